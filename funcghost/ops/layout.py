"""Which entries of an output belong to which sample: measured from two cotangents, never assumed.

The backward is linear in the cotangent of the losses. Scaling the cotangent of sample i by a power of two
scales exactly the entries of sample i of every output gradient, without rounding; so comparing two backward
passes over the same graph names the sample of every entry.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from funcghost.trees import gathered

Fold = Literal["whole", "high", "low", "single"]
DIGITS, HALF_DIGITS = 64, 8
"""Scales 2**-31 .. 2**32, or 2**-3 .. 2**4, few enough to stay clear of overflow in half precision."""


PIECE = 2**16
"""How many entries are compared at once, in memory that stays in the cache."""


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
            return value.movedim(self.axis, 0) if self.axis else value
        inner = value.shape[self.axis] // batch
        high = self.fold == "high"
        split: Tensor = value.unflatten(self.axis, (batch, inner) if high else (inner, batch))
        return split.movedim(self.axis if high else self.axis + 1, 0)

    def sum(self, values: Tensor, like: Tensor) -> Tensor:
        """The sum of each sample's entries, [b], in the dtype of `like` [b, ...]."""
        return self.by_sample(values, len(like)).reshape(len(like), -1).sum(1, dtype=like.dtype)

    def numbers(self, shape: Sequence[int], batch: int, device: torch.device) -> Tensor:
        """The sample of every entry of a tensor of this shape, from 0, as numbers that ops compute with."""
        if self.fold == "single":
            return torch.zeros((), dtype=torch.float64, device=device).expand(tuple(shape))
        samples = torch.arange(batch, dtype=torch.float64, device=device)
        if self.fold == "high":
            samples = samples.repeat_interleave(shape[self.axis] // batch)
        elif self.fold == "low":
            samples = samples.repeat(shape[self.axis] // batch)
        return spread(samples, self.axis, shape)

    def fits(self, shape: Sequence[int], batch: int) -> bool:
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


@dataclass(frozen=True)
class Rows:
    """The samples are those of the rows of an axis, which an op has moved by the values of data.

    `call` and `output` number the op, see `funcghost.ops.moves`.
    """

    axis: int
    call: int
    output: int = 0

    def __str__(self) -> str:
        return f"rows of axis {self.axis}"


@dataclass(frozen=True, eq=False)
class Placed:
    """Such rows in one run: `samples` is the sample of each."""

    axis: int
    samples: Tensor

    def sum(self, values: Tensor, like: Tensor) -> Tensor:
        """The sum of each sample's entries, [b], in the dtype of `like` [b, ...]."""
        rows = values.movedim(self.axis, 0).unsqueeze(-1).flatten(1).sum(1, dtype=like.dtype)
        return like.new_zeros(len(like)).index_add(0, self.samples, rows)


def spread(rows: Tensor, axis: int, shape: Sequence[int]) -> Tensor:
    """One value for each index of an axis, in every entry of a shape."""
    return rows.view([-1 if i == axis else 1 for i in range(len(shape))]).expand(tuple(shape))


def candidates(shape: Sequence[int], batch: int) -> list[Layout]:
    """Every layout that the shape admits."""
    if batch == 1:
        return [Layout(0, "single")]
    whole = [Layout(axis) for axis, size in enumerate(shape) if size == batch]
    folded = [axis for axis, size in enumerate(shape) if size % batch == 0 and size > batch]
    folds: tuple[Fold, Fold] = ("high", "low")
    return [*whole, *(Layout(axis, fold) for axis in folded for fold in folds)]


def codes(batch: int, like: Tensor, *, half: bool = False) -> list[Tensor]:
    """Cotangent scales [b] that tell all samples apart: powers of two, one digit of i in each.

    `half`: on the way to what they scale there are numbers in half precision.
    """
    index = torch.arange(batch, device=like.device)
    digits = HALF_DIGITS if half or like.dtype == torch.float16 else DIGITS
    found: list[Tensor] = []
    while not found or int(digits ** len(found)) < batch:
        digit = (index // digits ** len(found)) % digits
        found.append(torch.exp2(digit.to(like.dtype) - (digits // 2 - 1)))
    return found


@dataclass
class Clock:
    """Which backward is running: the base (`code` is None) or one with the cotangents scaled by a code.

    Before it is started, backwards are those of the losses themselves. The `true` one takes no derivative anywhere but
    at the values that came; nothing is measured by it.
    """

    batch: int = 0
    code: Tensor | None = None
    started: bool = True
    true: bool = False


class Meter:
    """Finds the layout of one output from the gradients of it that a few backward passes bring.

    It keeps these unless it is not `wanted`: they take as much memory as all that autograd keeps.
    """

    def __init__(self, clock: Clock, shape: Sequence[int] | None = None) -> None:
        """Starts without any gradient, for an output of this shape, if it is known."""
        self.clock, self.shape = clock, shape
        self.wanted = True
        self.base: Tensor | None = None
        self.coded: list[tuple[Tensor, Tensor]] = []

    def see(self, gradient: Tensor | None) -> None:
        """Takes the gradient of the backward that is running."""
        if not self.wanted or not self.clock.started or self.clock.true or gradient is None:
            return
        gradient = gathered(gradient)
        if self.clock.code is None:
            self.base, self.coded = gradient, []
        else:
            self.coded.append((self.clock.code, gradient))

    @property
    def likely(self) -> bool:
        """Whether the samples are an axis, by the shape."""
        return self.shape is None or self.clock.batch == 1 or self.clock.batch in self.shape

    @cached_property
    def layout(self) -> Layout | Literal["unused"] | None:
        """The one layout that agrees; "unused" if no gradient came; None where none or several agree."""
        assert self.wanted
        if self.base is None:
            return "unused"
        if self.base.layout is not torch.strided or self.silent or (self.clock.batch > 1 and not self.coded):
            return None
        found = candidates(self.base.shape, self.clock.batch)
        for part in (_corner, _whole):
            found = [layout for layout in found if self._agrees(layout, part)]
        return found[0] if len(found) == 1 else None

    @cached_property
    def silent(self) -> bool:
        """Whether the gradient says nothing."""
        if self.base is None or self.clock.batch == 1:
            return self.base is None
        parts = (_corner(self.base.unsqueeze(0)), self.base) if self.base.layout is torch.strided else (self.base,)
        return not any(bool(part.nan_to_num().any()) for part in parts)

    def in_rows(self, samples: Tensor) -> int | None:
        """The axis whose rows belong to these samples, if there is one."""
        if self.base is None or self.base.layout is not torch.strided or self.silent or not self.coded:
            return None
        for axis, size in enumerate(self.base.shape):
            if size == len(samples) and all(
                _proportional(self.base.movedim(axis, 0), coded.movedim(axis, 0), code[samples.long()])
                for code, coded in self.coded
            ):
                return axis
        return None

    def _agrees(self, layout: Layout, part: Callable[[Tensor], Tensor]) -> bool:
        """Whether each coded gradient is the base gradient times the code of each entry's sample, in a part of it."""
        assert self.base is not None
        rows = part(layout.by_sample(self.base, self.clock.batch))
        return all(
            _proportional(rows, part(layout.by_sample(coded, self.clock.batch)), code) for code, coded in self.coded
        )


def _whole(rows: Tensor) -> Tensor:
    return rows


def _corner(rows: Tensor) -> Tensor:
    """A few entries of every row: most layouts that do not fit are seen not to there."""
    for axis in range(1, rows.dim()):
        rows = rows.narrow(axis, 0, min(8, rows.shape[axis]))
    return rows


def _proportional(base: Tensor, coded: Tensor, code: Tensor) -> bool:
    """Whether `coded[i] = code[i] base[i]` for every sample; entries that are not finite say nothing."""
    if base.numel() > PIECE and len(base) > 1:
        rows = max(1, PIECE * len(base) // base.numel())
        parts = zip(base.split(rows), coded.split(rows), code.split(rows), strict=True)
        return all(_proportional(*part) for part in parts)
    expected = base * code.to(base.dtype).view(-1, *[1] * (base.dim() - 1))
    if torch.equal(coded, expected):
        return True
    off = coded - expected
    size, error = _largest(expected), _largest(off)
    if not bool(error.isfinite().all()):
        unknown = ~off.isfinite()
        size, error = _largest(expected.masked_fill(unknown, 0)), _largest(off.masked_fill(unknown, 0))
    # Exact up to the order of summation; half precision is held to float32, as the scales are exact there too.
    tolerance = 256 * torch.finfo(torch.promote_types(expected.dtype, torch.float32)).eps
    nothing = 256 * torch.finfo(expected.dtype).tiny * torch.finfo(expected.dtype).eps  # subnormal numbers are rounded
    return bool((error <= tolerance * size + nothing).all())


def _largest(rows: Tensor) -> Tensor:
    """The size of the largest entry of each row."""
    if not rows.numel():
        return rows.new_zeros(len(rows))
    axes = tuple(range(1, rows.dim() + 1))
    rows = (rows.abs() if rows.is_complex() else rows).unsqueeze(-1)
    return torch.maximum(rows.amax(axes), -rows.amin(axes))
