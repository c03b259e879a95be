"""What a site contributes when the gradients `g` of its outputs come: by tangents, and by factors.

    by tangents   scores `<grad_i, V> = sum over the entries of sample i of (J V) * g`
    by factors    factors of the gradients of what went in, for the ledger; and scores of some V by these

A call's recipe is the terms of these two kinds that it takes, worked out once for all calls of one form. A term says
which tensors it `keeps` until the backward, and what it then `contributes`, in the same order.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from funcghost.algebra.contractions import along, along_many, in_dtype
from funcghost.algebra.directions import Leaf, LowRank, as_dense
from funcghost.algebra.factors import Outer
from funcghost.dtypes import wide_dtype
from funcghost.engine.ledger import Ledger
from funcghost.engine.positions import Positions
from funcghost.engine.shadows import Shadow
from funcghost.errors import MismatchError
from funcghost.ops.apart import Level, Passed, Use, Where
from funcghost.ops.call import Call, Outputs
from funcghost.ops.layout import Layout, Placed, Rows
from funcghost.ops.tangent import Pushforward
from funcghost.trees import gathered

Tangents = tuple[Leaf | None, ...]
"""One tangent per direction, None for zero; that of a parameter may be low-rank."""
Scores = dict[int, Tensor]
"""A contribution [b] to the scores in each direction, by its number."""

MANY = 3
"""So many directions, for samples of so many positions, are scored by the gradients: one product for all of them."""


class Wanted(NamedTuple):
    """What is wanted of a call, as far as its recipe depends on it.

    `chosen`: the numbers of the outputs that have a derivative.
    `layouts`: where the samples are in each of them; None where there is no gradient.
    `vmapped`: how many axes their cotangents have in front because of vmap.
    `kinds`: the types of the tangents, by tracked slot and direction.
    `collects`: whether factors are wanted of everything that went in.
    `apart`: the directions that are scored by position.
    `dtype`: what `J V` is computed in, if not in the dtype of its operands.
    """

    chosen: tuple[int, ...]
    layouts: tuple[Layout | Rows | None, ...]
    vmapped: int
    kinds: tuple[tuple[type, ...], ...]
    collects: bool
    apart: frozenset[int]
    dtype: torch.dtype | None


@dataclass(eq=False, slots=True)
class Tapped:
    """One tapped call in one run: its recipe, and what the terms need besides the tensors that they keep.

    `site`: its number and op.
    `terms`: the recipe.
    `ends`: where the tensors of each term end among all that are kept.
    `layouts`: where the samples are in each output.
    `batch`: the number of samples.
    `ready`: says whether backwards have come to those that count; before, they are those of the losses themselves.
    `around`: repeats in a backward what surrounded the forward.
    `tangents`: the directions that come in, by tracked slot.
    `targets`: the shadows of what is in each slot, if factors go to the ledger.
    `levels`: the vmapped axes of the tensors that are kept, the outermost first.
    `may_be_freed`: whether these may be freed, and come back, before the backward.
    """

    site: tuple[int, str]
    terms: "Sequence[Term]"
    ends: Sequence[int]
    layouts: Sequence[Where]
    batch: int
    ready: Callable[[], bool]
    around: Callable[[], AbstractContextManager[None]]
    tangents: Mapping[int, Tangents]
    targets: Mapping[int, Shadow]
    ledger: Ledger | None
    positions: Positions | None
    dtype: torch.dtype | None
    levels: tuple[Level, ...] = ()
    may_be_freed: bool = False

    def contribution(self, kept: Sequence[Tensor], gradients: Sequence[Tensor | None], probe: Tensor) -> Tensor | None:
        """The scores [b, k] of all terms together; None for zero."""
        if not self.ready() or not self._used(gradients):
            return None
        found, start = Scores(), 0
        for term, end in zip(self.terms, self.ends, strict=True):
            levels = tuple([level.of(start, end) for level in self.levels])
            for k, score in term.contribute(self, kept[start:end], levels, gradients, probe).items():
                found[k] = found[k].to(score.dtype) + score if k in found else score
            start = end
        if self.ledger is not None:
            self.ledger.passed(self.targets.values())
        if not found:
            return None
        if len(found) == probe.shape[1] == 1:
            return found[0].to(probe.dtype).unsqueeze(-1)
        if len(found) < probe.shape[1]:
            found = dict.fromkeys(range(probe.shape[1]), probe.new_zeros(len(probe))) | found
        return torch.stack([found[k].to(probe.dtype) for k in range(probe.shape[1])], -1)

    def _used(self, gradients: Sequence[Tensor | None]) -> bool:
        """Whether there is any gradient; none may come to an output that was not used."""
        there = [layout for g, layout in zip(gradients, self.layouts, strict=True) if g is not None]
        if any(layout == "unused" for layout in there):
            number, op = self.site
            raise MismatchError(
                f"site {number} ({op}): an output that the losses did not use when the plan was made is used."
            )
        return bool(there)


@dataclass(frozen=True, eq=False)
class ByTangents:
    """Scores in the directions `columns` by `J V` of the chosen outputs.

    `elsewhere`: the tangents, by slot and direction, that another term scores: here they are zero.
    """

    push: Pushforward
    columns: tuple[int, ...]
    elsewhere: frozenset[tuple[int, int]]
    wanted: Wanted

    def keeps(self, call: Call, tangents: Sequence[Tangents]) -> list[Tensor]:
        """What `J V` is computed from, and the tangents of each direction."""
        given = [tangent for k in self.columns for tangent in filled(call, tangents, k, self.elsewhere)]
        return [*(call.leaves[slot].detach() for slot in self.push.needed), *given]

    def contribute(
        self,
        tapped: Tapped,
        kept: Sequence[Tensor],
        levels: tuple[Level, ...],
        gradients: Sequence[Tensor | None],
        probe: Tensor,
    ) -> Scores:
        """The inner products of `J V` with the gradients."""

        def slopes(*tensors: Tensor) -> list[Outputs]:
            return self._slopes(tapped, tensors)

        for level in reversed(levels):
            slopes = _below(slopes, level)
        found = Scores()
        for k, slope in zip(self.columns, slopes(*kept), strict=True):
            known = [
                (output, value, g, layout)
                for output, (value, g, layout) in enumerate(zip(slope, gradients, tapped.layouts, strict=True))
                if g is not None and not isinstance(layout, str)
            ]
            if k in self.wanted.apart and tapped.positions is not None:
                products = {
                    output: layout.by_sample(terms_of(value, g), len(probe))
                    for output, value, g, layout in known
                    if isinstance(layout, Layout)
                }
                found[k] = tapped.positions.add(k, tapped.site[0], products, probe.dtype)
                continue
            ours = alone(slope, kept)
            parts = [inner(value, g, layout, probe, ours) for _, value, g, layout in known]
            found[k] = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
        return found

    def _slopes(self, tapped: Tapped, tensors: Sequence[Tensor]) -> list[Outputs]:
        """`J V` of the chosen outputs for each direction."""
        if self.wanted.dtype is not None:
            tensors = list(map(in_dtype(self.wanted.dtype), tensors))
        needed, count, chosen = len(self.push.needed), len(self.wanted.kinds), self.wanted.chosen
        own, found = tensors[:needed], list[Outputs]()
        for start in range(needed, len(tensors), count):
            with tapped.around():
                slope = self.push.evaluate(own, tensors[start : start + count])
            found.append(slope if len(slope) == len(chosen) else tuple([slope[i] for i in chosen]))
        return found


@dataclass(frozen=True, eq=False)
class ByFactors:
    """The factors of a use: for the ledger, and for scores of the tangents `scored`, by slot and direction."""

    use: Use
    scored: frozenset[tuple[int, int]]

    def keeps(self, call: Call, tangents: Sequence[Tangents]) -> list[Tensor]:
        """What the factors are made of."""
        return [call.leaves[slot].detach() for slot in self.use.needed]

    def contribute(
        self,
        tapped: Tapped,
        kept: Sequence[Tensor],
        levels: tuple[Level, ...],
        gradients: Sequence[Tensor | None],
        probe: Tensor,
    ) -> Scores:
        """Hands the factors to the ledger; gives the scores by them."""
        with tapped.around():
            factors = self.use.factors(Passed(kept, levels, gradients, tapped.layouts, tapped.batch))
        found = Scores()
        for slot, factor in zip(self.use.slots, factors, strict=True):
            columns = sorted(k for where, k in self.scored if where == slot)
            rounded = factor.map(in_dtype(tapped.dtype)) if columns and tapped.dtype is not None else factor
            leaves = {
                k: _rounded(leaf, tapped.dtype) for k in columns if (leaf := tapped.tangents[slot][k]) is not None
            }
            dense = {k: leaf for k, leaf in leaves.items() if isinstance(leaf, Tensor)}
            many = dict[int, Tensor]()
            if isinstance(rounded, Outer) and len(dense) >= MANY and rounded.positions >= MANY:
                many = dict(zip(dense, along_many(rounded, list(dense.values())), strict=True))
            for k, leaf in leaves.items():
                score = many[k] if k in many else along(rounded, leaf)
                found[k] = found[k] + score if k in found else score
            if tapped.ledger is not None and slot in tapped.targets:
                tapped.ledger.collect(tapped.targets[slot], factor)
        return found


def _rounded(leaf: Leaf, dtype: torch.dtype | None) -> Leaf:
    to = in_dtype(dtype)
    return replace(leaf, rows=to(leaf.rows), cols=to(leaf.cols)) if isinstance(leaf, LowRank) else to(gathered(leaf))


Term = ByTangents | ByFactors


def filled(
    call: Call, tangents: Sequence[Tangents], k: int, elsewhere: frozenset[tuple[int, int]] = frozenset()
) -> list[Tensor]:
    """The tangents of a call in one direction, with zeros where there are none, or they are scored elsewhere."""
    found = []
    for slot, known in zip(call.tracked, tangents, strict=True):
        leaf = None if (slot, k) in elsewhere else known[k]
        found.append(torch.zeros_like(call.leaves[slot]) if leaf is None else as_dense(leaf))
    return found


def inner(
    slope: Tensor,
    gradient: Tensor,
    layout: Layout | Placed,
    probe: Tensor,
    ours: bool = False,
) -> Tensor:
    """The inner product per sample [b] of two tensors of one layout, accumulated in the dtype of the probe.

    If the memory of the slope is `ours`, the product is written there.
    """
    if ours and slope.dtype == gradient.dtype == wide_dtype(slope.dtype) and slope.shape == gradient.shape:
        return layout.sum(slope.mul_(gradient), probe)
    return layout.sum(terms_of(slope, gradient), probe)


def terms_of(slope: Tensor, gradient: Tensor) -> Tensor:
    """The terms of their inner product, entry by entry."""
    product = slope.to(wide_dtype(slope.dtype)) * gradient.conj()
    return product.real if product.is_complex() else product


def alone(slopes: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether there is one slope, in memory that holds nothing else and that no other tensor shares."""
    if len(slopes) != 1 or type(slopes[0]) is not Tensor or slopes[0].is_complex() or not slopes[0].is_contiguous():
        return False
    memory = slopes[0].untyped_storage()
    own = memory._cdata
    return memory.nbytes() == slopes[0].nbytes and not any(
        other.untyped_storage()._cdata == own for other in others if other.layout is torch.strided
    )


def _below(slopes: Callable[..., list[Outputs]], level: Level) -> Callable[..., list[Outputs]]:
    """The slopes for every index of a vmapped axis, which comes in front; of length 1 where no tensor has it."""
    if level.has_any:
        return torch.func.vmap(slopes, in_dims=level.dims, randomness=level.randomness)
    return lambda *kept: [tuple(value.unsqueeze(0) for value in slope) for slope in slopes(*kept)]
