"""One step of all ranks, as `DistributedDataParallel` makes it: of the mean over the ranks of their gradients.

Every rank has the whole model and samples of its own. In one process nothing is done here.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed

from funcghost.distributed.collectives import Group, check_replicated, several, summed_over_ranks, told_by_all
from funcghost.errors import InputError
from funcghost.integrations.passes import Passes
from funcghost.options import Options
from funcghost.problem import Losses, Problem
from funcghost.training.path_average import Leaves, inner
from funcghost.trees import Params, Tree

SAME = 1e-4
"""How far a validation loss may be from another rank's, relative to it: what devices round unlike."""


class Ranks:
    """The ranks that make a step together. Every rank must call the methods, in the same order.

    What a rank has of the parameters, and of trees like them, is all of it; `ShardedRanks` has shares.
    """

    def __init__(self, params: Params, group: Group) -> None:
        self.params, self.group = params, group
        self._compared = False

    def passes(self, losses: Losses, limit: int | None, options: Options | None) -> Passes:
        """What sees the batches of a step."""
        return Passes(losses, self.params, limit, options)

    def own(self, tree: Tree) -> Tree:
        """What this rank has of a tree like the parameters."""
        return tree

    def update(self, rule: Any) -> Any:
        """An update of the parameters, as one of what this rank has of them."""
        return rule

    def inner(self, a: Leaves, b: Leaves) -> Tensor:
        """The inner product of what all ranks have."""
        return inner(a, b)

    def norms(self, leaves: Leaves) -> Tensor:
        """The norm of each of what all ranks have."""
        return torch.stack([leaf.norm() for leaf in leaves])

    def largest(self, values: Tensor) -> Tensor:
        """The largest of what all ranks have."""
        return values

    def at(self, leaves: Leaves) -> AbstractContextManager[object]:
        """The parameters have these values for a while."""
        return Problem(lambda params, batch: batch, self.params, None).at(leaves)

    def averaging(self) -> AbstractContextManager[object]:
        """Within it a batch is taken, or the validation loss."""
        return nullcontext()

    def aside(self) -> AbstractContextManager[object]:
        """Within the losses: a backward that ends at what the model gives out."""
        return nullcontext()

    @property
    def count(self) -> int:
        """How many there are."""
        return distributed.get_world_size(self.group) if several(self.group) else 1

    def average(self) -> None:
        """Makes `.grad` of every parameter its mean over the ranks; None where it is None on all of them.

        Raises:
            InputError: (the first time) the parameters are not the same on all ranks.
        """
        if self.count == 1:
            return
        params = self.params
        if not self._compared:
            check_replicated(params, self.group)
            self._compared = True
        told = told_by_all([leaf.grad is not None for leaf in params.leaves], self.group)
        reached = [leaf for leaf, *there in zip(params.leaves, *told, strict=True) if any(there)]
        own = [torch.zeros_like(leaf, requires_grad=False) if leaf.grad is None else leaf.grad for leaf in reached]
        for leaf, total in zip(reached, summed_over_ranks(own, self.group), strict=True):
            leaf.grad = total / self.count

    def samples(self, ids: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The samples of all ranks [n] with their values, each of them once: one that is there twice has the sum.

        The values of a rank are those of the sum of its losses, of which the step is made by a share of one in `count`.
        """
        if self.count > 1:
            told = told_by_all((ids.cpu(), values.cpu() / self.count), self.group)
            ids, values = (torch.cat(column).to(values.device) for column in zip(*told, strict=True))
        once, place = torch.unique(ids, return_inverse=True)
        if len(once) == len(ids):
            return ids, values
        return once, torch.zeros_like(values[: len(once)]).index_add_(0, place, values)

    def any(self, own: bool) -> bool:
        """Whether it holds on one of the ranks."""
        return any(told_by_all(own, self.group))

    def check_one_validation(self, losses: Sequence[Tensor]) -> None:
        """The validation is one of all ranks.

        Raises:
            InputError: ranks give other losses.
        """
        told = told_by_all([float(loss) for loss in losses], self.group)
        for own in told[1:]:
            if any(abs(a - b) > SAME * max(abs(a), abs(b)) for a, b in zip(told[0], own, strict=True)):
                raise InputError(
                    f"validation: ranks give other losses ({told[0]} and {own}), so that their samples would be valued "
                    "for other things. Give the loss and the gradient of the validation samples of all ranks on each: "
                    "all-reduce them (data_parallel.validation_gradient), or let each rank take the whole set."
                )
