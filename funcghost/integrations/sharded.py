"""The values of the samples of a step on a model under `fully_shard` (FSDP2), which an optimizer makes in place.

The account is that of `Steps`, kept of this rank's shares, as `sharded.along_path` keeps it. A batch is seen twice, by
steps that gather the parameters and average the gradients as any other does.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import optree
import torch
from torch import Tensor, distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FSDPModule

from funcghost.attribution.passes import Taken
from funcghost.distributed.collectives import Group
from funcghost.distributed.fsdp import Sharded
from funcghost.distributed.sharded_path import Passes
from funcghost.distributed.shares import Shares, local, over_ranks
from funcghost.distributed.together import Together
from funcghost.engine.checkpoints import checkpoint_context
from funcghost.errors import InputError
from funcghost.integrations.passes import Part
from funcghost.integrations.ranks import Ranks
from funcghost.integrations.steps import Steps, Validation
from funcghost.options import Options
from funcghost.problem import Losses
from funcghost.reducers.dots import dot
from funcghost.training.path_average import Leaves
from funcghost.trees import Params, Tree


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` was applied to it."""
    return isinstance(model, FSDPModule)


class ShardedSteps(Steps):
    """`Steps` of a model under `fully_shard`: the step is of the mean over the ranks of their sums, as FSDP2 makes it.

    Every rank takes as many batches as the others, at the same time, each of any size. Gradients of every batch are
    averaged over ranks, and added to `.grad`: also where the loop is to accumulate them without (`no_sync`). Layers in
    a `checkpoint_wrapper`, as accelerate's `activation_checkpointing` puts them, get `fg.checkpoint_context`.

    Args:
        losses: as in `Steps`; they call the model itself.
        model: the root of what `fully_shard` was applied to.
        params: its parameters that are trained, `fg.trainable(model)`, as they are after `fully_shard`.
        validation: gives the loss and the gradient over the samples of all ranks, sharded as the parameters are:
            `sharded.validation(losses, model, params, batches)`.
        settings: the other arguments of `Steps`.

    Cost: with "path" 2 plain steps, since a batch is seen twice; with "score" 4/3; and validation gradients as in
    `Steps`. Bytes, memory and planning: those of `sharded.grad_and_reduce`, where a plain loop sends the gradients of
    several batches at once.

    Raises:
        InputError: as in `Steps` and `sharded.grad_and_reduce`; the model is tensor parallel as well; (by `take`)
            samples are packed in one row; `pairs_memory` is given.

    Example:
        >>> import funcghost as fg, torch
        >>> from torch import distributed
        >>> from torch.distributed.fsdp import fully_shard
        >>> from funcghost.distributed import sharded
        >>> from funcghost.integrations.sharded import ShardedSteps
        >>> distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
        >>> model = fully_shard(torch.nn.Linear(2, 1, bias=False), mesh=distributed.init_device_mesh("cpu", (1,)))
        >>> params, optimizer = fg.trainable(model), torch.optim.SGD(model.parameters(), lr=0.1)
        >>> losses = lambda params, x: model(x).squeeze(1)
        >>> steps = ShardedSteps(losses, model, params, sharded.validation(losses, model, params, [torch.eye(2)]))
        >>> _ = steps.take(torch.eye(2), torch.tensor([7, 8]))
        >>> steps.settle(optimizer)
        >>> optimizer.step()
        >>> steps.settled().values
        tensor([-0.0500, -0.0500])
        >>> distributed.destroy_process_group()
    """

    def __init__(
        self,
        losses: Losses,
        model: nn.Module,
        params: Mapping[str, Tensor],
        validation: Validation,
        **settings: Any,
    ) -> None:
        self.model = model
        for part in model.modules():
            if isinstance(part, CheckpointWrapper):
                part.checkpoint_fn = partial(part.checkpoint_fn, context_fn=checkpoint_context)
        super().__init__(losses, params, validation, **settings)

    def _together(self, group: Group) -> Ranks:
        return ShardedRanks(self.model, self.params, group)


class ShardedRanks(Ranks):
    """As `Ranks`, where each has a share of every parameter; FSDP2 averages over them in every backward."""

    def __init__(self, model: nn.Module, params: Params, group: Group) -> None:
        super().__init__(params, group)
        self.module, self.sharded, self.shares = model, Sharded(model, params), Shares(params, group)
        if self.sharded.in_parts or self.sharded.ranks != self.count:
            raise InputError(
                f"ShardedSteps: {self.count} ranks make a step, and {self.sharded.ranks} of them have samples of their "
                "own. Models that are tensor parallel as well have values by sharded.along_path."
            )
        if found := {group.divisor for group in self.sharded.groups} - {self.count}:
            raise InputError(
                f"ShardedSteps: gradients are divided by {sorted(found)} where {self.count} ranks make a step, which "
                "is then no mean. Leave set_gradient_divide_factor out."
            )

    def passes(self, losses: Losses, limit: int | None, options: Options | None) -> Any:
        """What sees the batches of a step."""
        if limit is not None:
            raise InputError(f"ShardedSteps: keeps no pairs, so that there is no pairs_memory; found {limit}.")
        return _Passes(losses, self, options)

    def own(self, tree: Tree) -> Tree:
        """This rank's shares."""
        return local(tree)

    def update(self, rule: Any) -> Any:
        """An update of shares."""
        return over_ranks(rule, self.shares)

    def inner(self, a: Leaves, b: Leaves) -> Tensor:
        """The inner product of what these are the shares of."""
        return self.shares.product(a, b)

    def norms(self, leaves: Leaves) -> Tensor:
        """The norm of each of what these are the shares of."""
        copies = self.shares.copies * (len(leaves) // len(self.shares.copies))
        squares = [leaf.double().square().sum() / n for leaf, n in zip(leaves, copies, strict=True)]
        return self.shares.total(torch.stack(squares)).sqrt()

    def largest(self, values: Tensor) -> Tensor:
        """The largest of what these are the shares of."""
        found = values.clone()
        distributed.all_reduce(found, distributed.ReduceOp.MAX, group=self.group)
        return found

    def at(self, leaves: Leaves) -> AbstractContextManager[object]:
        """The parameters have these shares for a while."""
        return self.sharded.at(leaves)

    def averaging(self) -> AbstractContextManager[object]:
        """Within it a batch is taken, or the validation loss."""
        return self.sharded.averaging()

    def aside(self) -> AbstractContextManager[object]:
        """Within the losses: a backward that ends at what the model gives out."""
        return self.sharded.aside()

    def average(self) -> None:
        """Gradients are averaged as they come."""


class _Passes:
    """As `funcghost.integrations.passes.Passes`, on all ranks at once."""

    def __init__(self, losses: Losses, ranks: ShardedRanks, options: Options | None) -> None:
        self.ranks, self.params = ranks, ranks.params
        self._step = Together(losses, ranks.module, "sum", False, options, None, ranks.group)
        score = Together(losses, ranks.module, None, False, options, None, ranks.group)
        self._passes = Passes(ranks.shares, self._step, score, lambda reducer: reducer, "sum")

    def scored(self, batch: Tree, ids: Tensor, segments: Tensor | None, along: Tree) -> tuple[Part, Tensor]:
        """A batch with the scores of its samples along a direction that is known, and its losses."""
        _check_rows(segments)
        out = self._step.step(self.params.rebuild(self.params.leaves), batch, dot(along))
        self._add(local(out.grads))
        return Part(ids, None, None, _checked(out.reduced, ids)), out.losses

    def first(self, batch: Tree, ids: Tensor, segments: Tensor | None) -> tuple[Part, Tensor]:
        """A batch that is kept for the direction that its step will give, and its losses."""
        _check_rows(segments)
        taken = self._passes.first(self.params, batch)
        self._add(self.params.rebuild(taken.grads))
        return Part(ids, None, taken), taken.losses

    def again(self, part: Part, along: Tree) -> Tensor:
        """The scores [n] of a batch's samples along a direction, of which this is the rank's share."""
        assert isinstance(part.seen, Taken)
        with self.ranks.averaging():
            return _checked(self._passes.second(self.params, part.seen, along), part.ids)

    def forget(self) -> None:
        """Nothing is held."""

    def _add(self, grads: Tree) -> None:
        """The mean over the ranks, of what the losses reach: an optimizer passes over the rest."""
        joined = optree.tree_leaves(self.ranks.shares.joined(grads))
        for leaf, own, reached in zip(self.params.leaves, joined, self._step.reached, strict=True):
            if reached:
                mean = own / self.ranks.count
                leaf.grad = mean if leaf.grad is None else leaf.grad.add_(mean)


def _check_rows(segments: Tensor | None) -> None:
    if segments is not None:
        raise InputError(
            "ShardedSteps: samples that are packed in one row are not told apart in a sharded model. Let rows be "
            "samples (DataCollatorWithPadding)."
        )


def _checked(scores: Tensor, ids: Tensor) -> Tensor:
    if scores.shape != ids.shape:
        raise InputError(f"the losses are of {list(scores.shape)} samples, and there are {len(ids)} ids.")
    return scores
