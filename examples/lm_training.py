"""Accounted training steps: the optimizer, the step with its values, what is measured beside it, and checkpoints."""

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

import funcghost as fg
from funcghost.attribution import in_run
from funcghost.store import write_whole
from funcghost.training import updates
from funcghost.training.update_kinds import Scheduled, ScheduledState
from funcghost.trees import match_direction, split_params
from lm_directions import BESIDE, Comparison, compare
from lm_model import Batch, Tree, WindowLosses, mean_loss

UNFINISHED = ".unfinished-"
PROBE_EVERY = 10
ORACLE_EVERY_CHECKS = 10


@dataclass(frozen=True)
class Optimizer:
    """AdamW, whose learning rate rises over the first steps."""

    lr: float
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)
    warmup: int = 20

    def rate(self, step: int) -> float:
        """The learning rate of this step."""
        return self.lr * min(1.0, (step + 1) / self.warmup)

    def begin(self, params: Tree) -> tuple[Scheduled, ScheduledState]:
        """The step as a pure function, and its state before the first."""
        adam = torch.optim.AdamW(params.values(), lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)
        update, state = updates.of(adam, params)
        return updates.scheduled(update, state, lambda count: ((count + 1) / self.warmup).clamp(max=1.0))


@dataclass(frozen=True)
class State:
    """All that a step needs of the steps before; the batches follow from the seed and the step.

    `slots` are the optimizer's, `slope` is what is known of the validation loss here, and `kept` are validation
    gradients as `BESIDE` keeps them.
    """

    step: int
    params: Tree
    slots: Any
    slope: in_run.Validation | None
    kept: tuple[Tree, ...]


class Row(NamedTuple):
    """The account of a step, added up over its samples.

    `impulse` is what the batch's gradient moves in all through the optimizer's memory, to which `values` are the part
    of this step.
    """

    step: int
    training_loss: float
    validation_loss: float
    values: float
    rest: float
    change: float
    impulse: float


class Check(NamedTuple):
    """A step whose change is known in float64, and what it comes to by the rules for the mean validation gradient.

    `account` is by a discrete gradient.
    """

    step: int
    change: float
    first: float
    trapezoid: float
    account: float
    simpson: float


class OracleStep(NamedTuple):
    """The values of a batch's windows, and the same from one `torch.autograd.grad` per sample, in float64."""

    documents: Tensor
    values: Tensor
    exact: Tensor


@dataclass
class Log:
    """What is known of the run: the account of every step; a few numbers for each check, probe and comparison."""

    account: list[Row] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    seconds: list[dict[str, float]] = field(default_factory=list)
    oracle: list[OracleStep] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)


class Trainer:
    """Takes steps that account for the validation loss.

    Every `check_every` steps the account is held against the truth in float64, and against Simpson's rule. Every
    `compare_every` steps, what it costs to keep a validation gradient for a while is measured: choose a number without
    common factors with the numbers of steps that it is kept for, and the comparisons will meet it at every age.
    """

    def __init__(
        self,
        losses: WindowLosses,
        optimizer: Optimizer,
        params: Tree,
        validation: Sequence[Batch],
        check_every: int,
        compare_every: int,
        plan: fg.Plan,
    ) -> None:
        self.losses, self.validation = losses, list(validation)
        self.optimizer, self.check_every, self.compare_every = optimizer, check_every, compare_every
        self.update, self.slots = optimizer.begin(params)
        self.account = in_run.along_path(losses, self.update, rule="discrete", plan=plan)
        self.simpson = in_run.along_path(losses, self.update, rule="simpson", plan=plan)
        self.score = fg.reduce(losses, plan=plan)

    def begin(self, params: Tree) -> State:
        """The state before the first step."""
        zeros = {name: torch.zeros_like(value) for name, value in params.items()}
        return State(step=0, params=params, slots=self.slots, slope=None, kept=(zeros,) * len(BESIDE))

    def step(self, state: State, batch: Batch, documents: Tensor, log: Log) -> tuple[State, in_run.Account]:
        """One step: the state after it, and its account. What is measured goes to the log."""
        slope = state.slope or in_run.validation_at(self.losses, state.params, self.validation)
        calls: dict[str, Callable[[], Any]] = {
            "plain": lambda: self._plain(state, batch),
            "account": lambda: self.account(
                state.params, batch, state=state.slots, validation=self.validation, before=slope
            ),
        }
        out = self._call(calls, state.step, log)
        gradient = slope.gradients[0]
        kept = tuple(way.renew(state.step, old, gradient) for way, old in zip(BESIDE, state.kept, strict=True))
        mean = {name: (gradient[name] + leaf) / 2 for name, leaf in out.after.gradients[0].items()}
        impulse = self._shared(state, out.grads, mean, "impulse").parts[0].item()
        log.account.append(
            Row(
                state.step,
                out.losses.mean().item(),
                slope.loss.item(),
                out.values.sum().item(),
                out.rest.item(),
                out.change.item(),
                impulse,
            )
        )
        if state.step % self.check_every == 0:
            self._check(state, batch, documents, slope, out, log)
        if state.step % self.compare_every == self.compare_every - 1:
            ones = {name: torch.ones_like(leaf) for name, leaf in gradient.items()}
            [leaves] = self._shared(state, out.grads, ones, "step").along
            factor = dict(zip(sorted(gradient), leaves, strict=True))  # in the order of names, as trees are
            pairs = list(zip(BESIDE, kept, strict=True))
            log.comparisons += compare(self.score, state.params, batch, factor, gradient, pairs, state.step)
        return State(state.step + 1, out.params, out.state, out.after, kept), out

    def _plain(self, state: State, batch: Batch) -> Any:
        """The step without an account."""
        return self.update(state.params, plain_gradient(self.losses, state.params, batch), state.slots)

    def _shared(self, state: State, grads: Tree, along: Tree, credit: Any) -> Any:
        """What the gradient does in this step, along this direction of the parameters."""
        split = split_params(state.params)
        ours, v = match_direction(grads, split), match_direction(along, split)
        return self.update.share(split, ours, state.slots, [v], credit, 1e-3)

    def _check(
        self, state: State, batch: Batch, documents: Tensor, slope: in_run.Validation, out: in_run.Account, log: Log
    ) -> None:
        better = self.simpson(state.params, batch, state=state.slots, validation=self.validation, before=slope)
        change = mean_loss(self.losses, out.params, self.validation) - mean_loss(
            self.losses, state.params, self.validation
        )
        first, last = (
            sum(
                float((leaf.double() * (out.params[name].double() - state.params[name].double())).sum())
                for name, leaf in point.gradients[0].items()
            )
            for point in (slope, out.after)
        )
        sums = [(account.values.sum() + account.rest).item() for account in (out, better)]
        log.checks.append(Check(state.step, change, first, (first + last) / 2, *sums))
        # Not the first step: where a gradient is rounding alone, AdamW's first step is its sign, in any precision.
        if state.step // self.check_every % ORACLE_EVERY_CHECKS == 1:
            exact = exact_values(self.losses, self.optimizer, state, batch, self.validation)
            # AdamW divides by roots of second moments, which blow rounding up: both sides are taken in float64.
            given: Any = state.params, state.slots
            params, slots = optree.tree_map(in_float64, given)
            ours = self.account(params, batch, state=slots, validation=self.validation)
            log.oracle.append(OracleStep(documents, ours.values, exact))

    def _call(self, calls: dict[str, Callable[[], Any]], step: int, log: Log) -> in_run.Account:
        """The account; at every probe a plain step too, in turning order, each with its time taken."""
        turn, place = divmod(step, PROBE_EVERY)
        probed = place == PROBE_EVERY // 2
        names = sorted(calls) if probed else ["account"]
        seconds: dict[str, float] = {}
        results: dict[str, Any] = {}
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            results[name] = calls[name]()
            seconds[name] = time.perf_counter() - start
        if probed:
            log.seconds.append(seconds)
        account: in_run.Account = results["account"]
        return account


def in_float64(value: Tensor) -> Tensor:
    """The value as it is, but floating-point numbers in float64."""
    return value.double() if value.is_floating_point() else value


def plain_gradient(losses: WindowLosses, params: Tree, batch: Batch) -> Tree:
    """The training gradient as a loop without values takes it."""
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    grads = torch.autograd.grad(losses(leaves, batch).mean(), list(leaves.values()))
    return dict(zip(leaves, grads, strict=True))


def exact_values(
    losses: WindowLosses, optimizer: Optimizer, state: State, batch: Batch, validation: Sequence[Batch]
) -> Tensor:
    """The values [b] of a step of AdamW the slow way: one backward per sample, in float64, and no use of funcghost.

    `phi_i = 1/b <grad_i, A * (V + c d)>` with `V = (V(w) + V(w')) / 2`, `d = w' - w`, and c so that `<V + c d, d>` is
    the change of the loss; `A = (u(G) - u(0)) / G`, u being what a gradient adds to w.
    """
    here = {name: value.double() for name, value in state.params.items()}
    leaves = {name: value.clone().requires_grad_() for name, value in here.items()}
    rows = [torch.autograd.grad(loss, list(leaves.values()), retain_graph=True) for loss in losses(leaves, batch)]
    grads = {name: torch.stack(column) for name, column in zip(leaves, zip(*rows, strict=True), strict=True)}
    lr, (beta1, beta2), step = optimizer.rate(state.step), optimizer.betas, state.step + 1

    def added(name: str, grad: Tensor) -> Tensor:
        slots = state.slots.inner[name]
        first: Tensor = beta1 * slots["exp_avg"].double() + (1 - beta1) * grad
        second: Tensor = beta2 * slots["exp_avg_sq"].double() + (1 - beta2) * grad.square()
        found: Tensor = -lr * first / (1 - beta1**step) / ((second / (1 - beta2**step)).sqrt() + 1e-8)
        return found

    mean = {name: grad.mean(0) for name, grad in grads.items()}
    there = {name: w * (1 - lr * optimizer.weight_decay) + added(name, mean[name]) for name, w in here.items()}
    slopes, at = list[Tree](), list[Tensor]()
    for point in (here, there):
        own = {name: value.clone().requires_grad_() for name, value in point.items()}
        loss = torch.cat([losses(own, part) for part in validation]).mean()
        slopes.append(dict(zip(own, torch.autograd.grad(loss, list(own.values())), strict=True)))
        at.append(loss.detach())
    mean_slope = {name: (slopes[0][name] + slopes[1][name]) / 2 for name in here}
    step_taken = {name: there[name] - here[name] for name in here}
    off = at[1] - at[0] - sum((mean_slope[name] * d).sum() for name, d in step_taken.items())
    scale = off / sum(d.square().sum() for d in step_taken.values())
    values = torch.zeros(len(rows), dtype=torch.float64)
    for name, grad in grads.items():
        moved = added(name, mean[name]) - added(name, torch.zeros_like(mean[name]))
        share = torch.where(mean[name] == 0, 0, moved / mean[name])
        values += grad.flatten(1) @ (share * (mean_slope[name] + scale * step_taken[name])).flatten()
    return values / len(rows)


def save_checkpoint(path: Path, state: State, log: Log, origin: dict[str, Any]) -> None:
    """Writes what a run needs to continue, and what it comes from; a reader sees the old file or the new one."""
    names = ("account", "checks", "oracle", "comparisons")
    rows = {name: [tuple(row) for row in getattr(log, name)] for name in names}
    kept = vars(state) | {"slots": tuple(state.slots), "slope": state.slope and tuple(state.slope)}
    content = {"origin": origin, "state": kept, "log": {"seconds": log.seconds, **rows}}
    file = io.BytesIO()
    torch.save(content, file)
    write_whole(path.with_name(UNFINISHED + path.name), path, file.getbuffer())


def load_checkpoint(path: Path) -> tuple[State, Log, dict[str, Any]]:
    """What `save_checkpoint` wrote."""
    content = torch.load(path, weights_only=True)
    log, kept = content["log"], content["state"]
    kept["slots"] = ScheduledState(*kept["slots"])
    kept["slope"] = kept["slope"] and in_run.Validation(*kept["slope"])
    account = [Row(*row) for row in log["account"]]
    checks = [Check(*row) for row in log["checks"]]
    oracle = [OracleStep(*row) for row in log["oracle"]]
    comparisons = [Comparison(*row) for row in log["comparisons"]]
    return State(**kept), Log(account, checks, log["seconds"], oracle, comparisons), content["origin"]
