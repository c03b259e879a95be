"""Scores are linear in the directions: so a step can be vmapped over them, and over nothing else.

The losses always run below every `torch.func` transform, on ordinary tensors, once for all directions.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from funcghost.errors import InputError
from funcghost.lowrank import Direction, LowRank, as_dense
from funcghost.run import Losses, Outcome, Problem
from funcghost.trees import Tree, tensors

Directions = Sequence[Direction]

ONLY_DIRECTIONS = (
    "inside torch.func transforms a step takes directions under torch.func.vmap and nothing else: params, batch and "
    "what the losses close over are ordinary tensors, and the losses use no torch.func of their own. Call the step in "
    "a loop; for several directions use fg.stack. The derivative of (u * scores).sum() in params is torch.func.jvp("
    "torch.func.grad(lambda p: (u * losses(p, batch)).sum()), (params,), (direction,))[1]."
)
LINEAR = (
    "scores are not differentiated. They are linear in the direction: their derivative along t is the score of t, "
    "fg.dot(t); and the gradient of (u * scores).sum() in the direction is that of (u * losses(params, batch)).sum() "
    "in params. Detach the direction to do without."
)


def lifted(solve: Callable[[Problem, Directions], Outcome], problem: Problem, directions: Directions) -> Outcome:
    """`solve(problem, directions)`, whose scores know of a vmap over the directions.

    Law: `vmap(scores)(vs)[n]` equals `scores(vs[n])`, from one forward and one backward for all n, with the random
    numbers of one.

    Raises:
        InputError: something else than a direction is transformed, or a score is differentiated.
    """
    level = torch._C._functorch.maybe_current_level()
    low = [leaf for direction in directions for leaf in direction if isinstance(leaf, LowRank)]
    if low and (level is not None or any(leaf.rows.requires_grad or leaf.cols.requires_grad for leaf in low)):
        directions = [[leaf and as_dense(leaf) for leaf in direction] for direction in directions]
    leaves = [leaf for direction in directions for leaf in direction if isinstance(leaf, Tensor)]
    others = [*problem.params.leaves, *tensors(problem.batch)]
    if any(map(_is_wrapped, others)) or any(map(_has_tangent, others)):
        raise InputError(ONLY_DIRECTIONS)
    if any(map(_has_tangent, leaves)):
        raise InputError(LINEAR)
    if level is None and not (torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)):
        return solve(problem, directions)
    if level is not None and not any(map(_is_wrapped, leaves)):
        raise InputError(ONLY_DIRECTIONS)
    below = problem if level is None else replace(problem, losses=_below(problem.losses))
    outcomes = list[Outcome]()

    def scores(flat: Sequence[Tensor]) -> Tensor:
        given, members = iter(flat), len(flat) // len(leaves)
        wanted = [
            [next(given).detach() if isinstance(leaf, Tensor) else leaf for leaf in direction]
            for _ in range(members)
            for direction in directions
        ]
        outcomes.append(solve(below, wanted))
        return outcomes[-1].scores

    of_all: Tensor = Scores.apply(scores, len(directions), *leaves)
    return replace(outcomes[-1], scores=of_all)


class Scores(torch.autograd.Function):
    """`Scores.apply(scores, k, *leaves) -> [b, k]`: those of `k` directions with these leaves."""

    @staticmethod
    def forward(scores: Callable[[Sequence[Tensor]], Tensor], k: int, *leaves: Tensor) -> Tensor:
        """All of them at once."""
        return scores(leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps nothing."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """There is a better way."""
        raise InputError(LINEAR)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], scores: Any, k: int, *leaves: Tensor) -> tuple[Tensor, int]:
        """The members of the vmapped axis are so many more directions."""
        members = [
            leaf.unbind(dim) if dim is not None else (leaf,) * info.batch_size
            for leaf, dim in zip(leaves, in_dims[2:], strict=True)
        ]
        flat = (leaf for member in zip(*members, strict=True) for leaf in member)
        found = Scores.apply(scores, info.batch_size * k, *flat)
        return found.unflatten(1, (info.batch_size, k)), 1


def _below(losses: Losses) -> Losses:
    """The losses, run below the transforms of the caller."""

    def run_below(params: Tree, batch: Tree) -> Any:
        with _Below():
            return losses(params, batch)

    return run_below


class _Below(TorchFunctionMode):
    """Refuses tensors of torch.func: those of the losses' own transforms cannot be told from the caller's."""

    def __torch_function__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the op as it is."""
        if any(map(_is_wrapped, tensors((args, kwargs)))):
            raise InputError(ONLY_DIRECTIONS)
        return op(*args, **(kwargs or {}))


def _is_wrapped(value: Tensor) -> bool:
    wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(value)
    return wrapped


def _has_tangent(value: Tensor) -> bool:
    """By forward mode differentiation."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None
