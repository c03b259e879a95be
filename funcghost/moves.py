"""Ops that move entries from sample to sample by the values of data: a layout measured once would not hold again.

Rows gathered for an expert, segments of packed rows added up, losses sorted: which sample an entry belongs to changes
with the data while shapes and ops stay the same. Such an op is found out by applying it to sample numbers instead of
values, once as it was called and once with the index shuffled: if an entry's sample changes, the op moves samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from funcghost.layout import Layout
from funcghost.rules import Op

_T: Any = torch.Tensor
_NAMES = (
    *("index_select", "gather", "take_along_dim", "take", "masked_select", "masked_scatter", "sort", "msort", "topk"),
    *("index_add", "index_copy", "index_put", "scatter", "scatter_add", "scatter_reduce", "index_reduce", "kthvalue"),
    *("unique", "segment_reduce", "index_fill", "argwhere", "repeat_interleave"),
)
MOVES: frozenset[Op] = frozenset(
    getattr(owner, name + suffix)
    for name in _NAMES
    for owner in (torch, _T)
    for suffix in ("", "_")
    if hasattr(owner, name + suffix)
) | {_T.__getitem__, _T.__setitem__}
"""The ops that choose where an entry goes by an index or an order. Others compute in place."""


@dataclass(frozen=True, eq=False)
class Move:
    """A call of such an op: shapes in place of the tensors whose samples matter, `data` the slots of the index."""

    op: Op
    leaves: tuple[Any, ...]
    spec: optree.PyTreeSpec
    data: tuple[int, ...]

    def moves_samples(self, layouts: dict[int, Layout | None], batch: int) -> bool:
        """Whether other data would send an entry to another sample; `layouts` are those of the float slots."""
        if any(layout is None for layout in layouts.values()):
            return True
        numbers = [
            _sample_numbers(leaf, layouts[slot], batch) if slot in layouts else leaf
            for slot, leaf in enumerate(self.leaves)
        ]
        plain = self._apply(numbers, 1.0)
        if plain is None:
            return True
        rolled, flipped = self._reordered(numbers, torch.roll, 1), self._reordered(numbers, torch.flip, (0,))
        others = (self._apply(rolled, 1.0), self._apply(flipped, 1.0), self._apply(numbers, -1.0))
        return any(other is None or not _same(plain, other) for other in others)

    def _reordered(self, leaves: Sequence[Any], order: Any, by: Any) -> list[Any]:
        """The leaves with the entries of the index in another order, which keeps it valid."""
        return [
            order(leaf.flatten(), by).view(leaf.shape) if slot in self.data else leaf
            for slot, leaf in enumerate(leaves)
        ]

    def _apply(self, leaves: Sequence[Any], sign: float) -> list[Tensor] | None:
        """The floats that come out for sample numbers, with the sign taken off again; None where it fails."""
        given = [leaf * sign if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf for leaf in leaves]
        nest: Any = optree.tree_unflatten(self.spec, given)
        try:
            with torch.no_grad():
                returned = self.op(*nest[0], **nest[1])
        except (RuntimeError, IndexError):
            return None
        found = [*optree.tree_leaves(returned), *given]
        return [value * sign for value in found if isinstance(value, Tensor) and value.is_floating_point()]


def _sample_numbers(shape: tuple[int, ...], layout: Layout | None, batch: int) -> Tensor:
    """A tensor whose entries are the numbers of their samples, from 1."""
    assert layout is not None
    numbers = torch.zeros(shape)
    rows = layout.by_sample(numbers, batch)
    rows.copy_(torch.arange(1.0, batch + 1).view(-1, *[1] * (rows.dim() - 1)).expand_as(rows))
    return numbers


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True))
