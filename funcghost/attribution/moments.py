"""Reducers that add up second moments of factored gradients: of rows, of columns, of entries in a basis."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from funcghost.algebra.contractions import squared_norms
from funcghost.algebra.factors import Dense, Factor, Form, Lookup, samples
from funcghost.algebra.rotations import in_form, rotated, sizes, squares
from funcghost.algebra.sums import total
from funcghost.dtypes import wide
from funcghost.reducers.quadratic import Quadratic

Bases = Mapping[str, tuple[Form, Tensor | None, Tensor | None]]


@dataclass(frozen=True, eq=False)
class _Moment(Quadratic):
    """What every parameter contributes by itself, kept apart by name; nothing from one without a gradient."""

    def zero(self, batch: int, like: Tensor) -> Tensor:
        """Empty."""
        return like.new_zeros(0)

    def result(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By name."""
        return dict(parts)


class Side(NamedTuple):
    """How long a side is, and whether its second moment is kept as a whole or as its diagonal."""

    size: int
    whole: bool

    @property
    def entries(self) -> int:
        """How many numbers are kept."""
        return self.size * self.size if self.whole else self.size


class Plan(NamedTuple):
    """How a parameter is seen."""

    form: Form
    left: Side
    right: Side

    @property
    def entries(self) -> int:
        """How many numbers `Sides` makes of it."""
        return self.form.blocks[0] * (self.left.entries + self.right.entries + 1)

    def unpacked(self, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The two sides, [q, size, size] or [q, size], and the squared norms by block, [q]."""
        q = self.form.blocks[0]
        left, right, norms = flat.split([q * self.left.entries, q * self.right.entries, q])
        sides = zip((left, right), (self.left, self.right), strict=True)
        one, other = (part.view(q, *([side.size] * (2 if side.whole else 1))) for part, side in sides)
        return one, other, norms


@dataclass(frozen=True, eq=False)
class Sides(_Moment):
    """`sum_p rows_p rows_p^T` [q, m, m], `sum_p cols_p cols_p^T` [q, n, n] and `sum_i |grad_i|^2` [q], flat.

    The sums are over all samples, positions and uses p. Where a gradient is no sum of products,
    `sum_i grad_i grad_i^T` and `sum_i grad_i^T grad_i` stand for them. The norms are of all uses together, with what is
    between positions and uses.
    """

    plans: Mapping[str, Plan]

    def of_parameter(self, name: str, uses: Sequence[Factor]) -> Tensor:
        """Flat, see `Plan.unpacked`."""
        plan = self.plans[name]
        seen = [in_form(use, plan.form) for use in uses]
        found = [
            total([_moment(use, side, own.whole) for use in seen]).flatten()
            for side, own in enumerate((plan.left, plan.right))
        ]
        if plan.form.blocks[0] == 1:
            norms = squared_norms(seen, self.means, name).sum().reshape(1)
        else:
            norms = squares(seen, self.means.budget).sum((1, 2))
        return torch.cat([*found, norms])


def _moment(use: Factor, side: int, whole: bool) -> Tensor:
    """`sum rows rows^T` or `sum cols cols^T`, [q, size, size], or the diagonal of that, [q, size]."""
    if isinstance(use, Lookup) and side == 0:
        counts = wide(use.cols).new_zeros(use.shape[0])
        counts = counts.index_add(0, use.index.flatten(), counts.new_ones(use.index.numel())).unsqueeze(0)
        return torch.diag_embed(counts) if whole else counts
    if isinstance(use, Dense):
        value = wide(use.value).reshape(samples(use), *sizes(use)).transpose(0, 1)  # [q, b, m, n]
        flat = value.movedim(2, 3).flatten(1, 2) if side == 0 else value.flatten(1, 2)
    else:
        value = wide(use.tensors[side]).flatten(0, 1)
        flat = value.unsqueeze(0) if value.dim() == 2 else value.transpose(0, 1)
    return flat.mT @ flat if whole else flat.square().sum(1)


@dataclass(frozen=True, eq=False)
class RotatedSquares(_Moment):
    """`sum_i (L^T grad_i R)^2`, entry by entry, [q, m, n], of all uses together."""

    bases: Bases

    def of_parameter(self, name: str, uses: Sequence[Factor]) -> Tensor:
        """[q, m, n]."""
        form, left, right = self.bases[name]
        return squares([rotated(in_form(use, form), left, right) for use in uses], self.means.budget)
