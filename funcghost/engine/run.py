"""One forward and one backward of the losses along a plan."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from funcghost.algebra.directions import Direction, as_dense
from funcghost.algebra.factors import Factor
from funcghost.dtypes import as_written, score_dtype
from funcghost.engine.capture import Capture, Choose
from funcghost.engine.ledger import Ledger
from funcghost.engine.plans import Plan
from funcghost.engine.positions import Positions
from funcghost.engine.to_the_end import ToTheEnd
from funcghost.errors import MismatchError
from funcghost.ops.digest import NO_SIZES, Sizes
from funcghost.problem import Problem, Reduction, cotangents, detached


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a run gives.

    `scores`: [b, k], in units of the losses.
    `gradients`: the training gradient, if asked for.
    `losses`, `aux`: what the losses returned, detached.
    `sizes`: those that its ops ran with.
    `positions`: the scores by position [b, t], by column.
    `parts`: what the tasks of the ledger made of each parameter.
    `pairs`: the factors that the ledger kept.
    """

    scores: Tensor
    gradients: list[Tensor]
    losses: Tensor
    aux: Any
    sizes: Sizes = NO_SIZES
    positions: Mapping[int, Tensor] = field(default_factory=dict)
    parts: Sequence[Mapping[str, Tensor]] = ()
    pairs: Mapping[str, tuple[Factor, ...]] = field(default_factory=dict)


def run(
    problem: Problem,
    plan: Plan,
    directions: Sequence[Direction],
    *,
    reduction: Reduction | None,
    choose: Choose | None = None,
    standins: dict[int, Tensor] | None = None,
    ledger: Ledger | None = None,
    positions: Positions | None = None,
    dtype: torch.dtype | None = None,
) -> Outcome:
    """Scores along the plan; with a `reduction` also the gradient of the reduced losses, from the same backward.

    Factors of the gradients of the losses go to the `ledger`, scores by position to `positions`; products for scores
    are computed in the `dtype`.

    Raises:
        MismatchError: the call does not fit the plan.
    """
    batch = plan.batch_size(problem.batch)
    if batch == 0:
        return _run_empty(problem, len(directions), reduction)
    leaves = problem.leaves()
    shape, dtype_of_scores = (batch, len(directions)), score_dtype(problem.params)
    probe = torch.zeros(shape, dtype=dtype_of_scores, device=leaves[0].device, requires_grad=True)
    kind = ToTheEnd if problem.in_step else Capture
    capture = kind(
        plan, leaves, directions, probe, problem.params, choose, standins, ledger, positions, dtype, problem.in_step
    )
    with capture:
        losses, aux = problem.evaluate(leaves)
    unfit: MismatchError | None = None
    try:
        losses = capture.finish(losses)
        if problem.in_step:
            capture.check_moves(at_once=True)
    except MismatchError as error:
        unfit = error
    sizes = capture.digest.sizes()
    problem.settle(unfit, sizes, losses.shape[0])
    if positions is not None:
        positions.settle()
    carried = capture.carried_to(losses)
    tail = carried and carried.shadow
    if ledger is not None and tail is not None:
        ledger.expect([tail])
    summing = ledger.summing if ledger is not None and reduction is not None else ()
    asked = [] if reduction is None else [leaf for number, leaf in enumerate(leaves) if number not in summing]
    wanted = [probe, *asked]
    cotangent = cotangents(losses, reduction or "sum")
    scores, *gradients = problem.backward(losses, wanted, cotangent, keep_graph=ledger is not None and tail is not None)
    if not problem.is_meta() and not problem.in_step:
        capture.check_moves(at_once=standins is None)
    if directions:
        scores = scores / cotangent.to(scores.dtype).unsqueeze(1)
    scale = losses.shape[0] if reduction == "mean" else 1
    if ledger is not None:
        with as_written(losses.device):
            ledger.close(tail, cotangent, scale)
        if summing:
            rest = iter(gradients)
            gradients = [ledger.sum_like(i, leaf) if i in summing else next(rest) for i, leaf in enumerate(leaves)]
    by_position = {} if positions is None else positions.results(scale)
    if carried and carried.tangents:
        tails = [torch.zeros_like(losses) if tangent is None else as_dense(tangent) for tangent in carried.tangents]
        scores = scores + torch.stack(tails, -1).to(scores.dtype)
    return Outcome(scores, gradients, losses.detach(), detached(aux), sizes, by_position)


def run_plain(problem: Problem, reduction: Reduction | None, expected: int | None = None) -> Outcome:
    """The losses, of as many samples as `expected`, and with a `reduction` the training gradient: nothing is scored."""
    leaves = problem.leaves()
    losses, aux = problem.evaluate(leaves)
    unfit: MismatchError | None = None
    if expected is not None and losses.shape[0] != expected:
        unfit = MismatchError(f"the losses are of {losses.shape[0]} samples where the plan expects {expected}.")
    problem.settle(unfit, NO_SIZES, losses.shape[0])
    gradients = list[Tensor]()
    if reduction is not None or problem.in_step:
        gradients = problem.backward(losses, leaves, cotangents(losses, reduction or "sum"))
    return Outcome(losses.new_zeros((losses.shape[0], 0)), gradients, losses.detach(), detached(aux))


def _run_empty(problem: Problem, columns: int, reduction: Reduction | None) -> Outcome:
    """A batch without samples has no sites worth a look, and no scores."""
    outcome = run_plain(problem, reduction, expected=0)
    return replace(outcome, scores=outcome.losses.new_zeros((0, columns), dtype=score_dtype(problem.params)))
