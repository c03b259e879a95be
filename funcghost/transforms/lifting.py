"""A step inside `torch.func` transforms, and the derivatives of its scores.

Scores are linear in the directions: so a step can be vmapped over them. They can be differentiated once, in directions,
params and batch. The losses always run below the transforms, on ordinary tensors, once for all directions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import optree
import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from funcghost.algebra.directions import Direction, LowRank, as_dense
from funcghost.dtypes import as_written
from funcghost.engine.run import Outcome
from funcghost.errors import InputError
from funcghost.ops.call import physical
from funcghost.ops.tangent import differentiable_kernels
from funcghost.problem import Losses, Problem, backward
from funcghost.side_effects import RandomState, random_state, replaying, untouched
from funcghost.trees import Tree, tensors

Directions = Sequence[Direction]
Solve = Callable[[Problem, Directions], Outcome]

TRANSFORMS = (
    "inside torch.func transforms a step takes directions under torch.func.vmap, or directions, params and batch under "
    "one torch.func.grad or vjp of scores; what the losses close over are ordinary tensors, and the losses use no "
    "torch.func of their own. Call the step in a loop; for several directions use fg.stack. For other derivatives of "
    "(u * scores).sum() take those of torch.func.jvp(torch.func.grad(lambda p: (u * losses(p, batch)).sum()), "
    "(params,), (direction,))[1]; along t in the direction it is the score of t, fg.dot(t)."
)


def lifted(solve: Solve, problem: Problem, directions: Directions, *, linear: bool) -> Outcome:
    """`solve(problem, directions)`, whose scores know of a vmap over the directions, or of a derivative of them.

    Law: `vmap(scores)(vs)[n]` equals `scores(vs[n])`, from one forward and one backward for all n, with the random
    numbers of one. The gradient of `<u, scores>` in a direction is that of `<u, losses>` in params, and in params and
    batch that of `<grad <u, losses>, direction>`: a backward runs the losses once more, with the same random numbers.
    All but the scores comes without a graph.

    Args:
        solve: takes ordinary tensors.
        problem: the losses, with tensors of a transform or without.
        directions: of the scores.
        linear: whether scores are all that is asked for.

    Raises:
        InputError: something else is transformed.
    """
    level = torch._C._functorch.maybe_current_level()
    plain = level is None and not _differentiable(directions)
    if plain and forward_ad._current_level < 0:
        return solve(problem, directions)
    low = [leaf for direction in directions for leaf in direction if isinstance(leaf, LowRank)]
    if low and (level is not None or _differentiable([low])):
        directions = [[leaf and as_dense(leaf) for leaf in direction] for direction in directions]
    leaves = [leaf for direction in directions for leaf in direction if isinstance(leaf, Tensor)]
    given = [*problem.params.leaves, *tensors(problem.batch)]
    if any(map(_has_tangent, (*given, *leaves))):
        raise InputError(TRANSFORMS)
    if plain:
        return solve(problem, directions)
    stack = [part.key() for part in get_interpreter_stack() or ()]
    if stack == [TransformType.Grad] and linear and directions:
        return _below_grad(solve, problem, directions)
    if any(map(_is_wrapped, given)) or (level is not None and not any(map(_is_wrapped, leaves))):
        raise InputError(TRANSFORMS)
    if any(key != TransformType.Vmap for key in stack):
        raise InputError(TRANSFORMS)
    return _below_vmap(solve, problem, directions, leaves)


def _differentiable(directions: Directions) -> bool:
    """Whether the caller may want a gradient in some direction."""
    leaves = [leaf for direction in directions for leaf in direction if leaf is not None]
    own = [value for leaf in leaves for value in ((leaf,) if isinstance(leaf, Tensor) else (leaf.rows, leaf.cols))]
    return torch.is_grad_enabled() and any(value.requires_grad for value in own)


@dataclass(frozen=True, eq=False)
class Below:
    """A step that runs below the transforms of the caller, on ordinary tensors.

    `solve`: the step.
    `problem`: the losses, and what the caller handed in.
    `directions`: of the scores.
    `drawn`: the state of the random numbers, from which a backward draws again.
    `outcomes`: what the step gave when it ran, beside the scores.
    """

    solve: Solve
    problem: Problem
    directions: Directions
    drawn: RandomState
    outcomes: list[Outcome] = field(default_factory=list)

    def solved(self, problem: Problem, directions: Directions) -> Tensor:
        """The scores of the step, whose outcome is kept."""
        self.outcomes.append(self.solve(problem, directions))
        return self.outcomes[-1].scores


@dataclass(frozen=True, eq=False)
class BelowGrad(Below):
    """Scores that are differentiated in what goes into the step.

    `plain`: the leaves of the directions, the parameters and the floating tensors of the batch that it ran on.
    """

    plain: list[Sequence[Tensor]] = field(default_factory=list)

    @property
    def places(self) -> list[int]:
        """Which leaves of the batch are floating tensors."""
        leaves = enumerate(optree.tree_leaves(self.problem.batch))
        return [i for i, leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]

    def at(self, params: Sequence[Tensor], floats: Sequence[Tensor]) -> Problem:
        """The problem with these parameters, and these floating tensors in the batch."""
        own, spec = optree.tree_flatten(self.problem.batch)
        for place, value in zip(self.places, floats, strict=True):
            own[place] = value
        moved = self.problem.params._replace(leaves=tuple(params))
        return replace(self.problem, params=moved, batch=optree.tree_unflatten(spec, own))

    def filled(self, leaves: Sequence[Tensor]) -> list[list[Tensor | None]]:
        """The directions with these leaves."""
        given = iter(leaves)
        return [[None if leaf is None else next(given) for leaf in direction] for direction in self.directions]

    def scores(self, leaves: Sequence[Tensor], params: Sequence[Tensor], floats: Sequence[Tensor]) -> Tensor:
        """All of them at once."""
        self.plain[:] = leaves, params, floats
        here = self.at(params, floats)
        return self.solved(replace(here, losses=_below(here.losses)), self.filled(leaves))

    def pulled(self, weights: Tensor) -> list[Tensor | None]:
        """The gradients of `<weights, scores>`: of all that went into them, first ones of the losses or second ones."""
        if not _only_tracked(weights):
            raise InputError(TRANSFORMS)
        # By autograd itself, below the transform: torch.func draws other random numbers.
        with temporarily_clear_interpreter_stack(), torch.enable_grad(), differentiable_kernels():
            leaves, params, floats = ([value.detach() for value in values] for values in self.plain)
            inputs = [value.requires_grad_() for value in (*params, *floats)]
            with untouched(self.problem.devices()), replaying(self.drawn):
                losses, _ = self.at(params, floats).evaluate(params)
            pairs = list[tuple[Tensor, Tensor]]()
            for column, direction in zip(physical(weights).detach().unbind(1), self.filled(leaves), strict=True):
                column = column.to(losses.dtype)
                with as_written(losses.device):
                    found = torch.autograd.grad(losses, params, column, create_graph=True, allow_unused=True)
                for gradient, param, own in zip(found, params, direction, strict=True):
                    if own is not None:
                        pairs.append((torch.zeros_like(param) if gradient is None else gradient, own))
            total = torch.stack([(gradient * own).sum().to(weights.dtype) for gradient, own in pairs]).sum()
            second: Sequence[Tensor | None] = [None] * len(inputs)
            if total.requires_grad:
                with as_written(total.device):
                    second = torch.autograd.grad(total, inputs, allow_unused=True)
        return [*(gradient.detach() for gradient, _ in pairs), *second]


def _below_grad(solve: Solve, problem: Problem, directions: Directions) -> Outcome:
    """Scores that are differentiated in what goes into the step."""
    below = BelowGrad(solve, problem, directions, random_state(problem.devices()))
    given = [leaf for direction in directions for leaf in direction if isinstance(leaf, Tensor)]
    batch = optree.tree_leaves(problem.batch)
    sizes = len(given), len(problem.params.leaves)
    floats = [batch[place] for place in below.places]
    of_all: Tensor = Differentiable.apply(below, sizes, *given, *problem.params.leaves, *floats)
    return replace(below.outcomes[-1], scores=of_all)


class Differentiable(torch.autograd.Function):
    """`Differentiable.apply(below, sizes, *leaves, *params, *floats) -> [b, k]`, under one gradient."""

    @staticmethod
    def forward(below: BelowGrad, sizes: tuple[int, int], *given: Tensor) -> Tensor:
        """All scores at once."""
        first, second = sizes[0], sum(sizes)
        return below.scores(given[:first], given[first:second], given[second:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps what gives the gradients."""
        ctx.below = inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """By derivatives of the losses: first ones for the directions, second ones for all else."""
        return (None, None, *ctx.below.pulled(gradients[0]))


@dataclass(frozen=True, eq=False)
class BelowVmap(Below):
    """Scores of all members of the vmapped axes at once, each member as so many more directions."""

    def scores(self, flat: Sequence[Tensor]) -> Tensor:
        """The scores of the members with these leaves, one member after the other."""
        own, given = (
            [leaf for direction in self.directions for leaf in direction if isinstance(leaf, Tensor)],
            iter(flat),
        )
        wanted = [
            [next(given).detach() if isinstance(leaf, Tensor) else leaf for leaf in direction]
            for _ in range(len(flat) // len(own))
            for direction in self.directions
        ]
        hidden = replace(self.problem, losses=_below(self.problem.losses))
        return self.solved(hidden if any(map(_is_wrapped, own)) else self.problem, wanted)

    def pulled(self, weights: Tensor) -> list[Tensor]:
        """The gradients of the losses times each column of weights [b, k], for the leaves of the directions."""
        with torch.enable_grad(), untouched(self.problem.devices()), replaying(self.drawn):
            leaves = self.problem.leaves()
            losses, _ = self.problem.evaluate(leaves)
        found = list[Tensor]()
        for k, column in enumerate(weights.unbind(1)):
            gradients = backward(losses, leaves, column.to(losses.dtype), keep_graph=True)
            direction = self.directions[k % len(self.directions)]
            found += [g for g, leaf in zip(gradients, direction, strict=True) if isinstance(leaf, Tensor)]
        return found


def _below_vmap(solve: Solve, problem: Problem, directions: Directions, leaves: Sequence[Tensor]) -> Outcome:
    """Scores of all members of the vmapped axes at once."""
    below = BelowVmap(solve, problem, directions, random_state(problem.devices()))
    of_all: Tensor = Scores.apply(below, len(directions), *leaves)
    return replace(below.outcomes[-1], scores=of_all)


class Scores(torch.autograd.Function):
    """`Scores.apply(below, k, *leaves) -> [b, k]`: those of `k` directions with these leaves."""

    @staticmethod
    def forward(below: BelowVmap, k: int, *leaves: Tensor) -> Tensor:
        """All of them at once."""
        return below.scores(leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps what gives the gradients of weighted losses."""
        ctx.below = inputs[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Scores are linear: the gradient in a direction is that of the losses, weighted by what comes in."""
        return (None, None, *ctx.below.pulled(gradients[0]))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], below: BelowVmap, k: int, *leaves: Tensor) -> tuple[Tensor, int]:
        """The members of the vmapped axis are so many more directions."""
        members = [
            leaf.unbind(dim) if dim is not None else (leaf,) * info.batch_size
            for leaf, dim in zip(leaves, in_dims[2:], strict=True)
        ]
        flat = (leaf for member in zip(*members, strict=True) for leaf in member)
        found = Scores.apply(below, info.batch_size * k, *flat)
        return found.unflatten(1, (info.batch_size, k)), 1


def _below(losses: Losses) -> Losses:
    """The losses, run below the transforms of the caller."""

    def run_below(params: Tree, batch: Tree) -> Any:
        with _Below():
            return losses(params, batch)

    return run_below


class _Below(TorchFunctionMode):
    """Stops at tensors of torch.func: those of the losses' own transforms cannot be told from the caller's."""

    def __torch_function__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the op as it is."""
        if any(map(_is_wrapped, tensors((args, kwargs)))):
            raise InputError(TRANSFORMS)
        return op(*args, **(kwargs or {}))


def _only_tracked(value: Tensor) -> bool:
    """Whether a value is wrapped for gradients alone."""
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        if torch._C._functorch.is_batchedtensor(value):
            return False
        value = torch._C._functorch.get_unwrapped(value)
    return True


def _is_wrapped(value: Tensor) -> bool:
    wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(value)
    return wrapped


def _has_tangent(value: Tensor) -> bool:
    """By forward mode differentiation."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None
