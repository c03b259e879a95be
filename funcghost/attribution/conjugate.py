"""Conjugate gradients for many right sides of one positive definite matrix, each served by the directions of all.

With residuals `R = V - X A` [k, size], a step takes the directions `P` of `R M`, conjugate to the last, orthonormal:

    S = P A P^T        X += R P^T S^-1 P        R -= R P^T S^-1 P A

Every right side is at the least error of the space that all have opened together. Directions that the others span
already, and those of right sides that are done, cost no product. For one right side it is the plain method.

Source: O'Leary, "The block conjugate gradient algorithm and related methods" (1980); Dubrulle, "Retooling the method of
block conjugate gradients" (2001), for orthonormal directions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from funcghost.attribution.batches import stacked
from funcghost.attribution.inverses import blank
from funcghost.attribution.products import Leaves, Product
from funcghost.errors import InputError
from funcghost.trees import Params, Tree


class Solution(NamedTuple):
    """What was found: the direction, the norms of the residuals relative to those of the right sides, and the steps."""

    direction: Tree
    residuals: Tensor
    steps: int


class _Block(NamedTuple):
    """Directions [m, *shape], their products with the matrix, and the small matrix `S` [m, m] between the two."""

    directions: list[Tensor]
    products: list[Tensor]
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
        right, many = stacked(direction, params)
        size = _gram(right, right).diagonal().sqrt()
        scale = torch.where(size > 0, size, 1)
        x, r = [torch.zeros_like(leaf) for leaf in right], _mixed(torch.diag(1 / scale), right)
        residuals, steps, last = size / scale, 0, None
        while steps < self.most and bool((open_ := residuals > self.tolerance).any()):
            directions = self._directions(params, [leaf[open_] for leaf in r], last)
            if not len(directions[0]):
                break  # there are no digits left to go on with
            last = self._block(directions)
            shares = torch.linalg.solve(last.between, _gram(last.directions, r)).T
            x = [a + b for a, b in zip(x, _mixed(shares, last.directions), strict=True)]
            r = [a - b for a, b in zip(r, _mixed(shares, last.products), strict=True)]
            residuals, steps = _norms(r), steps + 1
        x = _mixed(torch.diag(scale), x)
        found = x if many is not None else [leaf.squeeze(0) for leaf in x]
        return Solution(params.rebuild(found), residuals, steps)

    def _directions(self, params: Params, residuals: list[Tensor], last: _Block | None) -> list[Tensor]:
        """The next directions, from the residuals that are to fall."""
        z = residuals
        if self.preconditioner is not None:
            z = stacked(self.preconditioner(params.rebuild(residuals)), params)[0]
        if last is not None:
            shares = torch.linalg.solve(last.between, _gram(last.products, z)).T
            z = [a - b for a, b in zip(z, _mixed(shares, last.directions), strict=True)]
        return _orthonormal(z)

    def _block(self, directions: list[Tensor]) -> _Block:
        bent = self.product.of_leaves(directions)
        bent = [a + self.damping * b for a, b in zip(bent, directions, strict=True)]
        between = _gram(directions, bent)
        between = (between + between.T) / 2
        # Its least eigenvalue is not below that of the matrix, since the directions are orthonormal.
        if not bool(between.isfinite().all()) or not bool((torch.linalg.eigvalsh(between) > 0).all()):
            raise InputError(
                f"conjugate_gradients: the matrix plus damping={self.damping} is not positive definite. Raise the "
                "damping, or use gauss_newton in place of hessian."
            )
        return _Block(directions, bent, between)


def _orthonormal(leaves: Leaves) -> list[Tensor]:
    """An orthonormal basis of what k directions span, without those that are others' but for rounding.

    Each is brought to norm 1 first, so that residuals far below the others' are not taken for rounding.
    """
    norms = _norms(leaves)
    unit = _mixed(torch.diag(1 / torch.where(norms > 0, norms, 1)), leaves)
    values, basis = torch.linalg.eigh(_gram(unit, unit))
    kept = values > values.max() * 16 * max(torch.finfo(leaf.dtype).eps for leaf in leaves)
    return _mixed((basis[:, kept] / values[kept].sqrt()).T, unit)


def _gram(a: Leaves, b: Leaves) -> Tensor:
    """`<a_i, b_j>` in float64, [i, j]."""
    flat = [[x.double().reshape(len(x), -1) for x in leaves] for leaves in (a, b)]
    terms = [x @ y.T for x, y in zip(*flat, strict=True)]
    return torch.stack(terms).sum(0)


def _norms(leaves: Leaves) -> Tensor:
    """In float64, [k]."""
    return torch.stack([leaf.double().square().reshape(len(leaf), -1).sum(1) for leaf in leaves]).sum(0).sqrt()


def _mixed(shares: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """`sum_j shares[i, j] leaves[j]`, [i, *shape]."""
    return [torch.tensordot(shares.to(leaf.dtype), leaf, 1) for leaf in leaves]
