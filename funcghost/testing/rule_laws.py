"""The laws of `fg.register_rule`."""

from collections.abc import Mapping, Sequence
from itertools import chain, combinations
from typing import Any

import optree
import torch
from torch import Tensor

from funcghost.errors import InputError
from funcghost.ops.call import Call, Outputs, flatten_call, is_float
from funcghost.ops.rules import Op, Rule, find_rule
from funcghost.ops.tangent import covered_by_rule, pushforward

SEEDS = range(4)
ROUNDING = 256
"""Tolerated, in units of the dtype's eps and of the largest number."""


def assert_rule_laws(
    op: Op, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, *, holds: bool = True
) -> None:
    """Holds the rule registered for an op to what it says, on these arguments.

    For every set of arguments in which the rule says the op is jointly linear:

        op(.., a u + b v, ..) = a op(.., u, ..) + b op(.., v, ..)

    and for every choice among these arguments, `J V` as the rule gives it (with its `factor`) is the transpose of the
    op's own backward, which is what training uses.

    The directions are small whole numbers: if the arguments are, too, products and sums have no rounding, and whatever
    is off shows.

    Args:
        op: the op, with a rule.
        args: positional arguments to call it with, at which the laws are checked.
        kwargs: arguments by name.
        holds: whether the rule's `when` is to accept these arguments; with False, that it turns them away is the law.

    Raises:
        AssertionError: a law does not hold.
        InputError: the op has no rule, or none of the arguments is one that the rule is about.

    Example:
        >>> import funcghost as fg, torch
        >>> from funcghost.testing import assert_rule_laws
        >>> fg.register_rule(torch.bmm, linear="each")
        >>> assert_rule_laws(torch.bmm, (torch.ones(2, 3, 4), torch.ones(2, 4, 5)))
        >>> fg.register_rule(torch.addcmul, linear=[["input", "tensor1"]], arguments=["input", "tensor1", "tensor2"])
        >>> assert_rule_laws(torch.addcmul, (torch.ones(3), torch.ones(3), 2 * torch.ones(3)))
    """
    rule = find_rule(op)
    if rule is None:
        raise InputError(f"assert_rule_laws: {op} has no rule. Register one with fg.register_rule.")
    leaves, spec = flatten_call(tuple(args), dict(kwargs or {}))
    sets = _sets(rule, leaves, spec)
    if not sets:
        raise InputError(f"assert_rule_laws: no argument given is one that the rule of {op} is about.")
    for chosen in sorted({*chain.from_iterable(map(_choices, sets)), tuple(sorted({*chain(*sets)}))}):
        call = Call(op, tuple(leaves), spec, chosen)
        if covered_by_rule(call) != holds:
            raise AssertionError(f"{op}: the rule {'does not hold' if holds else 'holds'} for these arguments")
        if holds:
            for seed in SEEDS:
                _check_derivative(call, seed)
    if holds:
        for own in sets:
            _check_linear(Call(op, tuple(leaves), spec, own))


def _sets(rule: Rule, leaves: Sequence[Any], spec: optree.PyTreeSpec) -> list[tuple[int, ...]]:
    """The slots of each set of arguments in which the op is linear."""
    floats = tuple(slot for slot, leaf in enumerate(leaves) if is_float(leaf))
    if rule.linear == "each":
        return [(slot,) for slot in floats]
    if rule.linear == "jointly":
        return [floats] if floats else []
    nest: Any = optree.tree_unflatten(spec, list(range(len(leaves))))
    named = rule.bind(*nest)
    found = [tuple(named[name] for name in names if named.get(name) in floats) for names in rule.linear]
    return [own for own in found if own]


def _choices(slots: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [tuple(sorted(some)) for size in range(1, len(slots) + 1) for some in combinations(slots, size)]


def _whole(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, like.shape, generator=generator).to(like)


def _check_linear(call: Call) -> None:
    def at(tensors: Sequence[Tensor]) -> Outputs:
        values = dict(zip(call.tracked, tensors, strict=True))
        return call.evaluate([values.get(slot, leaf) for slot, leaf in enumerate(call.leaves)])

    for seed in SEEDS:
        u, v = ([_whole(call.leaves[slot], 100 * seed + 10 * k + slot) for slot in call.tracked] for k in range(2))
        mixed = at([2 * one - 3 * other for one, other in zip(u, v, strict=True)])
        apart = [2 * one - 3 * other for one, other in zip(at(u), at(v), strict=True)]
        _compare(call, "is not jointly linear in", mixed, apart)


def _check_derivative(call: Call, seed: int) -> None:
    """`<J V, g>` by the rule against `<V, u>`, where u is what the op's backward makes of g.

    Not against the backward's own derivative, which some ops do not have, and others not as they should.
    """
    tangents = [_whole(call.leaves[slot], 100 * seed + slot) for slot in call.tracked]
    push = pushforward(call, "rule")
    slopes = push.evaluate([call.leaves[slot] for slot in push.needed], tangents)
    with torch.enable_grad():
        own = {slot: call.leaves[slot].detach().requires_grad_() for slot in call.tracked}
        out = call.evaluate([own.get(slot, leaf) for slot, leaf in enumerate(call.leaves)])
    if [value.shape for value in slopes] != [value.shape for value in out]:
        raise AssertionError(f"{call.op}: the rule gives {[list(v.shape) for v in slopes]}, the op other shapes")
    cotangents = [_whole(value, seed + 50) for value in out]
    ends = [(value, g) for value, g in zip(out, cotangents, strict=True) if value.requires_grad]
    pulled = torch.autograd.grad(
        [value for value, _ in ends],
        list(own.values()),
        [g for _, g in ends],
        materialize_grads=True,
        allow_unused=True,
    )
    one, other = _products(slopes, cotangents), _products(tangents, pulled)
    _compare(call, "has another backward than the rule says, in", (one.sum(),), (other.sum(),), float(one.abs().sum()))


def _products(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    return torch.cat([(a * b.conj()).flatten() for a, b in zip(one, other, strict=True)])


def _compare(call: Call, what: str, found: Sequence[Tensor], wanted: Sequence[Tensor], size: float = 0.0) -> None:
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        size = max((size, *(float(value.abs().max()) for value in (one, other) if value.numel())))
        off = float((one - other).abs().max()) if one.shape == other.shape and one.numel() else 0.0
        if one.shape != other.shape or not off <= ROUNDING * torch.finfo(other.dtype).eps * size:
            raise AssertionError(
                f"{call.op} {what} its arguments number {list(call.tracked)}: output {number} is off by {off:.3g}, "
                f"of terms up to {size:.3g}"
            )
