"""Where the samples are in an output: measured from two cotangents, never assumed.

The backward is linear in the cotangent of the losses. Scaling the cotangent of sample i by a power of two
scales exactly the entries of sample i of every output gradient, without rounding; so comparing two backward
passes over the same graph names the sample of every entry. What is compared are the gradients' marginals: a gradient
that scales as a layout says has marginals that do, and one that does not has others, but for a choice of drawn numbers
of measure zero. No gradient is kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from math import isfinite, prod
from typing import Literal

import torch
from torch import Tensor

from funcghost.dtypes import wide_dtype
from funcghost.ops.layout import Layout, candidates
from funcghost.trees import gathered

DIGITS, HALF_DIGITS = 64, 8
"""Scales 2**-31 .. 2**32, or 2**-3 .. 2**4, few enough to stay clear of overflow in half precision."""

PIECE = 2**20
"""How many entries are read at once, in memory that stays in the cache."""
PERIOD = 65521
"""How many numbers are drawn; a prime, so that rows of a tensor are not alike."""


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
    at the values that came; nothing is measured by it. Where a gradient is seen to `overflow`, all is measured once
    more by gradients that meters `keep`: an entry that is not finite in either of two says nothing of both. Samples may
    be in `rows` that data have moved.
    """

    batch: int = 0
    code: Tensor | None = None
    started: bool = True
    true: bool = False
    overflow: bool = False
    keep: bool = False
    rows: bool = False


class Meter:
    """Finds the layout of one output from the marginals of the gradients that a few backward passes bring.

    It takes none unless it is `wanted`.
    """

    def __init__(self, clock: Clock, shape: Sequence[int] | None = None) -> None:
        """Starts without any gradient, for an output of this shape, if it is known."""
        self.clock, self.shape = clock, shape
        self.wanted = True
        self.base: Seen | None = None
        self.kept: Tensor | None = None
        self.coded: list[Coded] = []

    def see(self, gradient: Tensor | None) -> None:
        """Looks at the gradient of the backward that is running."""
        if not self.wanted or not self.clock.started or self.clock.true or gradient is None:
            return
        gradient = gathered(gradient)
        if self.clock.code is None:
            self.base, self.kept, self.coded = seen(gradient), gradient if self.clock.keep else None, []
            self.clock.overflow |= not self.base.finite
        elif self.base is not None and self.base.sums:
            base: Sequence[Tensor] = self.base.sums
            if self.kept is not None:
                both = self.kept.isfinite() & gradient.isfinite()
                base, gradient = marginals(self.kept.where(both, 0)), gradient.where(both, 0)
            own = Coded(self.clock.code, base, marginals(gradient))
            self.clock.overflow |= not all(bool(part.isfinite().all()) for part in own.sums)
            if self.clock.rows or not self._is_told_by(own):
                own = replace(own, sizes=sizes(gradient))
            self.coded.append(own)

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
        batch = self.clock.batch
        if not self.base.strided or self.silent or (batch > 1 and not self.coded):
            return None
        found = self._candidates
        if batch > 1:
            found = [layout for layout in found if all(self._scales(own, *self._along(layout)) for own in self.coded)]
        return found[0] if len(found) == 1 else None

    @cached_property
    def silent(self) -> bool:
        """Whether the gradient says nothing."""
        return self.base is None or (self.clock.batch > 1 and not self.base.largest)

    def in_rows(self, samples: Tensor) -> int | None:
        """The axis whose rows belong to these samples, if there is one."""
        if self.base is None or self.silent or not self.coded:
            return None
        for axis, size in enumerate(self.base.shape):
            if size == len(samples) and all(self._scales(own, axis, samples.long()) for own in self.coded):
                return axis
        return None

    @property
    def _candidates(self) -> list[Layout]:
        assert self.base is not None
        return candidates(self.base.shape, self.clock.batch)

    def _is_told_by(self, coded: "Coded") -> bool:
        """Whether a layout agrees exactly, or all are off by more than sizes, as large as they may be, allow."""
        assert self.base is not None
        off = [float(self._off(coded, *self._along(layout)).max()) for layout in self._candidates]
        largest = self.base.tolerance * self.base.largest * float(coded.code.max()) * prod(self.base.shape) ** 0.5
        return 0.0 in off or all(value > largest + self.base.nothing for value in off)

    def _off(self, coded: "Coded", axis: int, samples: Tensor) -> Tensor:
        """How far the marginals at each index of an axis are off those scaled by the code of its sample."""
        found, base = coded.sums[axis], coded.base[axis]
        return (found - base * coded.code[samples].to(base.dtype)).abs()

    def _along(self, layout: Layout) -> tuple[int, Tensor]:
        """The axis of a layout, and the sample at each index of it."""
        assert self.base is not None
        shape, device = self.base.shape[layout.axis : layout.axis + 1], self.base.sums[0].device
        return layout.axis, Layout(0, layout.fold).numbers(shape, self.clock.batch, device).long()

    def _scales(self, coded: "Coded", axis: int, samples: Tensor) -> bool:
        """Whether the entries at each index of an axis are scaled by the code of its sample."""
        assert self.base is not None
        off = self._off(coded, axis, samples)
        if not bool(off.any()):
            return True
        if not coded.sizes:
            return False
        # Exact up to the order of summation, and to where subnormal numbers are rounded. A wrong one is off by about
        # the size of what is added up.
        allowed = self.base.tolerance * coded.sizes[axis] + self.base.nothing
        return bool((off <= allowed).all())


@dataclass(frozen=True, eq=False)
class Coded:
    """The marginals of the base and of a gradient whose cotangents were scaled by a code, and sizes if need be."""

    code: Tensor
    base: Sequence[Tensor]
    sums: list[Tensor]
    sizes: Sequence[Tensor] = ()


@dataclass(frozen=True, eq=False)
class Seen:
    """What is kept of a gradient: its marginals `sums`, and how far off those of another may be.

    That is `tolerance`, relative to the size of what is added up, and `nothing` in any case.
    """

    shape: tuple[int, ...]
    strided: bool
    largest: float
    finite: bool = True
    sums: Sequence[Tensor] = ()
    tolerance: float = 0.0
    nothing: float = 0.0


def seen(gradient: Tensor) -> Seen:
    """What is kept of a gradient."""
    shape = tuple(gradient.shape)
    if gradient.layout is not torch.strided:
        return Seen(shape, False, float(gradient.nan_to_num().any()))
    if not gradient.numel():
        return Seen(shape, True, 0.0)
    largest = float(torch.linalg.vector_norm(gradient, torch.inf))
    finite = isfinite(largest)
    if not finite:
        largest = float(torch.linalg.vector_norm(gradient.nan_to_num(0, 0, 0), torch.inf))
    if not largest:
        return Seen(shape, True, 0.0)
    own, wide = torch.finfo(gradient.dtype), torch.finfo(wide_dtype(gradient.dtype))
    return Seen(
        shape,
        True,
        largest,
        finite,
        marginals(gradient),
        256 * wide.eps,  # half precision is held to float32, as the scales are exact there too
        256 * own.tiny * own.eps * gradient.numel() ** 0.5,
    )


def sizes(gradient: Tensor) -> list[Tensor]:
    """The sizes that the marginals of a gradient have if the signs of its entries are of no order."""
    largest = float(torch.linalg.vector_norm(gradient, torch.inf))
    parts = marginals(gradient, squares_over=largest or 1.0)
    return [part.sqrt() * largest for part in parts]


def marginals(value: Tensor, *, squares_over: float | None = None) -> list[Tensor]:
    """For each axis, one number per index: the sum of the entries there, each times the product of drawn numbers.

    With `squares_over`, the sums of the squares of the entries over that number.

    Cost: every entry is read twice, and memory for some `PIECE` of them.
    """

    def entries(piece: Tensor) -> Tensor:
        piece = piece.to(wide_dtype(piece.dtype))
        return piece if squares_over is None else (piece / squares_over).abs().square()

    order = sorted(range(value.dim()), key=value.stride, reverse=True)
    once = value[tuple(slice(0, 1) if step == 0 else slice(None) for step in value.stride())]
    rest, found = once.permute(order), list[Tensor]()
    if rest.dim() < 2:
        rest = entries(rest)
    while rest.dim() > 1:
        rows = rest.flatten(0, -2)
        across, last = None, list[Tensor]()
        for start, piece in _pieces(rows):
            piece = entries(piece) if not found else piece
            starts = start, 4001 * (1 + len(found))  # no two axes have the same numbers
            down, along = (
                _numbers(n, at, piece, squares_over is None) for n, at in zip(piece.shape, starts, strict=True)
            )
            across = down @ piece if across is None else across + down @ piece
            last.append(piece @ along)
        assert across is not None
        found.append(across)
        rest = torch.cat(last).view(rest.shape[:-1])
    placed = dict(zip(order, [rest, *reversed(found)], strict=False))
    return [placed[axis].expand(size) for axis, size in enumerate(value.shape)]


def _pieces(rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """So many rows at a time, with the number of the first."""
    count = max(1, PIECE // rows.shape[1])
    return zip(range(0, len(rows), count), rows.split(count), strict=True)


def _numbers(count: int, start: int, like: Tensor, drawn: bool) -> Tensor:
    """So many drawn numbers from a start, or ones."""
    if not drawn:
        return like.new_ones(count)
    found, start = _drawn(like.device, like.dtype), start % PERIOD
    if start + count > PERIOD:
        found = found.repeat((start + count) // PERIOD + 1)
    return found[start : start + count]


@cache
def _drawn(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Numbers of either sign, of size 1/2 to 3/2."""
    generator = torch.Generator().manual_seed(0)
    size = torch.rand(PERIOD, generator=generator, dtype=torch.float64, device="cpu") + 0.5
    sign = torch.randint(0, 2, (PERIOD,), generator=generator, device="cpu") * 2 - 1
    return (size * sign).to(device, dtype)
