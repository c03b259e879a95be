"""The validation loss of a sharded model and its gradient, over the batches of all ranks."""

from collections.abc import Sequence

import optree
import torch
from torch import Tensor

from funcghost.distributed.collectives import summed_over_ranks, told_by_all
from funcghost.distributed.together import Together
from funcghost.errors import InputError
from funcghost.trees import Params, Tree


def validated(step: Together, params: Params, batches: Sequence[Tree]) -> tuple[Tensor, Tree]:
    """The mean of the losses over the batches of all ranks, and its gradient, sharded as the parameters are.

    Args:
        step: of the validation losses, with the reduction "sum".
        params: the model's own.
        batches: this rank's.

    Raises:
        InputError: ranks have different numbers of batches, or there is no sample.
    """
    counts = told_by_all(len(batches), step.group)
    if len(set(counts)) > 1:
        raise InputError(
            f"validation: the ranks have {counts} batches, and a sharded model runs on all ranks at once. Give every "
            "rank as many, some of them without samples if need be."
        )
    total, losses, found = list[Tensor](), list[Tensor](), 0
    for batch in batches:
        out = step.step(params.rebuild(params.leaves), batch)
        leaves = optree.tree_leaves(out.grads)
        total = [a + b for a, b in zip(total, leaves, strict=True)] if total else leaves
        losses.append(out.losses.double())
        found += step.everyone
    if not found:
        raise InputError("validation: no rank has a validation sample. Pass batches to at least one.")
    own = torch.cat(losses)
    ((value, number),) = summed_over_ranks([torch.stack([own.sum(), own.new_tensor(float(len(own)))])], step.group)
    return value / number, params.rebuild([leaf / found for leaf in total])
