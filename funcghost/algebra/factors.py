"""Per-sample gradients of one parameter in factored form: one of three factors, and a few facts about each.

One axis alphabet: `b` samples, `t` positions, and the parameter as blocks `q` of matrices `m x n`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod

import torch
from torch import Tensor

from funcghost.algebra.sums import added_rows, product
from funcghost.dtypes import wide


@dataclass(frozen=True)
class Form:
    """A parameter as blocks [q, m, n]: its axes, split into those of `base`, in the order of their roles.

    `roles` are the numbers of axes of `base` that make up q, m and n; `shape` is the parameter's.
    """

    shape: tuple[int, ...]
    base: tuple[int, ...]
    roles: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

    def __hash__(self) -> int:
        """The hash of the tuple of its fields."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.shape, self.base, self.roles))

    @cached_property
    def blocks(self) -> tuple[int, int, int]:
        """The sizes q, m, n."""
        q, m, n = (prod(self.base[i] for i in axes) for axes in self.roles)
        return q, m, n

    @cached_property
    def plain(self) -> bool:
        """Whether the axes are in order."""
        order = [i for axes in self.roles for i in axes]
        return order == sorted(order)

    def fold(self, value: Tensor) -> Tensor:
        """From [..., *shape] to [..., q, m, n]."""
        lead = value.shape[: value.dim() - len(self.shape)]
        if self.plain:
            return value.reshape(*lead, *self.blocks)
        order = [len(lead) + i for axes in self.roles for i in axes]
        split = value.reshape(*lead, *self.base).permute(*range(len(lead)), *order)
        return split.reshape(*lead, *self.blocks)

    def whole(self, value: Tensor, batch: int) -> Tensor:
        """All entries of [b, q, m, n], with or without axes of length 1, as [b, *shape]."""
        if self.plain:
            return value.reshape(batch, *self.shape)
        return self.unfold(value.reshape(batch, *self.blocks))

    def unfold(self, value: Tensor) -> Tensor:
        """From [..., q, m, n] to [..., *shape]."""
        lead = value.shape[:-3]
        if self.plain:
            return value.reshape(*lead, *self.shape)
        order = [i for axes in self.roles for i in axes]
        split = value.reshape(*lead, *(self.base[i] for i in order))
        back = [len(lead) + order.index(i) for i in range(len(order))]
        return split.permute(*range(len(lead)), *back).reshape(*lead, *self.shape)


@cache
def matrix_form(shape: tuple[int, ...]) -> Form:
    """The first axis as rows, the others as columns."""
    return Form(shape, shape, ((), (0,), tuple(range(1, len(shape)))))


@dataclass(frozen=True, eq=False)
class Outer:
    """`grad_i = sum_t rows[i, t, q, :] (x) cols[i, t, q, :]`: rows [b, t, q, m], cols [b, t, q, n]."""

    rows: Tensor
    cols: Tensor
    form: Form

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What it is made of, samples first."""
        return self.rows, self.cols

    def map(self, function: Callable[[Tensor], Tensor]) -> "Outer":
        """The factor with another tensor for each of its own."""
        return Outer(function(self.rows), function(self.cols), self.form)

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape."""
        return self.form.shape

    @property
    def positions(self) -> int:
        """The number t of positions of a sample."""
        return self.rows.shape[1]


@dataclass(frozen=True, eq=False)
class Lookup:
    """`grad_i[index[i, t]] += cols[i, t]`: index [b, t], cols [b, t, n], for a table [m, *] of n columns."""

    index: Tensor
    cols: Tensor
    shape: tuple[int, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What it is made of, samples first."""
        return self.index, self.cols

    def map(self, function: Callable[[Tensor], Tensor]) -> "Lookup":
        """The factor with another tensor for each of its own."""
        return Lookup(function(self.index), function(self.cols), self.shape)

    @property
    def form(self) -> Form:
        """The table as one block."""
        return matrix_form(self.shape)

    @property
    def positions(self) -> int:
        """The number t of positions of a sample."""
        return self.index.shape[1]


@dataclass(frozen=True, eq=False)
class Dense:
    """`grad_i = value[i]`: value [b, *shape]."""

    value: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What it is made of, samples first."""
        return (self.value,)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Dense":
        """The factor with another tensor for each of its own."""
        return Dense(function(self.value))

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape."""
        return tuple(self.value.shape[1:])

    @property
    def form(self) -> Form:
        """All of it as one row for each entry of the first axis."""
        return matrix_form(self.shape) if self.shape else Form((), (), ((), (), ()))


Factor = Outer | Lookup | Dense


def samples(factor: Factor) -> int:
    """The number b of samples."""
    return factor.tensors[0].shape[0]


def nbytes(factor: Factor) -> int:
    """The memory its tensors take."""
    return sum(value.numel() * value.element_size() for value in factor.tensors)


def blocks(factor: Factor, form: Form, start: int = 0, stop: int | None = None) -> Tensor:
    """The per-sample gradients as [b, q, m', n], for the rows from `start` to `stop`, in float32 at least.

    `form` is the factor's own, or that of the matrix for a `Lookup` or a `Dense`, which have any.
    """
    stop = form.blocks[1] if stop is None else stop
    if isinstance(factor, Dense):
        return wide(form.fold(factor.value)[:, :, start:stop])
    if isinstance(factor, Outer):
        rows, cols = wide(factor.rows[..., start:stop]), wide(factor.cols)
        return product(rows.permute(0, 2, 3, 1), cols.permute(0, 2, 1, 3))
    cols = wide(factor.cols)
    b, t, n = cols.shape
    inside = (factor.index >= start) & (factor.index < stop)
    place = torch.where(inside, factor.index - start, stop - start)
    place = place + (stop - start + 1) * torch.arange(b, device=place.device).unsqueeze(1)
    table = added_rows(place.flatten(), cols.reshape(b * t, n), b * (stop - start + 1), t)
    return table.view(b, 1, stop - start + 1, n)[:, :, :-1]


def dense(factor: Factor) -> Tensor:
    """The per-sample gradients [b, *shape], in float32 at least."""
    if isinstance(factor, Dense):
        return wide(factor.value)
    return factor.form.unfold(blocks(factor, factor.form))
