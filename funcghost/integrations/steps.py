"""The values of the samples of a step that an optimizer makes in place, as loops and trainers do.

`in_run.along_path` is a pure function of parameters; the module of a trainer is live: it is wrapped, checkpointed, its
optimizer steps in place. So its own parameters are differentiated where they are, and moved to the other end of the
step for a moment, which the update as a pure function tells before the step is made. When it has been made it is held
to that.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import optree
import torch
from torch import Tensor

from funcghost.attribution.path import RULES, Rule, mean_slope
from funcghost.distributed.collectives import Group
from funcghost.errors import GhostError, InputError
from funcghost.integrations.passes import Part
from funcghost.integrations.ranks import Ranks
from funcghost.options import Options
from funcghost.problem import Losses
from funcghost.training import updates
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
class _Expected:
    """Where the step is to end, how far that is for each parameter [n], and what is known there."""

    leaves: Sequence[Tensor]
    moves: Tensor
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

    Where there are several processes (a `group`, all by default), the step is of the mean over them of their sums, as
    `DistributedDataParallel` makes it: `settle` averages `.grad`, and `settled` gives the samples of all ranks on each,
    with their shares of the mean. Every rank takes batches of its own, as many as it likes; the validation loss is that
    of all. Let the losses call the module inside `DistributedDataParallel`, which has its own ideas of a backward. For
    a model under `fully_shard` take `funcghost.integrations.sharded.ShardedSteps`.

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
        group: see above.

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
        group: Group = None,
    ) -> None:
        if kind not in ("path", "score"):
            raise InputError(f"kind must be 'path' or 'score', found {kind!r}.")
        if rule not in RULES:
            raise InputError(f"rule must be one of {[*RULES]}, found {rule!r}.")
        for name, count, least in (("renew", renew, 1), ("pairs_memory", pairs_memory or 0, 0)):
            if type(count) is not int or count < least:
                raise InputError(f"{name} must be a whole number of {least} or more, found {count!r}.")
        self.losses, self.params, self.validation = losses, split_params(dict(params)), validation
        if kind == "path":
            _check_fine(self.params)
        self.kind, self.rule, self.renew = kind, rule, renew
        self._ranks = self._together(group)
        self._passes = self._ranks.passes(losses, pairs_memory, options)
        self._parts: list[Part] = []
        self._age = 0
        self._direction: Tree = None
        self._expected: _Expected | None = None
        self._found: Settled | None = None

    def _together(self, group: Group) -> Ranks:
        """The ranks that make the steps."""
        return Ranks(self.params, group)

    def take(self, batch: Tree, ids: Tensor, segments: Tensor | None = None) -> Tensor:
        """A batch of samples `ids` [n]; its gradient is added to `.grad`. Gives its losses, detached.

        Where the samples are packed in one row, whose losses are [1], `segments` [1, t] says which is where, from 0.

        Raises:
            GhostError: as in `fg.grad_and_reduce`.
        """
        self._found = None
        with self._ranks.averaging():
            if self.kind == "score":
                part, losses = self._passes.scored(batch, ids, segments, self._scored_along())
            else:
                part, losses = self._passes.first(batch, ids, segments)
        self._parts.append(part)
        return losses

    def settle(self, optimizer: Any, max_norm: float | None = None) -> None:
        """Finds the values of all samples taken, for the step that the optimizer is about to make.

        With `max_norm` the gradient will be clipped to that norm before, as `torch.nn.utils.clip_grad_norm_` does.

        Raises:
            InputError: nothing was taken, or the optimizer is not one of `updates.of`.
        """
        if not self._parts:
            raise InputError("settle: no batch was taken.")
        self._ranks.average()
        if self.kind == "score":
            self._found = Settled(*self._samples([part.scores for part in self._parts if part.scores is not None]))
        else:
            self._found = self._account(optimizer, max_norm)
        self._age += 1
        self._parts = []
        self._passes.forget()

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

    def aside(self) -> AbstractContextManager[object]:
        """Entered by losses around a backward of their own, which ends at what the model gives out."""
        return self._ranks.aside()

    def _samples(self, values: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The samples of the step, of all ranks, with their values."""
        return self._ranks.samples(torch.cat([part.ids for part in self._parts]), torch.cat(values))

    def _scored_along(self) -> Tree:
        if self._direction is None or (self._age >= self.renew and not self._parts):
            loss, self._direction = self.validation()
            self._ranks.check_one_validation([loss])
            self._age = 0
        return self._direction

    def _account(self, optimizer: Any, max_norm: float | None) -> Settled:
        params, own = self.params, self._ranks.own
        still = Params(params.names, tuple(own([leaf.detach() for leaf in params.leaves])), params.spec)
        blank = [
            torch.zeros_like(leaf, requires_grad=False) if leaf.grad is None else leaf.grad for leaf in params.leaves
        ]
        grads = own(blank)
        rule, state = updates.of(optimizer, params.rebuild(params.leaves))
        update = self._ranks.update(rule if max_norm is None else updates.clipped(rule, max_norm))
        state = own(state)
        with torch.no_grad():
            after, _ = update(still.rebuild(still.leaves), still.rebuild(grads), state)
        there = [
            old.clone() if leaf.grad is None else new  # the optimizer passes over it
            for new, old, leaf in zip(optree.tree_leaves(after), still.leaves, params.leaves, strict=True)
        ]
        with torch.no_grad():
            moves = [new - old for new, old in zip(there, still.leaves, strict=True)]
        points = [self._here(), self._validated(there)]
        if self.rule == "simpson":
            middle = [old + move / 2 for old, move in zip(still.leaves, moves, strict=True)]
            points.insert(1, self._validated(middle))
        self._ranks.check_one_validation([loss for loss, _ in points])
        change = points[-1][0] - points[0][0]
        with torch.no_grad():
            gradients = [match_direction(own(tree), still, "validation") for _, tree in points]
            slopes = mean_slope(self.rule, gradients, moves, change, self._ranks.inner)
            [along], _ = update.share(still, grads, state, [slopes], "step", OFF)
            along = [torch.where(low, 0, leaf) for low, leaf in zip(self._rounding(grads), along, strict=True)]
            by_gradient = self._ranks.inner(along, grads)
            rest = self._ranks.inner(slopes, moves) - by_gradient
        direction = still.rebuild(along)
        ids, values = self._samples([self._passes.again(part, direction) for part in self._parts])
        self._check_sum(values, by_gradient, slopes, moves)
        self._expected = _Expected(there, self._ranks.norms(moves), points[-1])
        return Settled(ids, values, rest, change)

    def _rounding(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """Where a gradient is none but for rounding: what an optimizer that divides by it makes of it is the rest's."""
        tops = torch.stack([g.abs().amax() if g.numel() else g.new_zeros(()) for g in grads])
        tops = self._ranks.largest(tops)
        return [g.abs() <= 4 * torch.finfo(g.dtype).eps * top for g, top in zip(grads, tops, strict=True)]

    def _check_sum(self, values: Tensor, wanted: Tensor, slopes: list[Tensor], moves: list[Tensor]) -> None:
        """Values add up to what the gradient did, but for rounding.

        Raises:
            GhostError: they do not.
        """
        inner = self._ranks.inner
        size = inner(slopes, slopes).sqrt() * inner(moves, moves).sqrt()
        if not bool((values.sum() - wanted).abs() <= 10 * OFF * torch.maximum(wanted.abs(), size / 100)):
            raise GhostError(
                f"the values of the step add up to {float(values.sum()):.3g}, where its gradient did "
                f"{float(wanted):.3g}. The gradients of samples do not add up to the gradient that is stepped along: "
                "it is rounded, and Adam's denominators magnify what is left where samples cancel. Take "
                "pairs_memory=None, or kind='score'."
            )

    def _here(self) -> tuple[Tensor, Tree]:
        """The validation loss and gradient where the parameters are: known, if they are where the last step ended."""
        if self._expected is None or self._ranks.any(bool(self._elsewhere())):
            with self._ranks.averaging():
                return self.validation()
        return self._expected.validation

    def _validated(self, leaves: list[Tensor]) -> tuple[Tensor, Tree]:
        with self._ranks.averaging(), self._ranks.at(leaves):
            return self.validation()

    def _elsewhere(self) -> list[str]:
        """The parameters that are not where the last step was to end."""
        assert self._expected is not None
        ends = self._expected.leaves
        own = self._ranks.own([leaf.detach() for leaf in self.params.leaves])
        off = [leaf - end for leaf, end in zip(own, ends, strict=True)]
        norms = self._ranks.norms([*off, *ends])
        rounding = norms.new_tensor([4 * torch.finfo(end.dtype).eps for end in ends])
        near = norms[: len(ends)] <= OFF * self._expected.moves + rounding * norms[len(ends) :]
        there = zip(self.params.names, near.tolist(), strict=True)  # one wait for the device
        return [name for name, is_near in there if not is_near]


def _check_fine(params: Params) -> None:
    """Parameters are of a dtype whose steps can be accounted for.

    Raises:
        InputError: they are not.
    """
    coarse = [name for name, leaf in zip(params.names, params.leaves, strict=True) if torch.finfo(leaf.dtype).bits < 32]
    if coarse:
        raise InputError(
            f"kind='path': the parameters {coarse[:3]} are of 16 bits or fewer, where the gradient of a step is "
            "rounded so far that its samples do not add up to it. Train float32 master weights with products in "
            "bfloat16: model.float(), or from_pretrained(..., dtype=torch.float32), and bf16=True in the trainer's "
            "arguments (torch.autocast in a loop). Adapters (LoRA) are float32 on a bfloat16 base already. Or take "
            "kind='score', which adds nothing up."
        )
