"""Which terms a call takes: the directions that are scored by factors, and those by tangents."""

from collections.abc import Callable
from types import NoneType

import torch

from funcghost.algebra.directions import LowRank
from funcghost.engine.contributions import MANY, ByFactors, ByTangents, Term, Wanted
from funcghost.ops.apart import Use
from funcghost.ops.call import Call, remembered
from funcghost.ops.products import Description
from funcghost.ops.tangent import Pushforward, Way, covered_by_rule, pushforward
from funcghost.ops.uses import find_uses


def recipe_of(
    call: Call, wanted: Wanted, described: Description | None, push: Callable[[], Pushforward]
) -> tuple[Term, ...]:
    """The terms of a call to whose `J V` this is the way."""
    scored, uses = _by_factors(call, wanted, described)
    rest = [
        [kind is not NoneType and (slot, k) not in scored for k, kind in enumerate(kinds)]
        for slot, kinds in zip(call.tracked, wanted.kinds, strict=True)
    ]
    columns = tuple([k for k, tangents in enumerate(zip(*rest, strict=True)) if any(tangents)])
    factors = [ByFactors(use, scored) for use in uses]
    return (*factors, ByTangents(push(), columns, scored, wanted)) if columns else tuple(factors)


@remembered
def recipe(call: Call, wanted: Wanted, described: Description | None, way: Way) -> tuple[Term, ...]:
    """As `recipe_of`, for one of the ways to `J V`; where there is none, by factors alone."""
    if way == "each":
        uses = find_uses(call, described, wanted.layouts, wanted.chosen, wanted.vmapped)
        each = [(slot, kinds) for slot, kinds in zip(call.tracked, wanted.kinds, strict=True)]
        scored = frozenset((slot, k) for slot, kinds in each for k, kind in enumerate(kinds) if kind is not NoneType)
        return tuple(ByFactors(use, scored) for use in uses) if scored or wanted.collects else ()
    return recipe_of(call, wanted, described, lambda: pushforward(call, way))


def tried(call: Call, wanted: Wanted, described: Description | None, push: Pushforward) -> tuple[Term, ...]:
    """As `recipe_of`, while the way is tried: where factors score, `push` sees what it takes, a rule's by shapes."""
    found = recipe_of(call, wanted, described, lambda: push)
    scored = any(isinstance(term, ByFactors) and term.scored for term in found)
    if scored and not any(isinstance(term, ByTangents) for term in found):
        given = {slot: call.leaves[slot].detach() for slot in (*push.needed, *call.tracked)}
        if covered_by_rule(call):
            given = {slot: torch.empty_like(value, device="meta") for slot, value in given.items()}
        push.evaluate([given[slot] for slot in push.needed], [given[slot] for slot in call.tracked])
    return found


def _by_factors(
    call: Call, wanted: Wanted, described: Description | None
) -> tuple[frozenset[tuple[int, int]], tuple[Use, ...]]:
    """The tangents (slot and direction) that are scored by factors, and the uses wanted.

    Low-rank ones are, where factors are had without a derivative for each sample. Of others, those of a product whose
    output is larger than what the parameter meets: `g V` takes less memory than `J V`, at the same FLOPs. And those of
    products where there are `MANY`.
    """
    kinds = [
        {slot: kind for slot, kind in zip(call.tracked, along, strict=True) if kind is not NoneType}
        for along in zip(*wanted.kinds, strict=True)
    ]
    low = [any(issubclass(kind, LowRank) for kind in along.values()) for along in kinds]
    if not wanted.collects and wanted.vmapped and not any(low):
        return frozenset(), ()
    uses = find_uses(call, described, wanted.layouts, wanted.chosen, wanted.vmapped)
    cheap = {slot for use in uses if use.by_product for slot in use.slots}
    smaller = {slot for use in uses if use.smaller and not wanted.vmapped for slot in use.slots}
    plain = sum(not low[k] and k not in wanted.apart and bool(kinds[k]) for k in range(len(kinds)))
    if plain >= MANY and covered_by_rule(call) and not wanted.vmapped and wanted.dtype is None:
        smaller |= {slot for use in uses if use.outer for slot in use.slots}
    found = frozenset(
        (slot, k)
        for k, along in enumerate(kinds)
        if k not in wanted.apart and (low[k] or (cheap.issuperset(along) and not smaller.isdisjoint(along)))
        for slot in along
        if slot in cheap
    )
    slots = set(call.tracked) if wanted.collects else {slot for slot, _ in found}
    return found, tuple(use for use in uses if not slots.isdisjoint(use.slots))
