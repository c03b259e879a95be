"""How the validation direction is kept between steps (cached, averaged, of low rank), and what that costs in scores."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import funcghost as fg
from lm_model import Batch, Tree
from lm_scores import Floats

ROUNDING = 1e-5


@dataclass(frozen=True)
class Keeping:
    """A way to keep the direction `P * V`, with V from validation gradients and the scale P of the present step.

        V' = decay * V + (1 - decay) * gradient      every `refresh` steps; V between them
        scored: P * V, or `fg.compress` of it to this `rank` if that is not 0

    A refresh costs a forward and a backward on the validation windows. An average forgets the noise of gradients taken
    on few windows; of gradients on all of them, as in this example, it only makes the direction older.
    """

    refresh: int = 1
    decay: float = 0.0
    rank: int = 0

    def __str__(self) -> str:
        often = "every step" if self.refresh == 1 else f"every {self.refresh} steps"
        averaged = [f"averaged by {self.decay:g}"] if self.decay else []
        return ", ".join([often, *averaged, *([f"rank {self.rank}"] if self.rank else [])])

    def due(self, step: int) -> bool:
        """Whether this step takes a validation gradient."""
        return step % self.refresh == 0

    def renew(self, step: int, kept: Tree, fresh: Tree) -> Tree:
        """V at this step, from V before it and the validation gradient of this step; the first is taken as it is."""
        if not self.due(step):
            return kept
        if step == 0 or not self.decay:
            return fresh
        return {name: torch.lerp(gradient, kept[name], self.decay) for name, gradient in fresh.items()}

    def narrow(self, direction: Tree) -> Tree:
        """The direction, of low rank if this way says so."""
        return fg.compress(direction, rank=self.rank) if self.rank else direction


BESIDE = (Keeping(4), Keeping(16), Keeping(4, decay=0.5))
LOW_RANK = (Keeping(rank=16), Keeping(rank=32))


class Comparison(NamedTuple):
    """First-order scores of a batch along a kept direction against those along the fresh gradient, not compressed.

    `correlation` is Spearman's; `error` and `bound` are norms over the batch relative to that of the fresh scores, of
    the difference and of the certified bound on what compression changed. `used` is the largest share of a sample's
    bound that compression did change; both are 0 where nothing is compressed.
    """

    step: int
    name: str
    correlation: float
    error: float
    bound: float
    used: float


def compare(
    score: Callable[[Tree, Batch, Any], Any],
    params: Tree,
    batch: Batch,
    scale: Tree,
    fresh: Tree,
    kept: Sequence[tuple[Keeping, Tree]],
    step: int,
) -> list[Comparison]:
    """One pass over the batch along all directions: the kept ones, and the fresh one at the ranks of `LOW_RANK`.

    `scale` are the entries that the update's Jacobian has on its diagonal, averaged: AdamW's go by themselves.
    """
    columns = [{name: scale[name] * leaf for name, leaf in tree.items()} for tree in (fresh, *(v for _, v in kept))]
    tries = [*((way, 1 + place) for place, (way, _) in enumerate(kept)), *((way, 0) for way in LOW_RANK)]
    places: list[int] = []
    for way, dense in tries:
        places.append(len(columns) if way.rank else dense)
        columns += [way.narrow(columns[dense])] if way.rank else []
    scores, bounds = score(params, batch, fg.dot(fg.stack(columns), with_bound=True))
    found = []
    for (way, dense), place in zip(tries, places, strict=True):
        found.append(_against(step, str(way), scores[:, 0], scores[:, dense], scores[:, place], bounds[:, place]))
    return found


def _against(step: int, name: str, fresh: Tensor, dense: Tensor, scores: Tensor, bound: Tensor) -> Comparison:
    size = fresh.norm().clamp_min(torch.finfo(fresh.dtype).tiny)
    # The scores themselves are rounded, on top of the bound.
    allowed = bound + (ROUNDING * dense.abs().max()).clamp_min(torch.finfo(fresh.dtype).tiny)
    return Comparison(
        step,
        name,
        correlation=spearman(scores.double().numpy(), fresh.double().numpy()),
        error=float((scores - fresh).norm() / size),
        bound=float(bound.norm() / size),
        used=float(((scores - dense).abs() / allowed).max()),
    )


def spearman(one: Floats, other: Floats) -> float:
    """The rank correlation of two rows of numbers, 1 for the same order; ties are ranked in the order they come."""
    ranks = [np.argsort(np.argsort(values, kind="stable")) for values in (one, other)]
    count = len(one)
    return float(1 - 6 * np.square(ranks[0] - ranks[1]).sum() / (count * (count**2 - 1)))


class Cost(NamedTuple):
    """What a way costs: mean and lowest rank correlation, medians of error and bound, and the most of a bound used."""

    correlation: float
    lowest: float
    error: float
    bound: float
    used: float


def costs_of(comparisons: Sequence[Comparison]) -> dict[str, Cost]:
    """The costs by way, in the order of the comparisons; empty before the first."""
    rows: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        rows.setdefault(comparison.name, []).append(comparison)
    return {
        name: Cost(
            correlation=statistics.fmean(row.correlation for row in found),
            lowest=min(row.correlation for row in found),
            error=statistics.median(row.error for row in found),
            bound=statistics.median(row.bound for row in found),
            used=max(row.used for row in found),
        )
        for name, found in rows.items()
    }
