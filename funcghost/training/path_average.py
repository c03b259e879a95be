"""The Jacobian of a step, averaged over the gradients from zero to the step's own.

The change that a gradient G makes in a step `u` is, by the fundamental theorem,

    u(G) - u(0) = A G,        A = integral_0^1 J_u(s G) ds,

so `<V, u(G) - u(0)> = <A^T V, G>` is shared out over whatever G is a sum of, and every share is an inner product with
`A^T V`: the values of Aumann and Shapley ("Values of Non-Atomic Games", 1974; Sundararajan, Taly, Yan, arXiv
1703.01365). It is found exactly where entries go by themselves, and else by quadrature whose error is known.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from funcghost.errors import GhostError

Leaves = list[Tensor]
Step = Callable[[Leaves], Leaves]
"""From gradients to the step they make, both lists of tensors; differentiable."""

NODES = ((0.5 - 0.15**0.5, 5 / 18), (0.5, 8 / 18), (0.5 + 0.15**0.5, 5 / 18))
"""Gauss and Legendre's three nodes on [0, 1] and their weights."""

MOST_INTERVALS = 1024


def pulled_back(step: Step, grads: Leaves, cotangents: Sequence[Leaves]) -> list[Leaves]:
    """`J_step(grads)^T V` for every V of the cotangents."""
    with torch.enable_grad():
        leaves = [grad.detach().requires_grad_() for grad in grads]
        moves = step(leaves)
        found = []
        for number, cotangent in enumerate(cotangents, 1):
            taken = [(move, v) for move, v in zip(moves, cotangent, strict=True) if move.requires_grad]
            if not taken:
                found.append([torch.zeros_like(leaf, requires_grad=False) for leaf in leaves])
                continue
            outputs, along = zip(*taken, strict=True)
            again = number < len(cotangents)
            parts = torch.autograd.grad(outputs, leaves, along, retain_graph=again, allow_unused=True)
            found.append([torch.zeros_like(g) if p is None else p for g, p in zip(grads, parts, strict=True)])
    return found


def elementwise_average(
    step: Callable[[Tensor], Tensor], grad: Tensor, at: Callable[[Tensor], Callable[[Tensor], Tensor]]
) -> tuple[Tensor, Tensor]:
    """The diagonal of A where every entry of the step depends on its own entry of the gradient alone, and `A G`.

        A = (u(G) - u(0)) / G

    That needs no integral and no derivative, and so holds for a step that has none at 0, as Adam's first. Where the
    difference has lost digits, the gradient being small beside what the step moves anyway, A is the derivative at the
    middle, `u'(G / 2)`, which is right to second order there.

    `at(places)` is the step of the entries at these places of G laid flat. Cost: two evaluations, and a derivative of
    the entries that need it; on devices that would have to be waited for, of all.
    """
    with torch.no_grad():
        whole, still = step(grad), step(torch.zeros_like(grad))
        moved = whole - still
        least = torch.finfo(grad.dtype).eps ** (1 / 3)
        lost = (moved.abs() <= least * whole.abs_().add_(still.abs_())).logical_or_(grad == 0)
        average = moved / grad
    places = lost.flatten().nonzero().squeeze(1) if grad.device.type == "cpu" else None
    taken, own = (grad, step) if places is None else (grad.take(places), at(places))
    [[middle]] = pulled_back(lambda leaves: [own(leaves[0])], [taken / 2], [[torch.ones_like(taken)]])
    return torch.where(lost, middle, average) if places is None else average.put_(places, middle), moved


def inner(a: Leaves, b: Leaves) -> Tensor:
    """The inner product of two lists of tensors."""
    return torch.stack(
        [
            (x.flatten() * y.flatten()).sum(dtype=torch.promote_types(x.dtype, torch.float32))
            for x, y in zip(a, b, strict=True)
        ]
    ).sum()


def _size(leaves: Leaves) -> Tensor:
    return inner(leaves, leaves).sqrt()


def adaptive_average(
    step: Step, grads: Leaves, cotangents: Sequence[Leaves], tolerance: float, what: str = "the update"
) -> tuple[list[Leaves], list[Tensor]]:
    """`A^T V` and `<V, A G>` for every V of the cotangents, by Gauss' rule on intervals halved as often as it takes.

    On an interval [a, b] the law `<integral_a^b J(s G)^T V ds, G> = <V, u(b G) - u(a G)>` tells the error, so nothing
    is guessed: halving goes on until all errors of an interval are within an eighth of `tolerance` of the whole
    `<V, u(G) - u(0)>`, or of a hundredth of the product of the norms where that is more.

    Cost: for an interval three evaluations with their vector-Jacobian products, and one evaluation.

    Raises:
        GhostError: that takes too many intervals: the update jumps somewhere between no gradient and this one.
    """

    def at(s: float) -> Leaves:
        with torch.no_grad():
            return [move.detach() for move in step([s * grad for grad in grads])]

    start, end = at(0.0), at(1.0)
    moved = [b - a for a, b in zip(start, end, strict=True)]
    rounding = 16 * max(torch.finfo(grad.dtype).eps for grad in grads)
    allowed = []
    for v in cotangents:
        whole, most = inner(v, moved).abs(), _size(v) * _size(moved)
        reach = rounding * _size(v) * torch.stack([_size(start), _size(end)]).max()
        allowed.append(torch.maximum(tolerance / 8 * torch.maximum(whole, most / 100), reach))
    totals = [[torch.zeros_like(grad) for grad in grads] for _ in cotangents]
    pending, seen = [(0.0, 1.0, start, end)], 0
    while pending:
        a, b, at_a, at_b = pending.pop()
        parts = [[torch.zeros_like(grad) for grad in grads] for _ in cotangents]
        for node, weight in NODES:
            here = [(a + (b - a) * node) * grad for grad in grads]
            for part, found in zip(parts, pulled_back(step, here, cotangents), strict=True):
                for value, more in zip(part, found, strict=True):
                    value.add_(more, alpha=weight * (b - a))
        change = [y - x for x, y in zip(at_a, at_b, strict=True)]
        errors = [(inner(part, grads) - inner(v, change)).abs() for part, v in zip(parts, cotangents, strict=True)]
        seen += 1
        # What is not finite as a whole is so in every part, and reaches the user.
        if all(bool((error <= most) | ~most.isfinite()) for error, most in zip(errors, allowed, strict=True)):
            for total, part in zip(totals, parts, strict=True):
                for value, more in zip(total, part, strict=True):
                    value.add_(more)
        elif seen < MOST_INTERVALS:
            middle = (a + b) / 2
            at_middle = at(middle)
            pending += [(a, middle, at_a, at_middle), (middle, b, at_middle, at_b)]
        else:
            raise GhostError(
                f"{what} is not smooth between no gradient and this one: after {seen} intervals the error near {b:.3g} "
                f"of the gradient is still {max(map(float, errors)):.3g}, where {min(map(float, allowed)):.3g} is "
                f"allowed. Raise tolerance={tolerance:g}, or use an update that is differentiable."
            )
    return totals, [inner(v, moved) for v in cotangents]
