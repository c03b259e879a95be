"""Inner products with many directions, by the gradients themselves."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor

from funcghost.algebra.contractions import in_dtype
from funcghost.algebra.cost import ANY, Means
from funcghost.algebra.directions import LowRank, Stack
from funcghost.algebra.factors import Dense, Factor, Lookup, blocks, dense, matrix_form, samples
from funcghost.dtypes import wide
from funcghost.reducers.bases import Additive, Reducer
from funcghost.reducers.dots import Dot
from funcghost.trees import Params, named_leaves

FEW = 2
"""Directions for which a product each is no dearer than the gradients."""


@dataclass(frozen=True, eq=False)
class ManyDots(Additive):
    """As `fg.dot(fg.stack(directions))`, for more directions than one can take a product each for.

    Law: the result is that of `fg.dot`, to rounding.

    Shapes: [b, k]. Cost: per use of `m x n` with t positions `2 b t m n` for the gradients, slice by slice, as much as
    those of a plain step, and `2 b m n k`; `fg.dot` takes `2 b t m n k`.
    """

    direction: Stack
    means: Means = field(default=ANY, repr=False)
    degree: ClassVar[int] = 1

    def within(self, means: Means) -> Self:
        """The same, in slices that fit the budget."""
        return replace(self, means=means)

    @cached_property
    def leaves(self) -> dict[str, tuple[Tensor, ...]]:
        """For every parameter its part of each direction."""
        trees = [dict(zip(*named_leaves(tree)[:2], strict=True)) for tree in self.direction.directions]
        return {name: tuple(tree[name] for tree in trees) for name in trees[0]}

    def of_parameter(self, name: str, uses: Sequence[Factor]) -> Tensor:
        """[b, k]."""
        first, *others = (self._of_use(self.leaves[name], use) for use in uses)
        for other in others:
            first = first + other
        return first

    def zero(self, batch: int, like: Tensor) -> Tensor:
        """[b, k]."""
        return like.new_zeros((batch, len(self.direction.directions)))

    def _of_use(self, directions: Sequence[Tensor], use: Factor) -> Tensor:
        use = use.map(in_dtype(self.means.dtype))
        b = samples(use)
        if isinstance(use, Lookup):
            cols = wide(use.cols)
            rows = (wide(v).reshape(v.shape[0], -1)[use.index] for v in directions)
            return torch.stack([(row * cols).sum((1, 2)) for row in rows], 1)
        form = matrix_form(use.shape) if use.shape else use.form
        own = use if use.form == form else Dense(dense(use))
        _, m, n = form.blocks
        together = torch.stack([wide(form.fold(v)) for v in directions])  # [k, 1, m, n]
        width = max(1, self.means.budget // max(1, 8 * n * b))
        total = wide(use.tensors[-1]).new_zeros((b, len(directions)))
        for at in range(0, m, width):
            part = blocks(own, form, at, min(at + width, m)).reshape(b, -1)
            total = total + part @ together[:, :, at : at + width].reshape(len(directions), -1).T.to(part.dtype)
        return total


def by_gradients(reducer: Reducer, params: Params) -> Reducer:
    """The reducer that gives the same for less where `fg.dot` has many directions; otherwise the reducer itself.

    Raises:
        InputError: a direction does not fit the parameters.
    """
    if not isinstance(reducer, Dot) or not isinstance(reducer.direction, Stack):
        return reducer
    found = reducer.directions(params)
    if len(found) <= FEW or any(isinstance(leaf, LowRank) for leaves in found for leaf in leaves):
        return reducer
    return ManyDots(reducer.direction)
