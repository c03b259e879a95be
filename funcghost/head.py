"""The losses of a linear head in chunks of tokens, and what derivatives of them need: each chunk's logits, again.

With `z = x @ weight.T + bias` [n, v], `p` their softmax, `e` the unit vectors of the targets, `u` the cotangents of the
losses [n] and `q` the derivative of the logits along a direction:

    Losses      logsumexp(z) - <e, z>
    Gradients   u (p - e), taken to x, weight and bias
    Slopes      <p - e, q>
    curvature   u p (q - <p, q>), taken to x, weight and bias: the Hessian of <u, losses> times the direction

The derivatives of each are among them, so first and second ones never hold the logits of all tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad

Head = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Something for each of x [n, d], weight [v, d] and bias [v]; None for zero, or for what there is not."""


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


traced_head_losses = torch._dynamo.nonstrict_trace(head_losses)
"""For `torch.compile` outside of a step, which does not look into autograd Functions like these by itself."""


def wide(value: Tensor) -> torch.dtype:
    """The dtype for sums over many: float32 at least."""
    return torch.promote_types(value.dtype, torch.float32)


def spans(count: int, chunk: int) -> Iterator[slice]:
    """The chunks of so many tokens."""
    return (slice(start, min(start + chunk, count)) for start in range(0, count, chunk))


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Of one chunk, in the precision of the softmax."""
    return F.linear(x, weight, bias).to(wide(x))


def _subtract_one(values: Tensor, targets: Tensor) -> Tensor:
    """In place, at the target of each row."""
    return values.scatter_add_(1, targets.unsqueeze(1), values.new_full((), -1.0).expand(len(targets), 1))


def _at(values: Tensor, targets: Tensor) -> Tensor:
    return values.gather(1, targets.unsqueeze(1)).squeeze(1)


class Losses(torch.autograd.Function):
    """`Losses.apply(x, weight, bias, targets, chunk, once) -> (losses,)`, whose backward is that of x alone.

    Where `once` allows it, the gradient that x needs is taken in the forward, for cotangents of one.
    """

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int, once: bool
    ) -> tuple[Tensor, ...]:
        """The losses [n], and maybe the gradient of each in its own row of x."""
        losses, ascent = x.new_empty(len(x), dtype=wide(x)), torch.empty_like(x) if once and x.requires_grad else None
        for rows in spans(len(x), chunk):
            z = _logits(x[rows], weight, bias)
            total = z.logsumexp(1)
            losses[rows] = total - _at(z, targets[rows])
            if ascent is not None:
                z = _subtract_one(z.sub_(total.unsqueeze(1)).exp_(), targets[rows])
                ascent[rows] = z.to(x.dtype) @ weight
        return (losses,) if ascent is None else (losses, ascent)

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
        return x.new_zeros(len(x), dtype=wide(x))

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
    """`Gradients.apply(u, x, weight, bias, targets, chunk, wants)`: those of `<u, losses>` in what is wanted.

    With `p` the softmax and `e` the target's unit vector, of the logits it is `u (p - e)`.
    """

    @staticmethod
    def forward(
        u: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk: int,
        wants: tuple[bool, bool, bool],
    ) -> tuple[Tensor, ...]:
        """One chunk after the other; the weight's is added up in float32 at least."""
        of_x = torch.empty_like(x) if wants[0] else None
        of_weight = weight.new_zeros(weight.shape, dtype=wide(x)) if wants[1] else None
        of_bias = weight.new_zeros(len(weight), dtype=wide(x)) if wants[2] else None
        for rows in spans(len(x), chunk):
            g = torch.softmax(_logits(x[rows], weight, bias), 1)
            g = _subtract_one(g, targets[rows]).mul_(u[rows].unsqueeze(1))
            if of_bias is not None:
                of_bias += g.sum(0)
            g = g.to(x.dtype)
            if of_x is not None:
                of_x[rows] = g @ weight
            if of_weight is not None and of_weight.dtype == g.dtype:
                torch.addmm(of_weight, g.t(), x[rows], out=of_weight)
            elif of_weight is not None:
                of_weight += g.t() @ x[rows]
        return tuple(value.to(x.dtype) for value in (of_x, of_weight, of_bias) if value is not None)

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
    """`Slopes.apply(x, weight, bias, targets, *along, chunk) -> (losses, slopes)` [n]: `J V` along a direction.

    With `q` the derivative of the logits it is `<p - e, q>`.
    """

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
        losses, slopes = x.new_empty(len(x), dtype=wide(x)), x.new_zeros(len(x), dtype=wide(x))
        for rows in spans(len(x), chunk):
            z = _logits(x[rows], weight, bias)
            total = z.logsumexp(1)
            losses[rows] = total - _at(z, targets[rows])
            q = _moved_logits(x[rows], weight, (None if of_x is None else of_x[rows], of_weight, of_bias))
            if q is not None:
                at_target = _at(q, targets[rows])
                slopes[rows] = z.sub_(total.unsqueeze(1)).exp_().mul_(q).sum(1) - at_target
        return losses, slopes

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


def _moved_logits(x: Tensor, weight: Tensor, along: Head) -> Tensor | None:
    """The derivative of the logits of a chunk along a direction; None for zero."""
    of_x, of_weight, of_bias = along
    terms = [] if of_x is None else [_logits(of_x, weight, None)]
    terms += [] if of_weight is None else [_logits(x, of_weight, None)]
    terms += [] if of_bias is None else [of_bias.to(wide(x)).expand(len(x), -1)]
    return None if not terms else terms[0] if len(terms) == 1 else sum(terms[1:], terms[0])


def curvature(
    u: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, along: Head, chunk: int
) -> Head:
    """The Hessian of `<u, losses>` in (x, weight, bias), times a direction.

    With `h = u p (q - <p, q>)` and `g = u (p - e)` it is `(h W + g V, h' x + g' y, h' 1)` along `(y, V, c)`. In torch
    ops that can be differentiated further, which then keep the logits.
    """
    of_x, of_weight, _ = along
    parts, moved = [x.new_zeros(0, x.shape[1])], torch.zeros_like(weight, dtype=wide(x))
    of_bias = None if bias is None else torch.zeros_like(bias, dtype=wide(x))
    for rows in spans(len(x), chunk):
        p = torch.softmax(_logits(x[rows], weight, bias), 1)
        y = None if of_x is None else of_x[rows]
        q = _moved_logits(x[rows], weight, (y, *along[1:]))
        if q is None:
            q = torch.zeros_like(p)
        wide_h = u[rows].unsqueeze(1) * p * (q - (p * q).sum(1, keepdim=True))
        one = torch.zeros_like(p).scatter(1, targets[rows].unsqueeze(1), 1.0)
        h, g = wide_h.to(x.dtype), (u[rows].unsqueeze(1) * (p - one)).to(x.dtype)
        part = h @ weight
        parts.append(part if of_weight is None else part + g @ of_weight)
        moved = moved + h.t() @ x[rows]
        moved = moved if y is None else moved + g.t() @ y
        of_bias = None if of_bias is None else of_bias + wide_h.sum(0)
    return torch.cat(parts), moved.to(x.dtype), None if of_bias is None else of_bias.to(x.dtype)


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
