"""Low-rank directions: leaves that cost less to contract with, and a bound on what was left out that holds."""

import math
from collections.abc import Mapping
from typing import Any

import optree
import torch
from torch import Tensor

from funcghost.algebra.directions import LowRank, Stack, as_dense
from funcghost.algebra.ranks import Matrices, cut_to_rank, cut_within
from funcghost.errors import InputError
from funcghost.trees import Tree, named_leaves


def compress(direction: Tree, rank: int | None = None, rtol: float | None = None) -> Tree:
    """The direction with a `LowRank` leaf wherever that is cheaper, by truncated singular value decompositions.

        V.reshape(q, m, n)[k] ~ rows[k] @ cols[k].mT,      cost q r (m + n) per token instead of q m n

    Leaves of one axis or none stay as they are, and so do those for which no rank is cheaper, those with entries that
    are not finite, and those of dtypes other than bfloat16, float16, float32 and float64. A leaf [m, n] is one block,
    one with more axes [p, ...] is the block [p, rest]; with three axes [q, m, n] it may also become q blocks of a
    common rank (stacked experts, heads), whichever is cheaper. A leaf of zeros gets rank 1.

    With `rank`, every block gets this rank. With `rtol`, ranks are chosen for the whole tree, at little total cost:

        sqrt(sum over leaves of residual^2) <= rtol |direction|

    where |direction| is the Frobenius norm over all finite leaves; what the budget cannot buy stays dense, without
    residual. With both, no rank is above `rank`, and `rtol` may then be missed: the residuals tell.

    Residuals are computed from the factors as they are stored, in float64, and rounded up; they hold for any spectrum.
    Factors have the dtype of the leaf. Those in half precision cannot be nearer to it than 0.4 % (bfloat16) or 0.05 %
    (float16), so that a smaller rtol leaves such a leaf dense. Results depend on the direction alone, not on torch's
    random numbers, which are left as they are. `fg.stack` gives the stack of its compressed members.

    Args:
        direction: a tree like params, `fg.stack` of some, or `Pairs`: the sum of their gradients, whose leaves have a
            rank for each position, or less.
        rank: the rank of every block, at least 1.
        rtol: what may be dropped, relative to the norm of the direction.

    Units: those of the direction; a residual times the norm of a gradient is in those of a score (`certified_bound`).
    The costs count every block for every token: tokens that each visit one expert gain only from the split in blocks,
    and an embedding that is only looked up costs no products when it is dense.

    Cost: 8 q m n (r + 10) per leaf, one of these products in float64, the others in float32 (float64 for float64); with
    rtol for sketches of rank 32 and, where these are too small, 64, 128, ...; from half the smaller side on, and up to
    128 rows or columns, a full decomposition. Host and device wait for each other.

    Raises:
        InputError: neither rank nor rtol is given, or one is out of range; a leaf is no dense floating-point tensor, or
            is compressed already; rtol is given for tensors on the meta device, which have no values.

    Example:
        >>> import funcghost as fg, torch
        >>> v = {"w": torch.outer(torch.ones(8), torch.ones(8)) + 0.001 * torch.eye(8), "b": torch.ones(8)}
        >>> small = fg.compress(v, rtol=0.01)
        >>> small["w"], small["b"] is v["b"], round(float(small["w"].residual), 4)
        (LowRank(shape=(8, 8), rank=1, dtype=torch.float32), True, 0.0026)

    Source: Halko, Martinsson, Tropp, "Finding structure with randomness" (SIAM Review 53, 2011), algorithms 4.4
    and 5.1. That validation gradients are near low rank is seen in `tests/benchmarks/bench_rank.py`.
    """
    _check_arguments(rank, rtol)
    if isinstance(direction, Stack):
        return Stack(tuple(compress(member, rank, rtol) for member in direction.directions))
    if hasattr(direction, "as_direction"):
        return _recompressed(direction.as_direction(), rank, rtol)
    names, leaves, spec = named_leaves(direction)
    for name, leaf in zip(names, leaves, strict=True):
        check_leaf(name, leaf, rtol)
    with torch.no_grad():
        taken = [Matrices(name, leaf.detach()) for name, leaf in zip(names, leaves, strict=True)]
        cuts = cut_within(taken, rtol, rank) if rtol is not None else [cut_to_rank(leaf, rank or 1) for leaf in taken]
    found = [
        leaf if cut is None else LowRank(cut.rows, cut.cols, tuple(leaf.shape), cut.residual)
        for leaf, cut in zip(leaves, cuts, strict=True)
    ]
    return optree.tree_unflatten(spec, found)


def _recompressed(exact: Tree, rank: int | None, rtol: float | None) -> Tree:
    """A direction with exact low-rank leaves, compressed where that makes one cheaper, or its rank is too high."""
    _, leaves, spec = named_leaves(exact)
    found = named_leaves(compress(optree.tree_unflatten(spec, [as_dense(leaf) for leaf in leaves]), rank, rtol))[1]
    kept = []
    for leaf, smaller in zip(leaves, found, strict=True):
        fits = isinstance(leaf, LowRank) and (rank is None or leaf.rank <= rank)
        cheaper = isinstance(smaller, LowRank) and isinstance(leaf, LowRank) and smaller.cost < leaf.cost
        kept.append(leaf if fits and not cheaper else smaller)
    return optree.tree_unflatten(spec, kept)


def certified_bound(direction: Tree, norms: Mapping[str, Tensor]) -> Tensor:
    """How far the scores of every sample may be off because of what was dropped from a compressed direction.

        bound[i] = sum over low-rank leaves of residual * |grad_i of the leaf|
        |<grad_i, compressed> - <grad_i, direction>| <= bound[i]

    Shapes: `norms` maps names of parameters, as in `fg.plan`, to squared norms [b] of the per-sample gradients, or to
    upper bounds of them; names of dense leaves may be missing. The result is [b], for a stack of k directions [b, k].

    Units: those of the scores. Law: the inequality holds in floating point for norms that are no smaller than the true
    ones; added up in float64 and rounded up to the dtype of the norms, float32 at least. The rounding of the scores
    themselves comes on top. Cost: b per leaf.

    Raises:
        InputError: there are no norms, or not those of a low-rank leaf.

    Example:
        >>> import funcghost as fg, torch
        >>> from funcghost.algebra.compression import certified_bound
        >>> v, g = torch.diag(torch.tensor([4.0, 0.5, 0.0])), torch.ones(1, 3, 3)
        >>> small = fg.compress({"w": v}, rank=1)
        >>> error = ((small["w"].dense() - v) * g).sum((1, 2)).abs()
        >>> bool(error <= certified_bound(small, {"w": g.square().sum((1, 2))}))
        True

    Source: the inequality of Cauchy and Schwarz, leaf by leaf.
    """
    if not norms:
        raise InputError("certified_bound: norms must hold the squared norms [b] of at least one parameter.")
    if isinstance(direction, Stack):
        return torch.stack([certified_bound(member, norms) for member in direction.directions], -1)
    some = next(iter(norms.values()))
    total, terms = torch.zeros_like(some, dtype=torch.float64), 0
    names, leaves, _ = named_leaves(direction)
    for name, leaf in zip(names, leaves, strict=True):
        if not isinstance(leaf, LowRank):
            continue
        if name not in norms:
            raise InputError(f"certified_bound: norms must hold those of {name!r}, which is low-rank.")
        term = leaf.residual.detach().double() * norms[name].detach().double().sqrt()
        # Nothing was dropped, or there is no gradient: no error, also where the other is beyond the range of numbers.
        total = total + torch.where((leaf.residual == 0) | (norms[name] == 0), 0.0, term)
        terms += 1
    raised = total * (1 + (terms + 4) * 2.0**-52)
    dtype = torch.promote_types(some.dtype, torch.float32)
    rounded = raised.to(dtype)
    return torch.where(rounded.double() < raised, torch.nextafter(rounded, torch.full_like(rounded, math.inf)), rounded)


def _check_arguments(rank: Any, rtol: Any) -> None:
    if rank is None and rtol is None:
        raise InputError("compress: pass rank=, the rank of every block, or rtol=, what may be dropped, or both.")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise InputError(f"compress: rank must be a whole number of at least 1, found {rank!r}.")
    if rtol is not None and not (isinstance(rtol, int | float) and 0 <= rtol < math.inf):
        raise InputError(f"compress: rtol must be a number of at least 0, found {rtol!r}.")


def check_leaf(name: str, leaf: Any, rtol: float | None = None) -> None:
    """A leaf to be compressed, with this `rtol`, must be a dense tensor of real numbers."""
    if isinstance(leaf, LowRank):
        raise InputError(f"direction[{name!r}] is compressed already. Compress the dense direction instead.")
    if not isinstance(leaf, Tensor):
        raise InputError(f"direction[{name!r}] must be a tensor, found {type(leaf).__name__}.")
    if not leaf.is_floating_point() or leaf.layout is not torch.strided:
        raise InputError(
            f"direction[{name!r}] must be a dense tensor of real floating-point numbers, "
            f"found {leaf.dtype} of layout {leaf.layout}."
        )
    if leaf.is_meta and rtol is not None:
        raise InputError(
            f"direction[{name!r}] is on the meta device and has no values to choose a rank by. Pass rank= alone."
        )
