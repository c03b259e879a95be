"""Making a plan: measure the layouts, decide what is done at each site, and have it rehearsed."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from funcghost.engine.plans import Plan, batch_axes
from funcghost.engine.verified import Verified
from funcghost.errors import GhostError, InputError, MismatchError, PlanError, UnsupportedOpError
from funcghost.laws.draws import sample_weights
from funcghost.ops.meter import Clock, codes
from funcghost.options import Options
from funcghost.planning.sites import (
    Followed,
    UnresolvedMoveError,
    enough_measured,
    find_sites,
    follow_moves,
    want_meters,
)
from funcghost.planning.trace import Trace
from funcghost.planning.ways import rehearse
from funcghost.problem import Problem, backward, backwards, check_depends, graph_nodes
from funcghost.side_effects import Changes
from funcghost.trees import as_whole

log = logging.getLogger("funcghost")


def make_plan(problem: Problem, options: Options, *, exactly: bool = False, any_order: bool = False) -> Plan:
    """Plans the losses on this batch: `exactly` at the values that come, or at drawn ones if that can be done.

    In `any_order`, the plan serves whatever order the data give to the rows that they move.

    Costs the FLOPs of about four training steps, and memory for one and a half to two of them: no output gradient
    is kept. Random streams and tensors that the losses write to are put back.

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
        return _make_plan(problem, options, drawn=False, any_order=any_order)
    try:
        with problem.at(without_zeros(problem.params.leaves)) as moved:
            try:
                return _make_plan(moved, options, drawn=True, any_order=any_order)
            except MismatchError as change:  # the losses have found that they must run otherwise
                log.info("planning once more: %s", change)
                return _make_plan(moved, options, drawn=True, any_order=any_order)
    except (InputError, UnsupportedOpError):
        raise
    except (GhostError, RuntimeError, ValueError) as error:
        log.info("planning at the very values, since elsewhere: %s", error)
        return _make_plan(problem, options, drawn=False, any_order=any_order)


def _make_plan(problem: Problem, options: Options, drawn: bool, any_order: bool) -> Plan:
    collective = None if problem.in_parts else refuse_collective
    changes, carry_all = Changes(problem.devices(), collective=collective), options.route == "forward"
    try:
        trace, losses, gradients = _observe(problem, drawn, carry_all, changes)
    finally:
        changes.undo()
    plan = replace(_decide(problem, trace, losses, carry_all, any_order), written=changes.written)
    sizes = trace.digest.sizes()
    del trace
    if plan.batch:
        plan = rehearse(problem, plan, losses, gradients, options.verify != "never")
    own = Verified().verified_for(sizes) if plan.verified else Verified(frozenset([sizes.checksum]))
    plan = replace(plan, sizes=own)
    log.info("planned %d sites for %d samples, verified=%s", len(plan.sites), plan.batch, plan.verified)
    return plan


def without_zeros(leaves: Sequence[Tensor]) -> list[Tensor]:
    """Parameters, of which those that are all zero have small values.

    A gate or a head that starts at zero hides the way of the samples through what is before it; a plan has to serve
    when it has been trained.
    """

    def noise(leaf: Tensor, seed: int) -> Tensor:
        generator = torch.Generator(leaf.device).manual_seed(seed)
        values = torch.randn(leaf.shape, generator=generator, device=leaf.device, dtype=torch.float32)
        return (0.02 * values).to(leaf.dtype)

    zero = [leaf.numel() > 0 and not _has_any(as_whole(leaf)) for leaf in leaves]
    return [noise(leaf, i) if is_zero else leaf for i, (leaf, is_zero) in enumerate(zip(leaves, zero, strict=True))]


def _has_any(value: Tensor) -> bool:
    """Whether an entry is not zero: of nearly all tensors, the first row says so."""
    return bool(value[:1].any() if value.dim() else value) or bool(value.any())


def _lowest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    return max((d for d in dtypes if d.is_floating_point), key=lambda d: torch.finfo(d).eps)


def _observe(problem: Problem, drawn: bool, carry_all: bool, changes: Changes) -> tuple[Trace, Tensor, list[Tensor]]:
    """One forward with its losses, a backward to the first outputs, and one more for each code; then the gradients."""
    clock, leaves = Clock(started=False), problem.leaves()
    trace = Trace(problem, leaves, clock, drawn)

    def measure(code: Tensor | None) -> None:
        clock.code, cotangent = code, weights if code is None else weights * code
        with backwards(losses.device):
            torch.autograd.grad(losses, trace.roots or leaves, cotangent, retain_graph=True, allow_unused=True)

    with changes.watched():
        with trace:
            losses, _ = problem.evaluate(leaves)
        losses = trace.end(losses)
        result = trace.values.noted(losses)
        trace.result = None if result is None else result.number
        _refuse_reentrant_checkpoints(losses)
        check_depends(losses)
        clock.batch, clock.started, clock.rows = losses.shape[0], True, any(m.by_data for m in trace.moves.values())
        weights, all_of_them = sample_weights(losses), carry_all or clock.rows
        want_meters(trace.records, len(leaves), all_of_them=all_of_them)
        if clock.batch:
            measure(None)
    # What a backward writes to has been seen.
    scales = codes(clock.batch, losses, half=torch.float16 in trace.dtypes) if clock.batch > 1 else []
    for scale in scales:
        measure(scale)
    clock.keep = clock.overflow
    if clock.keep:
        for code in (None, *scales):
            measure(code)
    if not all_of_them and clock.batch and not enough_measured(trace.records, len(leaves)):
        want_meters(trace.records, len(leaves), all_of_them=True)
        for code in (None, *scales):
            measure(code)
    clock.true = True
    gradients = backward(losses, leaves, weights) if clock.batch else []
    return trace, losses.detach(), [as_whole(gradient) for gradient in gradients]


def refuse_collective(name: str) -> None:
    """What is measured here takes more runs on one rank than on another, which would wait for it in vain.

    Raises:
        UnsupportedOpError: the losses talk to other processes, and not by ops on DTensors.
    """
    raise UnsupportedOpError(
        f"losses: talk to other processes ({name}): a sample's gradient would lie in part on other ranks (expert and "
        "context parallel, batch norm over ranks, contrastive losses over ranks). Let the losses be of this rank's "
        "samples and parameters, and compute what is no part of a gradient, such as a count over ranks, before, as a "
        "part of the batch."
    )


def _decide(problem: Problem, trace: Trace, losses: Tensor, carry_all: bool, any_order: bool) -> Plan:
    """The plan, without ways to `J V`, that follows from what was observed."""
    batch = len(losses)
    try:
        followed = follow_moves(trace.records, trace.moves if batch > 1 else {}, batch, any_order=any_order)
        if any_order and trace.result in followed.rows:
            raise UnresolvedMoveError("what the losses are made of")
    except UnresolvedMoveError as op:
        log.info("%s moves samples by the values of data: tangents are carried to the losses.", op)
        followed, carry_all = Followed({}, ()), True
    return Plan(
        sites=tuple(find_sites(trace.records, problem.params.names, followed.rows, carry_all)),
        moves=() if carry_all else followed.moved,
        batch=batch,
        digest=trace.digest.ops,
        precision=_lowest([*trace.dtypes, losses.dtype]),
        axes=batch_axes(problem.batch, batch),
        captured=trace.captured(),
    )


def _refuse_reentrant_checkpoints(losses: Tensor) -> None:
    """Their gradients flow in `.backward()` alone: `torch.autograd.grad` would give zero for what is inside."""
    if any(node.name() == "CheckpointFunctionBackward" for node in graph_nodes(losses)):
        raise UnsupportedOpError(
            "torch.utils.checkpoint with use_reentrant=True hides its region from torch.autograd.grad. Pass "
            "use_reentrant=False and context_fn=fg.checkpoint_context."
        )
