"""A step that all ranks take at the same time, on a model that each of them has a share of.

Ranks wait for each other whenever parameters are gathered. So they may not run the losses a different number of times:
a forward goes to its end even if it does not fit the plan, then all say whether theirs did, and go back only if all
did. Where one did not, every rank gathers the whole model, plans or verifies on its own, and says how that went.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from typing import Any

import optree
import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import implicit_replication

from funcghost.algebra.directions import LowRank
from funcghost.algebra.pairs import Pairs
from funcghost.distributed.collectives import Group, several, told_by_all
from funcghost.distributed.directions import accompanied
from funcghost.distributed.faults import named
from funcghost.distributed.fsdp import Sharded
from funcghost.distributed.tensor_parallel import InParts, check_agreement
from funcghost.engine.plans import Plan
from funcghost.engine.run import Outcome, run_plain
from funcghost.errors import InputError, MismatchError, PlanError
from funcghost.ops.digest import Sizes
from funcghost.options import Options
from funcghost.problem import Losses, Problem, Reduction
from funcghost.reducers.bases import split_reducers
from funcghost.reducers.requests import Answer, Request, requested
from funcghost.side_effects import undone_on_failure, untouched
from funcghost.transforms.compiling import uncompiled
from funcghost.transforms.steps import Step, Transform
from funcghost.trees import Params, Tree, split_params


class _UnfitError(MismatchError):
    """Some rank's run does not fit its plan, or is to be verified."""


@dataclass(frozen=True, eq=False)
class InStep(Problem):
    """The losses of one rank, where the others run theirs at the same time.

    `model`: what is sharded.
    `owned`: the parameters as the user has them.
    `agree`: tells the other ranks what a forward has come to.
    `reduces`: whether gradients are scattered to where the parameters lie.
    """

    model: Sharded = field(kw_only=True)
    owned: Sequence[Tensor] = field(kw_only=True)
    reduces: bool = field(kw_only=True)
    agree: Callable[[MismatchError | None, Sizes, int], None] = field(kw_only=True)

    @property
    def in_step(self) -> bool:
        """They do."""
        return True

    @property
    def in_parts(self) -> bool:
        """Whether tensor parallel ranks compute them together."""
        return self.model.in_parts

    def settle(self, unfit: MismatchError | None, sizes: Sizes, count: int) -> None:
        """Goes on only if all ranks do."""
        self.agree(unfit, sizes, count)

    def backward(
        self, losses: Tensor, wanted: Sequence[Tensor], cotangent: Tensor, keep_graph: bool = False
    ) -> list[Tensor]:
        """As that of a problem; gradients of parameters come as FSDP2's hooks leave them, sharded and averaged."""
        if losses.requires_grad:
            self.model.go_back(losses)
        if not self.reduces:
            return super().backward(losses, wanted, cotangent, keep_graph)
        kept = [own.grad for own in self.owned]
        try:
            for own in self.owned:
                own.grad = None
            others = wanted[: len(wanted) - len(self.owned)]
            if losses.requires_grad:
                torch.autograd.backward(losses, cotangent, retain_graph=keep_graph, inputs=list(wanted))
            found = [own.grad for own in (*others, *self.owned)]
            self.model.reached = [own.grad is not None for own in self.owned]
        finally:
            for own, grad, leaf in zip(self.owned, kept, self.params.leaves, strict=True):
                own.grad, leaf.grad = grad, None
        blanks = (*others, *self.owned)
        return [
            torch.zeros_like(own, requires_grad=False) if grad is None else grad
            for grad, own in zip(found, blanks, strict=True)
        ]


class Together:
    """A step that all ranks take at the same time; what it keeps between calls are plans.

    After a step it knows how many samples the ranks had (`everyone`), and which parameters the losses `reached`.
    """

    def __init__(
        self,
        losses: Losses,
        model: nn.Module,
        reduction: Reduction | None,
        has_aux: bool,
        options: Options | None,
        plan: Plan | None,
        group: Group,
    ) -> None:
        self.scout = Transform(losses, None, has_aux, options, plan)
        self.model, self.reduction, self.group = model, reduction, group
        if self.scout.options.route == "forward":
            raise InputError("sharded: Options.route='forward' is not to be had under fully_shard. Leave it out.")
        self.checked, self.way = False, 0
        self.everyone, self.asked, self.early = 0, set[Any](), set[str]()
        self.reached: Sequence[bool] = ()

    def step(self, params: Tree, batch: Tree, reducers: Tree = None) -> Step:
        """The function that `grad_and_reduce` returns."""
        split = split_params(params)
        wanted, spec = split_reducers(reducers)
        request = requested(wanted, split)
        model, outcome = self._outcome(split, batch, request)
        reduced = request.results(Answer(outcome.scores, outcome.parts, outcome.positions), split)
        grads = None
        if self.reduction is not None:
            count = self.everyone if self.reduction == "mean" else 1
            factor = {part.number: group.divisor / max(count, 1) for group in model.groups for part in group.parts}
            grads = split.rebuild([leaf * factor[number] for number, leaf in enumerate(outcome.gradients)])
            self.reached = model.reached
        return Step(grads, outcome.losses, optree.tree_unflatten(spec, reduced), outcome.aux)

    def pairs(self, params: Tree, batch: Tree) -> Pairs:
        """The function that `pairs` returns."""
        split = split_params(params)
        model, outcome = self._outcome(split, batch, Request(keep=True))
        shapes = tuple(
            (name, tuple(leaf.shape), leaf.dtype) for name, leaf in zip(split.names, model.leaves(), strict=True)
        )
        return Pairs(outcome.pairs, shapes, split.spec)

    def _outcome(self, split: Params, batch: Tree, request: Request) -> tuple[Sharded, Outcome]:
        with named("sharded", self.group):
            return self._taken(split, batch, request)

    def _taken(self, split: Params, batch: Tree, request: Request) -> tuple[Sharded, Outcome]:
        model = Sharded(self.model, split)
        model.check_idle()
        _check_placed(request, split)
        self._ask(split, request)
        with uncompiled(), self._compiled(model, request):
            if not model.ready:
                with model.whole():
                    pass
            return model, self._solve(model, split, batch, request)

    def _compiled(self, model: Sharded, request: Request) -> AbstractContextManager[None]:
        """Where blocks run as they were compiled."""
        if model.in_parts or "torch._dynamo" not in sys.modules:
            return nullcontext()
        blocks = import_module("funcghost.distributed.compiled_blocks")
        wanted = {"scores": not request.empty, "gradients": self.reduction is not None}
        found: AbstractContextManager[None] = blocks.compiled_blocks(self.model, **wanted)
        return found

    def _ask(self, split: Params, request: Request) -> None:
        """Ranks that ask for different things would wait for each other in vain: they compare once what they ask."""
        asked = (
            split.names,
            tuple((tuple(leaf.shape), str(leaf.dtype)) for leaf in split.leaves),
            tuple(type(reducer).__name__ for reducer in request.reducers),
            (len(request.directions), len(request.tasks), request.keep, request.positions),
            (self.reduction, bool(self.scout.plans)),
        )
        if asked in self.asked:
            return
        told = told_by_all((asked, self._carried()), self.group)
        self.early.update(*(names for _, names in told))
        if other := _unlike([found for found, _ in told]):
            raise InputError(
                f"sharded: ranks {other} pass other parameters, reducers, reduction, or a plan where the others pass "
                "none, than rank 0. All ranks take a step together: pass the same on every one."
            )
        self.asked.update((*asked[:-1], (self.reduction, planned)) for planned in (True, asked[-1][1]))

    def _solve(self, model: Sharded, split: Params, batch: Tree, request: Request) -> Outcome:
        losses = self.scout.losses
        leaves = split._replace(leaves=tuple(model.leaves()))
        own = InStep(
            lambda _, given: losses(split.rebuild(split.leaves), given),
            leaves,
            batch,
            self.scout.has_aux,
            model=model,
            owned=split.leaves,
            reduces=self.reduction is not None,
            agree=lambda unfit, sizes, count: None,
        )
        if request.empty:
            return self._guarded(model, lambda: self._plain(own))
        checked = self.checked or not model.in_parts
        if checked and self.scout.plans and self.scout.options.verify != "always":
            try:
                return self._guarded(model, lambda: self._along(own, request, due=True))
            except _UnfitError:
                pass
        self._plan(own, request)
        try:
            return self._guarded(model, lambda: self._along(own, request, due=False))
        except _UnfitError as error:
            raise PlanError(
                "on some rank the losses ran other ops than when they were planned a moment ago: they do something "
                "else each time they run. Draw random numbers from torch, and let nothing depend on earlier calls."
            ) from error

    def _guarded(self, model: Sharded, body: Callable[[], Outcome]) -> Outcome:
        """What fails must not leave FSDP2 in the middle of a step."""
        try:
            return body()
        except BaseException:
            model.reset()
            raise

    def _plain(self, problem: InStep) -> Outcome:
        agree = partial(self._agree, problem)
        with problem.model.followed({}):
            return run_plain(replace(problem, agree=lambda unfit, sizes, count: agree(0, count)), self._reduction)

    @property
    def _reduction(self) -> Reduction | None:
        """Sums are scaled when the number of all samples is known."""
        return None if self.reduction is None else "sum"

    def _along(self, problem: InStep, request: Request, *, due: bool) -> Outcome:
        """Runs along the plan used last; `due` says whether new sizes are a reason to stop, and to verify."""
        plan, options = self.scout.plans[0], self.scout.options

        def agree(unfit: MismatchError | None, sizes: Sizes, count: int) -> None:
            right = [plan.sizes, plan.factored] if request.factored else [plan.sizes]
            new = not plan.verified or not all(known.knows(sizes) for known in right)
            unseen = plan.written is None or (new and options.verify == "first")
            self._agree(problem, int(unfit is not None or (due and count > 0 and unseen)), count)

        with (
            undone_on_failure(problem.devices(), plan.written or ()),
            accompanied(problem.model, request.directions, self.early) as directions,
            _replicating(problem),
        ):
            along = replace(request, directions=tuple(directions))
            outcome = self.scout.run(replace(problem, agree=agree), along, plan, self._reduction)
        self.scout.remember(plan.with_implied(outcome.sizes), instead_of=plan)
        return outcome

    def _agree(self, problem: InStep, code: int, count: int) -> None:
        """Tells the others whether this rank can go on, how many samples it has, and what it gathered on the way.

        Raises:
            _UnfitError: on all ranks, if one cannot.
            InputError: on all ranks, if one has gathered other parameters than another, or in another order.
        """
        codes, counts, ways = [code], [count], [problem.model.way]
        if several(self.group):
            own = torch.tensor([code, count, *ways], device=problem.params.leaves[0].device)
            told = own.new_empty(3 * distributed.get_world_size(self.group))
            distributed.all_gather_single(told, own, group=self.group)
            codes, counts, ways = told.view(-1, 3).T.tolist()
        _check_ways(ways)
        self.everyone = sum(counts) * problem.model.ranks // len(counts)
        if any(codes):
            raise _UnfitError(f"ranks {[rank for rank, found in enumerate(codes) if found]} are to plan or to verify.")

    def _plan(self, problem: InStep, request: Request) -> None:
        """Every rank plans, or verifies, on its own batch: with the whole model, so that none waits for another."""
        kind = InParts if problem.in_parts else Problem
        local = kind(self._seen(problem), problem.params, problem.batch, problem.has_aux)
        failed: Exception | None = None
        with problem.model.whole():
            blank = [
                [
                    leaf if leaf is None or isinstance(leaf, LowRank) else own.new_zeros(()).expand(own.shape)
                    for leaf, own in zip(direction, local.params.leaves, strict=True)
                ]
                for direction in request.directions
            ]
            try:
                if problem.in_parts:
                    check_agreement(local)
                    self.checked = True
                with untouched(problem.devices()), _replicating(problem):
                    self.scout.planned(local, replace(request, directions=tuple(blank)))
            except Exception as error:
                failed = error
        text = failed and f"{type(failed).__name__}: {failed}"
        told = told_by_all((text, self._carried(), self.way), self.group)
        if failed is not None:
            raise failed
        texts, carried, ways = zip(*told, strict=True)
        for rank, said in enumerate(texts):
            if said is not None:
                raise PlanError(f"rank {rank} could not plan or verify its losses, so that no rank goes on: {said}")
        _check_ways(ways)
        self.early.update(*carried)

    def _seen(self, problem: InStep) -> Losses:
        """The losses, after which it is known which groups they go through."""

        def losses(params: Tree, batch: Tree) -> Any:
            problem.model.visited = []
            found = problem.losses(params, batch)
            self.way = problem.model.way
            return found

        return losses

    def _carried(self) -> set[str]:
        """The parameters of which a direction is needed in the forward."""
        sites = [site for plan in self.scout.plans for site in plan.sites if site.action == "carry"]
        return {name for site in sites for name in site.parameters}


def _replicating(problem: InStep) -> AbstractContextManager[None]:
    """Where ops on DTensors take ordinary tensors, which are the same on all tensor parallel ranks."""
    return implicit_replication() if problem.in_parts else nullcontext()


def _unlike(told: Sequence[Any]) -> list[int]:
    """The ranks that say something else than rank 0."""
    return [rank for rank, found in enumerate(told) if found != told[0]]


def _check_ways(ways: Sequence[int]) -> None:
    """Ranks wait for one another in the order in which they go through groups; out of it they take other parameters.

    Raises:
        InputError: some rank went another way.
    """
    if other := _unlike(ways):
        raise InputError(
            f"sharded: the losses of ranks {other} went through other layers of fully_shard than those of rank 0, or "
            "in another order, so that ranks gather different parameters at the same time (FSDP2 says nothing, where "
            "their sizes agree). Let all ranks call the same layers, or put layers that are called by choice into one "
            "group, fully_shard([one, other])."
        )


def _check_placed(request: Request, params: Params) -> None:
    """Directions must lie as the parameters do."""
    for direction in request.directions:
        for name, leaf, own in zip(params.names, direction, params.leaves, strict=True):
            if not isinstance(leaf, DTensor):
                continue
            assert isinstance(own, DTensor)
            if (leaf.device_mesh, leaf.placements) != (own.device_mesh, own.placements):
                raise InputError(
                    f"direction[{name!r}]: must be sharded as the parameter is, with placements {own.placements} on "
                    f"its mesh, found {leaf.placements}. Redistribute it, or take it from sharded.validation_gradient."
                )
