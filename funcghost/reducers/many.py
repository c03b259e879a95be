"""Inner products with many directions at once, by the gradients themselves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from funcghost.algebra.contractions import in_dtype
from funcghost.algebra.directions import Stack
from funcghost.algebra.factors import Dense, Factor, Lookup, blocks, samples
from funcghost.algebra.sums import product, total
from funcghost.dtypes import wide
from funcghost.reducers.bases import Reducer
from funcghost.reducers.dots import Dot
from funcghost.reducers.quadratic import Quadratic
from funcghost.trees import Params

FEW = 2
"""Directions for which a product each is no dearer than the gradients."""


@dataclass(frozen=True, eq=False)
class ManyDots(Quadratic):
    """`out[i, k] = <grad losses[i], directions[k]>`, [b, k], for directions [k, *shape] by name.

    Law: the result is that of `fg.dot(fg.stack(...))` along the same directions, to rounding.

    Cost: per use of `m x n` with t positions `2 b t m n` for the gradients, slice by slice, as much as those of a plain
    step, and `2 b k m n`; `fg.dot` takes `2 b t m n k`.
    """

    directions: Mapping[str, Tensor]
    degree: ClassVar[int] = 1

    def of_parameter(self, name: str, uses: Sequence[Factor]) -> Tensor:
        """[b, k]."""
        rounded = in_dtype(self.means.dtype)
        return total([_products(use.map(rounded), self.directions[name], self.means.budget) for use in uses])

    def zero(self, batch: int, like: Tensor) -> Tensor:
        """[b, k]."""
        return like.new_zeros((batch, len(next(iter(self.directions.values())))))


def _products(use: Factor, directions: Tensor, budget: int) -> Tensor:
    """`<grad_i, V_k>`, [b, k]."""
    b, k = samples(use), len(directions)
    values = wide(directions)
    if isinstance(use, Dense):
        gradients = wide(use.value).reshape(b, values[0].numel())
        return product(gradients, values.reshape(k, -1).to(gradients.dtype).T)
    form, cols = use.form, wide(use.cols)
    matrices = form.fold(values).to(cols.dtype)  # [k, q, m, n]
    if isinstance(use, Lookup):
        size = max(1, budget // max(1, cols.numel() * cols.element_size()))
        parts = [(cols * part[:, 0][:, use.index]).flatten(2).sum(2).T for part in matrices.split(size)]
        return torch.cat(parts, 1)
    if use.positions == 1:
        # One product of the wider side with all directions, and one with the other.
        rows, cols = wide(use.rows).squeeze(1), cols.squeeze(1)
        if rows.shape[-1] < cols.shape[-1]:
            rows, cols, matrices = cols, rows, matrices.mT
        size = max(1, budget // max(1, cols.numel() * cols.element_size()))
        met = (product(rows.transpose(0, 1), part).transpose(1, 2) for part in matrices.split(size))  # [k, b, q, n]
        return torch.cat([(part * cols).flatten(2).sum(2).T for part in met], 1)
    q, m, n = form.blocks
    width = max(1, budget // max(1, q * n * (b + k) * cols.element_size()))
    return total(
        product(blocks(use, form, at, min(at + width, m)).flatten(1), matrices[:, :, at : at + width].flatten(1).T)
        for at in range(0, m, width)
    )


def by_gradients(reducer: Reducer, params: Params) -> Reducer:
    """The reducer that gives the same for less where `fg.dot` has many directions; otherwise the reducer itself.

    Raises:
        InputError: a direction does not fit the parameters.
    """
    if not isinstance(reducer, Dot) or not isinstance(reducer.direction, Stack):
        return reducer
    found = reducer.directions(params)
    leaves = [[leaf for leaf in column if isinstance(leaf, Tensor)] for column in zip(*found, strict=True)]
    if len(found) <= FEW or any(len(column) < len(found) for column in leaves):
        return reducer
    return ManyDots({name: torch.stack(column) for name, column in zip(params.names, leaves, strict=True)})
