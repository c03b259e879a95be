"""The values of the samples of a step that an optimizer makes in place, as loops and trainers do.

`in_run.along_path` is a pure function of parameters; the module of a trainer is live: it is wrapped, checkpointed, its
optimizer steps in place. So its own parameters are differentiated where they are, and moved to the other end of the
step for a moment, which the update as a pure function tells before the step is made. When it has been made it is held
to that.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import optree
import torch
from torch import Tensor

from funcghost.algebra.pair_algebra import combine
from funcghost.algebra.pairs import Pairs
from funcghost.attribution.path import RULES, Rule, mixed
from funcghost.engine.run import run_plain
from funcghost.errors import GhostError, InputError, SampleAxisError
from funcghost.options import Options
from funcghost.problem import Losses, Problem, graph_nodes
from funcghost.reducers.dots import dot
from funcghost.reducers.positions import per_segment
from funcghost.side_effects import Snapshot, restore, snapshot, untouched
from funcghost.training import updates
from funcghost.training.path_average import inner
from funcghost.transforms.halves import apply, plan
from funcghost.transforms.steps import grad_and_reduce, pairs_and_losses, reduce
from funcghost.trees import Params, Tree, match_direction, split_params

Kind = Literal["path", "score"]
Validation = Callable[[], tuple[Tensor, Tree]]
"""Gives the validation loss and its gradient, a tree like params, where the parameters are now."""

OFF = 1e-3
"""How far a step may be from what it was taken for, relative to it."""


class Settled(NamedTuple):
    """The samples of a step [n] with their values; the rest and the change of the validation loss, with kind "path".

    `values.sum() + rest == change`, up to the quadrature of the validation gradient between the ends of the step.
    """

    ids: Tensor
    values: Tensor
    rest: Tensor | None = None
    change: Tensor | None = None


@dataclass(frozen=True)
class _Part:
    """A batch whose gradient is in `.grad`: what it takes to know its samples' values, or the values."""

    batch: Tree
    ids: Tensor
    segments: Tensor | None
    pairs: Pairs | None
    before: Snapshot | None
    scores: Tensor | None = None


@dataclass(frozen=True)
class _Expected:
    """Where the step is to end, how far that is for each parameter, and what is known there."""

    leaves: Sequence[Tensor]
    moves: Sequence[Tensor]
    validation: tuple[Tensor, Tree]


class Steps:
    """Takes the batches of a step one after the other, and tells what their samples did in it.

        steps.take(batch, ids)       # for every batch of the step: its gradient is added to .grad
        steps.settle(optimizer)      # gradients are complete, and not clipped yet
        optimizer.step()
        steps.settled()              # values, held to the step that was made

    With kind "path", `values[i] = <grad losses[i], A^T V_bar>` as in `in_run.along_path`, over the entries of a
    parameter whose gradient is more than rounding beside the largest; with "score", `<grad losses[i], V>` with the
    validation gradient V at the start of the step, or of one up to `renew` steps before.

    Args:
        losses: `losses(params, batch) -> [b]` whose sum over the batches of a step is what the step is made of. They
            may use the module as it is: `params` are its own tensors.
        params: the parameters that are trained, by name: `fg.trainable(model)`.
        validation: gives the validation loss and its gradient at the parameters as they are.
        kind: see above.
        rule: of the mean validation gradient with "path", see `in_run.along_path`.
        renew: after how many steps the direction of "score" is taken anew.
        pairs_memory: bytes of pairs that a step may keep with "path"; the batches that do not fit are seen twice.
        options: as in `fg.grad_and_reduce`.

    Cost: with "path" 4/3 of a plain step where pairs are kept, 2 plain steps where not; with "score" 4/3; and a
    validation gradient a step (with "score", every `renew` steps).

    Raises:
        InputError: an argument is not what it must be; (when used) the optimizer is none of `updates.of`.
        GhostError: (by `settled`) the step that was made is not the one that the values are about.

    Example:
        >>> import torch
        >>> from funcghost.integrations.steps import Steps
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> def validation():
        ...     loss = w.square().sum()
        ...     return loss.detach(), {"w": torch.autograd.grad(loss, w)[0]}
        >>> steps = Steps(lambda params, x: (x @ params["w"]).square(), {"w": w}, validation)
        >>> optimizer = torch.optim.SGD([w], lr=0.1)
        >>> steps.take(torch.eye(2), torch.tensor([7, 8]))
        tensor([1., 4.])
        >>> steps.settle(optimizer)
        >>> optimizer.step()
        >>> steps.settled().values
        tensor([-0.3600, -1.4400])
    """

    def __init__(
        self,
        losses: Losses,
        params: Mapping[str, Tensor],
        validation: Validation,
        *,
        kind: Kind = "path",
        rule: Rule = "trapezoid",
        renew: int = 1,
        pairs_memory: int | None = None,
        options: Options | None = None,
    ) -> None:
        if kind not in ("path", "score"):
            raise InputError(f"kind must be 'path' or 'score', found {kind!r}.")
        if rule not in RULES:
            raise InputError(f"rule must be one of {[*RULES]}, found {rule!r}.")
        for name, count, least in (("renew", renew, 1), ("pairs_memory", pairs_memory or 0, 0)):
            if type(count) is not int or count < least:
                raise InputError(f"{name} must be a whole number of {least} or more, found {count!r}.")
        self.losses, self.params, self.validation = losses, split_params(dict(params)), validation
        self.kind, self.rule, self.renew, self.limit = kind, rule, renew, pairs_memory
        self._step = grad_and_reduce(losses, reduction="sum", options=options)
        self._score = reduce(losses, options=options)
        self._pairs = pairs_and_losses(losses, options=options)
        self._options = options
        self._of_one_row: tuple[Callable[..., Any], Callable[..., Any]] | None = None
        self._parts: list[_Part] = []
        self._held = self._largest = self._age = 0
        self._direction: Tree = None
        self._expected: _Expected | None = None
        self._found: Settled | None = None

    @property
    def tree(self) -> Tree:
        """The parameters, as the losses take them."""
        return self.params.rebuild(self.params.leaves)

    def take(self, batch: Tree, ids: Tensor, segments: Tensor | None = None) -> Tensor:
        """A batch of samples `ids` [n]; its gradient is added to `.grad`. Gives its losses, detached.

        Where the samples are packed in one row, whose losses are [1], `segments` [1, t] says which is where, from 0.

        Raises:
            GhostError: as in `fg.grad_and_reduce`.
        """
        self._found = None
        if self.kind == "score":
            reducer = self._reducer(self._scored_along(), segments, len(ids))
            step = self._step if segments is None else self._packed(batch)[0]
            out = step(self.tree, batch, reducer)
            gradients: Sequence[Tensor] = optree.tree_leaves(out.grads)
            losses = out.losses
            part = _Part(batch, ids, segments, None, None, _flat(out.reduced, ids))
        else:
            part, gradients, losses = self._first_pass(batch, ids, segments)
        self._parts.append(part)
        fresh = [g for p, g in zip(self.params.leaves, gradients, strict=True) if p.grad is None]
        still = fresh and not all(torch.stack([g.any() for g in fresh]).tolist())
        reached = self._reached(batch) if still else None
        for leaf, gradient in zip(self.params.leaves, gradients, strict=True):
            if leaf.grad is not None:
                leaf.grad.add_(gradient)
            elif reached is None or id(leaf) in reached:  # an optimizer passes over what has no gradient
                leaf.grad = gradient
        return losses

    def settle(self, optimizer: Any, max_norm: float | None = None) -> None:
        """Finds the values of all samples taken, for the step that the optimizer is about to make.

        With `max_norm` the gradient will be clipped to that norm before, as `torch.nn.utils.clip_grad_norm_` does.

        Raises:
            InputError: nothing was taken, or the optimizer is not one of `updates.of`.
        """
        if not self._parts:
            raise InputError("settle: no batch was taken.")
        ids = torch.cat([part.ids for part in self._parts])
        if self.kind == "score":
            self._found = Settled(ids, torch.cat([part.scores for part in self._parts if part.scores is not None]))
        else:
            self._found = self._account(optimizer, max_norm, ids)
        self._age += 1
        self._parts, self._held = [], 0

    def settled(self) -> Settled:
        """The samples and values of the step that has just been made.

        Raises:
            GhostError: it is not the step that they are about.
        """
        if self._found is None:
            raise InputError("settled: there is no step: take its batches, and settle it before it is made.")
        if self.kind == "path" and (wrong := self._elsewhere()):
            raise GhostError(
                f"the step that was made is not the one that the values are about: {wrong[:3]} are elsewhere. "
                "Something between the backward and the step (a callback, a scaler, noise) changes gradients, or "
                "something after it changes parameters. Without it the values are right; kind='score' needs no step."
            )
        found, self._found = self._found, None
        return found

    def _first_pass(self, batch: Tree, ids: Tensor, segments: Tensor | None) -> tuple[_Part, Sequence[Tensor], Tensor]:
        problem = Problem(self.losses, self.params, batch)
        before = snapshot(problem.devices())
        room = self.limit is None or (self.limit > 0 and self._held + self._largest <= self.limit)
        if segments is not None or not room:  # scores by position are those of a step
            outcome = run_plain(problem, "sum")
            return _Part(batch, ids, segments, None, before), outcome.gradients, outcome.losses
        pairs, losses = self._pairs(self.tree, batch)
        gradients = optree.tree_leaves(combine(pairs, torch.ones_like(losses)))
        self._largest = pairs.nbytes
        kept = self.limit is None or self._held + pairs.nbytes <= self.limit
        self._held += pairs.nbytes if kept else 0
        return _Part(batch, ids, segments, pairs if kept else None, before), gradients, losses

    def _reached(self, batch: Tree) -> set[int]:
        """The parameters that the losses depend on, by identity."""
        problem = Problem(self.losses, self.params, batch)
        with untouched(problem.devices()):
            losses, _ = problem.evaluate(problem.leaves())
        return {id(node.variable) for node in graph_nodes(losses) if hasattr(node, "variable")}

    def _scored_along(self) -> Tree:
        if self._direction is None or (self._age >= self.renew and not self._parts):
            self._direction, self._age = self.validation()[1], 0
        return self._direction

    def _packed(self, batch: Tree) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Step and scores for one packed row.

        Which axis has the positions is seen with two rows, on first use. One row runs the same ops, but that some of
        them have nothing to copy, which the checksum of ops counts: it is that of one row.
        """
        if self._of_one_row is None:
            twice = optree.tree_map(lambda leaf: torch.cat([leaf, leaf]) if _is_row(leaf) else leaf, batch)
            two, one = (plan(self.losses, self.tree, rows, options=self._options) for rows in (twice, batch))
            if [site.op for site in two.sites] != [site.op for site in one.sites]:
                raise SampleAxisError("packed rows: the losses run other ops with two rows than with one.")
            made = replace(two, digest=one.digest)
            self._of_one_row = (
                grad_and_reduce(self.losses, reduction="sum", options=self._options, plan=made),
                reduce(self.losses, options=self._options, plan=made),
            )
        return self._of_one_row

    def _reducer(self, along: Tree, segments: Tensor | None, count: int) -> Any:
        return dot(along) if segments is None else per_segment(dot(along), segments, count)

    def _account(self, optimizer: Any, max_norm: float | None, ids: Tensor) -> Settled:
        still = Params(self.params.names, tuple(leaf.detach() for leaf in self.params.leaves), self.params.spec)
        grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self.params.leaves]
        rule, state = updates.of(optimizer, self.tree)
        update: Any = rule if max_norm is None else updates.clipped(rule, max_norm)
        with torch.no_grad():
            after, _ = update(still.rebuild(still.leaves), still.rebuild(grads), state)
        there = [
            old.clone() if leaf.grad is None else new  # the optimizer passes over it
            for new, old, leaf in zip(optree.tree_leaves(after), still.leaves, self.params.leaves, strict=True)
        ]
        with torch.no_grad():
            moves = [new - old for new, old in zip(there, still.leaves, strict=True)]
        points = [self._here(), self._validated(there)]
        if self.rule == "simpson":
            points.insert(1, self._validated([old + move / 2 for old, move in zip(still.leaves, moves, strict=True)]))
        columns = zip(*(match_direction(tree, still, "validation") for _, tree in points), strict=True)
        slopes = [mixed(column, RULES[self.rule]) for column in columns]
        with torch.no_grad():
            [along], _ = update.share(still, grads, state, [slopes], "step", OFF)
            along = [torch.where(_is_rounding(g), 0, leaf) for g, leaf in zip(grads, along, strict=True)]
            by_gradient = inner(along, grads)
            rest = inner(slopes, moves) - by_gradient
        along = still.rebuild(along)
        values = torch.cat([self._second_pass(part, along) for part in self._parts])
        _check_sum(values, by_gradient, slopes, moves)
        self._expected = _Expected(there, [move.norm() for move in moves], points[-1])
        return Settled(ids, values, rest, points[-1][0] - points[0][0])

    def _here(self) -> tuple[Tensor, Tree]:
        """The validation loss and gradient where the parameters are: known, if they are where the last step ended."""
        if self._expected is None or self._elsewhere():
            return self.validation()
        return self._expected.validation

    def _validated(self, leaves: Sequence[Tensor]) -> tuple[Tensor, Tree]:
        with Problem(self.losses, self.params, None).at(leaves):
            return self.validation()

    def _second_pass(self, part: _Part, along: Tree) -> Tensor:
        if part.pairs is not None:
            return _flat(apply(dot(along), part.pairs, options=self._options), part.ids)
        assert part.before is not None
        reducer = self._reducer(along, part.segments, len(part.ids))
        with untouched(Problem(self.losses, self.params, part.batch).devices()):
            restore(part.before)
            score = self._score if part.segments is None else self._packed(part.batch)[1]
            return _flat(score(self.tree, part.batch, reducer), part.ids)

    def _elsewhere(self) -> list[str]:
        """The parameters that are not where the last step was to end."""
        assert self._expected is not None
        ends = zip(self.params.leaves, self._expected.leaves, self._expected.moves, strict=True)
        near = [
            (leaf.detach() - end).norm() <= OFF * move + 4 * torch.finfo(leaf.dtype).eps * end.norm()
            for leaf, end, move in ends
        ]
        there = zip(self.params.names, torch.stack(near).tolist(), strict=True)  # one wait for the device
        return [name for name, is_near in there if not is_near]


def _is_rounding(gradient: Tensor) -> Tensor:
    """Where a gradient is none but for rounding: what an optimizer that divides by it makes of that is the rest's."""
    if not gradient.numel():
        return gradient != 0
    return gradient.abs() <= 4 * torch.finfo(gradient.dtype).eps * gradient.abs().amax()


def _check_sum(values: Tensor, wanted: Tensor, slopes: list[Tensor], moves: list[Tensor]) -> None:
    """Values add up to what the gradient did, but for rounding.

    Raises:
        GhostError: they do not.
    """
    size = inner(slopes, slopes).sqrt() * inner(moves, moves).sqrt()
    if not bool((values.sum() - wanted).abs() <= 10 * OFF * torch.maximum(wanted.abs(), size / 100)):
        raise GhostError(
            f"the values of the step add up to {float(values.sum()):.3g}, where its gradient did {float(wanted):.3g}. "
            "The gradients of samples do not add up to the gradient that is stepped along: it is rounded (bfloat16), "
            "and Adam's denominators magnify what is left where samples cancel. Keep parameters in float32 (with "
            "bf16=True the products alone are rounded) and pairs_memory=None; or use kind='score'."
        )


def _is_row(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == 1


def _flat(scores: Tensor, ids: Tensor) -> Tensor:
    """[n] of [n], or of packed samples [1, n]."""
    if scores.numel() != len(ids):
        raise InputError(f"the losses are of {list(scores.shape)} samples, and there are {len(ids)} ids.")
    return scores.reshape(-1)
