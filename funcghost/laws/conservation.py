"""The conservation law: for random c and V, `<sum_i c_i grad_i, V>` by autograd equals `c . dots` by funcghost.

Autograd knows nothing of sites. A use of a parameter that was not seen, a wrong rule or a wrong layout breaks the law.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, hypot, inf, isfinite

import torch
from torch import Tensor

from funcghost.algebra.sums import applied
from funcghost.dtypes import wide, wide_dtype
from funcghost.engine.plans import Plan
from funcghost.errors import ConservationError
from funcghost.laws.draws import PERIOD, TOLERANCE, no_evidence, repeated
from funcghost.trees import Params

Scores = Callable[[Sequence[Sequence[Tensor | None]]], Tensor]
"""Maps directions (None for zero) to scores [b, k]."""


@dataclass(frozen=True, eq=False)
class Witness:
    """What autograd says: `<gradient, V>` of each parameter, its share, for the gradient of `<c, losses>`.

    `direction`: V.
    `precision`: the lowest met on the way.
    `share`: the size of the share that a parameter has.
    """

    losses: Tensor
    weights: Tensor
    shares: list[float]
    direction: list[Tensor]
    precision: torch.dtype
    share: float

    @property
    def tolerance(self) -> float:
        """How far off a sum may be, relative to its terms."""
        return TOLERANCE[self.precision]

    @property
    def finite(self) -> bool:
        """Whether there is anything to compare: NaN and inf in the losses spread over a batch's gradient."""
        return all(map(isfinite, (float(self.losses.double().sum()), *self.shares)))

    def repeats(self, losses: Tensor) -> bool:
        """Whether the losses of another run are these, but for rounding."""
        off, size = (losses - self.losses).abs().max(), self.losses.abs().max()
        return bool(off <= self.tolerance * size) if losses.numel() else True


def witness(
    losses: Tensor, weights: Tensor, gradients: list[Tensor], leaves: Sequence[Tensor], precision: torch.dtype
) -> Witness:
    """Chooses V so that every parameter has a share of like size, along its gradient and across it, of either sign.

    A parameter with a small gradient would otherwise vanish among the large ones, and its absence with it; and in a sum
    of shares of both signs what rounding does to each adds up as in a random walk. V has the dtypes of the parameters,
    which their gradients need not have (`Tensor.grad_dtype`). The list of gradients is used up on the way: each is
    freed once its part of V is made.
    """
    norms = list(map(_norm, gradients))
    largest = max((n for n in norms if 0 < n < inf), default=1.0)
    generator = torch.Generator().manual_seed(0)
    shares, direction = list[float](), list[Tensor]()
    drawn = torch.rand(PERIOD, generator=generator, device="cpu") - 0.5
    signs = (2 * torch.randint(0, 2, (len(gradients),), generator=generator, device="cpu") - 1).tolist()
    gradients.reverse()
    for index, (norm, sign, leaf) in enumerate(zip(norms, signs, leaves, strict=True)):
        gradient = wide(gradients.pop())
        noise = repeated(drawn.roll(-4001 * index).to(gradient.device), gradient.shape).to(gradient.dtype)
        across = max(float(torch.linalg.vector_norm(noise)), 1e-30)
        along = sign * (0.5 + ((index * 7919) % 101) / 101)
        # A gradient that is zero but for rounding (the bias of an attention's keys) is not blown up without end.
        boost = min(largest / max(norm, 1e-30), 1e3) if isfinite(norm) else 1.0
        value = noise.mul_(boost / across).add_(gradient, alpha=along * boost / max(norm, 1e-30))
        direction.append(value.to(leaf.dtype))
        shares.append(_product(gradient, wide(direction[-1])))
    return Witness(losses.detach(), weights, shares, direction, precision, largest)


def shares_of(gradients: Sequence[Tensor], direction: Sequence[Tensor]) -> list[float]:
    """`<gradient, V>` of each parameter."""
    return [_product(wide(g), wide(v)) for g, v in zip(gradients, direction, strict=True)]


def _norm(value: Tensor) -> float:
    """The norm; in float64, which is slower, where squares leave the range of float32."""
    found = float(torch.linalg.vector_norm(value, dtype=wide_dtype(value.dtype)))
    return found if 1e-15 < found < inf else float(torch.linalg.vector_norm(value, dtype=torch.float64))


def _product(a: Tensor, b: Tensor) -> float:
    """The inner product; added up in float64, which is slower, where it leaves the range of float32."""
    plain = a.layout is torch.strided and not a.is_complex() and a.dtype == b.dtype
    found = float(applied(a.reshape(1, a.numel()), b.flatten())) if plain else inf
    return found if isfinite(found) else float((a * b).sum(dtype=torch.float64))


def check_conservation(
    params: Params,
    scores: Scores,
    seen: Witness,
    groups: Sequence[list[int]],
    nearby: Callable[[int], Sequence[Tensor]],
    explain: Callable[[], str],
) -> None:
    """Compares the sum of shares of each group of parameters, and then of its halves where it is off.

    A column for each group costs no more than one for all where directions do not meet.

    `nearby(seed)` gives autograd's gradients where all differs by rounding: what such a change does to a share is
    no evidence against ours. `explain()` says what the cause may be.

    Raises:
        ConservationError: naming the parameters.
    """
    wrong = _broken(scores, seen, groups)
    while any(len(group) > 1 for group in wrong):
        halves = [half for group in wrong for half in _halves(group)]
        wrong = _broken(scores, seen, halves) or [[index] for group in wrong for index in group]
    culprits = sorted(index for group in wrong for index in group)
    if not culprits:
        return
    seeds, times = no_evidence(seen.precision)
    shares, moved = seen.shares, [shares_of(nearby(seed), seen.direction) for seed in seeds]
    found = _weighted(scores(_restricted(seen.direction, [[index] for index in culprits])), seen.weights).sum(0)
    ours = dict(zip(culprits, found.tolist(), strict=True))
    rounding = {index: times * max(abs(other[index] - shares[index]) for other in moved) for index in culprits}
    culprits = [index for index in culprits if not abs(ours[index] - shares[index]) <= rounding[index]]
    if not culprits:
        return
    named = [params.names[i] for i in culprits[:10]]
    raise ConservationError(
        f"the scores do not add up for parameters {named}{' and others' if len(culprits) > 10 else ''}: "
        f"sum_i c_i <grad_i, V> is {sum(shares[i] for i in culprits):.6g} by autograd, "
        f"{sum(ours[i] for i in culprits):.6g} by funcghost. {explain()}"
    )


def _weighted(scores: Tensor, weights: Tensor) -> Tensor:
    return scores.double() * weights.double().unsqueeze(1)


def _broken(scores: Scores, seen: Witness, groups: Sequence[list[int]]) -> list[list[int]]:
    """The groups whose scores do not add up to their shares."""
    shares = seen.shares
    terms = _weighted(scores(_restricted(seen.direction, groups)), seen.weights)
    wrong = []
    for group, ours, size in zip(groups, terms.sum(0).tolist(), terms.abs().sum(0).tolist(), strict=True):
        wanted = sum(shares[i] for i in group)
        scale = seen.share + size + hypot(*(shares[i] for i in group))
        if not abs(ours - wanted) <= seen.tolerance * scale:
            wrong.append(group)
    return wrong


def _halves(group: list[int]) -> list[list[int]]:
    return [half for half in (group[: len(group) // 2], group[len(group) // 2 :]) if half]


def _restricted(direction: Sequence[Tensor], groups: Sequence[list[int]]) -> list[list[Tensor | None]]:
    return [[v if i in group else None for i, v in enumerate(direction)] for group in groups]


def together(plan: Plan, names: Sequence[str]) -> list[list[int]]:
    """The parameters to check together: those of one tap, since `J V` is had there for all of them at once.

    Tangents that are carried meet those of other sites on their way, and each sum of them costs as much as a direction
    does: of such parameters there is one, and more, up to eight, where a share would be lost in the rounding of it.
    """
    numbers = {name: index for index, name in enumerate(names)}
    carried = {numbers[name] for site in plan.sites if site.action == "carry" for name in site.parameters}
    groups = {index: [index] for index in numbers.values() if index not in carried}
    for site in plan.sites:
        for name in site.parameters[1:]:
            one, other = (groups.get(numbers[n]) for n in (site.parameters[0], name))
            if one is not None and other is not None and one is not other:
                one.extend(other)
                groups.update(dict.fromkeys(other, one))
    apart = list({id(group): group for group in groups.values()}.values())
    # A sum of n shares may be off by some tolerance * (1 + 4 * n ** 0.5) of one, which is to be a quarter at most.
    most = max(1.0, (0.25 / TOLERANCE[plan.precision] - 1) / 4) ** 2
    sums = min(8, ceil(len(carried) / most))
    return [*apart, *(sorted(carried)[i::sums] for i in range(sums))]
