"""Inner products of per-sample gradients with many directions at once, kept as one tensor for each parameter."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from funcghost.algebra.contractions import in_dtype
from funcghost.algebra.factors import Dense, Factor, Lookup, blocks, samples
from funcghost.algebra.sums import total
from funcghost.attribution.batches import check_batches, joined, stacked
from funcghost.dtypes import wide
from funcghost.engine.plans import Plan
from funcghost.options import Options
from funcghost.problem import Losses
from funcghost.reducers.quadratic import Quadratic
from funcghost.transforms.functions import reduce
from funcghost.trees import Tree, split_params


@dataclass(frozen=True, eq=False)
class Against(Quadratic):
    """`out[i, k] = <grad losses[i], directions[k]>`, [b, k], for directions [k, *shape] by name.

    The gradients of a sample are formed once, slice by slice, where it has several positions: `2 b t m n` and
    `2 b k m n`, where k directions one by one cost `2 k b t m n`.
    """

    directions: Mapping[str, Tensor]
    degree: ClassVar[int] = 1

    def of_parameter(self, name: str, uses: Sequence[Factor]) -> Tensor:
        """[b, k]."""
        along = self.directions[name]
        rounded = in_dtype(self.means.dtype)
        return total([_products(use.map(rounded), along, self.means.budget) for use in uses])

    def zero(self, batch: int, like: Tensor) -> Tensor:
        """[b, k]."""
        return like.new_zeros((batch, len(next(iter(self.directions.values())))))


def _products(use: Factor, directions: Tensor, budget: int) -> Tensor:
    """`<grad_i, V_k>`, [b, k]."""
    b, k = samples(use), len(directions)
    values = wide(directions)
    if isinstance(use, Dense):
        gradients = wide(use.value).reshape(b, prod(use.shape))
        return gradients @ values.reshape(k, prod(use.shape)).to(gradients.dtype).T
    form, cols = use.form, wide(use.cols)
    matrices = form.fold(values).to(cols.dtype)  # [k, q, m, n]
    if isinstance(use, Lookup):
        size = max(1, budget // max(1, cols.numel() * cols.element_size()))
        parts = [torch.einsum("btn,kbtn->bk", cols, part[:, 0][:, use.index]) for part in matrices.split(size)]
        return torch.cat(parts, 1)
    if use.positions == 1:
        # One product of the wider side with all directions, and one with the other.
        rows, cols = wide(use.rows).squeeze(1), cols.squeeze(1)
        if rows.shape[-1] < cols.shape[-1]:
            rows, cols, matrices = cols, rows, matrices.mT
        size = max(1, budget // max(1, cols.numel() * cols.element_size()))
        parts = [torch.einsum("bqm,kqmn,bqn->bk", rows, part, cols) for part in matrices.split(size)]
        return torch.cat(parts, 1)
    q, m, n = form.blocks
    width = max(1, budget // max(1, q * n * (b + k) * cols.element_size()))
    parts = [
        blocks(use, form, at, min(at + width, m)).flatten(1) @ matrices[:, :, at : at + width].flatten(1).T
        for at in range(0, m, width)
    ]
    return total(parts)


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
        wanted = Against(dict(zip(split.names, leaves, strict=True)))
        found = joined(
            "against: batches", [scoring(params, batch, wanted) for batch in check_batches("batches", batches)]
        )
        return found.squeeze(1) if many is None else found

    return score
