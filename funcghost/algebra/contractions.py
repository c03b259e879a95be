"""Inner products between factored per-sample gradients of one parameter: each formula stands here once.

Two routes give the same numbers. `ghost` multiplies positions with positions:

    <grad_i, grad_j> = sum over uses u, v and positions t, s of <rows_ut, rows_vs> <cols_ut, cols_vs>

which never forms anything of the size of the parameter. `materialise` forms the gradients, slice by slice.
"""

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Literal

import torch
from torch import Tensor

from funcghost.algebra.cost import ANY, Means, bytes_of_entry, choose, common_form, sketch
from funcghost.algebra.directions import Leaf, LowRank
from funcghost.algebra.factors import Dense, Factor, Form, Lookup, Outer, blocks, dense, samples
from funcghost.algebra.sums import added_rows, applied, product, squares, total
from funcghost.dtypes import wide

ENTRIES = 2**22
"""How many numbers of gradients are formed at once for many directions."""


def squared_norms(uses: Sequence[Factor], means: Means = ANY, name: str = "") -> Tensor:
    """`|grad_i|^2` of one parameter from all of its uses, [b]."""
    b, sketches = samples(uses[0]), [sketch(use) for use in uses]
    route, _ = choose(sketches, sketches, (b, b), means, diagonal=True, same=True, name=name)
    uses = uses if means.dtype is None else [use.map(in_dtype(means.dtype)) for use in uses]
    if route.name == "materialise":
        return _materialised_norms(uses, means.budget)
    if len(uses) == 1 and isinstance(uses[0], Outer) and uses[0].positions == uses[0].form.blocks[0] == 1:
        # One position of a sample: the product of two squared sizes.
        rows, cols = (squares(wide(value).flatten(1)) for value in uses[0].tensors)
        return rows * cols
    found = [
        _ghost_diagonal(one, other, means.budget) * (1 if i == j else 2)
        for i, one in enumerate(uses)
        for j, other in enumerate(uses[i:], i)
    ]
    return total(found)


def inner_products(a: Sequence[Factor], b: Sequence[Factor], means: Means = ANY, name: str = "") -> Tensor:
    """`<grad_i, grad_j>` of one parameter for the samples of a and those of b, [a, b]; symmetric if a is b."""
    same = a is b
    route, _ = choose(
        [sketch(use) for use in a],
        [sketch(use) for use in b],
        (samples(a[0]), samples(b[0])),
        means,
        same=same,
        name=name,
    )
    if means.dtype is not None:
        a = [use.map(in_dtype(means.dtype)) for use in a]
        b = a if same else [use.map(in_dtype(means.dtype)) for use in b]
    if route.name == "materialise":
        found = _materialised_products(a, b, means.budget)
    else:
        found = total([_ghost_matrix(one, other, means.budget) for one in a for other in b])
    return (found + found.T) / 2 if same else found


def along(use: Factor, direction: Leaf) -> Tensor:
    """`<grad_i, V>` for a direction of the parameter's shape, [b]."""
    if isinstance(direction, LowRank):
        return _along_low_rank(use, direction)
    if isinstance(use, Dense):
        gradients = wide(use.value).reshape(samples(use), direction.numel())
        return applied(gradients, wide(direction).flatten())
    if isinstance(use, Lookup):
        looked = wide(direction).reshape(use.form.blocks[1:])[use.index]
        return (looked * wide(use.cols)).flatten(1).sum(1)
    matrices, (one, other) = use.form.fold(direction), use.tensors  # [q, m, n]
    if one.shape[-1] < other.shape[-1]:
        matrices, one, other = matrices.mT, other, one
    met = product(one.transpose(1, 2), matrices.to(one.dtype)).transpose(1, 2)
    return (wide(met) * wide(other)).flatten(1).sum(1)


def along_many(use: Outer, directions: Sequence[Tensor]) -> list[Tensor]:
    """`<grad_i, V>` for several directions of the parameter's shape, [b] each: by the gradients, slice by slice.

    Cost: that of one direction, and `2 b` FLOPs for each of their entries; `ENTRIES` numbers at a time.
    """
    q, m, n = use.form.blocks
    rows, b = max(1, ENTRIES // max(1, q * n * (samples(use) + len(directions)))), samples(use)

    def terms() -> Iterator[Tensor]:
        yield _zeros(use, (b, len(directions)))
        for at in range(0, m, rows):
            own = blocks(use, use.form, at, min(at + rows, m)).reshape(b, -1)
            others = [wide(use.form.fold(direction)[:, at : at + rows]).flatten() for direction in directions]
            yield product(own, torch.stack(others).to(own.dtype).T)

    return list(total(terms()).unbind(1))


def _along_low_rank(use: Factor, direction: LowRank) -> Tensor:
    """`<grad_i, V>` for a direction `V = L R^T` of rank r, [b]: `sum_t <L^T rows_t, R^T cols_t>`.

    Cost: r (m + n) per position and block.
    """
    if not fits(use, direction):
        return along(use, direction.dense())
    if isinstance(use, Lookup):
        left = direction.rows[0][use.index]
        right = product(use.cols, direction.cols[0].to(use.cols.dtype))
    else:
        assert isinstance(use, Outer)
        left, right = (
            product(value.squeeze(2), factor[0].to(value.dtype))
            if len(factor) == 1
            else product(value.transpose(1, 2), factor.to(value.dtype)).transpose(1, 2)
            for value, factor in ((use.rows, direction.rows), (use.cols, direction.cols))
        )
    return (wide(left) * wide(right)).flatten(1).sum(1)


def fits(use: Factor, direction: LowRank) -> bool:
    """Whether the blocks of the direction are those of the factor."""
    if isinstance(use, Dense):
        return False
    blocks = (len(direction.rows), direction.rows.shape[1], direction.cols.shape[1])
    return use.form.plain and use.form.blocks == blocks


def weighted_sum(use: Factor, weights: Tensor) -> Tensor:
    """`sum_i weights[i] grad_i`, of the parameter's shape: one product, no gradient per sample."""
    first = use.tensors[-1]
    scaled = wide(first) * weights.to(wide(first).dtype).view(-1, *[1] * (first.dim() - 1))
    if isinstance(use, Dense):
        return scaled.sum(0)
    if isinstance(use, Lookup):
        index = use.index.flatten()
        return added_rows(index, scaled.flatten(0, 1), use.form.blocks[1], len(index)).reshape(use.shape)
    rows, cols = wide(use.rows).flatten(0, 1), scaled.flatten(0, 1)
    return use.form.unfold(product(rows.permute(1, 2, 0), cols.transpose(0, 1)))


def whole(uses: Sequence[Factor], budget: int) -> Tensor | None:
    """The gradients of one parameter from all of its uses, [b, *shape]; None where they take more than the budget."""
    size = prod((samples(uses[0]), *uses[0].shape)) * max(bytes_of_entry(sketch(use)) for use in uses)
    return None if size * (3 if len(uses) > 1 else 1) > budget else total(map(dense, uses))


def summed(uses: Sequence[Factor]) -> Tensor:
    """The sum over the samples of the gradients of one parameter, in float32 at least."""
    sums = [wide(use.value).sum(0) for use in uses if isinstance(use, Dense)]
    others = [use for use in uses if not isinstance(use, Dense)]
    return total([*sums, *(weighted_sum(use, use.cols.new_ones(samples(use))) for use in others)])


def in_dtype(dtype: torch.dtype | None) -> Callable[[Tensor], Tensor]:
    """Rounds to the dtype that the caller chose to contract in, if any; numbers of rows stay."""
    return lambda value: value if dtype is None or not value.is_floating_point() else value.to(dtype)


def _zeros(use: Factor, shape: tuple[int, ...]) -> Tensor:
    return wide(use.tensors[-1]).new_zeros(shape)


def _products(one: Factor, other: Factor) -> Tensor:
    """`<position t of one, position s of other>`, [..., t, s], added up over blocks, of tensors [..., t, q, m]."""
    if isinstance(one, Lookup) and isinstance(other, Lookup):
        same = one.index.unsqueeze(-1) == other.index.unsqueeze(-2)
        return product(wide(one.cols), wide(other.cols).mT) * same
    if isinstance(one, Lookup):
        return _products(other, one).mT
    assert isinstance(one, Outer)
    if isinstance(other, Lookup):
        rows, cols = wide(one.rows).squeeze(-2), wide(one.cols).squeeze(-2)
        index = other.index.unsqueeze(-2).expand(*rows.shape[:-1], -1)
        return torch.gather(rows, -1, index) * product(cols, wide(other.cols).mT)
    assert isinstance(other, Outer)
    pairs = zip(map(wide, one.tensors), map(wide, other.tensors), strict=True)
    if one.form.blocks[0] == 1:
        of_rows, of_cols = (product(x.squeeze(-2), y.squeeze(-2).mT) for x, y in pairs)
        return of_rows * of_cols
    of_rows, of_cols = (product(x.transpose(-3, -2), y.transpose(-3, -2).mT) for x, y in pairs)
    return (of_rows * of_cols).sum(-3)


def _ghost_diagonal(one: Factor, other: Factor, budget: int) -> Tensor:
    """The sums of the products of positions of the same sample, [b], in tiles of samples and of positions."""
    found = [
        total([_products(part, second).sum((-2, -1)) for part in parts])
        for parts, second in _tiles(one, other, budget, 1, lambda start, stop: _narrow(other, start, stop))
    ]
    return torch.cat(found) if len(found) > 1 else found[0]


def _ghost_matrix(one: Factor, other: Factor, budget: int) -> Tensor:
    """The sums of the products of positions of any two samples, [a, b], in tiles of samples and of positions."""
    whole, b, s = _as_one(other), samples(other), _length(other)
    found = []
    for parts, second in _tiles(one, other, budget, b, lambda *_: whole):
        terms = []
        for part in parts:
            products, size = _products(_as_one(part), second), samples(part)
            single = _length(part) == s == 1
            terms.append(products if single else products.view(size, _length(part), b, s).sum(3).sum(1))
        found.append(total(terms))
    return torch.cat(found) if len(found) > 1 else found[0]


def _length(use: Factor) -> int:
    assert not isinstance(use, Dense)
    return use.positions


def _tiles(
    one: Factor, other: Factor, budget: int, b: int, beside: Callable[[int, int], Factor]
) -> Iterator[tuple[list[Factor], Factor]]:
    """Parts of a few samples of `one`, by position, and what they meet, so that a tile takes no more than the budget.

    A tile is of the products of the positions of a part with those of b samples of the other.
    """
    a, length = samples(one), _length(one)
    row = 3 * one.form.blocks[0] * _length(other) * b * max(4, one.tensors[-1].element_size())
    whole = row * length
    if whole * a <= budget:
        yield [one], beside(0, a)
        return
    size = max(1, budget // whole)
    parts = length if whole <= budget else max(1, budget // row)
    for start in range(0, a, size):
        some = _narrow(one, start, start + size)
        yield [_narrow(some, at, at + parts, 1) for at in range(0, length, parts)], beside(start, start + size)


def _narrow(use: Factor, start: int, stop: int, axis: Literal[0, 1] = 0) -> Factor:
    """The samples in a range, or the positions."""
    return use.map(lambda value: value[:, start:stop] if axis else value[start:stop])


def _as_one(use: Factor) -> Factor:
    """The positions of all samples in one row, [t, ...]."""
    return use.map(lambda value: value.flatten(0, 1))


def _slices(uses: Sequence[Factor], count: int, budget: int) -> tuple[Form | None, int, int]:
    """The form to slice, the number of rows, and the rows of a slice for which `count` gradients fit the budget."""
    sketches = [sketch(use) for use in uses]
    form = common_form(sketches)
    if form is None:
        return None, 1, 1
    q, m, n = form.blocks
    row = q * n * max(map(bytes_of_entry, sketches)) * count * (2 if len(uses) > 1 else 1)
    return form, m, max(1, budget // max(row, 1))


def _gradients(uses: Sequence[Factor], form: Form | None, start: int, stop: int) -> Tensor:
    """The gradients of all uses together, in the rows from `start` to `stop`, [b, entries]."""
    whole: Tensor | None = None
    ours = False
    for use in uses:
        found = dense(use) if form is None else blocks(use, form, start, stop)
        # The memory of a product is ours to write to, that of a dense factor is not.
        whole = found if whole is None else whole.add_(found) if ours else whole + found
        ours = ours or whole is not found or not isinstance(use, Dense)
    assert whole is not None
    return whole.reshape(len(whole), prod(whole.shape[1:]))


def _materialised_norms(uses: Sequence[Factor], budget: int) -> Tensor:
    if len(uses) == 1 and isinstance(uses[0], Dense):
        value = wide(uses[0].value)
        return squares(value.flatten(1) if value.dim() > 1 else value.unsqueeze(1))
    b = samples(uses[0])
    form, rows, width = _slices(uses, 1, budget)
    together = max(1, min(b, width // max(rows, 1))) if width >= rows else 1
    if form is None:
        together = 1
    found = []
    for first in range(0, b, together) or [0]:
        some = [_narrow(use, first, first + together) for use in uses]
        slices = range(0, rows, width) or [0]
        found.append(total(squares(_gradients(some, form, at, min(at + width, rows))) for at in slices))
    return torch.cat(found) if len(found) > 1 else found[0]


def _materialised_products(a: Sequence[Factor], b: Sequence[Factor], budget: int) -> Tensor:
    if len(a) == len(b) == 1 and isinstance(a[0], Dense) and isinstance(b[0], Dense):
        one, other = (wide(use.value).reshape(len(use.value), prod(use.shape)) for use in (a[0], b[0]))
        return product(one, other.T)
    count = samples(a[0]) + (0 if a is b else samples(b[0]))
    form, rows, width = _slices([*a, *b], count, budget)

    def terms() -> Iterator[Tensor]:
        yield _zeros(a[0], (samples(a[0]), samples(b[0])))
        for at in range(0, rows, width):
            one = _gradients(a, form, at, min(at + width, rows))
            other = one if a is b else _gradients(b, form, at, min(at + width, rows))
            yield product(one, other.T)

    return total(terms())
