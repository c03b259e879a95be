"""Whether the known sources of a query are among the samples of highest score."""

import torch
from torch import Tensor

from funcghost.errors import InputError
from funcghost.evaluation.tables import flags, numbers, same_length


def _places(where: str, scores: Tensor, sources: Tensor) -> tuple[Tensor, Tensor]:
    """The place of every sample by query, [n, q], from 1, the last of its ties; and the sources."""
    scores, sources = numbers(f"{where}: scores", scores, "nq"), flags(f"{where}: sources", sources, "nq")
    same_length(where, "samples n", scores=len(scores), sources=len(sources))
    same_length(where, "queries q", scores=scores.shape[1], sources=sources.shape[1])
    without = ~sources.any(0)
    if bool(without.any()):
        raise InputError(f"{where}: query {int(without.nonzero()[0])} has no source among the samples. Leave it out.")
    falling = (-scores).T.contiguous()
    return torch.searchsorted(falling.sort(-1).values, falling, right=True).T, sources


def recall_at(k: int, scores: Tensor, sources: Tensor) -> Tensor:
    """The share of a query's sources that are among its k samples of highest score, [q].

    A tie is resolved against the sources: a table of equal scores finds nothing unless k is n.

    Shapes: `scores` is [n, q], `sources` [n, q] of bool.

    Raises:
        InputError: the tables do not go together, k is not 1 or more, or a query has no source.

    Example:
        >>> import torch
        >>> from funcghost import evaluation
        >>> sources = torch.tensor([[True], [False], [True]])
        >>> evaluation.recall_at(1, torch.tensor([[3.0], [2.0], [1.0]]), sources)
        tensor([0.5000], dtype=torch.float64)
    """
    if type(k) is not int or k < 1:
        raise InputError(f"recall_at: k must be a number of samples, 1 or more, found {k!r}.")
    places, sources = _places("recall_at", scores, sources)
    return (sources & (places <= k)).sum(0).double() / sources.sum(0)


def mean_reciprocal_rank(scores: Tensor, sources: Tensor) -> float:
    """The mean over queries of `1 / place` of the first source; ties are resolved against it.

    Shapes and errors: as `recall_at`.

    Example:
        >>> import torch
        >>> from funcghost import evaluation
        >>> sources = torch.tensor([[False], [True], [True]])
        >>> evaluation.mean_reciprocal_rank(torch.tensor([[3.0], [2.0], [1.0]]), sources)
        0.5
    """
    places, sources = _places("mean_reciprocal_rank", scores, sources)
    first = torch.where(sources, places, len(places) + 1).min(0).values
    return float(first.double().reciprocal().mean())
