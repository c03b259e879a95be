"""A loss with the plans made for it: a call runs along one that fits, and has one made where none does."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, cast

import optree
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._pytree import tree_flatten

from funcghost.algebra.cost import means_of
from funcghost.algebra.pairs import Pairs
from funcghost.engine.ledger import Ledger
from funcghost.engine.plans import Plan
from funcghost.engine.positions import Positions
from funcghost.engine.run import Outcome, run, run_plain
from funcghost.errors import ConservationError, InputError, MismatchError, PlanError, UnsupportedOpError
from funcghost.laws.factored import verify_factors
from funcghost.ops.moves import by_chance
from funcghost.options import DEFAULT_BUDGET, Options, Rates, check_options
from funcghost.planning.planner import make_plan
from funcghost.planning.ways import verify_plan
from funcghost.problem import Losses, Problem, Reduction
from funcghost.reducers.bases import split_reducers
from funcghost.reducers.requests import Answer, Request, requested
from funcghost.side_effects import undone_on_failure, untouched
from funcghost.transforms.compiling import Given, Replacing, read_losses, with_code_of_its_own
from funcghost.transforms.lifting import lifted
from funcghost.transforms.one_op import OneOp
from funcghost.trees import Tree, in_short, split_params

log = logging.getLogger("funcghost")

Standins = dict[int, Tensor]
"""What takes the place of the tensors that the losses close over, by their id, while a compiler traces."""

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


@contextmanager
def uncompiled() -> Iterator[None]:
    """What the losses call runs as plain Python where it was given to `torch.compile`, so that a mode sees its ops.

    Gradients are taken also where the caller has inference mode on.
    """
    enabled = torch.is_grad_enabled()
    with torch.compiler.set_stance("force_eager"):
        if not torch.is_inference_mode_enabled():
            yield
            return
        with torch.inference_mode(False), torch.set_grad_enabled(enabled):
            yield


class Transform:
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

    def bound(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """A method as the function that a user gets: `torch.compile` keeps apart what it makes of each."""
        bound: Callable[..., Any] = with_code_of_its_own(method).__get__(self)
        return bound

    def problem(self, params: Tree, batch: Tree) -> Problem:
        """The losses at these parameters, on this batch."""
        return Problem(self.losses, split_params(params), batch, self.has_aux)

    def step(self, params: Tree, batch: Tree, reducers: Tree = None) -> Step:
        """The function that `grad_and_reduce` returns."""
        if torch.compiler.is_compiling():
            return self._read(params, batch, reducers)
        with uncompiled():
            return self._solve(params, batch, reducers, None)

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

    def prepare(self, params: Tree, batch: Tree, reducers: Tree) -> bool:
        """Sees to it that the first of the plans is verified for these arguments, with nothing changed by that.

        Says whether a graph may be for other sizes, too: if the plan was right for two.
        """
        problem = Problem(self.losses, split_params(params), batch, self.has_aux)
        request = requested(split_reducers(reducers)[0], problem.params)
        if request.empty or problem.is_meta():
            return True
        with torch._guards.tracing(None), uncompiled(), untouched(problem.devices()):
            self.planned(problem, request)
            if any(map(by_chance, self.plans[0].moves)):
                self._attempt(problem, request, make_plan(problem, self.options, any_order=True), new=True)
        return self.options.verify == "never" or len(self.plans[0].sizes) > 1

    def along_plan(self, given: Given, leaves: Sequence[Any], captured: Sequence[Tensor]) -> tuple[Any, ...]:
        """The step as a compiler traces it: what the losses close over comes in as arguments, tensors alone go out."""
        standins = {id(own): value for own, value in zip(given.captured, captured, strict=True)}
        with torch.compiler.set_stance("force_eager"):
            params, batch, reducers = given.tree(leaves)
            found = self._solve(params, batch, reducers, standins if torch.compiler.is_compiling() else None)
            return tuple(() if value is None else value for value in found)

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

    def _solve(self, params: Tree, batch: Tree, reducers: Tree, standins: Standins | None) -> Step:
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
        traced = standins is not None or torch.compiler.is_compiling() or get_proxy_mode() is not None
        if not request.empty and traced:
            return self._along_a_plan(problem, request, standins or {})
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
        ledger = self._ledger(problem, request, plan.rates)
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

    def _ledger(self, problem: Problem, request: Request, rates: Rates | None) -> Ledger | None:
        if not request.tasks and not request.keep:
            return None
        means = means_of(self.options, problem.params.leaves[0].device, rates)
        return Ledger(problem.params.names, [task.within(means) for task in request.tasks], keep=request.keep)

    def _with_results(self, outcome: Outcome, ledger: Ledger | None, problem: Problem) -> Outcome:
        if ledger is None:
            return outcome
        kept = ledger.pairs(outcome.losses, problem.params.leaves) if ledger.keep else {}
        return replace(outcome, parts=ledger.results(outcome.losses, outcome.scores.dtype), pairs=kept)

    def _along_a_plan(self, problem: Problem, request: Request, standins: Standins) -> Outcome:
        """Runs along a plan that was passed or prepared, and only that, while a compiler traces."""
        if torch._C._functorch.maybe_current_level() is not None:
            raise InputError("while a compiler traces, a step cannot run inside torch.func transforms: use fg.stack.")
        if not self.plans:
            raise PlanError(
                "while a compiler traces, nothing can be measured: make plan = fg.plan(...), and pass plan=plan."
            )
        reasons = []
        for plan in self.plans:
            try:
                outcome = self.run(problem, request, plan, self.reduction, standins)
            except MismatchError as reason:
                reasons.append(reason)
                continue
            new = outcome.sizes not in plan.sizes
            if not len(outcome.losses) or not self._due(new or not plan.verified):
                return outcome
            reasons.append(MismatchError("it has not been verified for these sizes and numbers"))
        raise PlanError(
            f"the plan passed is not for these losses: {reasons[0]} Make it with fg.plan(...) for what is compiled, or "
            "call the step once uncompiled with these arguments: it keeps what it planned and verified."
        ) from None

    def _solved(self, problem: Problem, request: Request) -> Outcome:
        """As one op where the losses are many small ones, and no plan is needed; else along a plan."""
        waits = request.tasks and problem.params.leaves[0].device.type != "cpu"
        if self.one_op is None or request.empty or request.keep or request.positions or waits:
            return self.planned(problem, request)
        ledger, budget = self._ledger(problem, request, None), self.options.memory_budget
        try:
            if not self.one_op.pays(problem):
                return self.planned(problem, request)
            outcome = self.one_op.run(problem, request.directions, self.reduction, ledger, budget, self._due)
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
                return self._attempt(problem, request, plan)
            except MismatchError as reason:
                log.info("a plan does not fit this call: %s", reason)
                reasons.append(reason)
        if reasons and problem.is_meta():
            raise PlanError(f"the plan passed is not for these losses: {reasons[0]} Make it with fg.plan(...).")
        plan = make_plan(problem, self.options)
        try:
            return self._attempt(problem, request, plan, new=True)
        except MismatchError:
            return self._attempt(problem, request, make_plan(problem, self.options, exactly=True), new=True)

    def _attempt(self, problem: Problem, request: Request, plan: Plan, new: bool = False) -> Outcome:
        """Runs along a plan, known or just made (`new`); if that fails in any way, leaves no trace."""
        with undone_on_failure(problem.devices(), plan.written) as changes:
            outcome, checked = self.run(problem, request, plan, self.reduction), plan
            if not new:
                known = plan if plan.written is not None else replace(plan, written=changes.written)
                checked = self._verified(problem, known, outcome)
            if request.factored and len(outcome.losses) and self._due(outcome.sizes not in checked.factored):
                checked = verify_factors(problem, checked, self.options)
            self._remember(checked, instead_of=plan)
        return outcome

    def _verified(self, problem: Problem, plan: Plan, outcome: Outcome) -> Plan:
        """The plan, verified for this call if that is due: with `verify="first"` once for new sizes."""
        new = outcome.sizes not in plan.sizes
        if not outcome.losses.shape[0] or not self._due(new or not plan.verified):
            return plan
        try:
            checked = verify_plan(problem, plan)
        except ConservationError as error:
            if not new:
                raise
            raise MismatchError(f"it does not hold for these sizes: {error}") from error
        return replace(checked, sizes=plan.sizes | {outcome.sizes}) if checked.verified else plan

    def _due(self, new: bool) -> bool:
        """Whether something is to be verified that is new, or is not."""
        return self.options.verify == "always" or (new and self.options.verify == "first")

    def _remember(self, plan: Plan, instead_of: Plan | None = None) -> None:
        self.plans = [plan, *(known for known in self.plans if known is not instead_of)][:MOST_PLANS]
