"""An op at other values than those that came, with the derivative that it has there."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from funcghost.engine.tap import ambient
from funcghost.ops.call import Call, Outputs
from funcghost.ops.meter import Clock
from funcghost.side_effects import random_state

Values = Callable[[], dict[int, Tensor]]
"""Gives the values, by slot, each time the same."""


def evaluated(call: Call, found: Outputs, slots: Collection[int], values: Values, many: bool) -> list[Outputs]:
    """What the call gives for other values in these slots, with the derivative of what it gave; or nothing.

    What a product keeps for its backward are the values, which share memory. Other ops of `many` entries keep nothing.
    """
    leaves = list(call.leaves)
    try:
        if many:
            tracked = [slot for slot in slots if leaves[slot].requires_grad]
            others = {s: leaf for s, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and s not in slots}
            around = ambient(found[0].device.type, random_state([found[0].device]))
            again = Again(call.emptied(), others, values, tracked, around)
            drawn = Later.apply(again, *(leaves[slot] for slot in tracked))
        else:
            for slot, value in values().items():
                leaf = leaves[slot]
                leaves[slot] = Away.apply(leaf, value) if leaf.requires_grad else value
            # A checkpoint counts what the ops of its region keep: these are not among them. Kept as it is, an op's own
            # output would keep the op, and the op it.
            with saved_tensors_hooks(Tensor.detach, _as_it_is):
                drawn = call.evaluate(leaves)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return []
    return [drawn] if len(drawn) == len(found) and all(map(_alike, drawn, found)) else []


def _as_it_is(value: Tensor) -> Tensor:
    return value


def _alike(drawn: Tensor, true: Tensor) -> bool:
    """Whether a drawn output can stand for the true one: infinite entries come of fills, if that has some, too."""
    if (drawn.shape, drawn.dtype, drawn.requires_grad) != (true.shape, true.dtype, true.requires_grad):
        return False
    if not drawn.requires_grad or bool(drawn.detach().sum().isfinite()) or bool(drawn.isfinite().all()):
        return True
    return bool(true.isinf().any()) and not bool(drawn.isnan().any())


@dataclass(frozen=True, eq=False)
class Again:
    """A call at drawn `values` that can be made once more, with what was `around` it; `tracked` are differentiated."""

    call: Call
    others: Mapping[int, Any]
    values: Values
    tracked: Sequence[int]
    around: Callable[[], AbstractContextManager[None]]

    def evaluate(self) -> tuple[list[Tensor], Outputs]:
        """What is differentiated, and what comes out."""
        values = self.values()
        inputs = {slot: values[slot].detach().requires_grad_() for slot in self.tracked}
        known = {**self.others, **values, **inputs}
        leaves = [known.get(slot, leaf) for slot, leaf in enumerate(self.call.leaves)]
        with torch.enable_grad(), self.around(), saved_tensors_hooks(Tensor.detach, _as_it_is):
            return list(inputs.values()), self.call.evaluate(leaves)


class Later(torch.autograd.Function):
    """`Later.apply(again, *tracked) -> outputs`: nothing is kept, the call is made once more for every backward."""

    @staticmethod
    def forward(ctx: Any, again: Again, *tracked: Tensor) -> Outputs:
        """What comes out."""
        ctx.set_materialize_grads(False)
        ctx.again = again
        _, found = again.evaluate()
        out = tuple(value.detach() for value in found)
        ctx.mark_non_differentiable(*(own for own, value in zip(out, found, strict=True) if not value.requires_grad))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of the call."""
        inputs, found = ctx.again.evaluate()
        known = [(value, g) for value, g in zip(found, gradients, strict=True) if g is not None]
        values, given = zip(*known, strict=True) if known else ((), ())
        return None, *torch.autograd.grad(values, inputs, given, allow_unused=True)


class Away(torch.autograd.Function):
    """`Away.apply(value, other) -> other`, with the gradient of `value`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, other: Tensor) -> Tensor:
        """The other value."""
        ctx.set_materialize_grads(False)
        return other

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        """The gradient as it is."""
        return gradients[0], None


class Back(torch.autograd.Function):
    """`Back.apply(clock, weights, true, *drawn) -> true`, with the gradients of all of them, weighted."""

    @staticmethod
    def forward(ctx: Any, clock: Clock, weights: list[float], true: Tensor, *drawn: Tensor) -> Tensor:
        """The true value."""
        ctx.set_materialize_grads(False)
        ctx.clock, ctx.weights = clock, weights
        return true.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """The weighted gradients, or that of the true value alone, as where the losses themselves differentiate."""
        [gradient] = gradients
        if gradient is None or ctx.clock.true or not ctx.clock.started:
            return None, None, gradient, *(None for _ in ctx.weights[1:])
        return None, None, *(_times(gradient, weight) for weight in ctx.weights)


def _times(gradient: Tensor, weight: float) -> Tensor | None:
    """The product, without the work where there is none."""
    if not weight:
        return None
    return gradient if weight == 1 else gradient * weight
