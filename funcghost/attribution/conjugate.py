"""Conjugate gradients for many right sides of one positive definite matrix, each served by the directions of all.

With residuals `R = V - X A` [k, size], a step takes the directions `P` of `R M`, conjugate to the last, orthonormal:

    S = P A P^T        X += R P^T S^-1 P        R -= R P^T S^-1 P A

Every right side is at the least error of the space that all have opened together. Directions that the others span
already, and those of right sides that are done, cost no product. For one right side it is the plain method.

Source: O'Leary, "The block conjugate gradient algorithm and related methods" (1980); Dubrulle, "Retooling the method of
block conjugate gradients" (2001), for orthonormal directions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from funcghost.algebra.sums import total
from funcghost.attribution.batches import stacked
from funcghost.attribution.inverses import blank
from funcghost.attribution.products import Leaves, Product
from funcghost.errors import InputError
from funcghost.trees import Params, Tree

PART = 2**18
"""Numbers of a direction that are in float64 at a time."""


class Solution(NamedTuple):
    """What was found: the direction, the norms of the residuals relative to those of the right sides, and the steps."""

    direction: Tree
    residuals: Tensor
    steps: int


class _Block(NamedTuple):
    """Directions [m, size], their products with the matrix, and the small matrix `S` [m, m] between the two."""

    directions: Tensor
    products: Tensor
    between: Tensor


@dataclass(frozen=True, eq=False)
class ConjugateGradients:
    """See `matrix_free.conjugate_gradients`."""

    product: Product
    damping: float
    preconditioner: Callable[[Tree], Tree] | None
    tolerance: float
    most: int

    def __call__(self, direction: Tree) -> Tree:
        """`(F + damping)^-1 v`, of one direction or of each of a stack.

        Raises:
            InputError: the residual asked for was not reached; or the matrix is not positive definite.
        """
        found = self.solve(direction)
        worst = float(found.residuals.max())
        if not worst <= self.tolerance:
            raise InputError(
                f"conjugate_gradients: after {found.steps} steps the residual is {worst:.2g}, and {self.tolerance:.2g} "
                "was asked for. Pass a larger most=, damping= or tolerance=, a preconditioner=, or params in float64; "
                "solve(...) gives what was found."
            )
        return found.direction

    def solve(self, direction: Tree) -> Solution:
        """As a call, whatever the residual is, which is told."""
        params = blank(self.product.params)
        leaves, many = stacked(direction, params)
        right = _flat(leaves)
        size = _norms(right)
        scale = torch.where(size > 0, size, 1)
        x, r = torch.zeros_like(right), right * _column(1 / scale, right)
        residuals, steps, last = size / scale, 0, None
        while steps < self.most and bool((open_ := residuals > self.tolerance).any()):
            directions = self._directions(params, r[open_], last)
            if not len(directions):
                break  # there are no digits left to go on with
            last = self._block(params, directions)
            shares = torch.linalg.solve(last.between, _gram(last.directions, r)).T.to(r.dtype)
            x.addmm_(shares, last.directions)
            r.addmm_(shares, last.products, alpha=-1)
            residuals, steps = _norms(r), steps + 1
        found = _leaves(params, x.mul_(_column(scale, x)))
        return Solution(
            params.rebuild(found if many is not None else [leaf.squeeze(0) for leaf in found]), residuals, steps
        )

    def _directions(self, params: Params, residuals: Tensor, last: _Block | None) -> Tensor:
        """The next directions, from the residuals that are to fall."""
        z = residuals
        if self.preconditioner is not None:
            z = _flat(stacked(self.preconditioner(params.rebuild(_leaves(params, z))), params)[0])
        if last is not None:
            shares = torch.linalg.solve(last.between, _gram(last.products, z)).T
            z = z - _mixed(shares, last.directions)
        return _orthonormal(z, max(torch.finfo(leaf.dtype).eps for leaf in params.leaves))

    def _block(self, params: Params, directions: Tensor) -> _Block:
        bent = _flat(self.product.of_leaves(_leaves(params, directions))).add_(directions, alpha=self.damping)
        between = _gram(directions, bent)
        between = (between + between.T) / 2
        # Its least eigenvalue is not below that of the matrix, since the directions are orthonormal.
        if not bool(between.isfinite().all()) or not bool((torch.linalg.eigvalsh(between) > 0).all()):
            raise InputError(
                f"conjugate_gradients: the matrix plus damping={self.damping} is not positive definite. Raise the "
                "damping, or use gauss_newton in place of hessian."
            )
        return _Block(directions, bent, between)


def _orthonormal(rows: Tensor, eps: float) -> Tensor:
    """An orthonormal basis of what k directions span, without those that are others' but for rounding by `eps`.

    Each is brought to norm 1 first, so that residuals far below the others' are not taken for rounding.
    """
    between = _gram(rows, rows)
    norms = between.diagonal().sqrt()
    unit = torch.diag(1 / torch.where(norms > 0, norms, 1))
    values, basis = torch.linalg.eigh(unit @ between @ unit)
    kept = values > values.max() * 16 * eps
    return _mixed((unit @ basis[:, kept] / values[kept].sqrt()).T, rows)


def _flat(leaves: Leaves) -> Tensor:
    """Directions [k, *shape] side by side, [k, size]."""
    return torch.cat([leaf.reshape(len(leaf), -1) for leaf in leaves], 1)


def _leaves(params: Params, rows: Tensor) -> list[Tensor]:
    """The directions [k, *shape] of rows [k, size]."""
    parts = rows.split([leaf.numel() for leaf in params.leaves], 1)
    return [
        part.reshape(len(rows), *leaf.shape).to(leaf.dtype) for part, leaf in zip(parts, params.leaves, strict=True)
    ]


def _gram(a: Tensor, b: Tensor) -> Tensor:
    """`<a_i, b_j>` in float64, [i, j]."""
    return total(x.double() @ y.double().T for x, y in zip(a.split(PART, 1), b.split(PART, 1), strict=True))


def _norms(rows: Tensor) -> Tensor:
    """In float64, [k]."""
    found: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return found


def _column(scale: Tensor, rows: Tensor) -> Tensor:
    """A factor for each of the rows."""
    return scale.to(rows.dtype).unsqueeze(1)


def _mixed(shares: Tensor, rows: Tensor) -> Tensor:
    """`sum_j shares[i, j] rows[j]`, [i, size]."""
    return shares.to(rows.dtype) @ rows
