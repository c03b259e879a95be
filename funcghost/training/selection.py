"""Selection while training: from scores of a batch, and its Gram matrix where redundancy counts, to weights of samples.

A policy is made by a function of this module, takes what reducers gave for a batch, and gives weights [b] that are zero
for what is left out and sum to 1, so that their weighted gradient is the mean of the chosen ones:

    step = weighting.weighted_gradient(losses, selection.top_k(8))
    out = step(params, batch, fg.dot(direction))          # one forward, one backward

Scores are larger for better samples, such as `<grad losses[i], V>` for a validation gradient V, which a step along
sample i takes off the validation loss. In-run values are lower for better ones: negate them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from funcghost.errors import InputError

Policy = Callable[[Any], Tensor]
"""From what the reducers gave to weights [b]."""


def top_k(k: int) -> Policy:
    """The k samples of the highest scores, with equal weights; all of them where there are no more than k.

    Of equal scores, the earlier sample is taken. Shapes: scores [b] to weights [b]. Cost: a sort.

    Raises:
        InputError: k is no whole number of 1 or more, or (when used) the scores are no floating numbers [b].

    Example:
        >>> import torch
        >>> from funcghost.training import selection
        >>> selection.top_k(2)(torch.tensor([0.1, 3.0, -1.0, 2.0]))
        tensor([0.0000, 0.5000, 0.0000, 0.5000])
    """
    count = _count(k, "top_k")
    return lambda scores: _mean_of(_numbers(scores, "top_k"), _highest(scores, count))


def threshold(least: float = 0.0) -> Policy:
    """The samples whose scores are more than `least`, with equal weights; no sample, all weights zero, where none is.

    A batch without a sample gives the gradient zero: a step of momentum and decay alone.

    Raises:
        InputError: `least` is no number, or (when used) the scores are no floating numbers [b].

    Example:
        >>> import torch
        >>> from funcghost.training import selection
        >>> selection.threshold()(torch.tensor([0.1, 3.0, -1.0, 2.0]))
        tensor([0.3333, 0.3333, 0.0000, 0.3333])
    """
    if not isinstance(least, int | float):
        raise InputError(f"threshold: least must be a number, found {least!r}.")
    return lambda scores: _mean_of(_numbers(scores, "threshold"), scores > least)


def quantile(share: float) -> Policy:
    """The best `share` of a batch, rounded up to whole samples, with equal weights.

    Raises:
        InputError: the share is not in (0, 1], or (when used) the scores are no floating numbers [b].

    Example:
        >>> import torch
        >>> from funcghost.training import selection
        >>> selection.quantile(0.5)(torch.tensor([0.1, 3.0, -1.0, 2.0]))
        tensor([0.0000, 0.5000, 0.0000, 0.5000])
    """
    if not isinstance(share, int | float) or not 0 < share <= 1:
        raise InputError(f"quantile: share must be in (0, 1], found {share!r}.")

    def policy(scores: Tensor) -> Tensor:
        size = len(_numbers(scores, "quantile"))
        return _mean_of(scores, _highest(scores, -int(-size * share // 1)))

    return policy


def greedy(k: int, redundancy: float) -> Policy:
    """One sample after the other, each the best beside those chosen already, with equal weights.

        next = argmax_i  scores[i] - redundancy sum_{j chosen} gram[i, j]

    Two steps along equal gradients do less than twice what one does; what a second takes off the validation loss is
    less by `lr <grad_i, H grad_j>`, H being the Hessian. With a multiple of the identity in its place that is
    `redundancy gram[i, j]`: `redundancy = lr` for H = 1. Of equal numbers, the earlier sample is taken.

    The policy takes `{"score": fg.dot(v), "gram": fg.gram()}` of a batch.

    Shapes: scores [b] and gram [b, b] to weights [b]. Cost: of order k b.

    Raises:
        InputError: an argument is not what it must be, or (when used) there are no scores [b] and gram [b, b].

    Example:
        >>> import torch
        >>> from funcghost.training import selection
        >>> gram = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> selection.greedy(2, 0.5)({"score": torch.tensor([2.0, 1.9, 1.8]), "gram": gram})
        tensor([0.5000, 0.0000, 0.5000])

    Source: Wang, Wu, Song, Mittal, Jia, "GREATS: Online Selection of High-Quality Data for LLM Training in Every
    Iteration" (NeurIPS 2024).
    """
    count = _count(k, "greedy")
    if not isinstance(redundancy, int | float) or not redundancy >= 0:
        raise InputError(f"greedy: redundancy must be a number of 0 or more, found {redundancy!r}.")

    def policy(reduced: Any) -> Tensor:
        if not isinstance(reduced, Mapping) or not {"score", "gram"} <= set(reduced):
            raise InputError('greedy: takes {"score": fg.dot(v), "gram": fg.gram()} as reducers.')
        scores, gram = _numbers(reduced["score"], "greedy"), reduced["gram"]
        if not isinstance(gram, Tensor) or gram.shape != (len(scores), len(scores)):
            found = list(gram.shape) if isinstance(gram, Tensor) else type(gram).__name__
            raise InputError(f"greedy: gram must be [{len(scores)}, {len(scores)}] beside these scores, found {found}.")
        left, chosen = scores.clone(), torch.zeros_like(scores, dtype=torch.bool)
        for _ in range(min(count, len(scores))):
            best = left.masked_fill(chosen, -torch.inf).argmax()
            chosen = chosen.index_fill(0, best, True)
            left = left - redundancy * gram.index_select(0, best.view(1)).squeeze(0).to(left.dtype)  # gram[best] waits
        return _mean_of(scores, chosen)

    return policy


def boltzmann(k: int, temperature: float, generator: torch.Generator | None = None) -> Policy:
    """As many samples, drawn one after the other with probabilities `exp(scores / temperature)`, with equal weights.

    Of low temperature it is `top_k`, of high temperature a uniform draw: what scores say is followed as far as they are
    trusted. Drawn by the k largest of `scores / temperature + noise`, with noise of Gumbel's distribution.

    Args:
        k: how many samples.
        temperature: in units of the scores; above 0.
        generator: of the random numbers; torch's own by default. It must be on the device of the scores.

    Raises:
        InputError: an argument is not what it must be, or (when used) the scores are no floating numbers [b].

    Example:
        >>> import torch
        >>> from funcghost.training import selection
        >>> selection.boltzmann(2, 1e-6)(torch.tensor([0.1, 3.0, -1.0, 2.0]))
        tensor([0.0000, 0.5000, 0.0000, 0.5000])

    Source: Boltzmann sampling of utilities is what OPUS selects by; drawn as in Kool, van Hoof, Welling,
    "Stochastic Beams and Where to Find Them" (arXiv 1903.06059).
    """
    count = _count(k, "boltzmann")
    if not isinstance(temperature, int | float) or not temperature > 0:
        raise InputError(f"boltzmann: temperature must be a positive number, found {temperature!r}.")

    def policy(scores: Tensor) -> Tensor:
        uniform = torch.rand(_numbers(scores, "boltzmann").shape, generator=generator, device=scores.device)
        tiny = torch.finfo(uniform.dtype).tiny
        noise = -(-(uniform.clamp(min=tiny)).log()).clamp(min=tiny).log()
        return _mean_of(scores, _highest(scores / temperature + noise, count))

    return policy


def _count(k: Any, what: str) -> int:
    if type(k) is not int or k < 1:
        raise InputError(f"{what}: k must be a whole number of 1 or more, found {k!r}.")
    return k


def _numbers(scores: Any, what: str) -> Tensor:
    if not isinstance(scores, Tensor) or scores.dim() != 1 or not scores.is_floating_point():
        found = f"{scores.dtype} {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise InputError(f"{what}: scores must be floating numbers [b], one per sample, found {found}.")
    return scores


def _highest(scores: Tensor, count: int) -> Tensor:
    """Which are the highest; the earlier of equal ones. Not-a-numbers come last."""
    order = torch.where(scores.isnan(), -torch.inf, scores).argsort(descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).index_fill(0, order[:count], True)


def _mean_of(scores: Tensor, chosen: Tensor) -> Tensor:
    return chosen.to(scores.dtype) / chosen.sum().clamp(min=1)
