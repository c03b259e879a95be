"""Figures of samples themselves: a contact sheet of images, cards of texts, the most remarkable first."""

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from funcghost.errors import InputError
from funcghost.plots.drawings import FEW
from funcghost.plots.reading import Floats, Source, averages, less_their_steps, values_of

WIDTH, LINES = 62, 7
"""Characters of a line of a card, and its lines."""


def contact_sheet(
    images: Any,
    values: Source,
    captions: Sequence[str] | None = None,
    *,
    column: str | None = None,
    count: int = 24,
    columns: int = 8,
    smallest: bool = False,
) -> Figure:
    """The images of the largest values (of the smallest), each under its value.

    Args:
        images: [n, h, w], [n, 1, h, w] or [n, 3, h, w]; of colours, those from 0 to 1 are shown.
        values: [n], or the folder of a store whose ids are positions in `images`.
        captions: [n], what is said of each beside its value.
        column: which values of the store; the last column of values by default.
        count: how many are shown, at most.
        columns: how many beside each other.
        smallest: whether to show those of the smallest values.

    Raises:
        InputError: images have another form, or there are fewer of them than values.

    Example:
        >>> import torch
        >>> from funcghost import plots
        >>> sheet = plots.contact_sheet(torch.rand(3, 8, 8), [0.1, 0.3, 0.2], ["a", "b", "c"], count=2)
        >>> [axis.get_title().split()[0] for axis in sheet.axes[:2]]
        ['b', 'c']
    """
    held = images.detach().cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    if held.ndim == 4 and held.shape[1] in (1, 3):
        held = held[:, 0] if held.shape[1] == 1 else np.clip(np.moveaxis(held, 1, -1), 0, 1)
    elif held.ndim != 3:
        raise InputError(f"images: must be [n, h, w], [n, 1, h, w] or [n, 3, h, w], found {list(held.shape)}.")
    chosen, means = _chosen(values, column, len(held), count, smallest)
    said = _captions(captions, len(held))
    lines = max(1, -(-len(chosen) // columns))
    drawn = Figure(figsize=(9, 9 / columns * lines * 1.45))
    drawn.subplots_adjust(0.01, 0.01, 0.99, 1 - 0.3 / lines, 0.1, 0.45)
    axes = list(drawn.subplots(lines, columns, squeeze=False).flat)
    for axis in axes:
        axis.set_axis_off()
    for axis, row in zip(axes, chosen, strict=False):
        axis.imshow(held[row], cmap="gray", interpolation="nearest")
        axis.set_title(f"{said(row)}\n{means[row]:+.2e}", fontsize=8)
    return drawn


def text_cards(
    texts: Sequence[str],
    values: Source,
    captions: Sequence[str] | None = None,
    *,
    column: str | None = None,
    count: int = 6,
    smallest: bool = False,
) -> Figure:
    """The beginnings of the texts of the largest values (of the smallest), each a card with its value.

    Args:
        texts: [n].
        values: [n], or the folder of a store whose ids are positions in `texts`.
        captions: [n], what is said of each beside its value.
        column: which values of the store; the last column of values by default.
        count: how many are shown, at most.
        smallest: whether to show those of the smallest values.

    Raises:
        InputError: there are fewer texts than values, or captions are not one for each.

    Example:
        >>> from funcghost import plots
        >>> cards = plots.text_cards(["one text", "another"], [0.1, 0.3])
        >>> cards.axes[0].get_title(loc="left")
        '1  +3.00e-01'
    """
    chosen, means = _chosen(values, column, len(texts), count, smallest)
    said = _captions(captions, len(texts))
    lines = max(1, -(-len(chosen) // 2))
    drawn = Figure(figsize=(9, 0.4 + 1.6 * lines))
    drawn.subplots_adjust(0.01, 0.01, 0.99, 1 - 0.2 / lines, 0.05, 0.25)
    axes = list(drawn.subplots(lines, 2, squeeze=False).flat)
    for axis in axes:
        axis.set_axis_off()
    for axis, row in zip(axes, chosen, strict=False):
        colour = FEW[0] if means[row] < 0 else FEW[1]
        axis.axvline(0, color=colour, linewidth=4)
        axis.set(xlim=(0, 1), ylim=(0, 1))
        axis.set_title(f"{said(row)}  {means[row]:+.2e}", loc="left", fontsize=9, color=colour)
        shown = textwrap.wrap(_plain(texts[row]), WIDTH, max_lines=LINES, placeholder=" …")
        axis.text(0.03, 1.0, "\n".join(shown), va="top", fontsize=8, family="monospace", parse_math=False)
    return drawn


def _chosen(
    source: Source, column: str | None, size: int, count: int, smallest: bool
) -> tuple[list[int], dict[int, float]]:
    """The positions of the largest or smallest mean values, and these."""
    found = values_of(source, column=column)
    if not len(found.values):
        return [], {}
    items, place = np.unique(found.items, return_inverse=True)
    if items.dtype.kind not in "iu" or items.min() < 0 or items.max() >= size:
        raise InputError(
            f"values: those of a store must be of positions among the {size} samples, found ids from {items.min()!r} "
            f"to {items.max()!r}."
        )
    means: Floats = averages(place, less_their_steps(found))
    known = np.flatnonzero(~np.isnan(means))
    order = known[np.argsort(means[known] if smallest else -means[known], kind="stable")][:count]
    return [int(items[at]) for at in order], {int(items[at]): float(means[at]) for at in order}


def _captions(captions: Sequence[str] | None, size: int) -> Callable[[int], str]:
    if captions is None:
        return str
    if len(captions) != size:
        raise InputError(f"captions: must be one for each of {size} samples, found {len(captions)}.")
    return lambda row: captions[row]


def _plain(text: str) -> str:
    """A text that fonts can show."""
    return "".join(c if c.isprintable() or c.isspace() else " " for c in text[: 4 * WIDTH * LINES])
