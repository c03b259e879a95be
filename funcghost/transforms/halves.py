"""What can be done of a step apart from it: its plan before, and the reducers of kept pairs after."""

import optree

from funcghost.algebra.cost import means_of
from funcghost.algebra.pair_algebra import check_pairs, scores_along
from funcghost.algebra.pairs import Pairs
from funcghost.dtypes import as_written
from funcghost.engine.plans import Plan
from funcghost.errors import InputError
from funcghost.laws.factored import verify_factors
from funcghost.options import Options, check_options
from funcghost.planning.planner import make_plan
from funcghost.problem import Losses, Problem
from funcghost.reducers.bases import split_reducers
from funcghost.reducers.requests import Answer, requested
from funcghost.transforms.compiling import uncompiled
from funcghost.trees import Tree, split_params


def apply(reducers: Tree, pairs: Pairs, *, options: Options | None = None) -> Tree:
    """The reducers over kept pairs: the same numbers as in the step that gave the pairs.

    Law: `fg.apply(r, fg.pairs(losses)(params, batch)) == fg.reduce(losses)(params, batch, r)`.

    Shapes, units, cost and errors: those of the reducers. `per_token` and `per_segment` need the step itself.

    Raises:
        InputError: the reducers are not reducers, or need the positions, which pairs do not keep apart.

    Example:
        >>> import funcghost as fg, torch
        >>> pairs = fg.pairs(lambda params, x: x @ params["w"])({"w": torch.zeros(2)}, torch.eye(2))
        >>> fg.apply({"norm": fg.squared_norm()}, pairs)
        {'norm': tensor([1., 1.])}
    """
    pairs, means = check_pairs(pairs, "apply"), means_of(check_options(options), pairs.device)
    wanted, spec = split_reducers(reducers)
    request = requested(wanted, pairs.params)
    if request.positions:
        raise InputError("apply: scores by position are those of a step: pass the reducer to fg.grad_and_reduce.")
    tasks = [task.within(means) for task in request.tasks]
    with as_written(pairs.device):
        parts = [{name: task.of_parameter(name, uses) for name, uses in pairs.uses.items()} for task in tasks]
        answer = Answer(scores_along(pairs, request.directions), parts)
        return optree.tree_unflatten(spec, request.results(answer, pairs.params))


def plan(
    losses: Losses,
    params: Tree,
    batch: Tree,
    reducers: Tree = None,
    options: Options | None = None,
    *,
    has_aux: bool = False,
) -> Plan:
    """Plans a step on a batch: which ops the parameters reach, where samples lie, how `J V` is had, what it costs.

    Print it to see the table; pass it to `grad_and_reduce` or `reduce` so that they never plan again. It serves any
    batch size and length for which the losses run the same ops (plan with two samples or more: with one there is
    nothing to tell apart, and the plan serves batches of one). Takes the time of four to seven plain steps, and 1.4 to
    3 times the memory of one (`tests/benchmarks/bench_planning.py`): a few short samples will do.

    Raises:
        InputError, UnsupportedOpError, ConservationError, PlanError: as in `grad_and_reduce`.

    Example:
        >>> import funcghost as fg, torch
        >>> print(fg.plan(lambda params, x: (x @ params["w"]).sum(1), {"w": torch.zeros(2, 3)}, torch.eye(2)))
        site  op             parameters  output  layout  J V by  FLOP  bytes
        0     Tensor.matmul  w           2x3     axis 0  rule    24    24
        1 sites tapped, 0 carried; 24 FLOP per direction on top of a step, planned with 2 samples, verified
    """
    problem, options = Problem(losses, split_params(params), batch, has_aux), check_options(options)
    request = requested(split_reducers(reducers)[0], problem.params)
    with uncompiled():
        made = make_plan(problem, options)
        return verify_factors(problem, made, options, request.tasks) if request.factored and made.batch else made
