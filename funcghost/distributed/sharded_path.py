"""In-run values of a sharded model: the account of a step, by the same law and from the same parts as in one process.

Every rank keeps the account of its shares, as if these were the parameters, with inner products that are sums over
ranks (`shares.py`); what takes the losses runs on the model, on all ranks at once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import optree
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from funcghost.algebra.directions import Stack, stack
from funcghost.attribution.passes import Part, Taken
from funcghost.attribution.path import RULES, Account, Path, Rule, Settings
from funcghost.attribution.validation import Batches, Sets, Validation, some
from funcghost.distributed.collectives import Group
from funcghost.distributed.fsdp import Sharded
from funcghost.distributed.sharded_validation import validated
from funcghost.distributed.shares import Shares, check_rules, joined, local, over_ranks
from funcghost.distributed.together import Together
from funcghost.engine.plans import Plan
from funcghost.errors import InputError
from funcghost.options import Options
from funcghost.problem import Losses, Reduction
from funcghost.reducers.dots import dot
from funcghost.side_effects import restore, snapshot
from funcghost.training.by_rules import ByRules
from funcghost.training.update_kinds import Clipped, Credit, Scheduled
from funcghost.trees import Params, Tree, split_params


def along_path(
    losses: Losses,
    model: nn.Module,
    update: ByRules | Clipped | Scheduled,
    *,
    rule: Rule = "trapezoid",
    credit: Credit = "step",
    reduction: Reduction = "mean",
    validation_losses: Losses | None = None,
    by: Callable[[Any], Any] | None = None,
    tolerance: float = 1e-3,
    options: Options | None = None,
    plan: Plan | None = None,
    group: Group = None,
) -> Callable[..., Account]:
    """`in_run.along_path` of a model under `fully_shard`: what the samples of all ranks did to the validation loss.

    `step(params, batch, *, state, validation, before=None) -> Account` with the `values` and `losses` of the rank's own
    samples, and with `rest`, `change` and the loss in `after` those of all ranks, the same on each. `params`, `grads`,
    `state` and gradients are sharded as the parameters are, and so is `after`. The model is left at `params`; to go on,
    write `out.params` into its parameters (`p.copy_(out.params[name])` under `torch.no_grad()`).

    Law, with `credit="step"`: the values of all ranks and `rest` add up to `change`, up to the quadrature, as in one
    process; values and rest are those of one process on the samples of all ranks.

    Args:
        losses: as in `sharded.grad_and_reduce`, of the training batch; the model is called as it is.
        model: as in `sharded.grad_and_reduce`.
        update: of `updates.of(optimizer, params)`, which may be clipped (by the norm over all ranks) and scheduled.
        rule: as in `in_run.along_path`.
        credit: as in `in_run.along_path`.
        reduction: over the samples of all ranks.
        validation_losses: if they differ from the losses (no dropout, say).
        by: `fg.per_param` or `fg.per_token`.
        tolerance: as in `in_run.along_path`.
        options: as in `sharded.grad_and_reduce`.
        plan: as in `sharded.grad_and_reduce`.
        group: as in `sharded.grad_and_reduce`.

    Every rank has validation batches of its own, as many as the others.

    Units: those of the validation loss. Cost: two plain steps, since the batch is seen twice, on the same random
    numbers; and a validation gradient, two with Simpson's rule. Muon gathers what it steps, one parameter after
    another, and every rank orthogonalizes all of them. Memory: the rank's shares of the gradients.

    Raises:
        InputError: the update is a function of one's own, which takes whole parameters; and as `in_run.along_path` and
            `sharded.grad_and_reduce`.
    """
    check_rules(update)
    if rule not in RULES or credit not in ("step", "impulse") or reduction not in ("mean", "sum"):
        raise InputError(
            f"sharded.along_path: rule must be one of {[*RULES]}, credit 'step' or 'impulse', reduction 'mean' or "
            f"'sum', found {rule!r}, {credit!r}, {reduction!r}."
        )
    gradient = Together(losses, model, reduction, False, options, None, group)
    score = Together(losses, model, None, False, options, plan, group)
    lookout = Together(validation_losses or losses, model, "sum", False, None, None, group)

    def step(params: Tree, batch: Tree, *, state: Tree, validation: Sets, before: Validation | None = None) -> Account:
        owned = split_params(params)
        placed, shares = Sharded(model, owned), Shares(owned, group)
        passes = Passes(shares, gradient, score, by or (lambda reducer: reducer), reduction)
        settings = Settings(rule, credit, tolerance, None)
        path = Path(over_ranks(update, shares), settings, _Lookout(placed, shares, lookout), passes, shares.product)
        out = path.step(
            local(params), batch, state=local(state), validation=validation, before=before and local(before)
        )
        return out._replace(
            params=shares.joined(out.params),
            grads=shares.joined(out.grads),
            state=_like(state, out.state),
            after=out.after._replace(gradients=tuple(shares.joined(tree) for tree in out.after.gradients)),
        )

    return step


def _like(tree: Tree, shares: Tree) -> Tree:
    return optree.tree_map(lambda own, new: joined(new, own) if isinstance(own, DTensor) else new, tree, shares)


class Passes:
    """A batch, seen twice: for its gradient, and for the products of its samples once the step is known."""

    def __init__(
        self,
        shares: Shares,
        gradient: Together,
        score: Together,
        by: Callable[[Any], Any],
        reduction: Reduction,
    ) -> None:
        self.shares, self.gradient, self.score, self.by, self.reduction = shares, gradient, score, by, reduction

    def first(self, params: Params, batch: Tree) -> Taken:
        """The training gradient, and what it takes to see the batch again."""
        owned = self.shares.owned
        before = snapshot([leaf.device for leaf in params.leaves[:1]])
        out = self.gradient.step(owned.rebuild(owned.leaves), batch)
        weight = some(self.gradient.everyone) if self.reduction == "mean" else 1
        part = Part(batch, None, before, out.losses)
        return Taken(
            [part], optree.tree_leaves(local(out.grads)), out.losses, weight, "two passes: the model is sharded"
        )

    def second(self, params: Params, taken: Taken, along: Tree) -> Tree:
        """The products of all samples with the direction, in units of the training gradient."""
        owned, (part,) = self.shares.owned, taken.parts
        several = [self.shares.joined(tree) for tree in along.directions] if isinstance(along, Stack) else None
        direction = self.shares.joined(along) if several is None else stack(several)
        after = snapshot([leaf.device for leaf in params.leaves[:1]])
        buffers = list(self.score.model.buffers())
        kept = [buffer.clone() for buffer in buffers]
        restore(part.before)
        try:
            out = self.score.step(owned.rebuild(owned.leaves), part.batch, self.by(dot(direction)))
        finally:
            restore(after)
            with torch.no_grad():
                for buffer, value in zip(buffers, kept, strict=True):
                    buffer.copy_(value)
        return optree.tree_map(lambda value: value / taken.weight, out.reduced)


class _Lookout:
    """Takes losses and gradients of the validation batches of all ranks."""

    def __init__(self, model: Sharded, shares: Shares, gradient: Together) -> None:
        self.model, self.shares, self.gradient = model, shares, gradient

    def at(self, params: Params, sets: Sequence[Batches], previous: Validation | None) -> Validation:
        """At these shares of the parameters."""
        with self.model.at(params.leaves):
            found = [validated(self.gradient, self.shares.owned, batches) for batches in sets]
        return Validation(torch.stack([loss for loss, _ in found]), tuple(local(tree) for _, tree in found), None)
