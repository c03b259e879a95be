"""What can be asked of pairs: reducers, inner products with other pairs, weighted sums, the gradients themselves."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from funcghost.algebra.contractions import along, inner_products, squared_norms, weighted_sum
from funcghost.algebra.cost import Means, means_of
from funcghost.algebra.directions import Direction
from funcghost.algebra.factors import Factor, dense
from funcghost.algebra.metric import Metric, known, metric_of
from funcghost.algebra.pairs import Pairs, check_weights
from funcghost.algebra.sums import total
from funcghost.dtypes import as_written, wide
from funcghost.errors import InputError
from funcghost.options import Options, check_options
from funcghost.trees import Tree

Weights = Tensor | Mapping[str, Tensor]
"""One weight per sample [b], or such weights for each parameter."""


def check_pairs(pairs: Any, what: str) -> Pairs:
    """What a function of pairs was given, which must be pairs."""
    if not isinstance(pairs, Pairs):
        raise InputError(
            f"{what}: takes Pairs as fg.pairs(losses)(params, batch) gives them, found {type(pairs).__name__}."
        )
    return pairs


def _match(a: Pairs, b: Pairs) -> None:
    if a.uses.keys() != b.uses.keys():
        raise InputError("pairs: both must be of the same parameters.")
    for name in a.uses:
        if a.uses[name][0].shape != b.uses[name][0].shape:
            raise InputError(f"pairs: parameter {name!r} has another shape in one than in the other.")


def cross_dots(a: Pairs, b: Pairs, metric: Tree | None = None, *, options: Options | None = None) -> Tensor:
    """The inner products of any two per-sample gradients: `out[i, j] = <a_i, b_j>`.

    With a `metric` it is `<a_i, M b_j>`, see `fg.squared_norm`.

    Shapes: [a, b]. Units and cost: those of `fg.gram`.

    Raises:
        InputError: these are not pairs of the same parameters.
        MemoryBudgetError: no tile of any route fits the budget.

    Example:
        >>> import funcghost as fg, torch
        >>> pairs = fg.pairs(lambda params, x: x @ params["w"])({"w": torch.zeros(2)}, torch.eye(2))
        >>> fg.cross_dots(pairs, pairs[:1])
        tensor([[1.],
                [0.]])
    """
    a, b = check_pairs(a, "cross_dots"), check_pairs(b, "cross_dots")
    _match(a, b)
    means = means_of(check_options(options), a.device)
    weightings = None if metric is None else metric_of(metric)
    parts = []
    with as_written(a.device):
        for name, uses in a.uses.items():
            products = inner_products if weightings is None else known(weightings, name).products
            parts.append(products(uses, b.uses[name], means, name))
    return torch.stack(parts).sum(0)


def cosine(a: Pairs, b: Pairs, metric: Tree | None = None, *, options: Options | None = None) -> Tensor:
    """The cosines of the angles between per-sample gradients: `out[i, j] = <a_i, b_j> / (|a_i| |b_j|)`.

    With a `metric`, products and norms are those under it, see `fg.squared_norm`.

    Shapes: [a, b]; 0 where a gradient is zero. Cost: that of `cross_dots` and of both norms.

    Raises:
        InputError: as in `cross_dots`.
        MemoryBudgetError: as in `cross_dots`.

    Example:
        >>> import funcghost as fg, torch
        >>> pairs = fg.pairs(lambda params, x: x @ params["w"])({"w": torch.zeros(2)}, 3 * torch.eye(2))
        >>> fg.cosine(pairs, pairs)
        tensor([[1., 0.],
                [0., 1.]])
    """
    products = cross_dots(a, b, metric, options=options)
    means, weightings = means_of(check_options(options), a.device), None if metric is None else metric_of(metric)
    with as_written(a.device):
        one, other = (
            total(_norms(name, uses, means, weightings) for name, uses in p.uses.items()).sqrt() for p in (a, b)
        )
    scale = one.unsqueeze(1) * other
    return torch.where(scale > 0, products / scale.where(scale > 0, 1), 0)


def _norms(name: str, uses: Sequence[Factor], means: Means, metric: Metric | None) -> Tensor:
    return squared_norms(uses, means, name) if metric is None else known(metric, name).norms(uses, means, name)


def scores_along(pairs: Pairs, directions: Sequence[Direction]) -> Tensor:
    """`<grad_i, V_k>` for directions of one leaf per parameter, None for zero: [b, k], in float32 at least."""
    like = wide(next(iter(pairs.uses.values()))[0].tensors[-1])
    columns = [like.new_zeros((len(pairs), 0))]
    for direction in directions:
        leaves = [(pairs.uses[name], leaf) for name, leaf in zip(pairs.params.names, direction, strict=True)]
        terms = [along(use, leaf) for uses, leaf in leaves if leaf is not None for use in uses]
        columns.append((total(terms) if terms else like.new_zeros(len(pairs))).unsqueeze(1))
    return torch.cat(columns, 1)


def combine(pairs: Pairs, weights: Weights) -> Tree:
    """`sum_i weights[i] grad_i`: the gradient of a weighted loss by book-keeping, without a second backward.

    Law: equal to autograd's gradient of `(weights * losses).sum()`. With a dict of weights, the leaf of a parameter is
    that of `combine` with its own.

    Shapes: weights [b], or a dict from all names of parameters to weights [b]; a tree like params.

    Weights may be a boolean mask. Leaves are dense, also where a backward gives sparse ones (`sparse=True`).

    Cost: one product per use, as the weight's gradient in a backward.

    Raises:
        InputError: weights are no floating numbers [b], or not those of the parameters.

    Example:
        >>> import funcghost as fg, torch
        >>> pairs = fg.pairs(lambda params, x: x @ params["w"])({"w": torch.zeros(2)}, torch.eye(2))
        >>> fg.combine(pairs, torch.tensor([2.0, 3.0]))
        {'w': tensor([2., 3.])}
    """
    pairs = check_pairs(pairs, "combine")
    by_name = weights if isinstance(weights, Mapping) else dict.fromkeys(pairs.uses, weights)
    if by_name.keys() != set(pairs.uses):
        missing, extra = (sorted(set(a) - set(b))[:5] for a, b in ((pairs.uses, by_name), (by_name, pairs.uses)))
        raise InputError(
            f"combine: weights by parameter must be given for each, missing {missing}, unexpected {extra}."
        )
    for own in by_name.values():
        check_weights("combine", pairs, own)
    return _added(pairs, lambda name, use: weighted_sum(use, by_name[name]))


def materialize(pairs: Pairs) -> Tree:
    """The per-sample gradients themselves: a tree like params with leaves [b, *shape], in the parameters' dtype.

    Cost: b copies of the parameters.

    Raises:
        InputError: these are not pairs.

    Example:
        >>> import funcghost as fg, torch
        >>> pairs = fg.pairs(lambda params, x: x @ params["w"])({"w": torch.zeros(2)}, torch.eye(2))
        >>> fg.materialize(pairs)
        {'w': tensor([[1., 0.],
                [0., 1.]])}
    """
    pairs = check_pairs(pairs, "materialize")
    return _added(pairs, lambda name, use: dense(use))


def _added(pairs: Pairs, of_use: Callable[[str, Factor], Tensor]) -> Tree:
    """A tree like params of the sums over the uses of each."""
    leaves = []
    with as_written(pairs.device):
        for name, _, dtype in pairs.parameters:
            leaves.append(total(of_use(name, use) for use in pairs.uses[name]).to(dtype))
    return optree.tree_unflatten(pairs.spec, leaves)
