"""The law of factors: what the factored per-sample gradients say along a direction is what the taps say.

`<grad_i, V>` by the factors of every use must equal the scores by `J V`, which the conservation law holds to autograd:
for each sample, and for each group of parameters that share a tap.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from funcghost.algebra.contractions import along
from funcghost.algebra.cost import Means, Sketch, means_of
from funcghost.algebra.factors import Factor
from funcghost.engine.ledger import Ledger
from funcghost.engine.plans import Contraction, Plan
from funcghost.engine.run import Outcome, run
from funcghost.errors import ConservationError
from funcghost.laws.conservation import Witness, together, witness
from funcghost.laws.draws import near, no_evidence, sample_weights
from funcghost.options import Options
from funcghost.problem import Problem, backward
from funcghost.reducers.bases import Additive
from funcghost.reducers.by_parameter import PerParamAdditive
from funcghost.side_effects import untouched
from funcghost.trees import as_whole


@dataclass(frozen=True, eq=False)
class Along(Additive):
    """`<grad_i, V>` by factors."""

    direction: dict[str, Tensor]
    degree: ClassVar[int] = 1

    def of_parameter(self, name: str, uses: Sequence[Factor]) -> Tensor:
        """[b]."""
        return torch.stack([along(use, self.direction[name]) for use in uses]).sum(0)

    def zero(self, batch: int, like: Tensor) -> Tensor:
        """[b]."""
        return like.new_zeros((batch,))


def verify_factors(problem: Problem, plan: Plan, options: Options, tasks: Sequence[Additive] = ()) -> Plan:
    """Checks the law of factors on this batch, unless told never to; the plan says which routes the tasks take.

    Raises:
        ConservationError: naming the parameters whose factors are wrong.
    """
    device = problem.params.leaves[0].device
    means = means_of(options, device, plan.rates)
    plan = replace(plan, rates=means.rates)
    names = problem.params.names
    with untouched(problem.devices(), plan.written):
        leaves = problem.leaves()
        losses, _ = problem.evaluate(leaves)
        weights = sample_weights(losses)
        gradients = [as_whole(gradient) for gradient in backward(losses, leaves, weights)]
    seen = witness(losses, weights, gradients, leaves, plan.precision)
    groups = together(plan, names)
    directions = [[v if i in group else None for i, v in enumerate(seen.direction)] for group in groups]
    apart = PerParamAdditive(Along(dict(zip(names, seen.direction, strict=True))))

    def measured(problem: Problem) -> tuple[Outcome, Ledger, Tensor]:
        """The scores of each group by `J V`, in the outcome, and by factors, [b, groups]."""
        ledger = Ledger(names, [apart], sketching=True)
        with untouched(problem.devices(), plan.written):
            outcome = run(problem, plan, directions, reduction=None, ledger=ledger)
        (parts,) = ledger.results(outcome.losses, outcome.scores.dtype)
        of_groups = [torch.stack([parts[names[i]] for i in group]).sum(0) for group in groups]
        return outcome, ledger, torch.stack(of_groups, 1)

    outcome, ledger, factors = measured(problem)
    if options.verify != "never" and seen.finite:

        def nearby(seed: int) -> Tensor:
            with problem.at(near(problem.params.leaves, seed, plan.precision)) as moved:
                other, _, own = measured(moved)
            return torch.stack([other.scores, own])

        _compare(torch.stack([outcome.scores, factors]), groups, names, seen, nearby)
        plan = replace(plan, factored=plan.factored.verified_for(outcome.sizes))
    sketches = {names[index]: uses for index, uses in (ledger.sketches or {}).items()}
    return replace(plan, contractions=_contractions(sketches, tasks, plan.batch, means)) if tasks else plan


def _compare(
    scores: Tensor,
    groups: Sequence[Sequence[int]],
    names: Sequence[str],
    seen: Witness,
    nearby: Callable[[int], Tensor],
) -> None:
    """Holds the scores of each group by factors, `scores[1]` [b, groups], to those by `J V`, `scores[0]`.

    `nearby(seed)` gives both where all differs by rounding: what that does to them is no evidence.
    """
    wrong, moved = list[str](), list[Tensor]()
    scores, (seeds, times) = scores.double(), no_evidence(seen.precision)
    for column, group in enumerate(groups):
        wanted, found = scores[0, :, column], scores[1, :, column]
        off = (found - wanted).abs()
        allowed = seen.tolerance * (seen.share + wanted.abs().max() + found.abs())
        if bool((off <= allowed).all()):
            continue
        moved = moved or [(nearby(seed).double() - scores).abs() for seed in seeds]
        shift = torch.stack([other[..., column] for other in moved]).max()
        if not bool((off <= allowed + times * shift).all()):
            wrong += [names[i] for i in group]
    if wrong:
        raise ConservationError(
            f"the factored per-sample gradients of parameters {wrong[:10]} are not those that the scores are of. They "
            "are used by an op that mixes samples inside, or whose description as a product is wrong. Leave these "
            "parameters out of params for reducers such as fg.squared_norm, and please report the model."
        )


def _contractions(
    sketches: dict[str, list[Sketch]], tasks: Sequence[Additive], batch: int, means: Means
) -> tuple[Contraction, ...]:
    rows = []
    for task in tasks:
        for name, uses in sketches.items():
            chosen = task.within(means).route(uses, batch, name)
            if chosen is not None:
                route, rejected = chosen
                rows.append(
                    Contraction(
                        type(task).__name__,
                        name,
                        route.name,
                        route.flops,
                        min(route.full, means.budget),
                        route.seconds(means.rates),
                        tuple(f"{other.name} {other.seconds(means.rates):.2g} s" for other in rejected),
                    )
                )
    return tuple(rows)
