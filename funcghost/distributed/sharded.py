"""Sharded models (FSDP2): every rank has a share of each parameter, and samples of its own.

    losses = lambda params, batch: cross_entropy(model(batch["x"]), batch["y"], reduction="none")
    params = dict(model.named_parameters())  # of a model under fully_shard
    direction = sharded.validation_gradient(losses, model, params, own_validation_batches)
    out = sharded.grad_and_reduce(losses, model)(params, own_batch, {"score": fg.dot(direction)})

The losses call the model itself: under `fully_shard`, `torch.func.functional_call` ignores the values that it is given.
Directions and gradients lie as the parameters lie. In a step FSDP2 gathers parameters and averages gradients as in any
other step; a direction is gathered along with the parameters of its group in the backward, and freed with them.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from funcghost.algebra.pairs import Pairs
from funcghost.distributed.collectives import Group
from funcghost.distributed.sharded_path import along_path
from funcghost.distributed.sharded_validation import validated
from funcghost.distributed.together import Together
from funcghost.engine.plans import Plan
from funcghost.errors import InputError
from funcghost.options import Options
from funcghost.problem import Losses, Reduction
from funcghost.transforms.steps import Step
from funcghost.trees import Tree, split_params

__all__ = ["along_path", "grad_and_reduce", "pairs", "reduce", "validation", "validation_gradient"]


def grad_and_reduce(
    losses: Losses,
    model: nn.Module,
    *,
    reduction: Reduction = "mean",
    has_aux: bool = False,
    options: Options | None = None,
    plan: Plan | None = None,
    group: Group = None,
) -> Callable[..., Step]:
    """`fg.grad_and_reduce` of a model under `fully_shard`, on the samples of all ranks.

    `step(params, batch, reducers)` gives, on a rank with batch [b] of n samples in all, a `Step` whose `losses` [b] and
    `reduced` are of the rank's own samples, those of one process with the whole model; and whose `grads` are

        (1/n) sum over the samples of all ranks of grad losses[i]        (with reduction="sum" without 1/n)

    sharded as the parameters are. Ranks may have different numbers of samples, or none. `.grad` of the parameters is
    left as it is. Reducers of several samples (`fg.gram`, `fg.cross`) are of the rank's own.

    Every rank must call it in the same order, with the same reducers. The first call plans: every rank on its own
    batch, with the whole model, and then the ranks tell one another whether it went well; so does a later call where
    some rank's losses run other ops, or, for a check, other sizes.

    Args:
        losses: `losses(params, batch) -> Tensor[b]`, which calls the model itself. It may leave `params` aside, which
            are handed on as they are given.
        model: what `fully_shard` was applied to at last, with everything in it.
        reduction: as in `fg.grad_and_reduce`, over the samples of all ranks.
        has_aux: as in `fg.grad_and_reduce`.
        options: as in `fg.grad_and_reduce`; there is no forward route.
        plan: as in `fg.grad_and_reduce`; all ranks pass one, or none does. See `plans.shared_plan`.
        group: all ranks that the model is sharded over, for agreements; all that there are by default.

    The step takes `params`, the model's own parameters or some of them, `dict(model.named_parameters())`. Directions
    are trees like params, of DTensors that are sharded in the same way; or with leaves, dense or of low rank, that all
    ranks have as a whole.

    Blocks that were given to `torch.compile` (with the backends "inductor", without CUDA graphs, and "aot_eager") run
    compiled where scores and gradients alone are asked for, up to 16 sizes and plans of each; to make norms, Gram
    matrices and pairs they run op by op, and so they do where samples are moved by data, or tangents go on to the next
    block. Random numbers are those of the compiler then, as in a plain compiled step. The log says what does not run
    compiled, and why. The first call compiles, and holds each block once to its own ops. Plans are of the ops in
    Dynamo's graphs: one of the uncompiled model is made anew where it names others.

    Units: as in `fg.grad_and_reduce`. Under a mixed precision policy the gradients of samples are those that the layers
    compute, in the policy's dtype, along the direction rounded to it.

    Cost: FLOPs as in `fg.grad_and_reduce`. Bytes that a rank receives, for P parameters of which it has 1/w, in units
    of (w - 1)/w P times the bytes of an entry: 3 in a plain step (gathered in the forward and in the backward, and
    gradients scattered), and 1 for each direction; 24 bytes a rank for agreement, for which the host waits once.
    Memory beside the plain step's: the directions of one group, or of two while the next is on its way. Where the
    tangent of a parameter is carried on in the forward (casts, views, sums of parameters) that of its group is there
    until the end. Planning takes the memory of the whole model and its gradients on every rank.

    Raises:
        InputError: the model is not sharded by FSDP2; params are not its own parameters; a direction lies
            otherwise; gradients are being accumulated; ranks do not ask the same.
        PlanError: another rank could not plan, or the losses do something else each time they run.
        RankError: another rank ended or hangs.

    Example:
        >>> import funcghost as fg, torch
        >>> from torch import distributed
        >>> from torch.distributed.fsdp import fully_shard
        >>> from funcghost.distributed import sharded
        >>> distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
        >>> model = fully_shard(torch.nn.Linear(2, 1, bias=False), mesh=distributed.init_device_mesh("cpu", (1,)))
        >>> step = sharded.grad_and_reduce(lambda params, x: model(x).squeeze(1), model)
        >>> out = step(dict(model.named_parameters()), torch.eye(2), fg.squared_norm())
        >>> out.grads["weight"].full_tensor(), out.reduced
        (tensor([[0.5000, 0.5000]]), tensor([1., 1.]))
        >>> distributed.destroy_process_group()
    """
    if reduction not in ("mean", "sum"):
        raise InputError(f"sharded.grad_and_reduce: reduction must be 'mean' or 'sum', found {reduction!r}.")
    return Together(losses, model, reduction, has_aux, options, plan, group).step


def reduce(
    losses: Losses,
    model: nn.Module,
    *,
    options: Options | None = None,
    plan: Plan | None = None,
    group: Group = None,
) -> Callable[..., Tree]:
    """Reduced per-sample gradients alone, as `fg.reduce`: arguments and errors are those of `grad_and_reduce`.

    No gradient of a parameter is computed, and none is reduced.
    """
    step = Together(losses, model, None, False, options, plan, group).step
    return lambda params, batch, reducers=None: step(params, batch, reducers).reduced


def pairs(
    losses: Losses,
    model: nn.Module,
    *,
    options: Options | None = None,
    plan: Plan | None = None,
    group: Group = None,
) -> Callable[[Tree, Tree], Pairs]:
    """The per-sample gradients of a rank's samples in factored form, as `fg.pairs`: factors are whole on every rank."""
    together = Together(losses, model, None, False, options, plan, group)
    return lambda params, batch: together.pairs(params, batch)


def validation_gradient(
    losses: Losses, model: nn.Module, params: Tree, batches: Sequence[Tree], group: Group = None
) -> Tree:
    """The gradient of the mean validation loss over the batches of all ranks, sharded as the parameters are.

        (1/n) sum over all n samples of all batches of all ranks of grad losses[i]

    Every rank must have as many batches as the others, of any size, also of none. Cost: on each rank a plain step for
    each of its batches.

    Raises:
        InputError: ranks have different numbers of batches, or there is no sample; and as `grad_and_reduce`.
    """
    step = Together(losses, model, "sum", False, None, None, group)
    return validated(step, split_params(params), batches)[1]


def validation(
    losses: Losses, model: nn.Module, params: Tree, batches: Sequence[Tree], group: Group = None
) -> Callable[[], tuple[Tensor, Tree]]:
    """A function that gives the mean validation loss over the batches of all ranks and its gradient.

    Each time where the model is then: what `funcghost.integrations.steps.Steps` takes. The gradient is that of
    `validation_gradient`; cost and errors, too, when it is called.
    """
    step = Together(losses, model, "sum", False, None, None, group)
    return lambda: validated(step, split_params(params), batches)
