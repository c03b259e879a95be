"""Scores along many directions at once, kept as one tensor for each parameter."""

from collections.abc import Callable, Iterable

from torch import Tensor

from funcghost.attribution.batches import check_batches, joined, stacked
from funcghost.engine.plans import Plan
from funcghost.options import Options
from funcghost.problem import Losses
from funcghost.reducers.many import ManyDots
from funcghost.transforms.steps import reduce
from funcghost.trees import Tree, split_params


def against(
    losses: Losses, *, options: Options | None = None, plan: Plan | None = None
) -> Callable[[Tree, Iterable[Tree], Tree], Tensor]:
    """Scores along many directions: `score(params, batches, directions)[i, k] = <grad losses[i], directions[k]>`.

    Shapes: `directions` is a tree like params whose leaves have an axis [k, *shape] in front, `fg.stack` of k trees, or
    one tree; the result is [n, k] for all n samples of all batches in their order, [n] for one tree.

    Units: those of `fg.dot`; no factor of 1/n.

    Cost: for every batch a forward, a backward without weight gradients, and per use with t positions `2 b t d p` and
    `2 b k d p`.

    Args:
        losses: as in `fg.grad_and_reduce`.
        options: as in `fg.grad_and_reduce`.
        plan: as in `fg.grad_and_reduce`.

    Raises:
        InputError: (when used) a direction is not like params, or there is no list of batches.

    Example:
        >>> import torch
        >>> from funcghost.attribution.against import against
        >>> score = against(lambda params, x: x @ params["w"])
        >>> score({"w": torch.zeros(2)}, [torch.eye(2)], {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])})
        tensor([[1., 3., 5.],
                [2., 4., 6.]])
    """
    scoring = reduce(losses, options=options, plan=plan)

    def score(params: Tree, batches: Iterable[Tree], directions: Tree) -> Tensor:
        split = split_params(params)
        leaves, many = stacked(directions, split)
        wanted = ManyDots(dict(zip(split.names, leaves, strict=True)))
        found = joined(
            "against: batches", [scoring(params, batch, wanted) for batch in check_batches("batches", batches)]
        )
        return found.squeeze(1) if many is None else found

    return score
