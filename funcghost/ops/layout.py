"""Which entries of an output belong to which sample: an axis, or a factor of one, or rows that data has moved."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from funcghost.control_flow import is_traced

Fold = Literal["whole", "high", "low", "single"]


@dataclass(frozen=True)
class Layout:
    """The sample index of a tensor: an axis, or the high or low factor of one, or all of it (B = 1)."""

    axis: int
    fold: Fold = "whole"

    def by_sample(self, value: Tensor, batch: int) -> Tensor:
        """A view of shape [b, ...] with the samples in front."""
        if self.fold == "single":
            return value.unsqueeze(0)
        if self.fold == "whole":
            return value.movedim(self.axis, 0) if self.axis else value
        inner = value.shape[self.axis] // batch
        high = self.fold == "high"
        split: Tensor = value.unflatten(self.axis, (batch, inner) if high else (inner, batch))
        return split.movedim(self.axis if high else self.axis + 1, 0)

    def sum(self, values: Tensor, like: Tensor) -> Tensor:
        """The sum of each sample's entries, [b], in the dtype of `like` [b, ...]."""
        return self.by_sample(values, len(like)).reshape(len(like), -1).sum(1, dtype=like.dtype)

    def numbers(self, shape: Sequence[int], batch: int, device: torch.device) -> Tensor:
        """The sample of every entry of a tensor of this shape, from 0, as numbers that ops compute with."""
        if self.fold == "single":
            return torch.zeros((), dtype=torch.float64, device=device).expand(tuple(shape))
        samples = torch.arange(batch, dtype=torch.float64, device=device)
        if self.fold == "high":
            samples = samples.repeat_interleave(shape[self.axis] // batch)
        elif self.fold == "low":
            samples = samples.repeat(shape[self.axis] // batch)
        return spread(samples, self.axis, shape)

    def fits(self, shape: Sequence[int], batch: int) -> bool:
        """Whether a tensor of this shape can have this layout."""
        if self.fold == "single":
            return batch == 1
        if self.axis >= len(shape):
            return False
        size = shape[self.axis]
        return size == batch if self.fold == "whole" else size % batch == 0

    def __str__(self) -> str:
        if self.fold == "single":
            return "one sample"
        return f"axis {self.axis}" + ("" if self.fold == "whole" else f", {self.fold}")


@dataclass(frozen=True)
class Rows:
    """The samples are those of the rows of an axis, which an op has moved by the values of data.

    `call` and `output` number the op, see `funcghost.ops.moves`.
    """

    axis: int
    call: int
    output: int = 0

    def __str__(self) -> str:
        return f"rows of axis {self.axis}"


@dataclass(frozen=True, eq=False)
class Placed:
    """Such rows in one run: `samples` is the sample of each."""

    axis: int
    samples: Tensor

    def by_sample(self, value: Tensor, batch: int) -> Tensor:
        """Of shape [b, r, ...], with the rows of each sample in front, and zeros behind those of which there are fewer.

        Cost: a copy, and where the samples are on a device, the wait for one number.
        """
        rows, most = value.movedim(self.axis, 0), self.most(batch)
        place = (self.samples * most + self._turn).to(rows.device)
        apart = rows.new_zeros(batch * most, *rows.shape[1:]).index_copy(0, place, rows)
        return apart.view(batch, most, *rows.shape[1:])

    def most(self, batch: int) -> int:
        """How many rows a sample has at most."""
        return int(self._turn.max()) + 1 if len(self.samples) else 0

    @cached_property
    def _turn(self) -> Tensor:
        """How many rows of its sample come before each row."""
        order = self.samples.argsort(stable=True)
        sorted_ = self.samples[order]
        before = torch.searchsorted(sorted_, sorted_)  # those of smaller samples
        return torch.empty_like(order).index_copy(0, order, torch.arange(len(order), device=order.device) - before)

    def sum(self, values: Tensor, like: Tensor) -> Tensor:
        """The sum of each sample's entries, [b], in the dtype of `like` [b, ...]."""
        rows = values.movedim(self.axis, 0).unsqueeze(-1).flatten(1).sum(1, dtype=like.dtype)
        return like.new_zeros(len(like)).index_add(0, self.samples, rows)


def samples_along(
    where: "Layout | Placed", axis: int, shape: Sequence[int], batch: int, device: torch.device
) -> Tensor | None:
    """The sample of each index of an axis, on a device, if it is there that the samples are."""
    if isinstance(where, Placed):
        return where.samples.to(device) if where.axis == axis else None
    if where.fold != "single" and where.axis != axis:
        return None
    return Layout(0, where.fold).numbers(shape[axis : axis + 1], batch, device).long()


def spread(rows: Tensor, axis: int, shape: Sequence[int]) -> Tensor:
    """One value for each index of an axis, in every entry of a shape."""
    return rows.view([-1 if i == axis else 1 for i in range(len(shape))]).expand(tuple(shape))


def candidates(shape: Sequence[int], batch: int) -> list[Layout]:
    """Every layout that the shape admits."""
    if batch == 1:
        return [Layout(0, "single")]
    whole = [Layout(axis) for axis, size in enumerate(shape) if size == batch]
    folded = [axis for axis, size in enumerate(shape) if size % batch == 0 and size > batch]
    folds: tuple[Fold, Fold] = ("high", "low")
    return [*whole, *(Layout(axis, fold) for axis in folded for fold in folds)]


def readable(value: Tensor) -> bool:
    """Whether the values of a tensor can be asked for: not while a graph is traced, nor on the meta device."""
    return not (is_traced() or value.is_meta or isinstance(value, FakeTensor))
