"""The transforms: pure functions of parameters, batch and reducers, made from a loss, with the plans made for it.

A call runs along a plan that fits, and has one made where none does.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, cast

import optree
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from funcghost.algebra.cost import means_of
from funcghost.algebra.pairs import Pairs
from funcghost.control_flow import is_traced
from funcghost.engine.ledger import Ledger
from funcghost.engine.plans import Plan
from funcghost.engine.positions import Positions
from funcghost.engine.run import Outcome, run, run_plain
from funcghost.engine.summing import summed_over_samples
from funcghost.errors import ConservationError, InputError, MismatchError, PlanError, UnsupportedOpError
from funcghost.laws.factored import verify_factors
from funcghost.options import DEFAULT_BUDGET, Options, check_options
from funcghost.planning.planner import make_plan
from funcghost.planning.ways import verify_plan
from funcghost.problem import Losses, Problem, Reduction
from funcghost.reducers.bases import split_reducers
from funcghost.reducers.requests import Answer, Request, requested
from funcghost.side_effects import undone_on_failure
from funcghost.transforms.compiling import Compilable, Replacing, Standins, read_losses, uncompiled
from funcghost.transforms.lifting import lifted
from funcghost.transforms.one_op import OneOp
from funcghost.trees import Tree, in_short, split_params

log = logging.getLogger("funcghost")

MOST_PLANS = 16
"""How many plans a transform keeps; each is a short list of names and numbers."""


class Step(NamedTuple):
    """What a step gives: the training gradient, the losses [b], the reduced values, and the losses' aux."""

    grads: Tree
    losses: Tensor
    reduced: Tree
    aux: Any

    def __repr__(self) -> str:
        """The fields in short: tensors by their shapes."""
        return in_short(self)


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
        plan: a plan from `fg.plan`; without one, the first call makes it (the time of four to seven steps), and so
            does a later call that runs other ops. Sizes not seen before are verified (two steps): the first three or
            four, and then, where all numbers of shapes are affine in what was verified (`b`, `t`, `b * t`), one when
            their count has doubled. Losses of very many very small ops, such as a loop over positions, need none.
            Needed on the meta device, and under `torch.compile` where the batch is made inside what is compiled.

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


class Transform(Compilable):
    """A loss with its options, and the plans made for it so far, the latest used first."""

    def __init__(
        self, losses: Losses, reduction: Reduction | None, has_aux: bool, options: Options | None, plan: Plan | None
    ) -> None:
        if not callable(losses):
            raise InputError(f"losses: must be a function losses(params, batch) -> [b], found {type(losses).__name__}.")
        if plan is not None and not isinstance(plan, Plan):
            raise InputError(f"plan: must come from fg.plan, found {type(plan).__name__}.")
        self.losses, self.reduction, self.has_aux = losses, reduction, has_aux
        self.options = check_options(options)
        if reduction is not None and self.options.route == "forward":
            raise InputError(
                "Options.route='forward' has no backward to take a training gradient from; use it with fg.reduce."
            )
        self.plans = [] if plan is None else [plan]
        by_default = replace(self.options, verify="first", memory_budget=DEFAULT_BUDGET, rates=None) == Options()
        self.one_op = OneOp() if plan is None and by_default else None

    def problem(self, params: Tree, batch: Tree) -> Problem:
        """The losses at these parameters, on this batch."""
        return Problem(self.losses, split_params(params), batch, self.has_aux)

    def step(self, params: Tree, batch: Tree, reducers: Tree = None) -> Step:
        """The function that `grad_and_reduce` returns."""
        if torch.compiler.is_compiling():
            return self._read(params, batch, reducers)
        with uncompiled():
            return self.solve(params, batch, reducers, None)

    def score(self, params: Tree, batch: Tree, reducers: Tree = None) -> Tree:
        """The function that `reduce` returns."""
        return self.step(params, batch, reducers).reduced

    def _read(self, params: Tree, batch: Tree, reducers: Tree) -> Step:
        """The step as Dynamo reads it."""
        losses, given, captured, traced = self.losses, (), (), cast(Any, None)  # noqa: F841
        leaves, spec = tree_flatten((params, batch, reducers))  # noqa: RUF059
        torch._dynamo.comptime.comptime(read_losses)
        grads, values, reduced, aux = traced(given, captured)
        return Step(grads if self.reduction else None, values, reduced, aux if self.has_aux else None)

    def pairs(self, params: Tree, batch: Tree) -> tuple[Pairs, Tensor]:
        """The per-sample gradients in factored form, and the losses [b]."""
        problem = self.problem(params, batch)
        with uncompiled():
            outcome = self._outcome(problem, Request(keep=True), None)
        shapes = tuple(
            (name, tuple(leaf.shape), leaf.dtype)
            for name, leaf in zip(problem.params.names, problem.params.leaves, strict=True)
        )
        return Pairs(outcome.pairs, shapes, problem.params.spec), outcome.losses

    def solve(self, params: Tree, batch: Tree, reducers: Tree, standins: Standins | None) -> Step:
        """The step, planned or along a plan; `standins` while a compiler traces."""
        problem = self.problem(params, batch)
        wanted, spec = split_reducers(reducers)
        request = requested(wanted, problem.params)
        outcome = self._outcome(problem, request, standins)
        reduced = request.results(Answer(outcome.scores, outcome.parts, outcome.positions), problem.params)
        grads = problem.params.rebuild(outcome.gradients) if self.reduction else None
        return Step(grads, outcome.losses, optree.tree_unflatten(spec, reduced), outcome.aux)

    def _outcome(self, problem: Problem, request: Request, standins: Standins | None) -> Outcome:
        if request.empty and standins:
            with Replacing(standins):
                return run_plain(problem, self.reduction)
        traced = standins is not None or is_traced()
        if not request.empty and traced:
            return self.traced(problem, request, standins or {})
        if request.positions and torch._C._functorch.maybe_current_level() is not None:
            raise InputError("per_token and per_segment cannot be vmapped over directions: use fg.stack.")
        return lifted(
            lambda below, own: self._solved(
                below, request if own is request.directions else replace(request, directions=tuple(own))
            ),
            problem,
            request.directions,
            linear=not (request.tasks or request.keep or request.positions),
        )

    def run(
        self,
        problem: Problem,
        request: Request,
        plan: Plan,
        reduction: Reduction | None,
        standins: Standins | None = None,
    ) -> Outcome:
        """What is asked for, along a plan."""
        ledger = self._ledger(problem, request, plan, summing=reduction is not None and standins is None)
        outcome = run(
            problem,
            plan,
            request.directions,
            reduction=reduction,
            standins=standins,
            ledger=ledger,
            positions=Positions(request.positions) if request.positions else None,
            dtype=self.options.compute_dtype,
        )
        return self._with_results(outcome, ledger, problem)

    def _ledger(self, problem: Problem, request: Request, plan: Plan | None, summing: bool = False) -> Ledger | None:
        if not request.tasks and not request.keep:
            return None
        means = means_of(self.options, problem.params.leaves[0].device, plan.rates if plan else None)
        tasks = [task.within(means) for task in request.tasks]
        formed = summing and plan is not None and not request.keep and any(task.degree > 1 for task in tasks)
        numbers = summed_over_samples(problem, plan) if formed and plan is not None else ()
        return Ledger(problem.params.names, tasks, keep=request.keep, summing=numbers, budget=means.budget)

    def _with_results(self, outcome: Outcome, ledger: Ledger | None, problem: Problem) -> Outcome:
        if ledger is None:
            return outcome
        kept = ledger.pairs(outcome.losses, problem.params.leaves) if ledger.keep else {}
        return replace(outcome, parts=ledger.results(outcome.losses, outcome.scores.dtype), pairs=kept)

    def needs_no_plan(self, problem: Problem) -> bool:
        """Whether the losses are many small ops, which are taken as one."""
        return self.one_op is not None and self.one_op.pays(problem)

    def _solved(self, problem: Problem, request: Request) -> Outcome:
        """As one op where the losses are many small ones, and no plan is needed; else along a plan."""
        waits = request.tasks and problem.params.leaves[0].device.type != "cpu"
        if self.one_op is None or request.empty or request.keep or request.positions or waits:
            return self.planned(problem, request)
        ledger, budget = self._ledger(problem, request, None), self.options.memory_budget
        try:
            if not self.needs_no_plan(problem):
                return self.planned(problem, request)
            outcome = self.one_op.run(problem, request.directions, self.reduction, ledger, budget, self.due)
        except (UnsupportedOpError, ConservationError, MismatchError, RuntimeError) as error:
            log.info("the losses are not taken as one op: %s", error)
            outcome = self.planned(problem, request)
            if not isinstance(error, MismatchError):
                self.one_op = None
            return outcome
        return self._with_results(outcome, ledger, problem)

    def planned(self, problem: Problem, request: Request) -> Outcome:
        """Runs along the first plan that fits; plans anew where none does, and needs none where nothing is scored."""
        if request.empty:
            return run_plain(problem, self.reduction)
        reasons = []
        for plan in list(self.plans):
            try:
                return self.attempt(problem, request, plan)
            except MismatchError as reason:
                log.info("a plan does not fit this call: %s", reason)
                reasons.append(reason)
        if reasons and problem.is_meta():
            raise PlanError(f"the plan passed is not for these losses: {reasons[0]} Make it with fg.plan(...).")
        plan = make_plan(problem, self.options)
        try:
            return self.attempt(problem, request, plan, new=True)
        except MismatchError:
            return self.attempt(problem, request, make_plan(problem, self.options, exactly=True), new=True)

    def attempt(self, problem: Problem, request: Request, plan: Plan, new: bool = False) -> Outcome:
        """Runs along a plan, known or just made (`new`); if that fails in any way, leaves no trace."""
        with undone_on_failure(problem.devices(), plan.written) as changes:
            outcome, checked = self.run(problem, request, plan, self.reduction), plan
            if not new:
                known = plan if plan.written is not None else replace(plan, written=changes.written)
                checked = self._verified(problem, known, outcome)
            if request.factored and len(outcome.losses) and self.due(not checked.factored.knows(outcome.sizes)):
                checked = verify_factors(problem, checked, self.options)
            self.remember(checked.with_implied(outcome.sizes), instead_of=plan)
        return outcome

    def _verified(self, problem: Problem, plan: Plan, outcome: Outcome) -> Plan:
        """The plan, verified if that is due: with `verify="first"` for sizes that do not follow from others."""
        new = not plan.sizes.knows(outcome.sizes)
        if not outcome.losses.shape[0] or not self.due(new or not plan.verified):
            return plan
        try:
            checked = verify_plan(problem, plan)
        except ConservationError as error:
            if not new:
                raise
            raise MismatchError(f"it does not hold for these sizes: {error}") from error
        return replace(checked, sizes=plan.sizes.verified_for(outcome.sizes)) if checked.verified else plan

    def due(self, new: bool) -> bool:
        """Whether something is to be verified that is new, or is not."""
        return self.options.verify == "always" or (new and self.options.verify == "first")

    def remember(self, plan: Plan, instead_of: Plan | None = None) -> None:
        """Keeps a plan as the one used last."""
        self.plans = [plan, *(known for known in self.plans if known is not instead_of)][:MOST_PLANS]
