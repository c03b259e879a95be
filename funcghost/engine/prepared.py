"""What a tap does at a call, apart from its tensors: worked out once for all calls of one form."""

from collections.abc import Callable
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcghost.algebra.contractions import in_dtype
from funcghost.algebra.directions import LowRank
from funcghost.engine.collector import Around
from funcghost.ops.layout import Layout
from funcghost.ops.products import Description
from funcghost.ops.tangent import Call, Outputs, Pushforward, Way, pushforward, remembered
from funcghost.ops.uses import Use, find_uses

Slopes = Callable[..., list[Outputs]]
"""`J V` for each direction, from what is `Around` each, the tensors it needs, and then the tangents of each."""


class Manner(NamedTuple):
    """What is wanted of a call: `kinds` are those of the tangents, by tracked slot and direction.

    Of its outputs, those `chosen` have the `layouts` (None where data says so); their cotangents have so many `vmapped`
    axes in front. `collects` says that factors are wanted of everything that went in, `apart` are the directions that
    are scored by position, and `J V` is computed in the `dtype`, if there is one.
    """

    chosen: tuple[int, ...]
    layouts: tuple[Layout | None, ...]
    vmapped: int
    kinds: tuple[tuple[type, ...], ...]
    collects: bool
    apart: frozenset[int]
    dtype: torch.dtype | None


class Prepared(NamedTuple):
    """What a tap does: `columns` are the directions scored by the `slopes`, which need the tensors in these slots.

    The `uses` need those in the slots `kept`; by their factors the leaves `factored` are scored (slot, column).
    """

    columns: tuple[int, ...]
    slopes: Slopes
    saved: tuple[int, ...]
    uses: tuple[Use, ...]
    kept: tuple[int, ...]
    factored: frozenset[tuple[int, int]]


def prepare(call: Call, manner: Manner, described: Description | None, push: Callable[[], Pushforward]) -> Prepared:
    """What to do at a call to whose `J V` this is the way."""
    factored, uses = _factored(call, manner, described)
    rest = [
        [kind is not NoneType and (slot, k) not in factored for k, kind in enumerate(kinds)]
        for slot, kinds in zip(call.tracked, manner.kinds, strict=True)
    ]
    columns = tuple([k for k, along in enumerate(zip(*rest, strict=True)) if any(along)])
    kept = tuple(slot for use in uses for slot in use.needed)
    if not columns:
        return Prepared((), _no_slopes, (), uses, kept, factored)
    pushed = push()
    return Prepared(columns, _slopes(pushed, len(call.tracked), manner), pushed.needed, uses, kept, factored)


@remembered
def prepared(call: Call, manner: Manner, described: Description | None, way: Way) -> Prepared:
    """As `prepare`, for one of the ways to `J V`."""
    return prepare(call, manner, described, lambda: pushforward(call, way))


def tried(call: Call, manner: Manner, described: Description | None, push: Pushforward) -> Prepared:
    """As `prepare`, while the way is tried: where factors score, `push` sees what it would take by shapes alone."""
    found = prepare(call, manner, described, lambda: push)
    if found.factored and not found.columns:
        blank = {slot: torch.empty_like(call.leaves[slot], device="meta") for slot in (*push.needed, *call.tracked)}
        push.evaluate([blank[slot] for slot in push.needed], [blank[slot] for slot in call.tracked])
    return found


def _factored(
    call: Call, manner: Manner, described: Description | None
) -> tuple[frozenset[tuple[int, int]], tuple[Use, ...]]:
    """The leaves of directions (slot and column) that are scored by factors, and the uses wanted.

    Low-rank ones are, where factors are had without a derivative for each sample. Of others, those of a product whose
    output is larger than what the parameter meets: `g V` takes less memory than `J V`, at the same FLOPs.
    """
    kinds = [
        {slot: kind for slot, kind in zip(call.tracked, along, strict=True) if kind is not NoneType}
        for along in zip(*manner.kinds, strict=True)
    ]
    low = [any(issubclass(kind, LowRank) for kind in along.values()) for along in kinds]
    if not manner.collects and (manner.vmapped or described is None) and not any(low):
        return frozenset(), ()
    uses = find_uses(call, described, manner.layouts, manner.chosen, manner.vmapped)
    cheap = {slot for use in uses if use.by_product for slot in use.slots}
    smaller = {slot for use in uses if use.smaller and not manner.vmapped for slot in use.slots}
    found = frozenset(
        (slot, k)
        for k, along in enumerate(kinds)
        if k not in manner.apart and (low[k] or (cheap.issuperset(along) and not smaller.isdisjoint(along)))
        for slot in along
        if slot in cheap
    )
    wanted = set(call.tracked) if manner.collects else {slot for slot, _ in found}
    return found, tuple(use for use in uses if not wanted.isdisjoint(use.slots))


def _slopes(push: Pushforward, count: int, manner: Manner) -> Slopes:
    """`J V` of the chosen outputs, from the tensors that `push` needs and `count` tangents per direction."""
    needed, rounded = len(push.needed), None if manner.dtype is None else in_dtype(manner.dtype)

    def slopes(around: Around, *tensors: Tensor) -> list[Outputs]:
        if rounded is not None:
            tensors = tuple(map(rounded, tensors))
        own, flat, found = tensors[:needed], tensors[needed:], list[Outputs]()
        for start in range(0, len(flat), count):
            with around():
                slope = push.evaluate(own, flat[start : start + count])
            found.append(slope if len(slope) == len(manner.chosen) else tuple([slope[i] for i in manner.chosen]))
        return found

    return slopes


def _no_slopes(*_: Any) -> list[Outputs]:
    """Those of a tap that scores no direction by `J V`."""
    return []
