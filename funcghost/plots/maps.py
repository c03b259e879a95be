"""Figures of a batch: its Gram matrix, cosines and spectrum; and of methods, what they find for what they cost."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from funcghost.errors import InputError
from funcghost.plots.drawings import FEW
from funcghost.plots.page import figure
from funcghost.plots.reading import Floats, array

MOST_LABELS = 40


def gram(products: Any, labels: Sequence[str] | None = None) -> Figure:
    """A Gram matrix [b, b] (`fg.gram`) by colour, from blue (opposed) over white to red; the samples as they come.

    Raises:
        InputError: it is not square, or labels are not one for each sample.

    Example:
        >>> from funcghost import plots
        >>> plots.gram([[2.0, -1.0], [-1.0, 1.0]]).axes[0].get_title(loc="left")
        'inner products of gradients'
    """
    return _map(_square(products, "gram"), labels, None, "inner products of gradients")


def cosine(products: Any, labels: Sequence[str] | None = None) -> Figure:
    """The cosines of the angles between gradients, from their Gram matrix [b, b]; gradients of zero are left blank.

    Raises:
        InputError: as of `gram`.

    Example:
        >>> from funcghost import plots
        >>> plots.cosine([[2.0, -1.0], [-1.0, 1.0]]).axes[0].get_title(loc="left")
        'cosines of gradients'
    """
    found = _square(products, "cosine")
    sizes = np.sqrt(np.diagonal(found))
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = found / np.outer(sizes, sizes)
    return _map(cosines, labels, 1.0, "cosines of gradients")


def spectrum(products: Any) -> Figure:
    """The spectrum of a batch: eigenvalues of its Gram matrix [b, b] as shares, and how many make up how much.

    The title says how many directions the batch fills, the exponential of the entropy of these shares
    (`geometry.effective_rank`).

    Raises:
        InputError: the matrix is not square, or has entries that are not finite.

    Example:
        >>> from funcghost import plots
        >>> plots.spectrum([[1.0, 0.0], [0.0, 1.0]]).axes[0].get_title(loc="left")
        'effective rank 2.0 of 2'
    """
    found = _square(products, "spectrum")
    if not np.isfinite(found).all():
        raise InputError("spectrum: the Gram matrix must be finite, found entries that are not.")
    values = np.maximum(np.linalg.eigvalsh((found + found.T) / 2)[::-1], 0.0)
    shares = values / values.sum() if values.sum() > 0 else values
    known = shares[shares > 0]
    rank = float(np.exp(-(known * np.log(known)).sum())) if len(known) else 0.0
    drawn, (axis, summed) = figure(columns=2)
    numbers = np.arange(1, len(shares) + 1)
    axis.plot(numbers, np.maximum(shares, 1e-16), ".-", color=FEW[0], linewidth=1)
    axis.set(xlabel="eigenvalue", ylabel="share", yscale="log")
    axis.set_title(f"effective rank {rank:.1f} of {len(shares)}", loc="left", fontsize=10)
    summed.plot(numbers, np.cumsum(shares), ".-", color=FEW[0], linewidth=1)
    summed.set(xlabel="the largest eigenvalues", ylabel="their share together", ylim=(0, 1.05))
    return drawn


def lds_against_cost(methods: Sequence[str], lds: Any, cost: Any, error: Any = None) -> Figure:
    """How well methods rank retrained models (`evaluation.lds`) against what they cost; up and left is better.

    Args:
        methods: [m], their names.
        lds: [m].
        cost: [m], above zero, in trainings or whatever they are compared in.
        error: [m], standard errors of `lds`.

    Raises:
        InputError: an array has another length, or a cost is not above zero.

    Example:
        >>> from funcghost import plots
        >>> plots.lds_against_cost(["dot", "EK-FAC"], [0.47, 0.7], [0.1, 0.4]).axes[0].get_ylabel()
        'LDS'
    """
    given = {"lds": lds, "cost": cost, "error": np.zeros(len(methods)) if error is None else error}
    found = {name: array(own, 1, name) for name, own in given.items()}
    for name, own in found.items():
        if len(own) != len(methods):
            raise InputError(f"lds_against_cost: {name} must be one for each of {len(methods)}, found {len(own)}.")
    if not (found["cost"] > 0).all():
        raise InputError(f"lds_against_cost: every cost must be above zero, found {found['cost'].tolist()}.")
    drawn, (axis,) = figure(height=4.4)
    for number, name in enumerate(methods):
        x, y, deviation = (found[key][number] for key in ("cost", "lds", "error"))
        axis.errorbar(x, y, deviation, fmt="o", color=FEW[number % len(FEW)], capsize=3)
        axis.annotate(f"{name}", (x, y), textcoords="offset points", xytext=(6, 6), fontsize=9)
    axis.set(xlabel="cost", ylabel="LDS", xscale="log")
    axis.margins(x=0.15, y=0.15)
    return drawn


def _square(products: Any, what: str) -> Floats:
    found = array(products, 2, what)
    if found.shape[0] != found.shape[1]:
        raise InputError(f"{what}: takes the Gram matrix [b, b] of a batch, found {list(found.shape)}.")
    return found


def _map(cells: Floats, labels: Sequence[str] | None, largest: float | None, title: str) -> Figure:
    if labels is not None and len(labels) != len(cells):
        raise InputError(f"labels: must be one for each of {len(cells)} samples, found {len(labels)}.")
    most = largest or float(np.nanmax(np.abs(cells), initial=0.0)) or 1.0
    drawn, (axis,) = figure(height=5.6)
    shown = axis.imshow(cells, cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")
    axis.spines[:].set_visible(False)
    if labels is not None and len(labels) <= MOST_LABELS:
        axis.set_xticks(range(len(labels)), list(labels), rotation=90, fontsize=7)
        axis.set_yticks(range(len(labels)), list(labels), fontsize=7)
    axis.set_title(title, loc="left", fontsize=10)
    drawn.colorbar(shown)
    return drawn
