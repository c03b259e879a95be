"""Ops at values of no meaning: what an op does with the samples, whatever the data.

Whether samples mix may hang on values: a mask, a matrix that pools rows, a weight that is zero at first, a hinge that
is not active yet. A layout measured at such values would not hold later. So while a plan is made, the derivative of
every op is taken at drawn values of the same size, in place of those that come; its outputs are the true ones.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import log2, prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from funcghost.laws.draws import PERIOD, repeated
from funcghost.ops.call import Call, Outputs, is_float, is_operand, physical
from funcghost.ops.families.products import FACTORS
from funcghost.ops.families.tables import OVERWRITES
from funcghost.ops.meter import Clock
from funcghost.ops.moves import REARRANGE
from funcghost.ops.tangent import is_linear, is_multilinear
from funcghost.planning.elsewhere import Back, evaluated
from funcghost.trees import is_distributed

FEW = 1024
"""Of so few entries, all may happen to lie where an op is constant: there more derivatives are taken, and averaged."""
POOLS = (3, 9)
"""How many periods of numbers are kept, for tensors of rows that fit into few of them and for others."""
MANY = 2**18
"""Ops of more entries than these keep nothing at the drawn values: they are run once more in every backward."""
FAR = 64.0
"""Entries larger by this than one, or smaller, may all lie where an op is constant, however many there are."""
TRUE, DRAWN = 0.73, (1.0, 0.61, 0.37)
"""The weights of the true derivative and of those at the drawn values, so odd that they do not cancel."""

DOUBLE = (torch.float64, torch.complex128)
LARGEST = 2.0**1023


@dataclass(frozen=True)
class Scale:
    """The size of a tensor's entries on average, and the largest if there is no negative one."""

    mean: float
    largest: float | None


class Generic:
    """Takes the derivatives of ops at drawn values."""

    def __init__(self, clock: Clock) -> None:
        """Draws once for all. The clock says when the true derivatives are to be taken after all."""
        self.clock = clock
        self.normal = torch.randn(PERIOD, generator=torch.Generator().manual_seed(0), device="cpu")
        self.farthest = float(self.normal.abs().max())
        self.pools: dict[Any, Tensor] = {}
        self.scales: dict[int, tuple[weakref.ref[Tensor], int, Scale]] = {}
        self.count = 0

    def outputs(self, call: Call, found: Outputs) -> Outputs:
        """What the call gave, with the derivative of the op at drawn values; as it is where that cannot be had.

        Its derivative is the same everywhere where the op is linear in all its tensors.
        """
        # 1. Nothing is drawn where the derivative is the same everywhere, or cannot be had.
        tensors = {slot: leaf for slot, leaf in enumerate(call.leaves) if is_operand(leaf)}
        if any(physical(leaf) is not leaf or is_distributed(leaf) for leaf in tensors.values()):
            return found
        if call.op in OVERWRITES:
            return self._as_if_kept(call, found)
        if call.op in REARRANGE or is_linear(call):
            return found
        # 2. What is varied, and how its entries are.
        varied = {
            slot: leaf
            for slot, leaf in tensors.items()
            if leaf.dtype == torch.bool or is_float(leaf) or call.op in FACTORS
        }
        scales = {slot: self._scale(leaf) for slot, leaf in varied.items()}
        few = all(leaf.numel() <= FEW for leaf in varied.values())
        far = any(scale.mean and not 1 / FAR < scale.mean < FAR for scale in scales.values())
        # 3. The op at drawn values: several times where all of them may lie where it is constant, once for a product,
        # whose derivative is that of a product everywhere.
        many = any(value.numel() > MANY for value in found) and not is_multilinear(call)
        like = {slot: _unfilled(leaf) for slot, leaf in varied.items()} if many else varied
        terms: list[tuple[float, Outputs]] = []
        for number, weight in enumerate(DRAWN[: 1 if is_multilinear(call) else 3 if few else 2 if far else 1]):
            values = partial(self._others, like, scales, number, self.count)
            terms += [(weight, drawn) for drawn in evaluated(call, found, varied, values, many)]
        # 4. At values near the true ones, where it takes no others.
        if not terms:
            near = {slot: self._near(leaf, slot) for slot, leaf in varied.items()}
            if not all(torch.equal(near[slot], leaf) for slot, leaf in varied.items()):
                terms = [(1.0, drawn) for drawn in evaluated(call, found, varied, lambda: near, many)]
        self.count += 2 * len(call.leaves)
        if not terms:
            return found
        # 5. The true values, with these derivatives.
        unwritten = len(found) - sum(is_float(call.leaves[slot]) for slot in call.written)
        return tuple(
            self._back(true, [(w, o[i]) for w, o in terms], i >= unwritten, true.numel() <= FEW)
            for i, true in enumerate(found)
        )

    def _scale(self, leaf: Tensor) -> Scale:
        """What a tensor's entries are like; many go into several ops."""
        known = self.scales.get(id(leaf))
        if known is not None and known[0]() is leaf and known[1] == leaf._version:
            return known[2]
        scale = scale_of(leaf.detach())
        if not leaf.is_inference():
            self.scales[id(leaf)] = weakref.ref(leaf), leaf._version, scale
        return scale

    def _as_if_kept(self, call: Call, found: Outputs) -> Outputs:
        """The derivative also of what was overwritten: data may say where, and another time leave all of it."""
        first, out = call.leaves[0], found[0]
        like = isinstance(first, Tensor) and (first.shape, first.dtype) == (out.shape, out.dtype)
        if len(found) > 1 or not like or not first.requires_grad:
            return found
        return (self._back(out, [(1.0, first)], bool(call.written), True),)

    def _back(self, true: Tensor, terms: Sequence[tuple[float, Tensor]], written: bool, among: bool) -> Tensor:
        """The true value with the weighted mean of derivatives; the true one is `among` them, if there are few entries.

        What was `written` to stays the same tensor, with another history.
        """
        if not true.requires_grad:
            return true
        weights = [TRUE if among else 0.0, *(weight for weight, _ in terms)]
        shares = [weight / sum(weights) for weight in weights]
        history = true.clone() if written else true
        value: Tensor = Back.apply(self.clock, shares, history, *(drawn for _, drawn in terms))
        if not written:
            return value
        with _unsafe_preserve_version_counter(true):  # whoever keeps it, keeps the same values
            return true.copy_(value)

    def _others(
        self, leaves: Mapping[int, Tensor], scales: Mapping[int, Scale], number: int, turn: int
    ) -> dict[int, Tensor]:
        return {
            slot: self._other(leaf, scales[slot], slot if number < 2 else slot + 1, number, turn)
            for slot, leaf in leaves.items()
        }

    def _other(self, leaf: Tensor, scale: Scale, place: int, number: int, turn: int) -> Tensor:
        """Of the size of the entries, 1/50 if those are zero, and positive if they are; for bools, of either kind.

        The second time of size 1 and the other sign or kind, the third time of size 1/8.
        """
        value, draw = _dense(leaf), partial(self._noise, turn=turn + place)
        sign = -1.0 if number == 1 else 1.0
        if value.dtype == torch.bool:
            return draw(value, sign, torch.float32) > 0
        if not is_float(value):
            return torch.where(value == 0, 1, value)
        size = (_rounded(1.25 * scale.mean) or 0.02, 1.0, 0.125)[number]
        largest = torch.finfo(value.dtype).max
        if scale.largest is not None:
            largest = scale.largest if number == 0 else max(scale.largest, 1.0)
            sign = 1.0
        noise = draw(value, sign * size, value.dtype, positive=scale.largest is not None)
        return _sparse(noise.clamp(-largest, largest) if size * self.farthest > largest else noise, leaf)

    def _near(self, leaf: Tensor, slot: int) -> Tensor:
        """Off by a quarter at most, for ops that do not take any values."""
        value = _dense(leaf)
        if not is_float(value):
            return torch.ones_like(value)
        return _sparse(
            value * (1 + self._noise(value, 1.0, value.dtype, turn=self.count + slot).clamp(-1, 1) / 4), leaf
        )

    def _noise(self, value: Tensor, size: float, dtype: torch.dtype, *, turn: int, positive: bool = False) -> Tensor:
        """Normal numbers of this size in the shape of a value, in memory that all share."""
        start = 8 * (501 * (turn + 1) % (PERIOD // 8))
        few, many = ((n, row_step(value.shape, n)) for n in POOLS)
        periods, step = few if few[1] >= min(8, *value.shape[-1:], value.numel()) else many
        key = value.device, dtype, size, positive, periods
        pool = self.pools.get(key)
        if pool is None:
            noise = self.normal.to(value.device, torch.float64 if dtype in DOUBLE else torch.float32) * size
            pool = self.pools[key] = (noise.abs() if positive else noise).to(dtype).repeat(periods)
        if not step:
            return repeated(pool[:PERIOD].roll(-start), value.shape)
        last = value.shape[-1] if value.dim() else 1
        rows = pool.as_strided((value.numel() // last, last), (step, 1), start) if value.numel() else pool[:0]
        return rows.view(value.shape)


def row_step(shape: Sequence[int], periods: int) -> int:
    """How far apart in memory the rows of a shape lie in so many periods of numbers; 0 if there is no room.

    The rows of large tensors overlap, each shifted against the others: by a multiple of eight where that can be, as
    kernels like it.
    """
    last = shape[-1] if shape else 1
    room, rows = (periods - 1) * PERIOD - last, prod(shape[:-1])
    if room < 0:
        return 0
    step = min(last, room // max(rows - 1, 1))
    return step - step % 8 if 8 < step < last else step


def scale_of(value: Tensor) -> Scale:
    """What the finite entries of a tensor are like."""
    if not is_float(value) or not value.numel():
        return Scale(0.0, None)
    some = _some(_dense(value)).resolve_conj().resolve_neg()
    wide = torch.complex128 if value.is_complex() else torch.float64
    # So few that calls of ops are what costs; a copy, since memory that NumPy has seen can no longer be resized.
    entries = some.to("cpu", wide, copy=True).numpy()
    entries = np.where(np.isfinite(entries), entries, 0)
    sizes = np.abs(entries)
    largest = float(sizes.max())
    mean = largest * float((sizes / largest).mean()) if largest else 0.0
    return Scale(mean, None if value.is_complex() or not largest or (entries < 0).any() else largest)


def _some(value: Tensor) -> Tensor:
    """Every so many entries of a large tensor."""
    step = max(1, round((value.numel() / FEW) ** (1 / max(1, value.dim()))))
    return value[tuple(slice(None, None, step) for _ in value.shape)]


def _rounded(size: float) -> float:
    """The nearest power of the root of two, so that many tensors share one size; zero for zero."""
    return 2.0 ** (round(2 * log2(min(size, LARGEST))) / 2) if size else 0.0


def _dense(leaf: Tensor) -> Tensor:
    return leaf.detach() if leaf.layout is torch.strided else leaf.detach().to_dense()


def _sparse(value: Tensor, leaf: Tensor) -> Tensor:
    """What is drawn for a leaf in its layout; one that is sparse has its zeros anywhere."""
    return value if leaf.layout is torch.strided else value.to_sparse(layout=leaf.layout)


def _unfilled(leaf: Tensor) -> Tensor:
    """What a floating tensor is but for its values, so that these are not kept."""
    plain = leaf.layout is torch.strided and (is_float(leaf) or leaf.dtype == torch.bool)
    return leaf.detach().new_empty(()).expand(leaf.shape) if plain else leaf.detach()
