"""Updates in which every sample has a weight of its own, computed from the gradients of the same batch.

One forward and one backward give the per-sample gradients in factored form; reducers say of them what the weights are
made of; the weighted sum is book-keeping. There is no second backward. `funcghost.training.clipping` is built on it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcghost.algebra.pair_algebra import Weights, combine
from funcghost.engine.plans import Plan
from funcghost.errors import InputError
from funcghost.options import Options
from funcghost.problem import Losses
from funcghost.transforms.halves import apply
from funcghost.transforms.steps import pairs_and_losses
from funcghost.trees import Tree


class Weighted(NamedTuple):
    """A weighted gradient (a tree like params), the weights [b] (or by parameter), and what they were made from.

    `losses` [b] are as the user's function returned them, without the weights.
    """

    grads: Tree
    weights: Weights
    reduced: Tree
    losses: Tensor


def weighted_gradient(
    losses: Losses, weigh: Callable[[Any], Weights], *, options: Options | None = None, plan: Plan | None = None
) -> Callable[[Tree, Tree, Tree], Weighted]:
    """The gradient `sum_i weights[i] grad losses[i]`, with `weights = weigh(reduced)` of the same batch.

    `step(params, batch, reducers)` gives a `Weighted`. The weights are held: `grads` has no derivative of them.

    Law: with constant weights, equal to autograd's gradient of `(weights * losses).sum()`; tied and reused parameters
    included. With weights `1 / b` it is the gradient of `losses.mean()`.

    Shapes: `weigh` takes what the reducers give (such as scores [b] of `fg.dot`) and returns floating weights [b], or a
    dict from the names of parameters to weights [b], one for each parameter.

    Units: those of the losses per unit of the parameters, times the weights. Sums over micro-batches add up.

    Cost: a forward and a backward without weight gradients, the reducers, and one product for each use of a weight, as
    much as its gradient in a backward: with `fg.dot` 4/3 of the FLOPs of a plain step. Memory for the inputs and output
    gradients of all uses, which `fg.pairs` keeps.

    Args:
        losses: as in `fg.grad_and_reduce`.
        weigh: gives the weights; see `rectified` and `tempered`.
        options: as in `fg.grad_and_reduce`.
        plan: as in `fg.grad_and_reduce`.

    Raises:
        InputError: (when used) the weights are not what they must be.
        UnsupportedOpError: (when used) gradients in factored form are not to be had.

    Example:
        >>> import funcghost as fg, torch
        >>> from funcghost.training import weighting
        >>> step = weighting.weighted_gradient(lambda params, x: x @ params["w"], weighting.rectified)
        >>> x = torch.tensor([[1.0, 0.0], [3.0, 4.0], [-1.0, 2.0]])
        >>> out = step({"w": torch.zeros(2)}, x, fg.dot({"w": torch.tensor([1.0, 0.0])}))
        >>> out.weights, out.grads["w"]
        (tensor([0.2500, 0.7500, 0.0000]), tensor([2.5000, 3.0000]))

    Source: Ren, Zeng, Yang, Urtasun, "Learning to Reweight Examples for Robust Deep Learning" (arXiv 1803.09050), where
    the scores are had by differentiating a step of training.
    """
    kept = pairs_and_losses(losses, options=options, plan=plan)

    def step(params: Tree, batch: Tree, reducers: Tree) -> Weighted:
        found, values = kept(params, batch)
        reduced = apply(reducers, found, options=options)
        weights = weigh(reduced)
        return Weighted(combine(found, weights), weights, reduced, values)

    return step


def rectified(scores: Tensor) -> Tensor:
    """Weights from the alignment with a validation gradient: `max(scores, 0) / sum max(scores, 0)`.

    Samples whose gradient goes against the direction are left out; where all are, the update is zero.

    Shapes: [b] to [b], of sum 1 or 0. Units: none.

    Cost: of order b.

    Raises:
        InputError: these are no floating numbers [b].

    Example:
        >>> import torch
        >>> from funcghost.training.weighting import rectified
        >>> rectified(torch.tensor([1.0, 3.0, -2.0]))
        tensor([0.2500, 0.7500, 0.0000])

    Source: Ren et al. (arXiv 1803.09050), section 3: one step of gradient descent on the weights, from zero.
    """
    positive = _scores(scores, "rectified").clamp(min=0)
    total = positive.sum()
    return positive / torch.where(total > 0, total, 1)


def tempered(scores: Tensor, temperature: float) -> Tensor:
    """Soft selection: `exp(scores / temperature) / sum exp(scores / temperature)`.

    Shapes: [b] to [b], of sum 1. Units: the temperature is in those of the scores; at infinity every sample counts as
    much as in the mean, towards zero the largest alone.

    Cost: of order b.

    Raises:
        InputError: the scores are no floating numbers [b], or the temperature is not above zero.

    Example:
        >>> import torch
        >>> from funcghost.training.weighting import tempered
        >>> tempered(torch.tensor([0.0, 0.0, 0.6931]), temperature=1.0)
        tensor([0.2500, 0.2500, 0.5000])
    """
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not temperature > 0:
        raise InputError(f"tempered: the temperature must be a number above zero, found {temperature!r}.")
    return (_scores(scores, "tempered") / temperature).softmax(0)


def _scores(scores: Any, what: str) -> Tensor:
    if not isinstance(scores, Tensor) or scores.dim() != 1 or not scores.is_floating_point():
        found = f"{scores.dtype} {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise InputError(f"{what}: scores must be floating numbers [b], found {found}.")
    return scores
