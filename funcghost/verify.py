"""The conservation law: for random c and V, `<sum_i c_i grad_i, V>` by autograd equals `c . dots` by funcghost.

Autograd knows nothing of sites. A use of a parameter that was not seen, a wrong rule or a wrong layout breaks the law.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from funcghost.errors import ConservationError
from funcghost.trees import Params

Scores = Callable[[Sequence[Sequence[Tensor]]], Tensor]
"""Maps directions to scores [b, k]."""

TOLERANCE = {torch.float64: 1e-7, torch.float32: 3e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Relative to the sum of the sizes of the terms: rounding of a deep network, far below one parameter's share."""


@dataclass(frozen=True, eq=False)
class Witness:
    """What autograd says: the gradient of `<c, losses>`, and the directions to test it in."""

    losses: Tensor
    weights: Tensor
    gradients: list[Tensor]
    direction: list[Tensor]
    tolerance: float

    @property
    def finite(self) -> bool:
        """Whether there is anything to compare: NaN and inf in the losses spread over a batch's gradient."""
        return all(bool(value.isfinite().all()) for value in (self.losses, *self.gradients))

    def shares(self) -> list[float]:
        """`<gradient, V>` of each parameter."""
        return [float((g.double() * v.double()).sum()) for g, v in zip(self.gradients, self.direction, strict=True)]


def sample_weights(losses: Tensor) -> Tensor:
    """The weights c [b]: of either sign, of size 1/2 to 3/2, the same for the same b."""
    generator = torch.Generator().manual_seed(losses.shape[0])
    size = torch.rand(losses.shape, generator=generator) + 0.5
    sign = torch.randint(0, 2, losses.shape, generator=generator) * 2 - 1
    return (size * sign).to(losses)


def witness(losses: Tensor, weights: Tensor, gradients: list[Tensor], precision: torch.dtype) -> Witness:
    """Chooses V so that every parameter has a share of like size: along its gradient and across it.

    A parameter with a small gradient would otherwise vanish among the large ones, and its absence with it.
    `precision` is the lowest precision met on the way.
    """
    norms = [float(torch.linalg.vector_norm(g.double())) for g in gradients]
    largest = max((n for n in norms if 0 < n < float("inf")), default=1.0)
    # A gradient that is zero but for rounding (the bias of an attention's keys) is not blown up past the tolerance.
    smallest = largest * max(1e-4, min(1.0, 32 * torch.finfo(precision).eps / TOLERANCE[precision]))
    direction = []
    for index, (gradient, norm) in enumerate(zip(gradients, norms, strict=True)):
        generator = torch.Generator(gradient.device).manual_seed(index)
        noise = torch.randn(gradient.shape, generator=generator, device=gradient.device, dtype=torch.float64)
        noise = noise / torch.linalg.vector_norm(noise).clamp_min(1e-30)
        along = gradient.double() / max(norm, 1e-30) if norm < float("inf") else 0.0
        size = 0.5 + ((index * 7919) % 101) / 101
        direction.append(
            ((along * size + noise) / max(norm if norm < float("inf") else 0.0, smallest)).to(gradient.dtype)
        )
    return Witness(losses.detach(), weights, gradients, direction, TOLERANCE[precision])


def check_conservation(params: Params, scores: Scores, seen: Witness, nearby: Callable[[], Sequence[Tensor]]) -> None:
    """Compares; if the law does not hold, finds the parameters whose share is off.

    `nearby()` gives autograd's gradients at parameters that differ by rounding: what such a change does to a share is
    no evidence against ours.

    Raises:
        ConservationError: naming the parameters.
    """
    tolerance = seen.tolerance
    shares = seen.shares()
    everything = list(range(len(shares)))
    groups = [everything] if tolerance < 1e-2 else [everything[i::8] for i in range(min(8, len(shares)))]
    wrong = [group for group in groups if _off(scores, seen, shares, group, tolerance)]
    if not wrong:
        return
    culprits = [index for group in wrong for index in _narrow(scores, seen, shares, group, tolerance)]
    found = _weighted(scores(_restricted(seen.direction, culprits)), seen.weights)
    moved = replace(seen, gradients=list(nearby())).shares()
    rounding = sum(abs(moved[i] - shares[i]) for i in culprits)
    if abs(float(found.sum()) - sum(shares[i] for i in culprits)) <= 64 * rounding:
        return
    named = [params.names[i] for i in culprits[:10]]
    raise ConservationError(
        f"the scores do not add up for parameters {named}{' and others' if len(culprits) > 10 else ''}: "
        f"sum_i c_i <grad_i, V> is {sum(shares[i] for i in culprits):.6g} by autograd, {float(found.sum()):.6g} by "
        "funcghost. They are used where a torch function mode does not see it (inside a custom autograd Function, a "
        "torch.func transform of their own, a compiled submodule, a C++ extension), changed in place through a view, "
        "or by an op whose rule is wrong. Call ordinary torch ops on these parameters, out of place; correct the rule "
        "given to fg.register_rule; or leave these parameters out of params."
    )


def _weighted(scores: Tensor, weights: Tensor) -> Tensor:
    return scores[:, 0].double() * weights.double()


def _off(scores: Scores, seen: Witness, shares: Sequence[float], group: Sequence[int], tolerance: float) -> bool:
    terms = _weighted(scores(_restricted(seen.direction, group)), seen.weights)
    size = float(terms.abs().sum()) + sum(abs(shares[i]) for i in group)
    return not abs(float(terms.sum()) - sum(shares[i] for i in group)) <= tolerance * size


def _narrow(scores: Scores, seen: Witness, shares: Sequence[float], group: list[int], tolerance: float) -> list[int]:
    """Halves a group that is off until single parameters are left."""
    if len(group) == 1:
        return group
    halves = group[: len(group) // 2], group[len(group) // 2 :]
    found = [
        i
        for half in halves
        if _off(scores, seen, shares, half, tolerance)
        for i in _narrow(scores, seen, shares, half, tolerance)
    ]
    return found or group


def _restricted(direction: Sequence[Tensor], group: Sequence[int]) -> list[list[Tensor]]:
    chosen = set(group)
    return [[v if i in chosen else torch.zeros_like(v) for i, v in enumerate(direction)]]
