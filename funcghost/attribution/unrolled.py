"""Exact attribution through a whole training: the derivative of a query in the weight of every sample at every step.

With weights `1 + eps_ti` on the losses of step t, `(params, state)_(t+1) = update(params_t, grad L_t, state_t)` and a
query of the final parameters, the sweep goes backwards with the adjoint `a` of parameters and state:

    (d_params, d_grads, d_state) = a pulled through the update at step t
    d query / d eps_ti = <grad l_ti, d_grads> / b       (mean; without 1/b for a sum)
    a = (d_params + H_t d_grads, d_state)               H_t the Hessian of step t's training loss

all from one backward through that step, its gradient and its update. No approximation: it is what autograd through the
training would give, in the memory of a step and of what is kept of the training.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcghost.attribution.adjoint import floats, pulled
from funcghost.attribution.replay import Training, Update
from funcghost.errors import InputError
from funcghost.ops.tangent import differentiable_kernels
from funcghost.problem import Losses, Reduction
from funcghost.progress import progress
from funcghost.trees import Params, Tree, split_params

Query = Callable[[Tree], Tensor]

CACHE = 2**19
"""Bytes that what an op makes may have on a core of a CPU: more than a cache holds, memory takes longer than sums."""


class Attribution(NamedTuple):
    """A training and what every sample of every step did to the query at its end.

    `scores[t]` is [b] for a query that is a scalar, [b, k] for one that is [k]; `value` is the query, `losses[t]` the
    losses [b] of step t, `initial` the derivative of the query in the initial parameters, [*shape] or [k, *shape].
    """

    params: Tree
    state: Tree
    value: Tensor
    losses: list[Tensor]
    scores: list[Tensor]
    initial: Tree


def attribute(
    losses: Losses,
    update: Update,
    params: Tree,
    state: Tree,
    batches: Sequence[Tree],
    query: Query,
    *,
    reduction: Reduction = "mean",
    every: int = 1,
    folder: Path | str | None = None,
    vectorised: bool = True,
) -> Attribution:
    """Trains over `batches`, and gives for every step the derivative of the query in the weight of each sample's loss.

    `scores[t][i] = d query(final params) / d eps` with sample i's loss weighted by `1 + eps` in step t's training loss;
    to first order, leaving the sample out of that step changes the query by minus that. With a query that is a loss,
    samples with negative scores helped. The scores of a sample are those of all steps it is in, added up (`by_sample`).

    Args:
        losses: as in `fg.grad_and_reduce`. They may use torch's random numbers; these are repeated.
        update: `update(params, grads, state) -> (params, state)`, differentiable, such as `training.updates` gives.
        params: the initial parameters, float32 or float64.
        state: the optimizer's initial state, a tree of tensors and other values.
        batches: one for each step; a sequence, since it is gone through backwards.
        query: `query(params)`, differentiable, a scalar or [k]: a loss on other data, say, or k of them.
        reduction: of the training loss; "mean" or "sum".
        every: how many steps apart states are kept; those between are recomputed, one stretch at a time.
        folder: where to keep them, instead of in memory.
        vectorised: whether the k adjoints go through a step together, by `torch.func.vmap` (on a CPU as many at a time
            as leave what an op makes of them in a cache); one after another where an op does not allow that.

    Shapes: `scores[t]` is [b] or [b, k]. Units: those of the query.

    Cost: the training; for each step one more forward and backward, and the double backward, of about two steps for
    each of the k adjoints; one more training where `every` is above 1. Memory for k copies of the parameters and the
    state, and for T / every + every states.

    Raises:
        InputError: an argument is not what it must be, or there is low precision, before the training goes on.
        ReplayError: a step that was run again gave other losses.

    Example:
        >>> import torch
        >>> from funcghost.attribution import unrolled
        >>> def losses(params, x):
        ...     return (params["w"] - x).square() / 2
        >>> def update(params, grads, state):
        ...     return {"w": params["w"] - 0.5 * grads["w"]}, state
        >>> batches = [torch.tensor([1.0, 3.0]), torch.tensor([2.0, 0.0])]
        >>> out = unrolled.attribute(losses, update, {"w": torch.tensor(0.0)}, {}, batches, lambda p: p["w"])
        >>> out.value, out.scores
        (tensor(1.), [tensor([0.1250, 0.3750]), tensor([ 0.2500, -0.2500])])

    Source: Ilyas, Engstrom, "MAGIC: Near-Optimal Data Attribution for Deep Learning" (arXiv 2504.16430); Engstrom et
    al., "Optimizing ML Training with Metagradient Descent" (arXiv 2503.13751), section 2.
    """
    place = _checked(params, state, batches, reduction, every, folder)
    training = Training(losses, update, batches, reduction, every, place)
    scores: list[Tensor] = []
    with differentiable_kernels():  # once, and not in every step
        final, last_state = training.run(params, state)
        value, adjoint = _of_query(query, final)
        k = len(adjoint[0])
        together = _together(training, final, k) if vectorised else 1
        of_state = [torch.zeros(k, *leaf.shape, dtype=leaf.dtype, device=leaf.device) for leaf in floats(last_state)]
        for step, moment in progress(training.backwards(), "unrolled: backwards", "steps", len(batches)):
            found, adjoint, of_state = pulled(training, step, moment, adjoint, of_state, together)
            scores.append(found if value.dim() else found.squeeze(-1))
    first = adjoint if value.dim() else [leaf.squeeze(0) for leaf in adjoint]
    return Attribution(
        final.rebuild(final.leaves), last_state, value, training.found, scores[::-1], final.rebuild(first)
    )


def by_sample(scores: Sequence[Tensor], samples: Sequence[Tensor], count: int) -> Tensor:
    """The scores of `count` samples, each added up over the steps it was in, [count] or [count, k].

    `samples[t]` [b] says which samples the batch of step t was made of.

    Raises:
        InputError: there are not as many numbers as scores.

    Example:
        >>> import torch
        >>> from funcghost.attribution import unrolled
        >>> scores, samples = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])], [torch.tensor([0, 2]), torch.tensor([2])]
        >>> unrolled.by_sample(scores, samples, 3)
        tensor([1., 0., 5.])
    """
    if not scores or [len(part) for part in scores] != [len(part) for part in samples]:
        raise InputError("by_sample: there must be one number of a sample for every score of every step.")
    flat, index = torch.cat(list(scores)), torch.cat(list(samples))
    if index.dtype != torch.int64 or (len(index) and not 0 <= int(index.min()) <= int(index.max()) < count):
        raise InputError(f"by_sample: samples must be int64 numbers from 0 to {count - 1}.")
    return flat.new_zeros((count, *flat.shape[1:])).index_add_(0, index, flat)


def smoothness(
    losses: Losses,
    update: Update,
    params: Tree,
    state: Tree,
    batches: Sequence[Tree],
    query: Query,
    *,
    reduction: Reduction = "mean",
    size: float = 0.05,
    seed: int = 0,
) -> float:
    """Whether a training is smooth enough for its derivative to mean anything: 1 if it is, near 0 or below if not.

    The weights of all samples are moved along a random direction v of signs, by `size` and by twice as much. With the
    differences `D1` and `D2` of the query between the three trainings,

        smoothness = sum_k |D1_k| sign(D1_k) sign(D2_k) / sum_k |D1_k|

    over the k entries of the query: the share of the change that goes on as it began. Give a query of many entries (the
    losses of many samples) for a figure that means something.

    Cost: three trainings. Arguments as in `attribute`.

    Raises:
        InputError: as in `attribute`; or nothing changes at all.

    Example:
        >>> import torch
        >>> from funcghost.attribution import unrolled
        >>> unrolled.smoothness(
        ...     lambda params, x: (params["w"] - x).square() / 2,
        ...     lambda params, grads, state: ({"w": params["w"] - 0.5 * grads["w"]}, state),
        ...     {"w": torch.tensor(0.0)}, {}, [torch.tensor([1.0, 3.0])], lambda params: params["w"],
        ... )
        1.0

    Source: Engstrom et al., "Optimizing ML Training with Metagradient Descent" (arXiv 2503.13751), section 3.
    """
    _checked(params, state, batches, reduction, 1, None)
    if not 0 < size < 0.5:
        raise InputError(f"smoothness: size must be between 0 and 0.5, found {size!r}.")

    def at(scale: float) -> Tensor:
        source = torch.Generator("cpu").manual_seed(seed)

        def weighted(params: Tree, batch: Tree) -> Tensor:
            values = losses(params, batch)
            signs = 2 * torch.randint(0, 2, (len(values),), generator=source).to(values) - 1
            moved: Tensor = values * (1 + scale * signs)
            return moved

        training = Training(weighted, update, batches, reduction, len(batches) + 1, None)
        with differentiable_kernels():
            final, _ = training.run(params, state)
        found: Tensor = query(final.rebuild(final.leaves)).detach().flatten().double()
        return found

    random = torch.get_rng_state()
    found = []
    for scale in (0.0, size, 2 * size):
        torch.set_rng_state(random)
        found.append(at(scale))
    first, second = found[1] - found[0], found[2] - found[1]
    whole = first.abs().sum()
    if not float(whole) > 0:
        raise InputError("smoothness: the query is the same whatever the weights of the samples are.")
    return float((first.abs() * first.sign() * second.sign()).sum() / whole)


def _checked(
    params: Tree, state: Tree, batches: Any, reduction: str, every: int, folder: Path | str | None
) -> Path | None:
    if reduction not in ("mean", "sum"):
        raise InputError(f"unrolled: reduction must be 'mean' or 'sum', found {reduction!r}.")
    if isinstance(batches, Tensor) or not hasattr(batches, "__getitem__") or not hasattr(batches, "__len__"):
        raise InputError(
            f"unrolled: batches must be a sequence, one for each step, found {type(batches).__name__}: it is gone "
            "through backwards. Make a list of it."
        )
    if not len(batches):
        raise InputError("unrolled: takes one batch or more, found none.")
    if type(every) is not int or every < 1:
        raise InputError(f"unrolled: every must be a number of steps, 1 or more, found {every!r}.")
    split = split_params(params)
    for name, leaf in zip(split.names, split.leaves, strict=True):
        _wide(f"params[{name!r}]", leaf)
    for leaf in floats(state):
        _wide("the state", leaf)
    if folder is None:
        return None
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    if any(place.glob("step*.pt")):
        raise InputError(f"unrolled: folder {place} has steps of another training. Pass an empty one.")
    return place


def _together(training: Training, params: Params, k: int) -> int:
    """How many of k adjoints go through a step at a time."""
    on_cpu = all(leaf.device.type == "cpu" for leaf in params.leaves)
    return max(1, min(k, CACHE * torch.get_num_threads() // training.largest)) if on_cpu else k


def _wide(what: str, leaf: Tensor) -> None:
    if leaf.dtype not in (torch.float32, torch.float64):
        raise InputError(
            f"unrolled: {what} is {leaf.dtype}. Rounding of that size is not part of the derivative, and what a long "
            "training makes of it drowns the scores: train in float32 or float64 for this."
        )


def _of_query(query: Query, params: Params) -> tuple[Tensor, list[Tensor]]:
    """The query, and its derivative in the parameters, [k, *shape]."""
    with torch.enable_grad():
        leaves = [leaf.detach().requires_grad_() for leaf in params.leaves]
        value = query(params.rebuild(leaves))
        if not isinstance(value, Tensor) or value.dim() > 1 or not value.is_floating_point() or not value.numel():
            raise InputError("unrolled: query(params) must give floating numbers, a scalar or [k].")
        if not value.requires_grad:
            raise InputError("unrolled: query(params) does not depend on the parameters.")
        rows = [
            torch.autograd.grad(entry, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
            for entry in value.reshape(-1)
        ]
    return value.detach(), [torch.stack(column).detach() for column in zip(*rows, strict=True)]
