"""Low-rank directions that follow a moving one: one subspace iteration in place of a decomposition."""

import math
from collections.abc import Sequence

import optree
import torch
from torch import Tensor

from funcghost.algebra.compression import check_leaf
from funcghost.algebra.contractions import fits, summed
from funcghost.algebra.directions import Leaf, LowRank, Stack, match_leaves
from funcghost.algebra.factors import Dense, Factor, Lookup
from funcghost.algebra.pairs import Pairs
from funcghost.algebra.sketch import orthonormal
from funcghost.algebra.sums import total
from funcghost.dtypes import as_written, wide
from funcghost.errors import InputError
from funcghost.trees import Params, Tree, named_leaves


def track(direction: Tree, previous: Tree) -> Tree:
    """The direction at the ranks of an earlier one, by one subspace iteration from where that one was.

    For a leaf with blocks V [m, n], m <= n, that was `rows @ cols.mT` of rank r before (for m > n the same of `V.mT`):

        Q = orth(V cols),      rows' @ cols'.mT = Q Q^T V

    It is for a direction that changes little between steps, as a validation gradient does: `fg.compress` finds the
    first one, and each is tracked from the one before. Of `Pairs`, whose direction is the sum of their gradients,
    nothing of the size of a parameter is formed: a step that takes `fg.pairs` on validation samples and tracks them
    leaves out the products for the validation gradient, and can be cheaper than a plain step on both batches.

    Law: exact where V has rank r or less and its row space (for m > n its column space) is that of the earlier one;
    tracked again and again, a V that stays gets to its best approximation of rank r, the error of the subspace falling
    by `(sigma_{r+1} / sigma_r)^2` each time. How far the result is off is not known, so residuals are infinite, and so
    are the bounds of `fg.dot(..., with_bound=True)`: where a bound is wanted, use `fg.compress`.

    Args:
        direction: a tree like params, `fg.stack` of some, or `Pairs`.
        previous: what `compress` or `track` gave for an earlier direction; leaves that are dense there stay dense.

    Units: those of the direction. Cost: 4 m n r FLOPs for a leaf of a tree, 4 r (m + n) for each position of `Pairs`,
    and a QR of the shorter side, min(m, n) x r, in float32 at least. Host and device do not wait for each other.

    Raises:
        InputError: the trees differ in structure, or leaves in shape, dtype or device.

    Example:
        >>> import funcghost as fg, torch
        >>> v = {"w": torch.outer(torch.ones(8), torch.arange(6.0)), "b": torch.ones(8)}
        >>> small = fg.compress(v, rank=1)
        >>> moved = fg.track({"w": 3 * v["w"], "b": v["b"]}, small)
        >>> moved["w"], torch.allclose(moved["w"].dense(), 3 * v["w"])
        (LowRank(shape=(8, 6), rank=1, dtype=torch.float32), True)

    Source: Stewart, "Simultaneous iteration for computing invariant subspaces of non-Hermitian matrices" (Numerische
    Mathematik 25, 1976); one iteration per step from the subspace before, as in Vogels, Karimireddy, Jaggi, "PowerSGD"
    (NeurIPS 2019).
    """
    if isinstance(direction, Stack) and isinstance(previous, Stack):
        if len(direction.directions) != len(previous.directions):
            raise InputError(
                f"track: a stack of {len(direction.directions)} directions cannot follow one of "
                f"{len(previous.directions)}. Compress it anew."
            )
        return Stack(tuple(map(track, direction.directions, previous.directions)))
    if isinstance(direction, Stack) or isinstance(previous, Stack):
        raise InputError("track: either both or none of direction and previous are stacks.")
    params, uses = _taken_apart(direction)
    before = match_leaves(previous, params, "previous")
    with torch.no_grad():
        found = [_renewed(old, *own) for old, own in zip(before, uses, strict=True)]
    return optree.tree_unflatten(params.spec, found)


Uses = tuple[Sequence[Factor], torch.dtype]
"""The factors whose gradients, summed over the samples, are a leaf; and its dtype."""


def _taken_apart(direction: Tree) -> tuple[Params, list[Uses]]:
    """What the leaves are to match, and what each is the sum of."""
    if isinstance(direction, Pairs):
        return direction.params, [(direction.uses[name], dtype) for name, _, dtype in direction.parameters]
    names, leaves, spec = named_leaves(direction)
    for name, leaf in zip(names, leaves, strict=True):
        check_leaf(name, leaf)
    return Params(names, tuple(leaves), spec), [((Dense(leaf.detach().unsqueeze(0)),), leaf.dtype) for leaf in leaves]


def _renewed(old: Leaf, uses: Sequence[Factor], dtype: torch.dtype) -> Leaf:
    with as_written(old.device):
        return _tracked(old, uses, dtype) if isinstance(old, LowRank) else summed(uses).to(dtype)


def _tracked(old: LowRank, uses: Sequence[Factor], dtype: torch.dtype) -> LowRank:
    """One iteration, with the shorter side as the basis; both sides get an equal part of the size."""
    factored = [use for use in uses if fits(use, old)]
    others = [use for use in uses if not fits(use, old)]
    blocks = len(old.rows), old.rows.shape[1], old.cols.shape[1]
    rest = summed(others).reshape(blocks) if others else None
    sides = [old.rows, old.cols]
    short, long = (0, 1) if blocks[1] <= blocks[2] else (1, 0)

    def product(onto: int, start: Tensor) -> Tensor:
        """`V start` onto the rows (0), or `V^T start` onto the columns (1)."""
        terms = [_outward(use, onto, _inward(use, 1 - onto, start)) for use in factored]
        if rest is not None:
            terms.append(torch.matmul(rest.mT if onto else rest, start.to(rest.dtype)))
        return total(terms)

    start = wide(sides[long])
    basis = orthonormal(product(short, start / _largest(start)))
    met = product(long, basis)
    size = _largest(met).sqrt()
    sides[short], sides[long] = (basis * size).to(dtype), (met / size).to(dtype)
    return LowRank(sides[0], sides[1], old.shape, old.residual.new_full((), math.inf))


def _largest(side: Tensor) -> Tensor:
    """The largest entry of each column by its size, [q, 1, r]: no square leaves the range of numbers; 1 for zeros."""
    found = side.abs().amax(1, keepdim=True)
    return torch.where(found == 0, 1, found)


def _inward(use: Factor, which: int, side: Tensor) -> Tensor:
    """For every position its rows (0) or columns (1) times a side [q, m or n, r]: [q, b t, r]."""
    if isinstance(use, Lookup) and which == 0:
        return side[:, use.index.flatten()]
    return torch.matmul(_positions(use, which), side.to(use.tensors[which].dtype))


def _outward(use: Factor, which: int, weights: Tensor) -> Tensor:
    """The sum over positions of rows (0) or columns (1) times the weights [q, b t, r]: [q, m or n, r]."""
    if isinstance(use, Lookup) and which == 0:
        blank = wide(weights).new_zeros((1, use.form.blocks[1], weights.shape[2]))
        return blank.index_add(1, use.index.flatten(), wide(weights))
    values = _positions(use, which)
    return wide(torch.matmul(values.mT, weights.to(values.dtype)))


def _positions(use: Factor, which: int) -> Tensor:
    """Rows (0) or columns (1) as [q, b t, m or n]."""
    values = use.tensors[which].flatten(0, 1)
    return values.unsqueeze(0) if isinstance(use, Lookup) else values.transpose(0, 1)
