"""`J V` of one op: its derivative in the direction of tangents of some of its arguments.

There is one meaning and three ways to get it, in the order of their cost: a rule of linearity (one call of the
op), the op's own forward derivative, and the transpose of the op's own backward.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import optree
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from funcghost.dtypes import as_written
from funcghost.ops.call import Call, Outputs, is_float, is_operand, physical, remembered
from funcghost.ops.known import Derivative, derivative_of
from funcghost.ops.products import bound
from funcghost.ops.rules import Op, Rule, find_rule

Way = Literal["rule", "forward", "transpose", "each"]
"""How `J V` is had; "each": it is not, but a backward for each sample is."""
Term = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Pushforward:
    """`J V` of a call, as a function of the tensors in the slots it needs and of the tangents."""

    needed: tuple[int, ...]
    evaluate: Callable[[Sequence[Tensor], Sequence[Tensor]], Outputs]


def covered_by_rule(call: Call) -> bool:
    """Whether a rule gives the derivative in every tracked argument of this call."""
    rule = find_rule(call.op)
    return rule is not None and _terms(call, rule) is not None


def is_linear(call: Call) -> bool:
    """Whether a rule says that the op is linear in all tensors of this call at once."""
    rule = find_rule(call.op)
    terms = None if rule is None else _terms(call, rule)
    given = {slot for slot, leaf in enumerate(call.leaves) if isinstance(leaf, Tensor)}
    return terms is not None and len(terms) == 1 and given.issubset((*terms[0][0], *terms[0][1]))


def is_multilinear(call: Call) -> bool:
    """Whether a rule says that the op is linear in each tensor of this call, the others held."""
    given = tuple(slot for slot, leaf in enumerate(call.leaves) if isinstance(leaf, Tensor))
    return all(is_float(call.leaves[slot]) for slot in given) and covered_by_rule(replace(call, tracked=given))


def pushforward(call: Call, way: Way) -> Pushforward:
    """The function that computes `J V` of a call in a given way."""
    rule = find_rule(call.op)
    if way == "rule" and rule is not None:
        found: Pushforward = _by_rule(call, rule)
        return found
    derivative = derivative_of(call.op) if way == "forward" else None
    if derivative is not None:
        return _by_formula(call, *derivative)
    return _by_derivative(call, _forward if way == "forward" else _transpose)


@remembered
def _by_rule(call: Call, rule: Rule) -> Pushforward:
    """The sum over the sets of arguments of the op with tangents and zeros in the places of the set."""
    terms = _terms(call, rule)
    if terms is None:
        raise AssertionError("covered_by_rule() was asked when the plan was made")
    tensors = [slot for slot, leaf in enumerate(call.leaves) if is_operand(leaf)]
    needed = tuple(slot for slot in tensors if any(slot not in filled + empty for filled, empty in terms))
    blanks = {
        slot: (call.leaves[slot].shape, call.leaves[slot].dtype) if isinstance(call.leaves[slot], Tensor) else None
        for _, empty in terms
        for slot in empty
    }
    call, own = call.emptied(), {slot: i for i, slot in enumerate(call.tracked)}

    def evaluate(saved: Sequence[Tensor], tangents: Sequence[Tensor]) -> Outputs:
        total: Outputs | None = None
        for filled, empty in terms:
            leaves = list(call.leaves)
            for slot, value in zip(needed, saved, strict=True):
                leaves[slot] = value
            for slot in empty:
                blank = blanks[slot]
                leaves[slot] = tangents[0].new_zeros((), dtype=blank[1]).expand(blank[0]) if blank else 0
            for slot in filled:
                leaves[slot] = tangents[own[slot]]
            term = call.evaluate(leaves)
            factor = rule.factor(_bind(call, rule, leaves)) if rule.factor else None
            term = term if factor is None else tuple(value * factor for value in term)
            total = term if total is None else tuple(a + b for a, b in zip(total, term, strict=True))
        assert total is not None
        return total

    return Pushforward(needed, evaluate)


def _terms(call: Call, rule: Rule) -> list[Term] | None:
    """For each set of arguments used: the slots to fill with tangents, and those to fill with zeros."""
    if rule.when is not None and not rule.when(_bind(call, rule, call.leaves)):
        return None
    if rule.linear == "each":
        return [((slot,), ()) for slot in call.tracked]
    if rule.linear == "jointly":
        floats = (slot for slot, leaf in enumerate(call.leaves) if is_float(leaf))
        return [(call.tracked, tuple(slot for slot in floats if slot not in call.tracked))]
    return _named_terms(rule, call.spec, call.tracked)


@lru_cache(maxsize=4096)
def _named_terms(rule: Rule, spec: optree.PyTreeSpec, tracked: tuple[int, ...]) -> list[Term] | None:
    """The terms where they follow from the names of the arguments alone: the same in every step."""
    nest: Any = optree.tree_unflatten(spec, range(spec.num_leaves))
    slots = rule.bind(*nest)
    remaining, terms = set(tracked), []
    for names in rule.linear:
        members = [slots[name] for name in names if isinstance(slots.get(name), int)]
        filled = tuple(slot for slot in members if slot in remaining)
        if filled:
            terms.append((filled, tuple(slot for slot in members if slot not in filled)))
            remaining.difference_update(filled)
    return None if remaining else terms


def _bind(call: Call, rule: Rule, leaves: Sequence[Any]) -> dict[str, Any]:
    nest: Any = optree.tree_unflatten(call.spec, leaves)
    return rule.bind(*nest)


def _by_formula(call: Call, names: Sequence[str], derivative: Derivative) -> Pushforward:
    """What is known of the op; what it writes to besides, as running statistics, has no derivative."""
    needed = tuple(slot for slot, leaf in enumerate(call.leaves) if is_operand(leaf))
    call = call.emptied()
    slots = {slot: name for name, slot in bound(call, names, range(len(call.leaves))).items()}

    def evaluate(saved: Sequence[Tensor], tangents: Sequence[Tensor]) -> Outputs:
        leaves = list(call.leaves)
        for slot, value in zip(needed, saved, strict=True):
            leaves[slot] = value
        moved = {slots[slot]: tangent for slot, tangent in zip(call.tracked, tangents, strict=True)}
        found = derivative(bound(call, names, leaves), moved)
        return (found, *(torch.zeros_like(leaves[slot]) for slot in call.written if is_float(leaves[slot])))

    return Pushforward(needed, evaluate)


Differentiate = Callable[[Callable[..., Outputs], Outputs, Outputs], Outputs]


def _by_derivative(call: Call, differentiate: Differentiate) -> Pushforward:
    needed = tuple(slot for slot, leaf in enumerate(call.leaves) if is_operand(leaf))
    call = replace(call.emptied(), op=WRITTEN_OUT.get(call.op, call.op))

    def evaluate(saved: Sequence[Tensor], tangents: Sequence[Tensor]) -> Outputs:
        values = dict(zip(needed, saved, strict=True))

        def op(*primals: Tensor) -> Outputs:
            moved = values | dict(zip(call.tracked, primals, strict=True))
            return call.evaluate([moved.get(slot, leaf) for slot, leaf in enumerate(call.leaves)])

        with differentiable_kernels():
            return differentiate(op, tuple(values[slot] for slot in call.tracked), tuple(tangents))

    return Pushforward(needed, evaluate)


def backward_sees(call: Call, saved: Sequence[Tensor], tangents: Sequence[Tensor]) -> bool:
    """Whether `<J^T u, V>` is not zero, by the backward of a call with its tensors `saved`, for these tangents V.

    For some u, and beyond what rounding makes of a zero.
    """
    slots = [slot for slot, leaf in enumerate(call.leaves) if isinstance(leaf, Tensor)]
    given = {slot: value.detach() for slot, value in zip(slots, saved, strict=True)}
    with torch.enable_grad():
        leaves = [given[slot].requires_grad_() for slot in call.tracked]
        values = [
            v for v in call.evaluate([given.get(i, leaf) for i, leaf in enumerate(call.leaves)]) if v.requires_grad
        ]
    if not values:
        return False
    drawn = [torch.linspace(0.5, 1.5, v.numel(), dtype=v.dtype, device=v.device).view(v.shape) for v in values]
    found = torch.autograd.grad(values, leaves, drawn, allow_unused=True)
    terms = [(g * v).double() for g, v in zip(found, tangents, strict=True) if g is not None]
    rounding = 256 * max(torch.finfo(value.dtype).eps for value in drawn)
    size = sum(float(v.double().square().sum()) for v in (*drawn, *tangents))
    return abs(sum(float(term.sum()) for term in terms)) > rounding * size


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str = "") -> Tensor:
    """All distances, from all differences: b m d numbers."""
    found: Tensor = torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, -1)
    return found


WRITTEN_OUT: dict[Op, Op] = {torch.cdist: _cdist}
"""Ops whose kernels have neither a forward nor a second derivative, by ops that have."""


@contextmanager
def differentiable_kernels() -> Iterator[None]:
    """Fused kernels without second derivatives give way to their plain forms."""
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
        yield


def _forward(op: Callable[..., Outputs], primals: Outputs, tangents: Outputs) -> Outputs:
    derivative: Outputs = torch.func.jvp(op, _unshared(primals), _unshared(tangents))[1]
    return derivative


def _unshared(values: Outputs) -> Outputs:
    """The tensors, copied where several entries are of one memory: some forward derivatives are written in place."""
    return tuple(value.contiguous() if _shares(value) else value for value in values)


def _shares(value: Tensor) -> bool:
    if physical(value) is not value or value.layout is not torch.strided:
        return False
    return any(stride == 0 and size > 1 for size, stride in zip(value.shape, value.stride(), strict=True))


def _transpose(op: Callable[..., Outputs], primals: Outputs, tangents: Outputs) -> Outputs:
    """The backward `u -> u J` is linear in `u`, hence its own backward is `V -> J V`.

    By autograd itself, which knows more ops than `torch.func`.
    """
    with torch.enable_grad():
        leaves = [primal.detach().requires_grad_() for primal in primals]
        values = op(*leaves)
        smooth = [value for value in values if value.requires_grad]
        duals = [torch.zeros_like(value, requires_grad=True) for value in smooth]
        found: Sequence[Tensor | None] = [None] * len(duals)
        with as_written(primals[0].device):  # the op runs as it ran, its backward as backwards do
            pulled = torch.autograd.grad(smooth, leaves, duals, create_graph=True, allow_unused=True)
            pairs = [(u, v) for u, v in zip(pulled, tangents, strict=True) if u is not None and u.requires_grad]
            if pairs:
                found = torch.autograd.grad([u for u, _ in pairs], duals, [v for _, v in pairs], allow_unused=True)
    derivatives = dict(zip(map(id, smooth), found, strict=True))
    return tuple(torch.zeros_like(v) if (d := derivatives.get(id(v))) is None else d for v in values)
