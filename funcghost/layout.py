"""Which entries of an output belong to which sample: measured from two cotangents, never assumed.

The backward is linear in the cotangent of the losses. Scaling the cotangent of sample i by a power of two
scales exactly the entries of sample i of every output gradient, without rounding; so comparing two backward
passes over the same graph names the sample of every entry.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Fold = Literal["whole", "high", "low", "single"]
DIGITS = 8
"""Scales 2**-3 .. 2**4, few enough to stay clear of overflow in half precision."""


@dataclass(frozen=True)
class Layout:
    """The sample index of a tensor: an axis, or the high or low factor of one, or all of it (B = 1)."""

    axis: int
    fold: Fold = "whole"

    def by_sample(self, value: Tensor, batch: int) -> Tensor:
        """A view of shape [b, ...] with the samples in front."""
        if self.fold == "single":
            return value.unsqueeze(0)
        if self.fold == "whole":
            return value.movedim(self.axis, 0)
        inner = value.shape[self.axis] // batch
        high = self.fold == "high"
        split: Tensor = value.unflatten(self.axis, (batch, inner) if high else (inner, batch))
        return split.movedim(self.axis if high else self.axis + 1, 0)

    def fits(self, shape: torch.Size, batch: int) -> bool:
        """Whether a tensor of this shape can have this layout."""
        if self.fold == "single":
            return batch == 1
        if self.axis >= len(shape):
            return False
        size = shape[self.axis]
        return size == batch if self.fold == "whole" else size % batch == 0

    def __str__(self) -> str:
        if self.fold == "single":
            return "one sample"
        return f"axis {self.axis}" + ("" if self.fold == "whole" else f", {self.fold}")


def candidates(shape: torch.Size, batch: int) -> list[Layout]:
    """Every layout that the shape admits."""
    if batch == 1:
        return [Layout(0, "single")]
    whole = [Layout(axis) for axis, size in enumerate(shape) if size == batch]
    folded = [axis for axis, size in enumerate(shape) if size % batch == 0 and size > batch]
    folds: tuple[Fold, Fold] = ("high", "low")
    return [*whole, *(Layout(axis, fold) for axis in folded for fold in folds)]


def codes(batch: int, like: Tensor) -> list[Tensor]:
    """Cotangent scales [b] that tell all samples apart: powers of two, one base-8 digit of i in each."""
    index = torch.arange(batch, device=like.device)
    found: list[Tensor] = []
    while not found or int(DIGITS ** len(found)) < batch:
        digit = (index // DIGITS ** len(found)) % DIGITS
        found.append(torch.exp2(digit.to(like.dtype) - 3))
    return found


@dataclass
class Clock:
    """Which backward is running: the base (`code` is None) or one with the cotangents scaled by a code.

    Before it is started, backwards are those of the losses themselves.
    """

    batch: int = 0
    code: Tensor | None = None
    started: bool = True


class Meter:
    """Narrows down the layout of one output from the gradients of it that a few backward passes bring."""

    def __init__(self, clock: Clock) -> None:
        """Starts without any gradient."""
        self.clock = clock
        self.base: Tensor | None = None
        self.candidates: list[Layout] = []

    def see(self, gradient: Tensor) -> None:
        """Takes the gradient of the backward that is running."""
        if not self.clock.started:
            return
        if self.clock.code is None:
            self.base = gradient
            self.candidates = candidates(gradient.shape, self.clock.batch) if gradient.layout is torch.strided else []
        elif self.candidates:
            self.candidates = [c for c in self.candidates if self._agrees(c, gradient, self.clock.code)]

    def _agrees(self, layout: Layout, coded: Tensor, code: Tensor) -> bool:
        """Whether the coded gradient is the base gradient times the code of each entry's sample."""
        assert self.base is not None
        base, coded = (layout.by_sample(value, self.clock.batch) for value in (self.base, coded))
        return _proportional(_corner(base), _corner(coded), code) and _proportional(base, coded, code)

    def layout(self) -> Layout | Literal["unused"] | None:
        """The one layout left; "unused" if no gradient came; None where none or several fit."""
        if self.base is None:
            return "unused"
        silent = self.clock.batch > 1 and not bool(self.base.nan_to_num().any())
        return self.candidates[0] if len(self.candidates) == 1 and not silent else None


def _corner(rows: Tensor) -> Tensor:
    """A few entries of every sample: most layouts that do not fit are seen not to there."""
    for axis in range(1, rows.dim()):
        rows = rows.narrow(axis, 0, min(8, rows.shape[axis]))
    return rows


def _proportional(base: Tensor, coded: Tensor, code: Tensor) -> bool:
    """Whether `coded[i] = code[i] base[i]` for every sample; entries that are not finite say nothing."""
    expected = base.reshape(len(code), -1) * code.unsqueeze(-1).to(base.dtype)
    off = coded.reshape(len(code), -1) - expected
    # Exact up to the order of summation; half precision is held to float32, as the scales are exact there too.
    tolerance = 256 * torch.finfo(torch.promote_types(expected.dtype, torch.float32)).eps
    if not bool(off.isfinite().all()):
        unknown = ~expected.isfinite()
        off, expected = off.masked_fill(unknown, 0), expected.masked_fill(unknown, 0)
    wide = torch.complex128 if expected.is_complex() else torch.float64
    size, error = (torch.linalg.vector_norm(x, dim=1, dtype=wide) for x in (expected, off))
    return bool((error <= tolerance * size).all())
