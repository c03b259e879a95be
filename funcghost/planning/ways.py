"""The rehearsal of a plan: finds the ways to `J V` by trying them, and holds the scores to the conservation law."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from funcghost.algebra.directions import Direction
from funcghost.engine.plans import Plan, Site
from funcghost.engine.run import run
from funcghost.errors import MismatchError, PlanError, UnsupportedOpError
from funcghost.laws.causes import causes
from funcghost.laws.conservation import Witness, check_conservation, together, witness
from funcghost.laws.draws import near, sample_weights
from funcghost.ops.call import Call, Outputs, physical
from funcghost.ops.tangent import Pushforward, Way, backward_sees, covered_by_rule, pushforward
from funcghost.problem import Problem, backward
from funcghost.side_effects import untouched
from funcghost.trees import as_whole

log = logging.getLogger("funcghost")


def verify_plan(problem: Problem, plan: Plan) -> Plan:
    """Checks the conservation law for a plan on this batch; the plan says if that could be done."""
    with untouched(problem.devices(), plan.written):
        leaves = problem.leaves()
        losses, _ = problem.evaluate(leaves)
        gradients = [as_whole(gradient) for gradient in backward(losses, leaves, sample_weights(losses))]
    return rehearse(problem, plan, losses.detach(), gradients, check=True)


def rehearse(problem: Problem, plan: Plan, losses: Tensor, gradients: list[Tensor], check: bool) -> Plan:
    """Finds the ways to `J V` along a plan.

    `gradients` are autograd's, of the losses times `sample_weights`: the list is used up.
    """
    rehearsal = Rehearsal(plan)
    seen = witness(losses, sample_weights(losses), gradients, problem.params.leaves, plan.precision)
    try:
        verified = rehearsal.run(problem, seen, check)
    except MismatchError as error:
        raise PlanError(f"the losses do something else each time they run: {error}") from error
    return replace(plan, sites=tuple(rehearsal.sites), verified=verified)


def nearby_gradients(problem: Problem, plan: Plan, weights: Tensor, seed: int) -> list[Tensor]:
    """The gradients of `<weights, losses>` by autograd, with parameters and weights off by a little rounding."""
    with (
        problem.at(near([as_whole(leaf) for leaf in problem.params.leaves], seed, plan.precision)) as moved,
        untouched(problem.devices(), plan.written),
    ):
        inputs = moved.leaves()
        losses, _ = moved.evaluate(inputs)
        (cotangents,) = near([weights], seed, plan.precision)
        return [as_whole(gradient) for gradient in backward(losses, inputs, cotangents)]


def losses_that_are_not_finite(losses: Tensor) -> str:
    """The numbers of the samples, of which there may be many."""
    found = (~losses.isfinite()).nonzero().flatten().tolist()
    return str(found[:8]) + (" and others" if len(found) > 8 else "")


class NoSlopeError(Exception):
    """The op at a site that is tapped has no `J V`, or says zero where its backward does not."""

    def __init__(self, index: int) -> None:
        super().__init__(f"site {index}")
        self.index = index


class Rehearsal:
    """Runs a plan along the witness, trying the ways to `J V` where there is no rule."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.sites: list[Site] = list(plan.sites)
        self.tried = set[int]()

    def run(self, problem: Problem, seen: Witness, check: bool) -> bool:
        """Finds the ways; with `check`, holds the scores to the witness. Says whether they were verified."""
        devices = problem.devices()

        def scores(directions: Sequence[Direction]) -> Tensor:
            outcome = None
            while outcome is None:
                plan = replace(self.plan, sites=tuple(self.sites))
                try:
                    with untouched(devices, plan.written):
                        outcome = run(problem, plan, directions, reduction=None, choose=self.choose)
                except NoSlopeError as error:
                    # What was chosen and has not been tried yet is chosen anew.
                    self.tried.add(error.index)
                    known = zip(self.sites, self.plan.sites, strict=True)
                    self.sites = [own if i in self.tried else planned for i, (own, planned) in enumerate(known)]
                    self.sites[error.index] = replace(self.sites[error.index], way="each")
            if check and seen.finite and not seen.repeats(outcome.losses):
                raise MismatchError(
                    "with equal params and batch, the losses have other values. Draw random numbers from torch, or from"
                    " the global streams of numpy and random, whose state is put back, or hand them in with the batch."
                    " What a model keeps from one call to the next (membranes, memories, caches) the losses must reset."
                )
            return outcome.scores

        if check and seen.finite:
            check_conservation(
                problem.params,
                scores,
                seen,
                together(self.plan, problem.params.names),
                partial(nearby_gradients, problem, self.plan, seen.weights),
                partial(causes, problem, self.plan.precision),
            )
            return True
        if check:
            bad = losses_that_are_not_finite(seen.losses)
            log.warning(
                "the losses of samples %s, or gradients, are NaN or infinite: nothing can be checked on this batch. "
                "The plan will be checked on the next one. The loss of a sample without any target must be 0.",
                bad,
            )
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
            self.tried.add(index)
            size = sum(value.numel() * value.element_size() for value in out)
            self.sites[index] = replace(site, way=way, flops=flops, bytes=size)
            return out

        def evaluate(saved: Sequence[Tensor], tangents: Sequence[Tensor]) -> Outputs:
            errors, zero = [], list[tuple[Way, Outputs, int]]()
            for way, push in zip(ways, pushes, strict=True):
                try:
                    with FlopCount() as count:
                        out = push.evaluate(saved, tangents)
                except RuntimeError as error:
                    errors.append(f"{way}: {str(error).splitlines()[0]}")
                    continue
                if way == "rule" or any(bool(physical(value).any()) for value in out):
                    return noted(way, out, count.total)
                zero.append((way, out, count.total))
            plain = not any(physical(value) is not value for value in (*saved, *tangents))
            silent = bool(zero) and plain and backward_sees(call, saved, tangents)
            if site.action == "tap" and (silent or (not zero and plain)):
                raise NoSlopeError(index)
            errors += [f"{way}: zero, which its backward is not" for way, _, _ in zero if silent]
            if zero and not silent:
                return noted(*zero[0]) if self.sites[index] is site else zero[0][1]
            raise UnsupportedOpError(
                f"parameters {list(site.parameters)} are used by {site.op}, whose derivative cannot be had "
                f"({'; '.join(errors)}). "
                f"Add a rule with fg.register_rule, or write the op with others that torch can differentiate twice."
            )

        return Pushforward(pushes[0].needed, evaluate)


class FlopCount(TorchDispatchMode):
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
