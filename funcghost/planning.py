"""Making a plan: measure the layouts, rehearse the ways to `J V`, verify the conservation law."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from funcghost.cost import DEFAULT_BUDGET, ROUTES, Means, Rates, machine_rates
from funcghost.errors import GhostError, InputError, MismatchError, PlanError, UnsupportedOpError
from funcghost.layout import Clock, codes
from funcghost.lowrank import Direction
from funcghost.plans import Plan, Site, batch_axes
from funcghost.run import Problem, backward, run
from funcghost.sites import (
    Followed,
    UnresolvedMoveError,
    enough_measured,
    find_sites,
    follow_moves,
    want_meters,
)
from funcghost.state import Changes, untouched
from funcghost.tangent import Call, Outputs, Pushforward, Way, covered_by_rule, physical, pushforward
from funcghost.trace import Trace
from funcghost.verify import Witness, check_conservation, sample_weights, shaken, witness

log = logging.getLogger("funcghost")


@dataclass(frozen=True)
class Options:
    """How to go about it.

    Args:
        verify: when to check the conservation law: on the "first" call (with each new plan), "always" or "never".
        route: "backward" takes scores in the backward wherever a layout fits; "forward" carries every tangent to
            the losses: no backward and no stored activations, for scoring with `fg.reduce`. "ghost" and "materialise"
            are "backward" with this one route to inner products of gradients where it exists, not the cheapest.
        memory_budget: bytes for the tiles of inner products between gradients; 256 MiB by default.
        rates: the machine's FLOP/s of matrix products and bytes/s of memory, by which routes are chosen; measured in
            a few milliseconds when a plan is made, and part of it, if not given.
        compute_dtype: the dtype to which the operands of products for scores are rounded, such as `torch.bfloat16`; by
            default their own (for inner products of gradients float32 at least). Sums are of float32 at least, and
            training gradients are not touched. Ops that are no products, such as norms, keep their precision.

    Raises:
        InputError: an option has a value that is not listed.

    Example:
        >>> import funcghost as fg
        >>> fg.Options(verify="always").route
        'backward'
    """

    verify: Literal["first", "always", "never"] = "first"
    route: Literal["backward", "forward", "ghost", "materialise"] = "backward"
    memory_budget: int = DEFAULT_BUDGET
    rates: Rates | None = None
    compute_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        """Checks the values."""
        for name, allowed in (("verify", ("first", "always", "never")), ("route", ("backward", "forward", *ROUTES))):
            if getattr(self, name) not in allowed:
                raise InputError(f"Options.{name} must be one of {allowed}, found {getattr(self, name)!r}.")
        if type(self.memory_budget) is not int or self.memory_budget < 1:
            raise InputError(f"Options.memory_budget must be a number of bytes, found {self.memory_budget!r}.")
        pair = isinstance(self.rates, tuple) and len(self.rates) == 2 and all(rate > 0 for rate in self.rates)
        if self.rates is not None and not pair:
            raise InputError(f"Options.rates must be (FLOP/s, bytes/s), two positive numbers, found {self.rates!r}.")
        floating = isinstance(self.compute_dtype, torch.dtype) and self.compute_dtype.is_floating_point
        if self.compute_dtype is not None and not floating:
            raise InputError(f"Options.compute_dtype must be a floating dtype, found {self.compute_dtype!r}.")


def means_of(options: Options, device: torch.device, rates: Rates | None = None) -> Means:
    """What contractions may use: rates as given, those of the plan, or as measured."""
    route = options.route if options.route in ROUTES else None
    return Means(options.memory_budget, route, options.rates or rates or machine_rates(device), options.compute_dtype)


def check_options(options: Options | None) -> Options:
    """The options, or those by default."""
    if options is not None and not isinstance(options, Options):
        raise InputError(f"options: must be fg.Options(...), found {type(options).__name__}.")
    return options or Options()


def make_plan(problem: Problem, options: Options, *, exactly: bool = False) -> Plan:
    """Plans the losses on this batch: `exactly` at the values that come, or at drawn ones if that can be done.

    Costs the FLOPs of about four training steps, and memory for the output gradients of every op at once. Random
    streams and tensors that the losses write to are put back.

    Raises:
        InputError: the losses do not depend on params, or are not [b].
        UnsupportedOpError: an op has no derivative that can be had.
        ConservationError: a use of a parameter was not seen, or is wrong.
        PlanError: the losses do something else each time they run, or there are no values to measure.
    """
    if not callable(problem.losses):
        raise InputError(
            f"losses: must be a function losses(params, batch) -> [b], found {type(problem.losses).__name__}."
        )
    if problem.is_meta():
        raise PlanError(
            "plan: tensors on the meta device have no values to measure. Plan on a real device and pass the plan."
        )
    if exactly:
        return _make_plan(problem, options, drawn=False)
    try:
        return _make_plan(without_zeros(problem), options, drawn=True)
    except (InputError, UnsupportedOpError):
        raise
    except (GhostError, RuntimeError, ValueError) as error:
        log.info("planning at the very values, since elsewhere: %s", error)
        return _make_plan(problem, options, drawn=False)


def _make_plan(problem: Problem, options: Options, drawn: bool) -> Plan:
    changes, carry_all = Changes(problem.devices()), options.route == "forward"
    try:
        trace, losses, gradients = _observe(problem, drawn, carry_all, changes)
    finally:
        changes.undo()
    plan = _decide(problem, trace, losses, carry_all)
    plan = replace(plan, written=changes.written)
    if plan.batch:
        plan = _rehearse(problem, plan, losses, gradients, options.verify != "never")
    log.info("planned %d sites for %d samples, verified=%s", len(plan.sites), plan.batch, plan.verified)
    return plan


def without_zeros(problem: Problem) -> Problem:
    """The same problem where parameters that are all zero have small values.

    A gate or a head that starts at zero hides the way of the samples through what is before it; a plan has to serve
    when it has been trained.
    """

    def noise(leaf: Tensor, seed: int) -> Tensor:
        generator = torch.Generator(leaf.device).manual_seed(seed)
        values = torch.randn(leaf.shape, generator=generator, device=leaf.device, dtype=torch.float32)
        return (0.02 * values).to(leaf.dtype)

    leaves = problem.params.leaves
    zero = [leaf.numel() > 0 and not bool(leaf.any()) for leaf in leaves]
    if not any(zero):
        return problem
    point = (noise(leaf, i) if is_zero else leaf for i, (leaf, is_zero) in enumerate(zip(leaves, zero, strict=True)))
    return replace(problem, point=tuple(point))


def _nearby_gradients(problem: Problem, plan: Plan, weights: Tensor, seed: int) -> list[Tensor]:
    """The gradients of `<weights, losses>` by autograd, with parameters and weights off by a little rounding."""

    def near(value: Tensor, number: int) -> Tensor:
        size = 64 if value.dtype in (torch.float64, torch.float32) else 1
        return shaken(value, size * torch.finfo(value.dtype).eps, 1000 * seed + number)

    moved = replace(problem, point=tuple(near(leaf, number) for number, leaf in enumerate(problem.leaves(), 1)))
    with untouched(problem.devices(), plan.written):
        inputs = moved.leaves()
        losses, _ = moved.evaluate(inputs)
        return [gradient.to_dense() for gradient in backward(losses, inputs, near(weights, 0))]


def verify_plan(problem: Problem, plan: Plan) -> Plan:
    """Checks the conservation law for a plan on this batch; the plan says if that could be done."""
    with untouched(problem.devices(), plan.written):
        leaves = problem.leaves()
        losses, _ = problem.evaluate(leaves)
        gradients = [gradient.to_dense() for gradient in backward(losses, leaves, sample_weights(losses))]
    return _rehearse(problem, plan, losses.detach(), gradients, check=True)


def _rehearse(problem: Problem, plan: Plan, losses: Tensor, gradients: list[Tensor], check: bool) -> Plan:
    """Finds the ways to `J V` along a plan; `gradients` are autograd's, of the losses times `sample_weights`."""
    rehearsal, weights = _Rehearsal(plan), sample_weights(losses)
    try:
        verified = rehearsal.run(problem, witness(losses, weights, gradients, plan.precision), check)
    except MismatchError as error:
        raise PlanError(f"the losses do something else each time they run: {error}") from error
    return replace(plan, sites=tuple(rehearsal.sites), verified=verified)


def _lowest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    return max((d for d in dtypes if d.is_floating_point), key=lambda d: torch.finfo(d).eps)


def _observe(problem: Problem, drawn: bool, carry_all: bool, changes: Changes) -> tuple[Trace, Tensor, list[Tensor]]:
    """One forward with its losses, a backward to the first outputs, and one more for each code; then the gradients."""
    clock, leaves = Clock(started=False), problem.leaves()
    trace = Trace(problem, leaves, clock, drawn)

    def measure(code: Tensor | None) -> None:
        clock.code, cotangent = code, weights if code is None else weights * code
        torch.autograd.grad(losses, trace.roots or leaves, cotangent, retain_graph=True, allow_unused=True)

    with changes.watched():
        with trace:
            losses, _ = problem.evaluate(leaves)
        _refuse_reentrant_checkpoints(losses)
        if not losses.requires_grad:
            raise InputError(
                "losses: do not depend on params. Call the model with the params handed in, e.g. by "
                "torch.func.functional_call or fg.module_losses, and not under torch.no_grad()."
            )
        clock.batch, clock.started = losses.shape[0], True
        weights, all_of_them = sample_weights(losses), carry_all or any(move.by_data for move in trace.moves.values())
        want_meters(trace.records, len(leaves), all_of_them=all_of_them)
        if clock.batch:
            measure(None)
    # What a backward writes to has been seen.
    scales = codes(clock.batch, losses, half=torch.float16 in trace.dtypes) if clock.batch > 1 else []
    for scale in scales:
        measure(scale)
    if not all_of_them and clock.batch and not enough_measured(trace.records, len(leaves)):
        want_meters(trace.records, len(leaves), all_of_them=True)
        for code in (None, *scales):
            measure(code)
    clock.true = True
    gradients = backward(losses, leaves, weights) if clock.batch else []
    return trace, losses.detach(), [gradient.to_dense() for gradient in gradients]


def _decide(problem: Problem, trace: Trace, losses: Tensor, carry_all: bool) -> Plan:
    """The plan, without ways to `J V`, that follows from what was observed."""
    batch = len(losses)
    try:
        followed = follow_moves(trace.records, trace.moves if batch > 1 else {}, batch)
    except UnresolvedMoveError as op:
        log.info("%s moves samples by the values of data: tangents are carried to the losses.", op)
        followed, carry_all = Followed({}, ()), True
    return Plan(
        sites=tuple(find_sites(trace.records, problem.params.names, followed.rows, carry_all)),
        moves=() if carry_all else followed.moved,
        batch=batch,
        digest=trace.digest.ops,
        sizes=frozenset([trace.digest.sizes]),
        precision=_lowest([*trace.dtypes, losses.dtype]),
        axes=batch_axes(problem.batch, batch),
        captured=trace.captured(),
    )


def _refuse_reentrant_checkpoints(losses: Tensor) -> None:
    """Their gradients flow in `.backward()` alone: `torch.autograd.grad` would give zero for what is inside."""
    todo, seen = [losses.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise UnsupportedOpError(
                "torch.utils.checkpoint with use_reentrant=True hides its region from torch.autograd.grad. Pass "
                "use_reentrant=False and context_fn=fg.checkpoint_context."
            )
        todo.extend(child for child, _ in node.next_functions)


def together(plan: Plan, names: Sequence[str]) -> list[list[int]]:
    """The parameters to check together: those of one tap, since `J V` is had there for all of them at once.

    Tangents that are carried meet those of other sites on their way: of such parameters there are 8 sums.
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
    return [*apart, *(sorted(carried)[i::8] for i in range(min(8, len(carried))))]


class _Rehearsal:
    """Runs a plan along the witness, trying the ways to `J V` where there is no rule."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.sites: list[Site] = list(plan.sites)

    def run(self, problem: Problem, seen: Witness, check: bool) -> bool:
        """Finds the ways; with `check`, holds the scores to the witness. Says whether they were verified."""
        devices = problem.devices()

        def scores(directions: Sequence[Direction]) -> Tensor:
            plan = replace(self.plan, sites=tuple(self.sites))
            with untouched(devices, plan.written):
                outcome = run(problem, plan, directions, reduction=None, choose=self.choose)
            if check and seen.finite and not seen.repeats(outcome.losses):
                raise MismatchError(
                    "with equal params and batch, the losses have other values. Draw random numbers from torch, or from"
                    " the global streams of numpy and random, whose state is put back, or hand them in with the batch."
                )
            return outcome.scores

        if check and seen.finite:
            check_conservation(
                problem.params,
                scores,
                seen,
                together(self.plan, problem.params.names),
                partial(_nearby_gradients, problem, self.plan, seen.weights),
            )
            return True
        if check:
            log.warning("the gradients are not finite: the conservation law will be checked with a batch whose are.")
        scores([seen.direction])
        return False

    def choose(self, index: int, call: Call) -> Pushforward:
        """A pushforward that tries the ways in the order of their cost, and notes the first that works.

        An op of the user's own that knows no forward derivative gives zero: its transpose may know more.
        """
        ways: list[Way] = ["rule"] if covered_by_rule(call) else ["forward", "transpose"]
        pushes = [pushforward(call, way) for way in ways]
        site = self.sites[index] = replace(self.sites[index], way=ways[0])

        def noted(way: Way, out: Outputs, flops: int) -> Outputs:
            size = sum(value.numel() * value.element_size() for value in out)
            self.sites[index] = replace(site, way=way, flops=flops, bytes=size)
            return out

        def evaluate(saved: Sequence[Tensor], tangents: Sequence[Tensor]) -> Outputs:
            errors, zero = [], list[tuple[Way, Outputs, int]]()
            for way, push in zip(ways, pushes, strict=True):
                try:
                    with _FlopCount() as count:
                        out = push.evaluate(saved, tangents)
                except RuntimeError as error:
                    errors.append(f"{way}: {str(error).splitlines()[0]}")
                    continue
                if way == "rule" or any(bool(physical(value).any()) for value in out):
                    return noted(way, out, count.total)
                zero.append((way, out, count.total))
            if zero:
                return noted(*zero[0]) if self.sites[index] is site else zero[0][1]
            raise UnsupportedOpError(
                f"parameters {list(site.parameters)} are used by {site.op}, whose derivative cannot be had "
                f"({'; '.join(errors)}). "
                f"Add a rule with fg.register_rule, or write the op with others that torch can differentiate twice."
            )

        return Pushforward(pushes[0].needed, evaluate)


class _FlopCount(TorchDispatchMode):
    """Counts the FLOPs of matrix products and convolutions, as `torch.utils.flop_counter` does, without its hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out
