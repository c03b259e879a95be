"""The leading singular vectors of a batch of matrices, by random sketches that depend on a seed alone."""

from typing import NamedTuple

import torch
from torch import Tensor

OVERSAMPLING = 10
POWER_ITERATIONS = 2
SMALL = 128


class Factors(NamedTuple):
    """`matrix[k] ~ left[k] @ diag(values[k]) @ right[k].mT`, with orthonormal columns and falling values.

    Shapes: left [q, m, l], values [q, l], right [q, n, l]. The first `known` columns are as accurate as the sketch
    makes them, the others serve them. `complete`: the decomposition is the full one.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    known: int
    complete: bool

    def rest(self, matrix: Tensor) -> float:
        """The Frobenius norm of what they leave out of the matrix."""
        if self.complete:
            return 0.0
        left_out = matrix - (self.left * self.values.unsqueeze(-2)) @ self.right.mT
        return float(torch.linalg.vector_norm(left_out, dtype=torch.float64))


def leading_factors(matrix: Tensor, rank: int, seed: int) -> Factors:
    """The leading `rank` singular triples, at least, of `matrix` [q, m, n], entries of size 1 or so.

    By randomized subspace iteration, with two iterations, orthonormalised after each product, and the direct SVD of the
    projection; by a full SVD where the smaller side is short or the sketch would span half of it. The random numbers
    are drawn on the CPU from a generator of their own: the same for every device, and none of torch's are used up.

    Cost: 6 q m n l with l = rank + 10.

    Source: Halko, Martinsson, Tropp, "Finding structure with randomness" (SIAM Review 53, 2011), algorithms 4.4
    and 5.1.
    """
    short, width = min(matrix.shape[1:]), rank + OVERSAMPLING
    if matrix.shape[1] > matrix.shape[2]:
        left, values, right, known, complete = leading_factors(matrix.mT, rank, seed)
        return Factors(right, values, left, known, complete)
    if short <= SMALL or 2 * width >= short:
        left, values, right = _svd_of_wide(matrix)
        return Factors(left, values, right, short, True)
    source = torch.Generator("cpu").manual_seed(seed)
    start = torch.randn((short, width), generator=source, dtype=matrix.dtype, device="cpu").to(matrix.device)
    basis = orthonormal(matrix.mT @ start)
    for _ in range(POWER_ITERATIONS):
        basis = orthonormal(matrix.mT @ orthonormal(matrix @ basis))
    right, values, left = _svd_of_wide((matrix @ basis).mT)
    return Factors(left, values, basis @ right, rank, False)


def orthonormal(tall: Tensor) -> Tensor:
    """Orthonormal columns that span those of a tall matrix, and more where these are dependent."""
    basis: Tensor = torch.linalg.qr(tall).Q
    return basis


def _svd_of_wide(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Left vectors, values and right vectors of [q, l, n], l <= n, to the accuracy of the dtype.

    Below float64 by the Gram matrix in float64, several times as fast as LAPACK's SVD: what the square loses there lies
    below the rounding of the entries. Values below that are taken as zeros, with zeros as right vectors.
    """
    if matrix.dtype is torch.float64:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left, values, right.mT
    wide = matrix.double()
    squares, left = torch.linalg.eigh(wide @ wide.mT)
    values, left = squares.clamp(min=0).sqrt().flip(-1), left.flip(-1)
    floor = torch.finfo(matrix.dtype).eps * values[..., :1]
    inverses = torch.where(values > floor, values, torch.inf).reciprocal()
    right = (wide.mT @ left) * inverses[..., None, :]
    return left.to(matrix.dtype), torch.where(values > floor, values, 0.0).to(matrix.dtype), right.to(matrix.dtype)
