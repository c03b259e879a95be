"""The losses of a linear head in chunks of tokens, and what derivatives of them need: each chunk's logits, again.

With `z = x @ weight.T + bias` [n, v], `p` their softmax, `e` the unit vectors of the targets, `u` the cotangents of the
losses [n] and `q` the derivative of the logits along a direction:

    chunked_losses      logsumexp(z) - <e, z>
    chunked_gradients   u (p - e), taken to x, weight and bias
    chunked_slopes      <p - e, q>
    curvature           u p (q - <p, q>), taken to x, weight and bias: the Hessian of <u, losses> times the direction
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from funcghost.dtypes import wide_dtype

Head = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Something for each of x [n, d], weight [v, d] and bias [v]; None for zero, or for what there is not."""


def spans(count: int, chunk: int) -> Iterator[slice]:
    """The chunks of so many tokens."""
    return (slice(start, min(start + chunk, count)) for start in range(0, count, chunk))


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Of one chunk, in the precision of the softmax."""
    return F.linear(x, weight, bias).to(wide_dtype(x.dtype))


def _subtract_one(values: Tensor, targets: Tensor) -> Tensor:
    """In place, at the target of each row."""
    return values.scatter_add_(1, targets.unsqueeze(1), values.new_full((), -1.0).expand(len(targets), 1))


def _at(values: Tensor, targets: Tensor) -> Tensor:
    return values.gather(1, targets.unsqueeze(1)).squeeze(1)


def chunked_losses(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int, ascend: bool
) -> tuple[Tensor, ...]:
    """The losses [n]; with `ascend` also the gradient of each in its own row of x."""
    losses, ascent = x.new_empty(len(x), dtype=wide_dtype(x.dtype)), torch.empty_like(x) if ascend else None
    for rows in spans(len(x), chunk):
        z = _logits(x[rows], weight, bias)
        total = z.logsumexp(1)
        losses[rows] = total - _at(z, targets[rows])
        if ascent is not None:
            z = _subtract_one(z.sub_(total.unsqueeze(1)).exp_(), targets[rows])
            ascent[rows] = z.to(x.dtype) @ weight
    return (losses,) if ascent is None else (losses, ascent)


def chunked_gradients(
    u: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    chunk: int,
    wants: tuple[bool, bool, bool],
) -> tuple[Tensor, ...]:
    """The gradients of `<u, losses>` in what is wanted of x, weight and bias; sums are of float32 at least."""
    of_x = torch.empty_like(x) if wants[0] else None
    of_weight = weight.new_zeros(weight.shape, dtype=wide_dtype(x.dtype)) if wants[1] else None
    of_bias = weight.new_zeros(len(weight), dtype=wide_dtype(x.dtype)) if wants[2] else None
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


def chunked_slopes(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, along: Head, chunk: int
) -> tuple[Tensor, Tensor]:
    """The losses [n] and their derivatives [n] along a direction: both, since the losses come with the softmax."""
    of_x, of_weight, of_bias = along
    losses, slopes = x.new_empty(len(x), dtype=wide_dtype(x.dtype)), x.new_zeros(len(x), dtype=wide_dtype(x.dtype))
    for rows in spans(len(x), chunk):
        z = _logits(x[rows], weight, bias)
        total = z.logsumexp(1)
        losses[rows] = total - _at(z, targets[rows])
        q = _moved_logits(x[rows], weight, (None if of_x is None else of_x[rows], of_weight, of_bias))
        if q is not None:
            at_target = _at(q, targets[rows])
            slopes[rows] = z.sub_(total.unsqueeze(1)).exp_().mul_(q).sum(1) - at_target
    return losses, slopes


def _moved_logits(x: Tensor, weight: Tensor, along: Head) -> Tensor | None:
    """The derivative of the logits of a chunk along a direction; None for zero."""
    of_x, of_weight, of_bias = along
    terms = [] if of_x is None else [_logits(of_x, weight, None)]
    terms += [] if of_weight is None else [_logits(x, of_weight, None)]
    terms += [] if of_bias is None else [of_bias.to(wide_dtype(x.dtype)).expand(len(x), -1)]
    return None if not terms else terms[0] if len(terms) == 1 else sum(terms[1:], terms[0])


def curvature(
    u: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, along: Head, chunk: int
) -> Head:
    """The Hessian of `<u, losses>` in (x, weight, bias), times a direction.

    With `h = u p (q - <p, q>)` and `g = u (p - e)` it is `(h W + g V, h' x + g' y, h' 1)` along `(y, V, c)`. In torch
    ops that can be differentiated further, which then keep the logits.
    """
    of_x, of_weight, _ = along
    parts, moved = [x.new_zeros(0, x.shape[1])], torch.zeros_like(weight, dtype=wide_dtype(x.dtype))
    of_bias = None if bias is None else torch.zeros_like(bias, dtype=wide_dtype(x.dtype))
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
