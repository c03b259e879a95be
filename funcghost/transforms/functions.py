"""The transforms: pure functions of parameters, batch and reducers, made from a loss."""

from collections.abc import Callable

import optree
from torch import Tensor

from funcghost.algebra.cost import means_of
from funcghost.algebra.pair_algebra import check_pairs, scores_along
from funcghost.algebra.pairs import Pairs
from funcghost.dtypes import as_written
from funcghost.engine.plans import Plan
from funcghost.errors import InputError
from funcghost.laws.factored import verify_factors
from funcghost.options import Options, check_options
from funcghost.planning.planner import make_plan
from funcghost.problem import Losses, Problem, Reduction
from funcghost.reducers.bases import split_reducers
from funcghost.reducers.requests import Answer, requested
from funcghost.transforms.steps import Step, Transform, uncompiled
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


def grad_and_reduce(
    losses: Losses,
    *,
    reduction: Reduction = "mean",
    has_aux: bool = False,
    options: Options | None = None,
    plan: Plan | None = None,
) -> Callable[..., Step]:
    """A training gradient and reduced per-sample gradients, from one forward and one backward.

    `step(params, batch, reducers)`, also without reducers, gives a `Step`: `grads` is the gradient of `losses.mean()`
    or `losses.sum()`, a tree like params, equal to autograd's to rounding (zeros for parameters the losses do not
    depend on); `losses` is [b]; `reduced` has the structure of `reducers`; `aux` is the second value of the losses with
    `has_aux=True`. All come detached, but for scores along directions that require gradients, or under
    `torch.func.grad`. With sample i's gradient meaning that of `losses[i]`, whatever the model does.

    Units: `reduced` is about the gradients of the losses as the user's function returned them; `reduction` has no
    effect on it.

    Args:
        losses: `losses(params, batch) -> Tensor[b]`, any function that autograd can differentiate. `params` is any tree
            of floating tensors, `batch` any object.
        reduction: what `grads` is the gradient of.
        has_aux: whether the losses return `(losses, aux)`.
        options: see `Options`.
        plan: a plan from `fg.plan`; without one, the first call makes it (the FLOPs of three steps), and so
            does a later call that runs other ops. A call with sizes not seen before verifies it. Losses of very many
            very small ops, such as a loop over positions, need none. Needed on the meta device, and under
            `torch.compile` where the batch is made inside what is compiled.

    Cost: see the reducers; `fg.dot` adds one forward-sized product per use of a weight.

    Raises:
        InputError: params, losses, reducers or a direction are not what they must be; before anything is computed.
        UnsupportedOpError: a parameter is used in a way that cannot be followed.
        ConservationError: the scores do not add up to what autograd says, on the first call with new ops.
        PlanError: a plan is needed and there is none that fits.

    Example:
        >>> import funcghost as fg, torch
        >>> def losses(params, x):
        ...     return (x @ params["w"]).square()
        >>> params, x = {"w": torch.tensor([1.0, 2.0])}, torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> step = fg.grad_and_reduce(losses, reduction="sum")
        >>> out = step(params, x, {"score": fg.dot({"w": torch.tensor([1.0, 1.0])})})
        >>> out.grads["w"], out.losses, out.reduced["score"]
        (tensor([2., 4.]), tensor([1., 4.]), tensor([2., 4.]))
    """
    if reduction not in ("mean", "sum"):
        raise InputError(f"grad_and_reduce: reduction must be 'mean' or 'sum', found {reduction!r}.")
    transform = Transform(losses, reduction, has_aux, options, plan)
    return transform.bound(Transform.step)


def reduce(losses: Losses, *, options: Options | None = None, plan: Plan | None = None) -> Callable[..., Tree]:
    """Reduced per-sample gradients alone: no gradient of a parameter is computed.

    `score(params, batch, reducers)` has the structure of `reducers`. Arguments, units and errors as in
    `grad_and_reduce`. Cost of `fg.dot`: a forward, the gradients of the activations, and one more product per weight:
    as many FLOPs as a plain training step.

    Example:
        >>> import funcghost as fg, torch
        >>> score = fg.reduce(lambda params, x: x @ params["w"])
        >>> score({"w": torch.zeros(2)}, torch.eye(2), fg.dot({"w": torch.tensor([3.0, 4.0])}))
        tensor([3., 4.])
    """
    transform = Transform(losses, None, False, options, plan)
    return transform.bound(Transform.score)


def pairs(losses: Losses, *, options: Options | None = None, plan: Plan | None = None) -> Callable[[Tree, Tree], Pairs]:
    """The per-sample gradients of a batch in factored form: `fg.pairs(losses)(params, batch)` gives `Pairs`.

    One forward and one backward, without any weight gradient; memory for the inputs and output gradients of all uses of
    parameters. Factors share memory with activations and with the batch: do not write to these while pairs are kept.
    Arguments and errors as in `grad_and_reduce`.

    Law: `fg.materialize` of it is the tree of the gradients of `losses[i]`, [b, *shape].

    Example:
        >>> import funcghost as fg, torch
        >>> pairs = fg.pairs(lambda params, x: x @ params["w"])({"w": torch.zeros(2)}, torch.eye(2))
        >>> fg.cross_dots(pairs, pairs)
        tensor([[1., 0.],
                [0., 1.]])
    """
    kept = pairs_and_losses(losses, options=options, plan=plan)
    return lambda params, batch: kept(params, batch)[0]


def pairs_and_losses(
    losses: Losses, *, options: Options | None = None, plan: Plan | None = None
) -> Callable[[Tree, Tree], tuple[Pairs, Tensor]]:
    """As `pairs`, along with the losses [b], detached."""
    return Transform(losses, None, False, options, plan).pairs


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
    nothing to tell apart, and the plan serves batches of one). Costs the FLOPs of about three steps, and memory for all
    output gradients at once: a few short samples will do.

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
