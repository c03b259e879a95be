"""Which rank for which leaf of a direction, the factors at that rank, and what they leave out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from funcghost.algebra.allocation import Option, allocate
from funcghost.algebra.sketch import Factors, leading_factors
from funcghost.dtypes import as_written

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
FIRST_SKETCH = 32
RETRIES = 8
PIECE = 1 << 22
"""Entries of a leaf that are in float64 at a time."""


class Cut(NamedTuple):
    """A leaf cut to a rank: `rows` [q, m, r], `cols` [q, n, r], and an upper bound on the norm of the rest, []."""

    rows: Tensor
    cols: Tensor
    residual: Tensor


class Blocks(NamedTuple):
    """A leaf seen as q matrices [m, n]."""

    q: int
    m: int
    n: int

    @property
    def unit(self) -> int:
        """What a rank costs."""
        return self.q * (self.m + self.n)

    @property
    def most(self) -> int:
        """The highest rank that is cheaper than the dense blocks."""
        return (self.q * self.m * self.n - 1) // self.unit


def _ways(leaf: Tensor) -> list[Blocks]:
    """The ways to see a leaf as blocks for which some rank is cheaper than the leaf itself."""
    if leaf.dim() < 2 or leaf.numel() == 0 or leaf.dtype not in DTYPES:
        return []
    ways = [Blocks(1, leaf.shape[0], math.prod(leaf.shape[1:]))]
    if leaf.dim() == 3 and leaf.shape[0] > 1:
        ways.append(Blocks(*leaf.shape))
    return [blocks for blocks in ways if blocks.most > 0]


@dataclass(eq=False)
class Matrices:
    """A leaf on its way: the exponent of its size, whether it is finite, and what was found of it."""

    name: str
    value: Tensor
    ways: list[Blocks] = field(init=False)
    exponent: int = field(init=False, default=0)
    finite: bool = field(init=False, default=True)
    spectra: dict[Blocks, Factors] = field(init=False, default_factory=dict)
    built: dict[tuple[Blocks, int], Cut | None] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.ways = _ways(self.value)
        if self.value.is_meta or not self.value.numel():
            return
        known = self.value if self.value.dtype in DTYPES else self.value.float()  # few ops take eight bits
        low, high = map(float, torch.aminmax(known))
        largest = max(-low, high) if math.isfinite(low) else low
        if not math.isfinite(largest):
            self.ways, self.finite = [], False
            return
        exponent = math.frexp(largest)[1]
        self.exponent = exponent + exponent % 2

    @cached_property
    def norm(self) -> float:
        """The norm of the leaf over 2^exponent; zero if it is not finite."""
        if self.value.is_meta or not self.value.numel() or not self.finite:
            return 0.0
        pieces = self.value.reshape(-1).split(PIECE)
        return math.hypot(*(float(torch.linalg.vector_norm(self._unit_sized(p.double()))) for p in pieces))

    def _unit_sized(self, value: Tensor) -> Tensor:
        return _times_power(value, -self.exponent)

    def _matrix(self, blocks: Blocks) -> Tensor:
        wide = torch.promote_types(self.value.dtype, torch.float32)
        return self._unit_sized(self.value.to(wide)).reshape(tuple(blocks))

    def factors(self, blocks: Blocks, rank: int) -> Factors:
        """The leading triples of the leaf over 2^exponent, kept; anew when more are asked for than are known."""
        kept = self.spectra.get(blocks)
        if kept is None or not (kept.complete or kept.known >= rank):
            seed = crc32(f"{self.name}/{blocks.q}".encode())
            with as_written(self.value.device):
                kept = self.spectra[blocks] = leading_factors(self._matrix(blocks), rank, seed)
        return kept

    def rest(self, blocks: Blocks, rank: int) -> float:
        """The norm of what these leave out."""
        with as_written(self.value.device):
            return self.factors(blocks, rank).rest(self._matrix(blocks))

    def cut(self, blocks: Blocks, rank: int) -> Cut | None:
        """The leaf at this rank with its residual, kept; None where the factors leave the range of the dtype."""
        key = blocks, rank
        if key not in self.built:
            left, values, right = self.factors(blocks, rank)[:3]
            weights = values[:, None, :rank].sqrt()
            half, dtype = self.exponent // 2, self.value.dtype
            rows, cols = (_times_power(side[..., :rank] * weights, half).to(dtype) for side in (left, right))
            residual = self._residual(blocks, rows, cols)
            self.built[key] = None if residual is None else Cut(rows, cols, residual)
        return self.built[key]

    def _residual(self, blocks: Blocks, rows: Tensor, cols: Tensor) -> Tensor | None:
        """An upper bound on `|V - rows cols^T|`, by the difference itself."""
        # Float64 has the range for squares of all but its own numbers.
        half, rank = self.exponent // 2 if self.value.dtype is torch.float64 else 0, rows.shape[2]
        R, C = (_times_power(side.double(), -half) for side in (rows, cols))
        value = self.value.reshape(tuple(blocks))
        step = max(1, PIECE // (blocks.q * blocks.n))
        norms = []
        for k in range(0, blocks.m, step):
            own = _times_power(value[:, k : k + step].double(), -2 * half)
            norms.append(torch.linalg.vector_norm(torch.baddbmm(own, R[:, k : k + step], C.mT, alpha=-1)))
        # A sum of a value and r terms is off by at most (r + 1) u (|value| + sum |terms|), whatever its order, and the
        # value is no larger than the sum and the terms together.
        terms = ((R.abs().mT @ R.abs()) * (C.abs().mT @ C.abs())).sum().sqrt()
        found = math.hypot(*map(float, norms)) + 2 * (rank + 2) * 2.0**-53 * float(terms)
        scale = 2.0**half
        found *= 1 + (self.value.numel() + rank + 8) * 2.0**-53
        return _rounded_up(found * scale * scale, found > 0, self.value)


def cut_to_rank(leaf: Matrices, rank: int) -> Cut | None:
    """The leaf at this rank in the cheaper of its ways, None where it is cheaper as it is."""
    fitting = [blocks for blocks in leaf.ways if rank <= blocks.most]
    if not fitting:
        return None
    blocks = min(fitting, key=lambda blocks: blocks.unit)
    if leaf.value.is_meta:
        new = leaf.value.new_empty
        wide = torch.promote_types(leaf.value.dtype, torch.float32)
        sides = new((blocks.q, blocks.m, rank)), new((blocks.q, blocks.n, rank))
        return Cut(*sides, new((), dtype=wide))
    return leaf.cut(blocks, rank)


def cut_within(leaves: Sequence[Matrices], rtol: float, cap: int | None) -> list[Cut | None]:
    """The leaves at ranks with which the residuals keep within the tolerance, None where they stay dense."""
    top = max((leaf.exponent for leaf in leaves if leaf.norm), default=0)
    total = math.hypot(*(math.ldexp(leaf.norm, leaf.exponent - top) for leaf in leaves if leaf.norm))
    allowed = min(rtol, 1.0) * total * (1 - 1e-12)
    places = [k for k, leaf in enumerate(leaves) if leaf.ways]
    matrices = [leaves[k] for k in places]
    found: list[Cut | None] = [None] * len(leaves)
    for attempt in range(RETRIES + 1):
        # Estimates come from singular values; where rounding makes the truth a little more, less may be dropped.
        share = 1 - (attempt / RETRIES) ** 2
        chosen, best = _choose(matrices, share * allowed**2, top, cap)
        small = [None if option is None else leaf.cut(*option) for leaf, option in zip(matrices, chosen, strict=True)]
        dropped = [math.ldexp(float(leaf.residual), -top) for leaf in small if leaf is not None]
        if best or math.hypot(*dropped) <= allowed:
            break
    for place, leaf in zip(places, small, strict=True):
        found[place] = leaf
    return found


Way = tuple[Blocks, int] | None
"""Blocks and a rank, or None: dense."""


def _choose(leaves: Sequence[Matrices], budget: float, top: int, cap: int | None) -> tuple[list[Way], bool]:
    """For every leaf its blocks and rank; and whether nothing more exact could have been chosen.

    A leaf whose choice reaches the end of what its sketch knows is sketched anew for twice the rank.
    """
    asked = {(leaf, blocks): _limit(blocks, cap, FIRST_SKETCH) for leaf in leaves for blocks in leaf.ways}
    while True:
        menus = [_options(leaf, {b: asked[leaf, b] for b in leaf.ways}, top, cap) for leaf in leaves]
        curves = [[option for _, option in menu] for menu in menus]
        picks = allocate(curves, budget, [leaf.name for leaf in leaves])
        more = False
        for leaf, curve, pick in zip(leaves, curves, picks, strict=True):
            for blocks in leaf.ways:
                rank = asked[leaf, blocks]
                if curve[pick].cost >= rank * blocks.unit and rank < _limit(blocks, cap):
                    asked[leaf, blocks], more = _limit(blocks, cap, 2 * rank), True
        if not more:
            best = all(
                curve[pick].residual <= min(option.residual for option in curve)
                for curve, pick in zip(curves, picks, strict=True)
            )
            return [menu[pick][0] for menu, pick in zip(menus, picks, strict=True)], best


def _limit(blocks: Blocks, *caps: int | None) -> int:
    return min([blocks.most, *(cap for cap in caps if cap is not None)])


def _options(leaf: Matrices, asked: Mapping[Blocks, int], top: int, cap: int | None) -> list[tuple[Way, Option]]:
    """What can be made of a leaf: cost, and the squared residual over 4^top as the singular values have it."""
    menu: list[tuple[Way, Option]] = []
    unit_roundoff = torch.finfo(leaf.value.dtype).eps / 2
    for blocks, rank in asked.items():
        factors = leaf.factors(blocks, rank)
        squares = factors.values.double().square().sum(0).cpu()
        kept = squares.cumsum(0)
        tail = torch.cat([squares[1:], squares.new_zeros(1)]).flip(0).cumsum(0).flip(0) + leaf.rest(blocks, rank) ** 2
        residuals = tail + unit_roundoff**2 * kept  # factors are rounded to the dtype of the leaf
        for r, residual in enumerate(residuals[:rank].tolist(), start=1):
            least = math.ulp(0.0) if residual else 0.0  # what is dropped is not nothing, however small the leaf
            scaled = max(math.ldexp(residual, 2 * (leaf.exponent - top)), least)
            menu.append(((blocks, r), Option(r * blocks.unit, scaled)))
    if cap is None or all(cap > blocks.most for blocks in leaf.ways):
        menu.append((None, Option(leaf.value.numel(), 0.0)))
    return menu


def _times_power(value: Tensor, exponent: int) -> Tensor:
    """`value * 2^exponent`, far off in two steps: one power may be out of range where the result is not."""
    if abs(exponent) < 100:
        return value * 2.0**exponent if exponent else value
    half = exponent // 2
    return value * 2.0**half * 2.0 ** (exponent - half)


def _rounded_up(value: float, positive: bool, like: Tensor) -> Tensor | None:
    """The number as a tensor, float32 at least, that is no smaller; None if there is none."""
    if positive:
        value = math.nextafter(value, math.inf)
    if not math.isfinite(value):
        return None
    found = torch.tensor(value, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    if float(found) < value:
        found = torch.nextafter(found, torch.full_like(found, math.inf))
    return found if math.isfinite(float(found)) else None
