"""Sharing out a budget: for each of several items one option, at the least total cost."""

from collections.abc import Sequence
from itertools import pairwise
from math import fsum, inf
from typing import NamedTuple


class Option(NamedTuple):
    """What an item costs, and what it then leaves over of the budget that all share."""

    cost: int
    residual: float


def allocate(curves: Sequence[Sequence[Option]], budget: float, names: Sequence[str]) -> list[int]:
    """For every item the index of its option, so that the residuals sum to the budget at most, at little total cost.

    Law: the result meets the budget if any does; every item's cost falls, or stays, as the budget grows; the order of
    the items does not matter if their names differ (ties go by name). The cost is the least there is where every step
    to the next option costs the same and residuals fall by less and less; elsewhere it is above that by less than one
    step along the lower convex hull of some item's options.

    Greedy: from the dearest options on, the steps that save the most cost per residual are taken back first. Cost:
    n log n for n options in all.
    """
    corners = [_hull(curve) for curve in curves]
    steps = []
    for item, (curve, hull) in enumerate(zip(curves, corners, strict=True)):
        slope = inf
        for place, (low, high) in enumerate(pairwise(hull)):
            gain = curve[low].residual - curve[high].residual
            # Rounding must not turn the steps of one item around.
            slope = min(slope, gain / (curve[high].cost - curve[low].cost))
            steps.append((slope, names[item], -place, item, low, high))
    chosen = [hull[-1] for hull in corners]
    total = fsum(curve[k].residual for curve, k in zip(curves, chosen, strict=True))
    for _, _, _, item, low, high in sorted(steps):
        curve = curves[item]
        after = total + (curve[low].residual - curve[high].residual)
        if after > budget:
            slack = max(budget - total, 0.0)
            chosen[item] = _cheapest(curve, curve[high].residual + slack)
            break
        total, chosen[item] = after, low
    return chosen


def _cheapest(curve: Sequence[Option], most: float) -> int:
    """The cheapest option that leaves at most this over."""
    fitting = (k for k, option in enumerate(curve) if option.residual <= most)
    return min(fitting, key=lambda k: (curve[k], k))


def _hull(curve: Sequence[Option]) -> list[int]:
    """The corners of the lower convex hull, from the cheapest option to the one that leaves least."""
    corners: list[int] = []
    for k in sorted(range(len(curve)), key=lambda k: (curve[k], k)):
        point = curve[k]
        if corners and point.residual >= curve[corners[-1]].residual:
            continue
        while len(corners) > 1 and _above(curve[corners[-2]], curve[corners[-1]], point):
            corners.pop()
        corners.append(k)
    return corners


def _above(first: Option, middle: Option, last: Option) -> bool:
    """Whether the middle lies above the line through the others, or on it."""
    whole, part = last.cost - first.cost, middle.cost - first.cost
    return (first.residual - middle.residual) * whole < (first.residual - last.residual) * part
