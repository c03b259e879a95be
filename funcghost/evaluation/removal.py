"""What becomes of a query when the samples that are said to matter are taken away, or trained on once more."""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from funcghost.errors import InputError
from funcghost.evaluation.tables import numbers, same_length
from funcghost.trees import Tree


def removal_masks(scores: Tensor, counts: Sequence[int], largest: bool = True) -> Tensor:
    """Masks [k, n] to retrain on without the `counts[k]` samples of highest (or lowest) score; of ties, the earlier.

    Raises:
        InputError: scores are no numbers [n], or a count is not between 0 and n - 1.

    Example:
        >>> import torch
        >>> from funcghost import evaluation
        >>> evaluation.removal_masks(torch.tensor([1.0, 3.0, 2.0]), [1, 2])
        tensor([[ True, False,  True],
                [ True, False, False]])
    """
    scores = numbers("removal_masks: scores", scores, "n")
    order = scores.argsort(descending=largest, stable=True)
    masks = torch.ones(len(counts), len(scores), dtype=torch.bool, device=scores.device)
    for mask, count in zip(masks, counts, strict=True):
        if type(count) is not int or not 0 <= count < len(scores):
            raise InputError(f"removal_masks: counts must be from 0 to {len(scores) - 1}, found {count!r}.")
        mask[order[:count]] = False
    return masks


def area_between(counts: Sequence[int], outputs: Tensor, baseline: Tensor) -> Tensor:
    """The mean height of a removal curve above a baseline (random removals), by trapezoids over the counts, [q].

    Shapes: `outputs` and `baseline` are [k, q], for k counts in rising order.

    Raises:
        InputError: the tables do not go together, or there are fewer than two counts, or they do not rise.

    Example:
        >>> import torch
        >>> from funcghost import evaluation
        >>> evaluation.area_between([0, 10], torch.tensor([[0.0], [2.0]]), torch.zeros(2, 1))
        tensor([1.], dtype=torch.float64)

    Source: Ilyas et al., "Datamodels" (arXiv 2202.00622), section 4.1 (brittleness).
    """
    outputs, baseline = (
        numbers("area_between: outputs", outputs, "kq"),
        numbers("area_between: baseline", baseline, "kq"),
    )
    same_length("area_between", "counts k", counts=len(counts), outputs=len(outputs), baseline=len(baseline))
    same_length("area_between", "queries q", outputs=outputs.shape[1], baseline=baseline.shape[1])
    if len(counts) < 2 or any(later <= earlier for earlier, later in pairwise(counts)):
        raise InputError(f"area_between: takes two counts or more, in rising order, found {list(counts)}.")
    at = torch.tensor(list(counts), dtype=torch.float64, device=outputs.device)
    return torch.trapezoid(outputs - baseline, at, dim=0) / (at[-1] - at[0])


def tail_patch(
    step: Callable[[Tree, Tree], Tree], query: Callable[[Tree], Tensor], params: Tree, proponents: Iterable[Tree]
) -> Tensor:
    """What one more training step on retrieved samples does: `out[j] = query(step(params, batch_j)) - query(params)`.

    Every step starts from the same params. `step(params, batch)` gives new params, `query(params)` a scalar or [k].

    Shapes: [j] or [j, k]. Units: those of the query. Cost: for each batch a training step and a query.

    Raises:
        InputError: there is no batch of proponents, or the query gives something else.

    Example:
        >>> import torch
        >>> from funcghost import evaluation
        >>> evaluation.tail_patch(lambda p, x: p - 0.5 * x, torch.square, torch.tensor(2.0), [torch.tensor(2.0)])
        tensor([-3.])

    Source: Chang et al., "Scalable Influence and Fact Tracing for LLM Pretraining" (arXiv 2410.17413), section 4.2.
    """

    def asked(at: Tree) -> Tensor:
        found = query(at)
        if not isinstance(found, Tensor) or found.dim() > 1 or not found.is_floating_point():
            raise InputError("tail_patch: query(params) must give floating numbers, a scalar or [k].")
        return found.detach()

    before = asked(params)
    changes = [asked(step(params, batch)) - before for batch in proponents]
    if not changes:
        raise InputError("tail_patch: takes one batch of proponents or more, found none.")
    return torch.stack(changes)
