"""Figures of values: how they are distributed, over steps, by group, and what they add up to."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from funcghost.errors import InputError
from funcghost.plots.page import figure
from funcghost.plots.reading import Source, array, averages, largest_groups, less_their_steps, rows_of, values_of

Floats = NDArray[Any]
FEW = ("#3b6ea5", "#c8442e", "#6f9e3f", "#8d6cab", "#c99a2e", "#4f9d9d", "#9a9a9a")
MOST_POINTS = 200


def distribution(source: Source, *, column: str | None = None, group: str | None = None, groups: Any = None) -> Figure:
    """Histograms of the values of a store or of an array [n], by group where there are some.

    Raises:
        InputError: there is no such column, or an array has another length.

    Example:
        >>> from funcghost import plots
        >>> plots.distribution([0.1, -0.2, 0.3], groups=["a", "b", "a"]).axes[0].get_xlabel()
        'value'
    """
    found = values_of(source, column=column, group=group, groups=groups)
    names = largest_groups(found)[: len(FEW)]
    return distributions({name: found.values[rows_of(found, name)] for name in names}, found.column)


def distributions(values: Mapping[str, Floats], label: str, title: str = "") -> Figure:
    """Histograms of values by label, each as shares of its own; the outermost 1 % are in the last bins."""
    drawn, (axis,) = figure()
    everything = np.concatenate([*values.values(), np.zeros(0)])
    everything = everything[np.isfinite(everything)]
    low, high = np.quantile(everything, [0.005, 0.995]) if len(everything) else (0.0, 1.0)
    edges = np.linspace(low, high if high > low else low + 1.0, 50)
    for number, (name, own) in enumerate(values.items()):
        inside = np.clip(own[np.isfinite(own)], edges[0], edges[-1])
        shares = np.full(len(inside), 1 / max(len(inside), 1))
        colour, alpha = FEW[number % len(FEW)], 0.7 if len(values) <= 2 else 0.45
        axis.hist(inside, list(edges), weights=shares, alpha=alpha, color=colour, label=f"{name} ({len(inside)})")
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlabel(label)
    axis.set_ylabel("share")
    axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    if len(values) > 1:
        axis.legend(frameon=False, fontsize=8)
    return drawn


def over_steps(
    source: Source, *, column: str | None = None, group: str | None = None, steps: Any = None, groups: Any = None
) -> Figure:
    """Values over steps: the mean of each group, and where the middle nine tenths of all lie.

    Steps are put together where there are more than two hundred of them.

    Args:
        source: the folder of a record, or values [n] with their `steps` [n].
        column: which values of the record; the last column of values by default.
        group: a column of groups of the record.
        steps: [n], with values [n].
        groups: [n], names, with values [n].

    Raises:
        InputError: there is no such column, there are no steps, or an array has another length.

    Example:
        >>> from funcghost import plots
        >>> plots.over_steps([0.1, -0.2, 0.3], steps=[0, 1, 2]).axes[0].get_xlabel()
        'step'
    """
    found = values_of(source, column=column, group=group, steps=steps, groups=groups)
    if found.steps is None:
        raise InputError("over_steps: takes the record of a run, or values with their steps, found no steps.")
    drawn, (axis,) = figure()
    if len(found.steps):
        first, last = int(found.steps.min()), int(found.steps.max()) + 1
        bins = min(MOST_POINTS, last - first)
        place = (found.steps - first) * bins // (last - first)
        middles = first + (np.arange(bins) + 0.5) * (last - first) / bins - 0.5
        spread = np.full((bins, 2), np.nan)
        for at in np.unique(place):
            inside = found.values[(place == at) & np.isfinite(found.values)]
            spread[at] = np.quantile(inside, [0.05, 0.95]) if len(inside) else np.nan
        axis.fill_between(middles, *spread.T, color=FEW[-1], alpha=0.25, linewidth=0, label="middle 90 %")
        for number, name in enumerate(largest_groups(found)[: len(FEW)]):
            rows = rows_of(found, name)
            if rows.any():
                means = averages(place[rows], found.values[rows])
                label = f"mean of {name}"
                axis.plot(middles[: len(means)], means, ".-", color=FEW[number], linewidth=1, markersize=3, label=label)
        axis.legend(frameon=False, fontsize=8)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(xlabel="step", ylabel=found.column)
    return drawn


def by_group(source: Source, *, column: str | None = None, group: str | None = None, groups: Any = None) -> Figure:
    """How the values of each group lie: the middle half as a box, nine tenths as a line; the groups by their median.

    The values of a record of a run are each less the mean of its step.

    Args:
        source: the folder of a store, or values [n] with their `groups` [n].
        column: which values of the store; the last column of values by default.
        group: a column of groups of the store.
        groups: [n], names, with values [n].

    Raises:
        InputError: there is no such column, there are no groups, or an array has another length.

    Example:
        >>> from funcghost import plots
        >>> plots.by_group([0.1, -0.2, 0.3], groups=["a", "b", "a"]).axes[0].get_xlabel()
        'value'
    """
    found = values_of(source, column=column, group=group, groups=groups)
    if found.groups is None:
        raise InputError("by_group: takes a store with the name of a column, group=, or values with groups=.")
    own = less_their_steps(found)
    parts = {name: own[rows] for name in largest_groups(found) if (rows := rows_of(found, name)).any()}
    names = sorted(parts, key=lambda name: float(np.median(parts[name])))
    drawn, (axis,) = figure(height=1.0 + 0.3 * max(len(names), 3))
    if names:
        boxes: dict[str, Any] = {"patch_artist": True, "boxprops": {"facecolor": "#3b6ea580", "edgecolor": FEW[0]}}
        lines: dict[str, Any] = {name: {"color": FEW[0]} for name in ("whiskerprops", "capprops")}
        lines["medianprops"] = {"color": FEW[1]}
        own_values = [parts[name] for name in names]
        axis.boxplot(own_values, orientation="horizontal", whis=(5, 95), showfliers=False, **boxes, **lines)
        axis.set_yticks(range(1, len(names) + 1), [f"{name} ({len(parts[name])})" for name in names])
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel(found.column + ("" if found.steps is None else ", less its step's mean"))
    return drawn


def by_group_over_time(edges: Floats, groups: Sequence[str], cells: Floats, label: str) -> Figure:
    """Mean values [groups, bins] by colour, from blue (negative) to red; groups without any are left out."""
    drawn, (axis,) = figure(height=4.4)
    rows = [row for row in range(len(groups)) if np.isfinite(cells[row]).any()]
    shown = cells[rows]
    largest = float(np.nanmax(np.abs(shown), initial=0.0)) or 1.0
    known = np.abs(shown[np.isfinite(shown)])
    norm = SymLogNorm(
        linthresh=(float(np.median(known)) if len(known) else 0.0) or largest, vmin=-largest, vmax=largest
    )
    grid = axis.pcolormesh(edges, np.arange(len(rows) + 1), shown, cmap="RdBu_r", norm=norm)
    axis.set_yticks(np.arange(len(rows)) + 0.5, [groups[row] for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel("step")
    drawn.colorbar(grid, label=label)
    return drawn


def account(values: Any, rest: Any, change: Any, steps: Any = None) -> Figure:
    """The account of the validation loss: what values and rests of steps add up to, beside the change that was made.

    Args:
        values: [s], the sum of the values of each step, `out.values.sum()` of `in_run.along_path`.
        rest: [s], what momentum and decay did in each, `out.rest`.
        change: [s], what the step really did, `out.change`.
        steps: [s], their numbers; 0, 1, .. by default.

    Raises:
        InputError: an array has another length.

    Example:
        >>> from funcghost import plots
        >>> plots.account([-0.3, -0.2], [0.1, 0.0], [-0.2, -0.21]).axes[1].get_ylabel()
        'off the change of the step'
    """
    given = {"values": values, "rest": rest, "change": change}
    found = {name: array(own, 1, name) for name, own in given.items()}
    numbers = np.arange(len(found["values"])) if steps is None else array(steps, 1, "steps")
    for name, own in {**found, "steps": numbers}.items():
        if len(own) != len(found["values"]):
            raise InputError(f"account: {name} must be one for each of {len(found['values'])} steps, found {len(own)}.")
    drawn, (stacked, errors) = figure(columns=2)
    of_samples, with_rest = np.cumsum(found["values"]), np.cumsum(found["values"] + found["rest"])
    stacked.fill_between(numbers, 0, of_samples, color=FEW[0], alpha=0.6, label="values")
    stacked.fill_between(numbers, of_samples, with_rest, color=FEW[-1], alpha=0.6, label="rest")
    stacked.plot(numbers, np.cumsum(found["change"]), color="black", linewidth=1, label="change")
    stacked.set(xlabel="step", ylabel="validation loss, added up")
    off = np.abs(found["values"] + found["rest"] - found["change"])
    relative = off / np.maximum(np.abs(found["change"]), np.finfo(float).tiny)
    errors.plot(numbers, np.maximum(relative, 1e-12), ".", color=FEW[0], markersize=4, label="values + rest")
    errors.set(xlabel="step", ylabel="off the change of the step", yscale="log")
    drawn.legend(loc="outside upper left", ncols=6, frameon=False)
    return drawn
