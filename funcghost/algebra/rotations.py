"""Factored gradients of one parameter in one form: rows and columns times matrices, squared entry by entry.

For a parameter as blocks `q` of `m x n`, and matrices `L` [q, m, m'] and `R` [q, n, n'], the gradients become
`L^T grad_i R`, still factored: rows times L, columns times R. That is what a curvature in its eigenbasis is asked for,
and a norm under a metric.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from funcghost.algebra.factors import Dense, Factor, Form, Lookup, Outer, blocks, dense, matrix_form, samples
from funcghost.algebra.sums import total
from funcghost.dtypes import wide


def form_of(uses: Sequence[Factor]) -> Form:
    """The form in which to see a parameter: that of the first product it goes into, else that of its shape."""
    return next((use.form for use in uses if isinstance(use, Outer)), uses[0].form)


def block_form(q: int, m: int, n: int) -> Form:
    """Blocks as they are: [m, n] for one, [q, m, n] for more."""
    return matrix_form((m, n)) if q == 1 else Form((q, m, n), (q, m, n), ((0,), (1,), (2,)))


def sizes(use: Factor) -> tuple[int, int, int]:
    """The sizes q, m, n of a use in `block_form`, where a `Dense` has no form of its own."""
    q, m, n = use.shape if len(use.shape) == 3 else (1, *use.shape)
    return q, m, n


def _is_table(form: Form) -> bool:
    return form.plain and form.blocks[0] == 1 and form.shape[:1] == (form.blocks[1],)


def in_form(use: Factor, form: Form) -> Factor:
    """The use as blocks of `block_form(*form.blocks)`: factored where it is of that form, or of its transpose."""
    own = block_form(*form.blocks)
    if isinstance(use, Outer):
        q, m, n = use.form.roles
        if use.form == form:
            return Outer(use.rows, use.cols, own)
        if use.form.base == form.base and (q, n, m) == form.roles:
            return Outer(use.cols, use.rows, own)
    if isinstance(use, Lookup) and _is_table(form):
        return Lookup(use.index, use.cols, own.shape)
    value = form.fold(dense(use))
    return Dense(value.reshape(len(value), *own.shape))


def rotated(use: Factor, left: Tensor | None, right: Tensor | None) -> Factor:
    """`L^T grad_i R` of a use in `block_form`; None stands for the identity."""
    q = sizes(use)[0]
    if isinstance(use, Dense):
        value = wide(use.value).reshape(samples(use), *sizes(use))
        value = value if left is None else left.mT @ value
        value = value if right is None else value @ right
        return Dense(value.squeeze(1) if q == 1 else value)
    if isinstance(use, Lookup):
        cols = wide(use.cols) if right is None else wide(use.cols) @ right[0]
        if left is None:
            return Lookup(use.index, cols, (use.shape[0], cols.shape[-1]))
        rows = left[0][use.index]
        return Outer(rows.unsqueeze(2), cols.unsqueeze(2), block_form(1, rows.shape[-1], cols.shape[-1]))
    rows, cols = _times(wide(use.rows), left), _times(wide(use.cols), right)
    return Outer(rows, cols, block_form(q, rows.shape[-1], cols.shape[-1]))


def _times(value: Tensor, matrices: Tensor | None) -> Tensor:
    """[b, t, q, m] times [q, m, m']."""
    if matrices is None:
        return value
    return value @ matrices[0] if len(matrices) == 1 else torch.einsum("btqm,qmx->btqx", value, matrices)


def _width(uses: Sequence[Factor], count: int, budget: int) -> int:
    """The rows of a slice of `count` gradients that takes no more than the budget, the uses one by one included."""
    q, _, n = sizes(uses[0])
    size = q * n * count * (2 if len(uses) > 1 else 1) * wide(uses[0].tensors[-1]).element_size()
    return max(1, budget // max(1, size))


def _slices(uses: Sequence[Factor], width: int) -> Iterator[tuple[slice, Tensor]]:
    """The gradients of all uses together, [b, q, m', n], by slices of rows."""
    rows = sizes(uses[0])[1]
    for at in range(0, rows, width):
        end = min(at + width, rows)
        yield slice(at, end), total([_blocks(use, at, end) for use in uses])


def _blocks(use: Factor, start: int, stop: int) -> Tensor:
    if isinstance(use, Dense):
        return wide(use.value).reshape(samples(use), *sizes(use))[:, :, start:stop]
    return blocks(use, use.form, start, stop)


def _merged(use: Lookup) -> tuple[Tensor, Tensor]:
    """The rows that the samples have looked up, each once for a sample: numbers of rows [u], gradients [u, n]."""
    b, t, n = use.cols.shape
    of_sample = torch.arange(b, device=use.index.device).unsqueeze(1) * use.shape[0] + use.index
    key, place = of_sample.flatten().unique(return_inverse=True)
    cols = wide(use.cols).reshape(b * t, n)
    return key % use.shape[0], cols.new_zeros((len(key), n)).index_add_(0, place, cols)


def squares(uses: Sequence[Factor], budget: int) -> Tensor:
    """`sum_i grad_i^2`, entry by entry, [q, m, n], of all uses in `block_form` together with what is between them.

    Cost: of one position of a sample `2 b m n`, as a weight's gradient; of more `2 b t m n`; of looked-up rows `b t n`.
    """
    first, (q, m, n) = uses[0], sizes(uses[0])
    if len(uses) == 1 and isinstance(first, Outer) and first.positions == 1:
        rows, cols = (wide(value).squeeze(1).square() for value in first.tensors)
        return torch.einsum("bqm,bqn->qmn", rows, cols)
    if len(uses) == 1 and isinstance(first, Lookup):
        rows, merged = _merged(first)
        return merged.new_zeros((m, n)).index_add_(0, rows, merged.square()).unsqueeze(0)
    found = wide(first.tensors[-1]).new_zeros((q, m, n))
    for place, gradients in _slices(uses, _width(uses, samples(first), budget)):
        found[:, place] = torch.linalg.vecdot(gradients, gradients, dim=0)
    return found


def weighted_norms(uses: Sequence[Factor], weights: Tensor, budget: int) -> Tensor:
    """`sum_qmn weights[q, m, n] grad_i[q, m, n]^2`, [b], of uses in `block_form`."""
    first = uses[0]
    if len(uses) == 1 and isinstance(first, Outer) and first.positions == 1:
        rows, cols = (wide(value).squeeze(1).square() for value in first.tensors)
        return torch.einsum("bqm,qmn,bqn->b", rows, weights.to(rows.dtype), cols)
    found = wide(first.tensors[-1]).new_zeros(samples(first))
    for place, gradients in _slices(uses, _width(uses, samples(first), budget)):
        found = found + (gradients.square() * weights[:, place].to(gradients.dtype)).flatten(1).sum(1)
    return found


def weighted_products(a: Sequence[Factor], b: Sequence[Factor], weights: Tensor, budget: int) -> Tensor:
    """`sum_qmn weights[q, m, n] grad_i[q, m, n] grad_j[q, m, n]` of the samples of a and those of b, [a, b]."""
    same, count = a is b, samples(a[0]) + samples(b[0])
    found = wide(a[0].tensors[-1]).new_zeros((samples(a[0]), samples(b[0])))
    width = min(_width(a, count, budget), _width(b, count, budget))
    for (place, one), (_, other) in zip(_slices(a, width), _slices(b, width), strict=True):
        found = found + (one * weights[:, place].to(one.dtype)).flatten(1) @ other.flatten(1).T
    return (found + found.T) / 2 if same else found
