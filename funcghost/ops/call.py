"""A call of an op: its flat arguments, what came out, and what can be remembered of it."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import optree
import torch
import torch.nn.functional as F
from torch import Tensor

from funcghost.ops.rules import Op, find_rule

_T: Any = Tensor
Outputs = tuple[Tensor, ...]

PLAIN = frozenset(
    [int, float, bool, str, type(None), type(...), torch.dtype, torch.device, torch.memory_format, torch.layout]
)
"""What is known by its value alone."""
LEAVES = PLAIN - {type(None)} | {Tensor, torch.nn.Parameter}
MOST_KEYS = 4096
ACTIVATIONS: dict[Op, int] = {
    op: list(inspect.signature(op).parameters).index("inplace")
    for op in (
        *(F.relu, F.relu6, F.hardtanh, F.threshold, F.leaky_relu, F.elu, F.selu, F.celu, F.silu, F.mish),
        *(F.hardswish, F.hardsigmoid),
    )
}
"""Functions that write to their input if they are told to, and where they are told."""


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an op: its flat arguments, and which of them carry a tangent or are written to."""

    op: Op
    leaves: tuple[Any, ...]
    spec: optree.PyTreeSpec
    tracked: tuple[int, ...]
    written: tuple[int, ...] = ()

    def emptied(self) -> "Call":
        """The same call without its tensors, so that keeping it keeps none of them."""
        leaves = tuple(None if is_operand(leaf) else leaf for leaf in self.leaves)
        return Call(self.op, leaves, self.spec, self.tracked, self.written)

    def key(self) -> tuple[Any, ...] | None:
        """Equal for calls that differ in the values of tensors alone; None where that cannot be told, as in vmap."""
        if torch._C._functorch.maybe_current_level() is not None:
            return None
        known: list[Any] = [self.op, find_rule(self.op), self.spec, self.tracked, self.written]
        for leaf in self.leaves:
            kind = type(leaf)
            if kind is Tensor or kind is torch.nn.Parameter:
                known += (leaf.shape, leaf.dtype, leaf.layout)
            elif kind in PLAIN:
                known += (kind, leaf)
            else:
                return None
        return tuple(known)

    def evaluate(self, leaves: Sequence[Any]) -> Outputs:
        """The differentiable outputs of the op on these leaves; what it writes to is copied first, or not written."""
        at = ACTIVATIONS.get(self.op) if self.written else None
        if not self.written or at is not None:
            args, kwargs = optree.tree_unflatten(self.spec, leaves)
            if at is not None and len(args) > at:
                args = (*args[:at], False)
            elif at is not None:
                kwargs = {**kwargs, "inplace": False}
            return outputs(self.op(*args, **kwargs), ())
        copied = list(leaves)
        for slot in self.written:
            copied[slot] = copied[slot].clone()
        args, kwargs = optree.tree_unflatten(self.spec, copied)
        return outputs(self.op(*args, **kwargs), [copied[slot] for slot in self.written])


def remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a call and of hashable values that is evaluated once for all calls with the same key.

    What it gives must hold nothing of the call but shapes and flags.
    """
    known: dict[Any, Any] = {}

    @wraps(function)
    def recall(call: Call, *others: Any) -> Any:
        own = call.key()
        if own is None:
            return function(call, *others)
        key = (own, others)
        found = known.get(key, known)
        if found is known:
            if len(known) >= MOST_KEYS:
                known.clear()
            found = known[key] = function(call, *others)
        return found

    return recall


def flatten_call(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Any], optree.PyTreeSpec]:
    """The leaves of an op's arguments."""
    if not kwargs and LEAVES.issuperset(map(type, args)):
        return list(args), _flat_spec(len(args))
    nest: Any = (tuple(args), kwargs)
    return optree.tree_flatten(nest)


@cache
def _flat_spec(count: int) -> optree.PyTreeSpec:
    """The structure of so many arguments without containers."""
    nest: Any = ((0,) * count, {})
    return optree.tree_structure(nest)


def is_float(value: object) -> bool:
    """Whether a value is a tensor that can have a derivative."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def is_operand(value: object) -> bool:
    """Whether a value is a tensor of numbers, and no object of its own that is a tensor by descent.

    Such ones (`CausalBias`, the images of torchvision) say in a `__torch_function__` what ops make of them, and lose
    what they are made of where they are copied: without a gradient they are kept as they are.
    """
    if not isinstance(value, Tensor):
        return False
    kind = type(value)
    return kind in LEAVES or value.requires_grad or getattr(kind.__torch_function__, "__func__", None) in _NO_OWN_WAY


_NO_OWN_WAY = (None, _T.__torch_function__.__func__)


def outputs(returned: Any, written: Sequence[Tensor]) -> Outputs:
    """What an op gave: the floating tensors it returned, then those it wrote to."""
    if not written and isinstance(returned, Tensor):
        return (returned,) if is_float(returned) else ()
    leaves = [returned] if isinstance(returned, Tensor) else optree.tree_leaves(returned)
    fresh = [leaf for leaf in leaves if is_float(leaf) and not any(leaf is w for w in written)]
    return (*fresh, *(w for w in written if is_float(w)))


def physical(value: Tensor) -> Tensor:
    """The tensor inside the wrappers of `torch.func` transforms."""
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value


def alias(value: Tensor) -> Tensor:
    """The same memory under a new identity that autograd does not take for a view, so in-place ops stay legal."""
    aliased: Tensor = torch.ops.aten._unsafe_view(value, value.shape)
    return aliased


def swap(returned: Any, replaced: dict[int, Tensor]) -> Any:
    """What an op returned, with some of its tensors replaced."""
    if isinstance(returned, Tensor):
        return replaced.get(id(returned), returned)
    return optree.tree_map(lambda leaf: replaced.get(id(leaf), leaf), returned)
