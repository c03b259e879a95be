"""The losses of a linear head that is taken in chunks of tokens, as nodes of autograd for whatever derivative is asked.

The derivatives of each node are among the nodes, so first and second ones never hold the logits of all tokens; what
they compute is in `funcghost.losses.chunks`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad

from funcghost.dtypes import wide_dtype
from funcghost.losses.chunks import chunked_gradients, chunked_losses, chunked_slopes, curvature


def head_losses(operands: tuple[Tensor, ...], targets: Tensor, chunk: int) -> Tensor:
    """The losses [n] of (x, weight) or (x, weight, bias), behind nodes for whatever derivative is under way."""
    (x, weight), bias = operands[:2], operands[2] if len(operands) > 2 else None
    forward_mode = forward_ad._current_level >= 0
    losses: Tensor
    if not torch.is_grad_enabled():
        duals = [None if value is None else forward_ad.unpack_dual(value) for value in (x, weight, bias)]
        along = [dual and dual.tangent for dual in duals]
        if forward_mode and any(tangent is not None for tangent in along):
            primals = (dual and dual.primal for dual in duals)
            losses = forward_ad.make_dual(*Slopes.apply(*primals, targets, *along, chunk))
        else:
            losses = Losses.apply(x, weight, bias, targets, chunk, False)[0]
        return losses
    transforms = {interpreter.key() for interpreter in get_interpreter_stack() or ()}
    once = not forward_mode and transforms <= {TransformType.Vmap}
    losses = Losses.apply(x, weight, bias, targets, chunk, once)[0]
    return losses + weight_branch(x, weight, bias, targets, chunk)


def __getattr__(name: str) -> Any:
    """`traced_head_losses`, for `torch.compile` outside of a step, which does not look into Functions like these.

    It is made when a compiler first asks for it, since importing Dynamo takes as long as importing torch.
    """
    if name != "traced_head_losses":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, torch._dynamo.nonstrict_trace(head_losses))


class Losses(torch.autograd.Function):
    """`Losses.apply(x, weight, bias, targets, chunk, once) -> (losses,)`, whose backward is that of x alone.

    Where `once` allows it, the gradient that x needs is taken in the forward, for cotangents of one.
    """

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int, once: bool
    ) -> tuple[Tensor, ...]:
        """The losses [n], and maybe the gradient of each in its own row of x."""
        return chunked_losses(x, weight, bias, targets, chunk, ascend=once and x.requires_grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps the operands, for both modes."""
        *operands, ctx.chunk, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*operands, *output[1:])
        ctx.save_for_forward(*operands)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, *_: Any) -> tuple[Any, ...]:
        """The gradient of x."""
        x, weight, bias, targets, *kept = ctx.saved_tensors
        if u is None or not ctx.needs_input_grad[0]:
            return (None,) * 6
        if kept and not torch.is_grad_enabled():
            return ((u.unsqueeze(1) * kept[0]).to(x.dtype), *(None,) * 5)
        return (*Gradients.apply(u, x, weight, bias, targets, ctx.chunk, (True, False, False)), *(None,) * 5)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        """The derivative in the direction of all operands."""
        x, weight, bias, targets = ctx.saved_tensors[:4]
        return (Slopes.apply(x, weight, bias, targets, *tangents[:3], ctx.chunk)[1],)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        """The vmapped axis becomes so many more tokens."""
        return _folded(Losses.apply, info.batch_size, in_dims, args, tokens=(0, 3))


@dataclass(frozen=True, eq=False)
class Unconnected:
    """A tensor that a node uses, with its history, but does not hang on."""

    value: Tensor


class WeightBranch(torch.autograd.Function):
    """`WeightBranch.apply(x, weight, bias, targets, chunk) -> zeros [n]`, with the gradients of weight and bias.

    A node of its own, since autograd leaves out nodes that are not asked for, but not a part of one: scoring alone
    takes no gradient of a weight. So that it is not asked for on the way to x, outside of `torch.func` x is
    unconnected.
    """

    @staticmethod
    def forward(x: Tensor | Unconnected, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int) -> Tensor:
        """Zeros, to be added to the losses."""
        x = x.value if isinstance(x, Unconnected) else x
        return x.new_zeros(len(x), dtype=wide_dtype(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps the operands."""
        x, *operands, ctx.chunk = inputs
        ctx.unconnected = x if isinstance(x, Unconnected) else None
        ctx.save_for_backward(None if ctx.unconnected else x, *operands)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Any, ...]:
        """The gradients of weight and bias."""
        wants = (False, ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        x, *operands = ctx.saved_tensors
        x = ctx.unconnected.value if ctx.unconnected else x
        found = iter(Gradients.apply(u, x, *operands, ctx.chunk, wants) if any(wants) else ())
        return (*(next(found) if want else None for want in wants), None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        """`Losses` has the derivative of forward mode."""
        return torch.zeros_like(ctx.saved_tensors[0])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        """The vmapped axis becomes so many more tokens."""
        return _folded(weight_branch, info.batch_size, in_dims, args, tokens=(0, 3))


def weight_branch(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int) -> Tensor:
    """Zeros [n] with the gradients of weight and bias; `torch.func` has to see x."""
    zeros: Tensor = WeightBranch.apply(x if get_interpreter_stack() else Unconnected(x), weight, bias, targets, chunk)
    return zeros


class Gradients(torch.autograd.Function):
    """`Gradients.apply(u, x, weight, bias, targets, chunk, wants)`: those of `<u, losses>` in what is wanted."""

    forward = staticmethod(chunked_gradients)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps the operands, for both modes."""
        *operands, ctx.chunk, ctx.wants = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands)
        ctx.save_for_forward(*operands)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        """`<gradients, along>` is `<u, slopes along>`, and the Hessian is symmetric."""
        u, x, weight, bias, targets = ctx.saved_tensors
        if all(cotangent is None for cotangent in cotangents):
            return (None,) * 7
        given = iter(cotangents)
        of_x, of_weight, of_bias = (next(given) if want else None for want in ctx.wants)
        along = of_x, of_weight, of_bias
        of_u = Slopes.apply(x, weight, bias, targets, *along, ctx.chunk)[1] if ctx.needs_input_grad[0] else None
        bent = curvature(u, x, weight, bias, targets, along, ctx.chunk)
        return (of_u, *bent, None, None, None)

    @staticmethod
    def jvp(ctx: Any, of_u: Tensor | None, *tangents: Any) -> tuple[Tensor, ...]:
        """Linear in u; the Hessian times the tangents of the rest."""
        u, x, weight, bias, targets = ctx.saved_tensors
        moved = curvature(u, x, weight, bias, targets, tangents[:3], ctx.chunk)
        found = [value for value, want in zip(moved, ctx.wants, strict=True) if want and value is not None]
        if of_u is None:
            return tuple(found)
        more = Gradients.apply(of_u, x, weight, bias, targets, ctx.chunk, ctx.wants)
        return tuple(a + b for a, b in zip(found, more, strict=True))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        """Each example has gradients of its own."""
        return _each(Gradients.apply, info.batch_size, in_dims, args)


class Slopes(torch.autograd.Function):
    """`Slopes.apply(x, weight, bias, targets, *along, chunk) -> (losses, slopes)` [n]: `J V` along a direction."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        of_x: Tensor | None,
        of_weight: Tensor | None,
        of_bias: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        """Both, since the losses come with the softmax."""
        return chunked_slopes(x, weight, bias, targets, (of_x, of_weight, of_bias), chunk)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keeps the operands."""
        *operands, ctx.chunk = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, u: Tensor | None) -> tuple[Any, ...]:
        """Of the slopes: the Hessian times the direction, and the gradient; of the losses the gradient."""
        x, weight, bias, targets, *along = ctx.saved_tensors
        needs = ctx.needs_input_grad
        found: list[Tensor | None] = [None, None, None]
        of_along: list[Tensor | None] = [None, None, None]

        def gradients(cotangent: Tensor, wants: tuple[bool, ...]) -> list[Tensor | None]:
            given = iter(Gradients.apply(cotangent, x, weight, bias, targets, ctx.chunk, wants))
            return [next(given) if want else None for want in wants]

        if u is not None:
            of_along = gradients(u, needs[4:7])
            found = list(curvature(u, x, weight, bias, targets, (along[0], along[1], along[2]), ctx.chunk))
        if v is not None:
            found = [
                b if a is None else a if b is None else a + b
                for a, b in zip(found, gradients(v, needs[:3]), strict=True)
            ]
        return (*found, None, *of_along, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        """The vmapped axis becomes so many more tokens."""
        return _folded(Slopes.apply, info.batch_size, in_dims, args, tokens=(0, 3, 4))


def _folded(
    function: Any, batch: int, in_dims: Sequence[int | None], args: Sequence[Any], tokens: tuple[int, ...]
) -> Any:
    """A function of tokens [n, ...] on those of all examples, if these share everything else."""
    if any(axis is not None and slot not in tokens for slot, axis in enumerate(in_dims)):
        return _each(function, batch, in_dims, args)
    given = list(args)
    for slot in tokens:
        if args[slot] is not None:
            axis = in_dims[slot]
            front = args[slot].expand(batch, *args[slot].shape) if axis is None else args[slot].movedim(axis, 0)
            given[slot] = front.flatten(0, 1)
    found = function(*given)
    if isinstance(found, Tensor):
        return found.reshape(batch, len(found) // batch), 0
    return tuple(value.reshape(batch, len(value) // batch, *value.shape[1:]) for value in found), (0,) * len(found)


def _each(function: Any, batch: int, in_dims: Sequence[int | None], args: Sequence[Any]) -> Any:
    """A function of every example by itself."""
    found = [
        function(
            *(
                arg.select(axis, i) if isinstance(arg, Tensor) and axis is not None else arg
                for arg, axis in zip(args, in_dims, strict=True)
            )
        )
        for i in range(batch)
    ]
    if isinstance(found[0], Tensor):
        return torch.stack(found), 0
    return tuple(torch.stack(values) for values in zip(*found, strict=True)), (0,) * len(found[0])
