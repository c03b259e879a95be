"""Scored training steps: the optimizer, the step with its values, what is measured beside it, and checkpoints."""

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import funcghost as fg
from funcghost.attribution import in_run
from funcghost.store import write_whole
from lm_directions import BESIDE, Comparison, Keeping, compare
from lm_model import Batch, Tree, WindowLosses, mean_loss

UNFINISHED = ".unfinished-"
PROBE_EVERY = 10
ORACLE_EVERY_CHECKS = 10


@dataclass(frozen=True)
class State:
    """All that a step needs of the steps before; the batches follow from the seed and the step.

    `kept` are validation gradients as the run keeps them, and as `BESIDE` does.
    """

    step: int
    params: Tree
    velocity: Tree
    second_moment: Tree
    kept: tuple[Tree, ...]


@dataclass(frozen=True)
class Optimizer:
    """RMSprop with Nesterov momentum, its scale held: an adaptive optimizer whose step the values describe exactly.

    With `s` the second moment of the gradients of the steps before and `P = 1 / (sqrt(s) + eps)`, a step is

        w~ = w + momentum * v              look ahead, along the earlier steps
        g  = mean_j grad l_j(w~)
        w' = w~ - lr * P * g               the gradient's step, linear in g because P is from before it
        v' = momentum * v - lr * P * g

    In-run values of the batch are about the third line: they sum to `l_val(w') - l_val(w~)`.
    """

    lr: float
    momentum: float = 0.95
    decay: float = 0.99
    eps: float = 1e-5
    warmup: int = 20

    def rate(self, step: int) -> float:
        """The learning rate of this step: it rises over the first `warmup` steps."""
        return self.lr * min(1.0, (step + 1) / self.warmup)

    def look_ahead(self, state: State) -> Tree:
        """`w~`, where the gradient is taken."""
        return {name: value + self.momentum * state.velocity[name] for name, value in state.params.items()}

    def scale(self, state: State) -> Tree:
        """`P`, known before the gradient is."""
        return {name: 1.0 / (moment.sqrt() + self.eps) for name, moment in state.second_moment.items()}

    def advance(self, state: State, here: Tree, scale: Tree, grads: Tree, kept: tuple[Tree, ...]) -> State:
        """The state after the step with these gradients at `here`."""
        lr = self.rate(state.step)
        move = {name: -lr * scale[name] * grad for name, grad in grads.items()}
        past = state.second_moment
        moment = {name: torch.lerp(grad.square(), past[name], self.decay) for name, grad in grads.items()}
        return State(
            step=state.step + 1,
            params={name: here[name] + move[name] for name in move},
            velocity={name: self.momentum * state.velocity[name] + move[name] for name in move},
            second_moment=moment,
            kept=kept,
        )


class Check(NamedTuple):
    """A step held against the truth: losses before it, the change it made, sums of values along a fresh gradient."""

    step: int
    training_loss: float
    validation_loss: float
    change: float
    first: float
    second: float


class OracleStep(NamedTuple):
    """The values of a batch's windows, and the same from one `torch.autograd.grad` per sample, in float64."""

    documents: Tensor
    values: Tensor
    exact: Tensor


@dataclass
class Log:
    """What is measured beside the steps; a few numbers for each check, probe and comparison."""

    checks: list[Check] = field(default_factory=list)
    seconds: list[dict[str, float]] = field(default_factory=list)
    oracle: list[OracleStep] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)


class Trainer:
    """Takes scored steps: second-order values of every batch, along a validation gradient that may be kept for a while.

    Every `check_every` steps, values along a fresh validation gradient are checked against the truth. Every
    `compare_every` steps, what keeping one costs is measured: choose a number without common factors with the numbers
    of steps that it is kept for, and the comparisons will meet it at every age.
    """

    def __init__(
        self,
        losses: WindowLosses,
        optimizer: Optimizer,
        validation: Sequence[Batch],
        keeping: Keeping,
        check_every: int,
        compare_every: int,
        plan: fg.Plan,
    ) -> None:
        self.losses = losses
        self.optimizer = optimizer
        self.validation = list(validation)
        self.keeping = keeping
        self.check_every = check_every
        self.compare_every = compare_every
        self.first_order = in_run.first_order(losses, compress=keeping.narrow, plan=plan)
        self.second_order = in_run.second_order(losses, compress=keeping.narrow, plan=plan)
        self.exact = in_run.second_order(losses, plan=plan)
        self.score = fg.reduce(losses, plan=plan)

    def begin(self, params: Tree, calibration: Sequence[Batch]) -> State:
        """The state before the first step; the second moment is that of the calibration batches' gradients."""
        zeros = {name: torch.zeros_like(value) for name, value in params.items()}
        moment = zeros
        for batch in calibration:
            grads = plain_gradient(self.losses, params, batch)
            moment = {name: moment[name] + grad.square() / len(calibration) for name, grad in grads.items()}
        return State(step=0, params=params, velocity=zeros, second_moment=moment, kept=(zeros,) * (1 + len(BESIDE)))

    def step(self, state: State, batch: Batch, documents: Tensor, log: Log) -> tuple[State, in_run.Values]:
        """One step: the state after it, and its values. What is measured goes to the log."""
        here, scale, lr = self.optimizer.look_ahead(state), self.optimizer.scale(state), self.optimizer.rate(state.step)
        ways = self.keeping, *BESIDE
        checking = state.step % self.check_every == 0
        comparing = state.step % self.compare_every == self.compare_every - 1
        kept, fresh = state.kept, None
        if checking or comparing or any(way.due(state.step) for way in ways):
            fresh = in_run.validation_gradient(self.losses, here, self.validation)
            kept = tuple(way.renew(state.step, old, fresh) for way, old in zip(ways, kept, strict=True))
        keywords = {"lr": lr, "direction": kept[0], "preconditioner": scale}
        calls: dict[str, Callable[[], Any]] = {
            "plain": lambda: plain_gradient(self.losses, here, batch),
            "first": lambda: self.first_order(here, batch, **keywords),
            "second": lambda: self.second_order(here, batch, validation=self.validation, **keywords),
        }
        values = self._call(calls, state.step, log)
        after = self.optimizer.advance(state, here, scale, values.grads, kept)
        if fresh is not None and checking:
            truth = {"lr": lr, "direction": fresh, "preconditioner": scale, "validation": self.validation}
            as_it_is = kept[0] is fresh and not self.keeping.rank
            exact = values if as_it_is else self.exact(here, batch, **truth)
            before = mean_loss(self.losses, here, self.validation)
            change = mean_loss(self.losses, after.params, self.validation) - before
            sums = exact.first.sum().item(), exact.values.sum().item()
            log.checks.append(Check(state.step, values.losses.mean().item(), before, change, *sums))
            if state.step % (ORACLE_EVERY_CHECKS * self.check_every) == 0:
                slow = exact_values(self.losses, here, batch, self.validation, lr, scale)
                log.oracle.append(OracleStep(documents, exact.values, slow))
        if fresh is not None and comparing:
            pairs = list(zip(ways, kept, strict=True))
            log.comparisons += compare(self.score, here, batch, scale, fresh, pairs, state.step)
        return after, values

    def _call(self, calls: dict[str, Callable[[], Any]], step: int, log: Log) -> in_run.Values:
        """The second-order call; at every probe the others too, in turning order, each with its time taken."""
        turn, place = divmod(step, PROBE_EVERY)
        probed = place == PROBE_EVERY // 2
        names = sorted(calls) if probed else ["second"]
        seconds: dict[str, float] = {}
        results: dict[str, Any] = {}
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            results[name] = calls[name]()
            seconds[name] = time.perf_counter() - start
        if probed:
            log.seconds.append(seconds)
        values: in_run.Values = results["second"]
        return values


def plain_gradient(losses: WindowLosses, params: Tree, batch: Batch) -> Tree:
    """The training gradient as a loop without values takes it."""
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    grads = torch.autograd.grad(losses(leaves, batch).mean(), list(leaves.values()))
    return dict(zip(leaves, grads, strict=True))


def exact_values(
    losses: WindowLosses, params: Tree, batch: Batch, validation: Sequence[Batch], lr: float, scale: Tree
) -> Tensor:
    """Second-order in-run values [b] the slow way: one backward per sample, in float64, and no use of funcghost.

    `phi_i = lr/b <grad_i, P * (-V + 1/2 H (lr P * mean_j grad_j))>`.
    """
    leaves = [value.double().requires_grad_() for value in params.values()]
    tree = dict(zip(params, leaves, strict=True))
    rows = [torch.autograd.grad(loss, leaves, retain_graph=True) for loss in losses(tree, batch)]
    grads = [torch.stack(column) for column in zip(*rows, strict=True)]
    validation_loss = torch.cat([losses(tree, part) for part in validation]).mean()
    slope = torch.autograd.grad(validation_loss, leaves, create_graph=True)
    moves = [lr * scale[name] * grad.mean(0) for name, grad in zip(tree, grads, strict=True)]
    along = torch.stack([(v * move).sum() for v, move in zip(slope, moves, strict=True)]).sum()
    bend = torch.autograd.grad(along, leaves)
    values = torch.zeros(len(rows), dtype=torch.float64)
    for name, grad, v, h in zip(tree, grads, slope, bend, strict=True):
        values += grad.flatten(1) @ (scale[name] * (h / 2 - v.detach())).flatten()
    return values * lr / len(rows)


def save_checkpoint(path: Path, state: State, log: Log, origin: dict[str, Any]) -> None:
    """Writes what a run needs to continue, and what it comes from; a reader sees the old file or the new one."""
    rows = {name: [tuple(row) for row in getattr(log, name)] for name in ("checks", "oracle", "comparisons")}
    content = {"origin": origin, "state": vars(state), "log": {"seconds": log.seconds, **rows}}
    file = io.BytesIO()
    torch.save(content, file)
    write_whole(path.with_name(UNFINISHED + path.name), path, file.getbuffer())


def load_checkpoint(path: Path) -> tuple[State, Log, dict[str, Any]]:
    """What `save_checkpoint` wrote."""
    content = torch.load(path, weights_only=True)
    log = content["log"]
    checks = [Check(*row) for row in log["checks"]]
    oracle = [OracleStep(*row) for row in log["oracle"]]
    comparisons = [Comparison(*row) for row in log["comparisons"]]
    return State(**content["state"]), Log(checks, log["seconds"], oracle, comparisons), content["origin"]
