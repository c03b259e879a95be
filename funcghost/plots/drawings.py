"""Drawings of values: how they are distributed, and by group over time."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from funcghost.plots.page import figure

Floats = NDArray[Any]
FEW = ("#3b6ea5", "#c8442e", "#6f9e3f", "#8d6cab", "#c99a2e", "#4f9d9d", "#9a9a9a")
MOST_GROUPS = 24


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
