"""Tables of numbers: checks of their shapes, ranks with ties, correlations column by column."""

from typing import Any

import torch
from torch import Tensor

from funcghost.errors import InputError


def numbers(where: str, value: Any, axes: str) -> Tensor:
    """A finite table in float64, with as many axes as there are letters in `axes`.

    Raises:
        InputError: it is something else.
    """
    letters = ", ".join(axes)
    if not isinstance(value, Tensor) or value.dtype is torch.bool or value.is_complex():
        raise InputError(f"{where}: must be a tensor [{letters}] of real numbers, found {_named(value)}.")
    if value.dim() != len(axes) or not value.numel():
        raise InputError(f"{where}: must be [{letters}] with one entry or more, found {list(value.shape)}.")
    found = value.detach().double()
    if not bool(found.isfinite().all()):
        raise InputError(f"{where}: must be finite, found {int((~found.isfinite()).sum())} entries that are not.")
    return found


def flags(where: str, value: Any, axes: str) -> Tensor:
    """A table of True and False.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(value, Tensor) or value.dtype is not torch.bool or value.dim() != len(axes):
        raise InputError(f"{where}: must be a tensor [{', '.join(axes)}] of bool, found {_named(value)}.")
    return value


def same_length(where: str, axis: str, **lengths: int) -> None:
    """Lengths of one axis that must be equal, by the name of the table.

    Raises:
        InputError: they are not.
    """
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise InputError(f"{where}: tables must agree in {axis}; {found}.")


def _named(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def ranks(values: Tensor) -> Tensor:
    """The ranks 1 to m along the first axis of [m, ...]; those of equal values are averaged."""
    ordered = values.movedim(0, -1).contiguous()
    sorted_values = ordered.sort(-1).values
    below = torch.searchsorted(sorted_values, ordered)
    through = torch.searchsorted(sorted_values, ordered, right=True)
    return ((below + through + 1).double() / 2).movedim(-1, 0)


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """The correlations of the columns of two tables [m, ...]; 0 where a column is constant."""
    one, other = ((value - value.mean(0)) for value in (a, b))
    scale = (one.square().sum(0) * other.square().sum(0)).sqrt()
    products = (one * other).sum(0)
    return torch.where(scale > 0, products / torch.where(scale > 0, scale, 1), 0).clamp(-1, 1)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """The rank correlations of the columns of two tables [m, ...]; 0 where a column is constant."""
    return pearson(ranks(a), ranks(b))
