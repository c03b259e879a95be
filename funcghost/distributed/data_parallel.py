"""Data parallel: every rank has the whole model and samples of its own; gradients and directions are of all samples.

    direction = data_parallel.validation_gradient(losses, params, own_validation_batches)
    out = data_parallel.grad_and_reduce(losses)(params, own_batch, {"score": fg.dot(direction)})

Directions travel, not samples: one all-reduce for the validation gradient, and one for the training gradient. What a
rank gets for its samples is what one process would get for them; with `out.grads`, every rank takes the same step.

Under `DistributedDataParallel`, let the losses call `ddp.module`, and params be `dict(ddp.module.named_parameters())`:
DDP averages in its own `.backward()` alone, so a gradient that is taken as here is never averaged twice.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from funcghost.attribution.validation import summed_gradient
from funcghost.distributed.collectives import Group, check_replicated, several, summed_over_ranks, told_by_all
from funcghost.distributed.faults import named
from funcghost.engine.plans import Plan
from funcghost.errors import InputError, PlanError
from funcghost.options import Options
from funcghost.problem import Losses, Reduction
from funcghost.transforms import steps
from funcghost.transforms.steps import Step
from funcghost.trees import Params, Tree, check_whole, named_leaves, split_params


def grad_and_reduce(
    losses: Losses,
    *,
    reduction: Reduction = "mean",
    has_aux: bool = False,
    options: Options | None = None,
    plan: Plan | None = None,
    group: Group = None,
) -> Callable[..., Step]:
    """`fg.grad_and_reduce` on the samples of all ranks of a process group.

    `step(params, batch, reducers)` gives, on a rank with batch [b] of n samples in all, a `Step` whose `losses` [b] and
    `reduced` are of the rank's own samples, and whose `grads` are

        (1/n) sum over the samples of all ranks of grad losses[i]        (with reduction="sum" without 1/n)

    the same on every rank, and those of one process on all batches together. Ranks may have different numbers of
    samples, or none. (`DistributedDataParallel` averages the ranks' means, which weighs samples of small batches more.)
    Reducers of several samples (`fg.gram`, `fg.cross`) are of the rank's own.

    Every rank must call it in the same order. On the first call, and as often as params have other names or shapes,
    the ranks compare their parameters, and say whether the step went well: if it failed on one, all raise. Without a
    process group it is `fg.grad_and_reduce`.

    Args:
        losses: as in `fg.grad_and_reduce`.
        reduction: as in `fg.grad_and_reduce`, over the samples of all ranks.
        has_aux: as in `fg.grad_and_reduce`.
        options: as in `fg.grad_and_reduce`.
        plan: as in `fg.grad_and_reduce`; `plans.shared_plan` has one rank make it for all.
        group: the ranks that take part; all by default.

    Units: as in `fg.grad_and_reduce`. Cost: on top of it, one all-reduce of the gradient, in buckets.

    Raises:
        InputError: the parameters are not the same on all ranks, or sharded, or have sparse gradients.
        PlanError: another rank failed in its first step.
        RankError: another rank ended or hangs.

    Example:
        >>> import funcghost as fg, torch
        >>> from funcghost.distributed import data_parallel
        >>> step = data_parallel.grad_and_reduce(lambda params, x: x @ params["w"])
        >>> step({"w": torch.zeros(2)}, torch.eye(2), fg.squared_norm()).grads["w"]
        tensor([0.5000, 0.5000])
    """
    local = steps.grad_and_reduce(losses, reduction=reduction, has_aux=has_aux, options=options, plan=plan)
    agreed: set[tuple[tuple[str, ...], tuple[torch.Size, ...]]] = set()

    def first(params: Tree, batch: Tree, reducers: Tree, split: Params) -> Step:
        """Plans: what may fail on one rank alone, while the others wait for its gradient."""
        check_replicated(split, group)
        failed: Exception | None = None
        try:
            out = local(params, batch, reducers)
        except Exception as error:
            failed = error
        told = told_by_all(failed and f"{type(failed).__name__}: {failed}", group)
        if failed is not None:
            raise failed
        for rank, text in enumerate(told):
            if text is not None:
                raise PlanError(f"rank {rank} failed in its first step, so that no rank goes on: {text}")
        return out

    def step(params: Tree, batch: Tree, reducers: Tree = None) -> Step:
        with named("data_parallel", group):
            return together(params, batch, reducers)

    def together(params: Tree, batch: Tree, reducers: Tree) -> Step:
        split = split_params(params)
        check_whole(split)
        known = split.names, tuple(leaf.shape for leaf in split.leaves)
        out = local(params, batch, reducers) if known in agreed else first(params, batch, reducers, split)
        agreed.add(known)
        if not several(group):
            return out
        own = _dense_leaves(out.grads, split)
        if reduction == "mean":
            count = len(out.losses)
            total = _total(count, own[0].device, group)
            own = [leaf * (count / total).to(leaf.dtype) if count else torch.zeros_like(leaf) for leaf in own]
        return out._replace(grads=split.rebuild(summed_over_ranks(own, group)))

    return step


def validation_gradient(losses: Losses, params: Tree, batches: Sequence[Tree], group: Group = None) -> Tree:
    """The gradient of the mean validation loss over the batches of all ranks: a tree like params, the same everywhere.

        (1/n) sum over all n samples of all batches of all ranks of grad losses[i]

    Ranks may have different numbers of batches, or none; each batch is taken by one rank. Cost: on each rank a forward
    and a backward for each of its batches, and one all-reduce of the gradient, in buckets.

    Raises:
        InputError: no rank has a sample, or a parameter is sharded.

    Example:
        >>> import torch
        >>> from funcghost.distributed import data_parallel
        >>> data_parallel.validation_gradient(lambda p, x: x @ p["w"], {"w": torch.zeros(2)}, [torch.eye(2)])["w"]
        tensor([0.5000, 0.5000])
    """
    return validated(losses, params, batches, group)[1]


def validated(losses: Losses, params: Tree, batches: Sequence[Tree], group: Group = None) -> tuple[Tensor, Tree]:
    """The mean validation loss over the batches of all ranks, in float64, and `validation_gradient`."""
    split = split_params(params)
    check_whole(split)
    with named("validation_gradient", group):
        total, found = summed_gradient(losses, split, batches)
        own = [found.sum(dtype=torch.float64), found.new_tensor(len(found), dtype=torch.float64)]
        loss, everyone = summed_over_ranks([torch.stack(own).to(total[0].device)], group)[0]
        if not int(everyone):
            raise InputError("validation_gradient: no rank has a validation sample. Pass batches to at least one.")
        gradients = [leaf / everyone.to(leaf.dtype) for leaf in summed_over_ranks(total, group)]
        return loss / everyone, split.rebuild(gradients)


def across(group: Group = None) -> Callable[[Tensor], Tensor]:
    """Adds a tensor up over ranks: what `attribution.curvature` takes as `across`, so that a curvature is that of all.

    Law: the factors of every rank are those of one process on the batches of all. Every rank has a batch, whose
    parameters are used alike. Cost: the bytes of the factors, once.

    Example:
        >>> import torch
        >>> from funcghost.attribution import curvature
        >>> from funcghost.distributed import data_parallel
        >>> own = [torch.tensor([[1.0, 3.0]])]
        >>> found = curvature.kfac(lambda p, x: x @ p["w"], {"w": torch.zeros(2)}, own, across=data_parallel.across())
        >>> found.made_of["samples"]
        1
    """
    return lambda value: summed_over_ranks([value], group)[0]


def _total(count: int, device: torch.device, group: Group) -> Tensor:
    """The number of samples of all ranks, as a tensor, so that nobody waits for it."""
    (total,) = summed_over_ranks([torch.tensor([count], dtype=torch.float64, device=device)], group)
    return total.squeeze(0)


def _dense_leaves(grads: Tree, params: Params) -> list[Tensor]:
    _, leaves, _ = named_leaves(grads)
    for name, leaf in zip(params.names, leaves, strict=True):
        if leaf.layout is not torch.strided:
            raise InputError(
                f"grads[{name!r}] is sparse, and cannot be summed over ranks. Use dense gradients, as nn.Embedding "
                "gives them with sparse=False."
            )
    return leaves
