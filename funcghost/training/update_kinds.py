"""The kinds of updates: by rules, of any function, with clipping before, with a schedule around."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from funcghost.errors import InputError
from funcghost.training.path_average import Leaves, adaptive_average, pulled_back
from funcghost.training.path_average import inner as inner_product
from funcghost.trees import Params, Tree, match_direction, split_params

Credit = Literal["step", "impulse"]
Schedule = Callable[[Tensor], Tensor | float]
Function = Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]

CLIP_EPS = 1e-6
"""What torch adds to a norm before it divides by it."""


class Shared(NamedTuple):
    """How what a gradient G does in a step is shared out over the terms of G, seen along cotangents V.

    `along` are lists of tensors D like the parameters, one list for every V: a term g of G has the part `<g, D>`.
    `parts` are the numbers, one for every V, that the parts of all terms add up to.
    """

    along: list[Leaves]
    parts: list[Tensor]


class Update(Protocol):
    """A step of an optimizer, that can also say what a part of its gradient does in it."""

    def __call__(self, params: Tree, grads: Tree, state: Tree) -> tuple[Tree, Tree]:
        """The parameters and the state after the step."""

    def share(
        self, params: Params, grads: Leaves, state: Tree, cotangents: Sequence[Leaves], credit: Credit, tolerance: float
    ) -> Shared:
        """What the gradient does in the step.

        With `credit="step"` the parts add up to `<V, u(G) - u(0)>`: what the gradient moves in this step. With
        "impulse" a part is what g moves in this and all later steps through a memory that is linear in gradients, the
        other quantities held: the step along the memory is shared out over what is in the memory, and a part of this
        gradient counts as often as it will ever be in it.
        """

    def pulled(self, params: Params, grads: Leaves, state: Tree, cotangents: Sequence[Leaves]) -> list[Leaves]:
        """`J^T V` for the derivative J of the step in its gradient at G."""


def global_norm(leaves: Leaves) -> Tensor:
    """The norm of all of them together, as `torch.nn.utils.clip_grad_norm_` has it."""
    norm: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(leaf) for leaf in leaves]))
    return norm


@dataclass(frozen=True)
class Clipped:
    """An update after clipping the gradient to a global norm, see `clipped`.

    `product` and `norm` are those of the gradients: over ranks, if leaves are shares of them.
    """

    inner: Update
    max_norm: float
    product: Callable[[Leaves, Leaves], Tensor] = inner_product
    norm: Callable[[Leaves], Tensor] = global_norm

    def _scale(self, grads: Leaves) -> tuple[Tensor, Tensor]:
        """What the gradient is multiplied by, and its norm."""
        norm = self.norm(grads)
        return (self.max_norm / (norm + CLIP_EPS)).clamp(max=1.0), norm

    def __call__(self, params: Tree, grads: Tree, state: Tree) -> tuple[Tree, Tree]:
        """The parameters and the state after the step."""
        split = split_params(params)
        leaves = match_direction(grads, split, "grads")
        scale, _ = self._scale(leaves)
        return self.inner(params, split.rebuild([scale * leaf for leaf in leaves]), state)

    def share(
        self, params: Params, grads: Leaves, state: Tree, cotangents: Sequence[Leaves], credit: Credit, tolerance: float
    ) -> Shared:
        """See `Update.share`.

        On the way from no gradient to G, clipping changes how far along G the update is taken, and no more:
        `s G` becomes `r G` with `r = min(s, c)`, c being the scale at G. Along G the parts are those of the update at
        `c G`; across G they are those up to where clipping sets in, at s = c, and from there on the derivative of the
        clipped gradient, `(c / s) J(c G)^T V`, whose integral is `c log(1 / c) J(c G)^T V`.
        """
        scale, norm = self._scale(grads)
        at = [scale * grad for grad in grads]
        found, parts = self.inner.share(params, at, state, cotangents, credit, tolerance)
        found = [[scale * leaf for leaf in leaves] for leaves in found]
        if credit == "step":
            beyond = self.inner.pulled(params, at, state, cotangents)
            found = [
                _where(scale < 1, _plus(leaves, self._across(late, grads, norm), -scale * scale.log()), leaves)
                for leaves, late in zip(found, beyond, strict=True)
            ]
        return Shared(found, parts)

    def pulled(self, params: Params, grads: Leaves, state: Tree, cotangents: Sequence[Leaves]) -> list[Leaves]:
        """`J^T V`."""
        scale, norm = self._scale(grads)
        found = self.inner.pulled(params, [scale * grad for grad in grads], state, cotangents)
        found = [_where(scale < 1, self._across(leaves, grads, norm), leaves) for leaves in found]
        return [[scale * leaf for leaf in leaves] for leaves in found]

    def _across(self, leaves: Leaves, grads: Leaves, norm: Tensor) -> Leaves:
        """Without the part along the gradient."""
        along = self.product(leaves, grads) / norm.square()
        return [leaf - along.to(grad.dtype) * grad for leaf, grad in zip(leaves, grads, strict=True)]


def _where(clipped: Tensor, one: Leaves, other: Leaves) -> Leaves:
    """One or the other, chosen on the device: a Python `if` would wait for it."""
    return [torch.where(clipped, a, b) for a, b in zip(one, other, strict=True)]


def _plus(leaves: Leaves, others: Leaves, times: Tensor) -> Leaves:
    return [leaf + times.to(leaf.dtype) * other for leaf, other in zip(leaves, others, strict=True)]


class ScheduledState(NamedTuple):
    """How many steps were taken, and the state of the update with its base learning rates."""

    taken: Tensor
    inner: Tree


@dataclass(frozen=True)
class Scheduled:
    """An update with other learning rates from step to step, see `scheduled`."""

    inner: Update
    schedule: Schedule

    def _now(self, state: Any) -> Tree:
        if not isinstance(state, ScheduledState):
            raise InputError(f"state: must be a ScheduledState, as scheduled gave it, found {type(state).__name__}.")
        factor = self.schedule(state.taken)
        return with_rates(state.inner, lambda _, lr: lr * factor)

    def __call__(self, params: Tree, grads: Tree, state: Tree) -> tuple[Tree, Tree]:
        """The parameters and the state after the step."""
        params, after = self.inner(params, grads, self._now(state))
        base = with_rates(after, lambda name, _: rates_of(state.inner)[name])
        return params, ScheduledState(state.taken.detach() + 1, base)

    def share(
        self, params: Params, grads: Leaves, state: Tree, cotangents: Sequence[Leaves], credit: Credit, tolerance: float
    ) -> Shared:
        """See `Update.share`."""
        return self.inner.share(params, grads, self._now(state), cotangents, credit, tolerance)

    def pulled(self, params: Params, grads: Leaves, state: Tree, cotangents: Sequence[Leaves]) -> list[Leaves]:
        """`J^T V`."""
        return self.inner.pulled(params, grads, self._now(state), cotangents)


@dataclass(frozen=True)
class Plain:
    """An update that is any function, see `plain`."""

    function: Function

    def __call__(self, params: Tree, grads: Tree, state: Tree) -> tuple[Tree, Tree]:
        """The parameters and the state after the step."""
        return self.function(params, grads, state)

    def _step(self, params: Params, state: Tree) -> Callable[[Leaves], Leaves]:
        def step(grads: Leaves) -> Leaves:
            after, _ = self.function(params.rebuild(params.leaves), params.rebuild(grads), state)
            return match_direction(after, params, "update(...)[0]")

        return step

    def share(
        self, params: Params, grads: Leaves, state: Tree, cotangents: Sequence[Leaves], credit: Credit, tolerance: float
    ) -> Shared:
        """See `Update.share`."""
        if credit == "impulse":
            raise InputError(
                "credit='impulse' has to know the memory of the optimizer: take an update from updates.of, or 'step'."
            )
        return Shared(*adaptive_average(self._step(params, state), grads, cotangents, tolerance))

    def pulled(self, params: Params, grads: Leaves, state: Tree, cotangents: Sequence[Leaves]) -> list[Leaves]:
        """`J^T V`."""
        return pulled_back(self._step(params, state), grads, cotangents)


def rates_of(state: Any) -> dict[str, Tensor]:
    """The learning rate of every parameter."""
    if isinstance(state, ScheduledState):
        return rates_of(state.inner)
    if not isinstance(state, Mapping) or not all(isinstance(own, Mapping) and "lr" in own for own in state.values()):
        raise InputError("state: must be that of updates.of, with a learning rate for every parameter.")
    return {name: own["lr"] for name, own in state.items()}


def with_rates(state: Any, rate: Callable[[str, Tensor], Tensor]) -> Tree:
    """The state with other learning rates, each from the name of its parameter and what it was."""
    rates_of(state)
    if isinstance(state, ScheduledState):
        return ScheduledState(state.taken, with_rates(state.inner, rate))
    return {name: dict(own) | {"lr": rate(name, own["lr"])} for name, own in state.items()}
