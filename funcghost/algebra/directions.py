"""Directions: trees like the parameters, along which per-sample gradients are measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from funcghost.dtypes import as_written
from funcghost.errors import InputError
from funcghost.trees import Params, Tree, match_direction, named_leaves


@dataclass(frozen=True, eq=False)
class Stack:
    """Several directions, taken in one pass."""

    directions: tuple[Tree, ...]


def stack(directions: Sequence[Tree]) -> Stack:
    """K directions in one pass: `fg.dot(fg.stack([v1, .., vK]))` is [b, k], column k that of `fg.dot(vk)`.

    Nothing is copied. Cost: K products per use of a weight, where one direction costs one.

    Raises:
        InputError: there is no direction in the sequence.

    Example:
        >>> import funcghost as fg, torch
        >>> v = {"w": torch.ones(2)}
        >>> len(fg.stack([v, v]).directions)
        2
    """
    if not isinstance(directions, Sequence) or not directions:
        raise InputError(f"stack: takes a sequence of one or more directions, found {type(directions).__name__}.")
    return Stack(tuple(directions))


torch.utils._pytree.register_pytree_node(
    Stack,
    lambda value: (list(value.directions), None),
    lambda children, _: Stack(tuple(children)),
    serialized_type_name="funcghost.Stack",
)


@dataclass(frozen=True, eq=False)
class LowRank:
    """A leaf of a direction: `V = rows @ cols.mT` in blocks, `V.reshape(q, m, n)[k] = rows[k] @ cols[k].mT`.

    Shapes: rows [q, m, r], cols [q, n, r]; `shape` is that of the parameter, with q m n entries. `residual` [] is an
    upper bound on the Frobenius norm of what was dropped, in float32 at least: `|<V' - V, G>| <= residual |G|` for the
    V' that this stands for and any G, where V is the exact product of the factors as they are stored. It is infinite
    where nobody knows, as after `fg.track`.

    Other code may take it apart and put it together with anything in place of the tensors: it is a pytree node of
    `torch.utils._pytree`, and a leaf for optree.

    Example:
        >>> import funcghost as fg, torch
        >>> w = torch.outer(torch.arange(1.0, 5.0), torch.arange(1.0, 7.0))
        >>> leaf = fg.compress({"w": w}, rank=1)["w"]
        >>> leaf, leaf.cost, torch.allclose(leaf.dense(), w)
        (LowRank(shape=(4, 6), rank=1, dtype=torch.float32), 10, True)
    """

    rows: Tensor
    cols: Tensor
    shape: tuple[int, ...]
    residual: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the factors."""
        return self.rows.dtype

    @property
    def device(self) -> torch.device:
        """The device of the factors."""
        return self.rows.device

    @property
    def rank(self) -> int:
        """The number of columns of a block's factors."""
        return self.rows.shape[2]

    @property
    def cost(self) -> int:
        """Multiplications per token that meets every block once, q r (m + n); a dense leaf has q m n."""
        return self.rows.numel() + self.cols.numel()

    @property
    def nbytes(self) -> int:
        """Of the factors."""
        return self.rows.nbytes + self.cols.nbytes

    def dense(self) -> Tensor:
        """The tensor [*shape], multiplied in float32 at least and rounded to the dtype. Cost: q m n r."""
        wide = torch.promote_types(self.dtype, torch.float32)
        with as_written(self.device):
            product = self.rows.to(wide) @ self.cols.to(wide).mT
        return product.to(self.dtype).reshape(self.shape)

    def __repr__(self) -> str:
        return f"LowRank(shape={self.shape}, rank={self.rank}, dtype={self.dtype})"


torch.utils._pytree.register_pytree_node(
    LowRank,
    lambda leaf: ([leaf.rows, leaf.cols, leaf.residual], leaf.shape),
    lambda children, shape: _from_children(tuple(shape), *children),
    serialized_type_name="funcghost.LowRank",
    to_dumpable_context=list,
    from_dumpable_context=tuple,
)


def _from_children(shape: tuple[int, ...], rows: Any, cols: Any, residual: Any) -> LowRank:
    return LowRank(rows, cols, shape, residual)


Leaf = Tensor | LowRank
Direction = Sequence[Leaf | None]
"""One leaf per parameter, None for zero."""


def as_dense(leaf: Leaf) -> Tensor:
    """The tensor that a leaf stands for."""
    return leaf.dense() if isinstance(leaf, LowRank) else leaf


def match_leaves(direction: Tree, params: Params, what: str = "direction") -> list[Leaf]:
    """The leaves of a direction, dense or low-rank, checked against the parameters they belong to."""
    names, leaves, spec = named_leaves(direction)
    low = {name: leaf for name, leaf in zip(names, leaves, strict=True) if isinstance(leaf, LowRank)}
    blanks = [leaf.rows.new_empty(()).expand(leaf.shape) if isinstance(leaf, LowRank) else leaf for leaf in leaves]
    checked = match_direction(optree.tree_unflatten(spec, blanks), params, what)
    return [low.get(name, leaf) for name, leaf in zip(params.names, checked, strict=True)]
