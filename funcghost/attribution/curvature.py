"""Curvature for influence: the damped inverse of a Fisher or Gauss-Newton matrix, as a function of directions.

All are of the same matrix, for losses `l` (the data's own, or those of `labels`) of n samples over all batches,

    F = (1/n) sum_i sum_l (grad l_i)(grad l_i)^T

each parameter (or group of parameters) by itself; what differs is how much of it is kept. The influence of training
sample i on query q, by its weight in the mean loss, is `-(1/n) <grad q, (F + damping)^-1 grad losses[i]>`; scores are
`+<precondition(grad q), grad losses[i]>`, positive where training on the sample lowers the query's loss:

    precondition = curvature.ekfac(losses, params, batches).damped(fraction=0.1)
    scores = against(losses)(params, batches, precondition(directions))

A parameter that is used several times (tied, reused, at several positions) is seen as a whole: `grad l_i` has all of
its uses, so eigenvalues and scales have what is between them.
"""

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from funcghost.algebra.factors import Factor, Lookup, dense
from funcghost.algebra.rotations import form_of
from funcghost.algebra.sums import total
from funcghost.attribution.gathering import Across, Passes
from funcghost.attribution.inverses import Curvature
from funcghost.attribution.moments import Plan, RotatedSquares, Side, Sides
from funcghost.attribution.spectra import Sided, Spectrum, Whole, eigenbasis
from funcghost.errors import InputError
from funcghost.options import Options
from funcghost.problem import Losses
from funcghost.trees import Tree, split_params

LARGEST = 4096
"""How long a side, or a whole block, may be for its eigenvectors to be found."""


def diagonal(
    losses: Losses | Sequence[Losses],
    params: Tree,
    batches: Iterable[Tree],
    *,
    options: Options | None = None,
    across: Across | None = None,
) -> Curvature:
    """The diagonal of F: `(1/n) sum_i sum_l (grad l_i)^2`, entry by entry.

    Cost: for each batch and losses a forward, a backward without weight gradients, and as much as the weight gradients
    (t times that for t positions).

    Args:
        losses: of the curvature, one function or several whose curvatures are added (see `labels`).
        params: a tree of parameters.
        batches: a list of batches, or a loader.
        options: as in `fg.grad_and_reduce`.
        across: adds a tensor up over processes that have other batches.

    Raises:
        InputError: there is no list of batches, or no sample in them.

    Example:
        >>> import torch
        >>> from funcghost.attribution import curvature
        >>> found = curvature.diagonal(lambda p, x: x @ p["w"], {"w": torch.zeros(2)}, [torch.tensor([[1.0, 3.0]])])
        >>> found.damped(1.0)({"w": torch.ones(2)})
        {'w': tensor([0.5000, 0.1000])}
    """
    passes = Passes(losses, params, batches, options, across)
    return _in_bases(passes, "diagonal", {name: (form_of(uses), None, None) for name, uses in passes.first().items()})


def kfac(
    losses: Losses | Sequence[Losses],
    params: Tree,
    batches: Iterable[Tree],
    *,
    largest: int = LARGEST,
    options: Options | None = None,
    across: Across | None = None,
) -> Curvature:
    """K-FAC: `F ~ s (A (x) B)`, with `A = sum_p rows_p rows_p^T`, `B = sum_p cols_p cols_p^T` over positions and uses.

    Rows and columns are what the op's gradients are outer products of, output gradients and inputs of a linear layer.
    `s` makes the trace that of F, `s tr A tr B = (1/n) sum_i |grad_i|^2`, in which the products between positions and
    uses are. (The usual `s`, from the independence of rows and columns, leaves these out.) It is exact where all
    samples have the same columns, as with one input. A bias is a product with 1, and its matrix is exact; a
    parameter in no product has `sum grad grad^T` and `sum grad^T grad` for sides.

    Args:
        losses: as in `diagonal`.
        params: as in `diagonal`.
        batches: as in `diagonal`.
        largest: of a longer side, and of rows that are looked up, the diagonal is kept.
        options: as in `diagonal`.
        across: as in `diagonal`.

    Cost: as `diagonal`, and per position `m^2 + n^2`; eigenvectors of every side, in float64.

    Raises:
        InputError: as in `diagonal`.

    Example:
        >>> import torch
        >>> from funcghost.attribution import curvature
        >>> x, params = torch.tensor([[1.0, 3.0]]), {"w": torch.zeros(2)}
        >>> curvature.kfac(lambda p, x: x @ p["w"], params, [x]).spectra[0].dense().round(decimals=4)
        tensor([[1., 3.],
                [3., 9.]])

    Source: Martens, Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature"
    (arXiv 1503.05671); Eschenhagen et al., "Kronecker-Factored Approximate Curvature for Modern Neural Network
    Architectures" (arXiv 2311.00636), for positions.
    """
    passes = Passes(losses, params, batches, options, across)
    sides, samples = _sides(passes, largest)
    spectra = []
    for name, (plan, left, right, norms) in sides.items():
        (rows, L), (cols, R) = left, right
        values = rows.unsqueeze(2) * cols.unsqueeze(1)
        whole = values.sum((1, 2))
        scale = torch.where(whole > 0, norms / samples / torch.where(whole > 0, whole, 1), 0)
        spectra.append(Sided(name, plan.form, L, R, values * scale.view(-1, 1, 1)))
    return passes.made("kfac", spectra, samples, largest=largest)


def ekfac(
    losses: Losses | Sequence[Losses],
    params: Tree,
    batches: Iterable[Tree],
    *,
    largest: int = LARGEST,
    options: Options | None = None,
    across: Across | None = None,
) -> Curvature:
    """EK-FAC: the diagonal of F in the eigenbasis of K-FAC, `values = (1/n) sum_i sum_l (L^T grad_i R)^2`.

    Of all matrices that are diagonal in that basis the nearest to F, hence never farther than K-FAC. Gradients are of
    all positions and uses together. Arguments, cost and errors as in `kfac`, and a second pass over the batches, with
    the products of `diagonal` after rows and columns are in the basis. Labels that are drawn are drawn anew in it.

    Example:
        >>> import torch
        >>> from funcghost.attribution import curvature
        >>> x, params = torch.tensor([[1.0, 3.0]]), {"w": torch.zeros(2)}
        >>> precondition = curvature.ekfac(lambda p, x: x @ p["w"], params, [x]).damped(fraction=1.0)
        >>> precondition({"w": torch.tensor([1.0, 3.0])})
        {'w': tensor([0.0667, 0.2000])}

    Source: George, Laurent, Bouthillier, Ballas, Vincent, "Fast Approximate Natural Gradient Descent in a
    Kronecker-factored Eigenbasis" (arXiv 1806.03884); Grosse et al., "Studying Large Language Model Generalization with
    Influence Functions" (arXiv 2308.03296), section 3.1.
    """
    passes = Passes(losses, params, batches, options, across)
    sides, _ = _sides(passes, largest)
    bases = {name: (plan.form, left[1], right[1]) for name, (plan, left, right, _) in sides.items()}
    return _in_bases(passes, "ekfac", bases, largest=largest)


def exact(
    losses: Losses | Sequence[Losses],
    params: Tree,
    batches: Iterable[Tree],
    *,
    group: Callable[[str], str] | None = None,
    largest: int = LARGEST,
    options: Options | None = None,
    across: Across | None = None,
) -> Curvature:
    """F itself, by groups of parameters: all of F within a group, nothing between groups.

    Args:
        losses: as in `diagonal`.
        params: as in `diagonal`.
        batches: as in `diagonal`.
        group: names the group of a parameter; by default its name up to the last dot, so that a layer's weight and bias
            are together. `lambda name: ""` makes one group of all.
        largest: groups of more numbers than that have EK-FAC, parameter by parameter.
        options: as in `diagonal`.
        across: as in `diagonal`.

    Cost: for groups of s numbers, `2 n s^2` per losses, memory for `b s` and for `s^2`, and eigenvectors, `s^3`.

    Raises:
        InputError: as in `diagonal`.

    Example:
        >>> import torch
        >>> from funcghost.attribution import curvature
        >>> x, params = torch.tensor([[1.0, 3.0], [1.0, -3.0]]), {"w": torch.zeros(2)}
        >>> curvature.exact(lambda p, x: x @ p["w"], params, [x]).spectra[0].dense()
        tensor([[1., 0.],
                [0., 9.]])
    """
    split = split_params(params)
    members: dict[str, list[str]] = {}
    for name in split.names:
        key = group(name) if group is not None else name.rpartition(".")[0] or name
        members.setdefault(key, []).append(name)
    sizes = {name: leaf.numel() for name, leaf in zip(split.names, split.leaves, strict=True)}
    small = [own for own in members.values() if sum(sizes[name] for name in own) <= largest]
    passes = Passes(losses, params, batches, options, across)
    matrices, samples = _matrices(passes, small)
    spectra: list[Spectrum] = []
    shapes = {name: tuple(leaf.shape) for name, leaf in zip(split.names, split.leaves, strict=True)}
    for own, matrix in zip(small, matrices, strict=True):
        values, basis = eigenbasis(matrix / samples)
        spectra.append(Whole(tuple(own), tuple(shapes[name] for name in own), basis, values))
    covered = {name for own in small for name in own}
    if covered != set(split.names):
        rest = ekfac(losses, params, passes.batches, largest=largest, options=options, across=across)
        spectra += [spectrum for spectrum in rest.spectra if spectrum.names[0] not in covered]
    return passes.made("exact", spectra, samples, largest=largest)


def _matrices(passes: Passes, groups: Sequence[Sequence[str]]) -> tuple[list[Tensor], int]:
    """`sum_i grad_i grad_i^T` of each group, and the number of samples."""
    found: list[Tensor | None] = [None] * len(groups)
    count = 0
    for batch in passes.batches:
        for number, own in enumerate(passes.losses):
            uses, _ = passes.transforms[id(own)].pairs(passes.tree, batch)
            count += len(uses) if number == 0 else 0
            for place, names in enumerate(groups):
                flat = torch.cat([_rows(uses.uses[name]) for name in names], 1)
                matrix, known = flat.T @ flat, found[place]
                found[place] = matrix if known is None else known + matrix
    return [passes.across(matrix) for matrix in found if matrix is not None], passes.counted(count)


def _rows(uses: Sequence[Factor]) -> Tensor:
    """The gradients of a parameter, flat, [b, entries]."""
    found = total([dense(use) for use in uses])
    return found.reshape(len(found), prod(found.shape[1:]))


Eigen = tuple[Tensor, Tensor | None]
"""Eigenvalues [q, size] of a side, and its eigenvectors [q, size, size], None for the identity."""


def _sides(passes: Passes, largest: int) -> tuple[dict[str, tuple[Plan, Eigen, Eigen, Tensor]], int]:
    """For every parameter its form, both sides in their eigenbases, and the sum of the squared norms, [q]."""
    if type(largest) is not int or largest < 0:
        raise InputError(f"curvature: largest must be a length, 0 or more, found {largest!r}.")
    plans = {}
    for name, uses in passes.first().items():
        form = form_of(uses)
        _, m, n = form.blocks
        looked_up = all(isinstance(use, Lookup) for use in uses)
        plans[name] = Plan(form, Side(m, m <= largest and not looked_up), Side(n, n <= largest))
    sums, samples = passes.summed(Sides(plans), {name: (plan.entries,) for name, plan in plans.items()})
    found = {}
    for name, plan in plans.items():
        left, right, norms = plan.unpacked(sums[name])
        found[name] = (plan, _eigen(left, plan.left), _eigen(right, plan.right), norms)
    return found, samples


def _eigen(moment: Tensor, side: Side) -> Eigen:
    return eigenbasis(moment) if side.whole else (moment, None)


def _in_bases(passes: Passes, kind: str, bases: Any, **facts: Any) -> Curvature:
    sums, samples = passes.summed(RotatedSquares(bases), {name: form.blocks for name, (form, _, _) in bases.items()})
    spectra = [Sided(name, form, left, right, sums[name] / samples) for name, (form, left, right) in bases.items()]
    return passes.made(kind, spectra, samples, **facts)
