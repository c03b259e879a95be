"""Long sums in float32 that keep their digits: in pieces, whatever kernel a product takes.

Rounding of a sum of k terms that are added up one after the other grows with the root of k: of ten million terms there
are three digits left, and kernels for products of a few rows do just that. The sums of pieces are added up by
`torch.sum`, in pairs of pairs.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

FEW = 16
"""With so many rows and columns a kernel itself adds up in pieces of some hundred terms."""
SHORT, LONG = 2**8, 2**13
"""How many terms are left to a kernel for a few rows or columns, and for many."""
AT_ONCE = 2**18
"""Sums of pieces that are kept at once."""


def piece(m: int, n: int) -> int:
    """How many terms of a product [m, k] by [k, n] are left to the kernel."""
    return LONG if m >= FEW and n >= FEW else SHORT


def product(one: Tensor, other: Tensor) -> Tensor:
    """`one @ other` of matrices [.., m, k] and [.., k, n]; in float32 sums hold to 1e-6 of the size of their terms.

    Cost: that of the product; where k is large, memory for `AT_ONCE` numbers or for one more result.
    """
    (m, k), n = one.shape[-2:], other.shape[-1]
    if one.dim() > 2 and other.shape[:-2].numel() == 1:  # one matrix for all: torch would copy it for each
        lead = torch.broadcast_shapes(one.shape[:-2], other.shape[:-2])
        return product(one.reshape(one.shape[:-1].numel(), k), other[(0,) * (other.dim() - 2)]).view(*lead, m, n)
    step = piece(m, n)
    if one.dtype is not torch.float32 or k <= step:
        return torch.matmul(one, other)
    many = max(one.shape[:-2].numel(), other.shape[:-2].numel())
    group = step * max(1, AT_ONCE // max(1, m * n * many))
    if k <= group:
        return _of_pieces(one, other, step)
    first, *others = (slice(start, min(start + group, k)) for start in range(0, k, group))
    found = _of_pieces(one[..., first], other[..., first, :], step)
    for part in others:
        found += _of_pieces(one[..., part], other[..., part, :], step)
    return found


def applied(matrix: Tensor, vector: Tensor) -> Tensor:
    """`matrix @ vector`, [m], which holds to as many digits as `product`."""
    if matrix.dtype is not torch.float32 or len(vector) <= SHORT:
        return torch.mv(matrix, vector)
    return product(matrix, vector.unsqueeze(1)).squeeze(1)


def _of_pieces(one: Tensor, other: Tensor, step: int) -> Tensor:
    """The product from pieces of equal lengths, about as long as a step, and of what they leave over."""
    k = one.shape[-1]
    count = -(-k // step)
    if count == 1:
        return torch.matmul(one, other)
    size = k // count
    whole = count * size
    if whole < k:
        rest = torch.matmul(one[..., whole:], other[..., whole:, :])
        one, other = one[..., :whole], other[..., :whole, :]
    pieces = one.unflatten(-1, (count, size)).movedim(-2, -3)
    found = torch.matmul(pieces, other.unflatten(-2, (count, size))).sum(-3)
    return found + rest if whole < k else found


def squares(rows: Tensor) -> Tensor:
    """The sum of squares of each row [b, n], [b], without a root on the way."""
    if rows.shape[1] <= LONG:
        found: Tensor = torch.linalg.vecdot(rows, rows)
        return found
    return total(torch.linalg.vecdot(part, part) for part in rows.split(LONG, 1))


def in_double(terms: int) -> bool:
    """Whether rows that are added to rows of a table, one after the other, are so many that float64 takes them."""
    return terms > SHORT


def added_rows(index: Tensor, values: Tensor, rows: int, terms: int) -> Tensor:
    """`out[index[i]] += values[i]`, [rows, n], of which no row has more than so many terms."""
    dtype = torch.float64 if in_double(terms) else values.dtype
    table = values.new_zeros((rows, values.shape[1]), dtype=dtype).index_add_(0, index, values.to(dtype))
    return table.to(values.dtype)


def total(terms: Iterable[Tensor]) -> Tensor:
    """The sum of one tensor or more, in pairs of pairs."""
    sums: list[tuple[int, Tensor]] = []
    for value in terms:
        count = 1
        while sums and sums[-1][0] == count:
            value = sums.pop()[1] + value
            count *= 2
        sums.append((count, value))
    _, found = sums.pop()
    while sums:
        found = sums.pop()[1] + found
    return found
