"""Curvature as a basis and its eigenvalues: of a parameter by rows and columns, or of several together.

    F = (L (x) R) diag(values) (L (x) R)^T          kept as `Sided`
    F = Q diag(values) Q^T                          kept as `Whole`

so that `(F + damping)^-1 v` is: into the basis, divided, and back.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from funcghost.algebra.factors import Form


@dataclass(frozen=True, eq=False)
class Sided:
    """The curvature of one parameter: orthogonal `left` [q, m, m] and `right` [q, n, n] (None: the identity).

    `values` [q, m, n] are the eigenvalues, not below zero.
    """

    name: str
    form: Form
    left: Tensor | None
    right: Tensor | None
    values: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        """The one parameter."""
        return (self.name,)

    def scaled(self, leaves: list[Tensor], scale: Tensor) -> list[Tensor]:
        """Directions [k, *shape] with their coefficients in the basis times a scale."""
        (leaf,) = leaves
        value = self.form.fold(leaf).to(scale.dtype)
        value = value if self.left is None else self.left.mT @ value
        value = value if self.right is None else value @ self.right
        value = value * scale
        value = value if self.left is None else self.left @ value
        value = value if self.right is None else value @ self.right.mT
        return [self.form.unfold(value).to(leaf.dtype)]

    def dense(self) -> Tensor:
        """The matrix, of the parameter as it lies in memory: for small ones, to look at."""
        size = self.values.numel()
        eye = torch.eye(size, dtype=self.values.dtype, device=self.values.device)
        (found,) = self.scaled([eye.view(size, *self.form.shape)], self.values)
        return found.reshape(size, size)


@dataclass(frozen=True, eq=False)
class Whole:
    """The curvature of some parameters together: orthogonal `basis` [s, s] and eigenvalues `values` [s]."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    basis: Tensor
    values: Tensor

    def scaled(self, leaves: list[Tensor], scale: Tensor) -> list[Tensor]:
        """Directions [k, *shape] with their coefficients in the basis times a scale."""
        sizes = [leaf[0].numel() for leaf in leaves]
        flat = torch.cat([leaf.reshape(len(leaf), size) for leaf, size in zip(leaves, sizes, strict=True)], 1)
        found = ((flat.to(scale.dtype) @ self.basis) * scale) @ self.basis.T
        parts = zip(found.split(sizes, 1), leaves, strict=True)
        return [part.reshape(leaf.shape).to(leaf.dtype) for part, leaf in parts]

    def dense(self) -> Tensor:
        """The matrix."""
        return (self.basis * self.values) @ self.basis.T


Spectrum = Sided | Whole


def moved(spectrum: Spectrum, target: torch.device | torch.dtype) -> Spectrum:
    """On another device, or in another dtype."""
    if isinstance(spectrum, Whole):
        return replace(spectrum, basis=spectrum.basis.to(target), values=spectrum.values.to(target))
    left, right = (None if side is None else side.to(target) for side in (spectrum.left, spectrum.right))
    return replace(spectrum, left=left, right=right, values=spectrum.values.to(target))


def eigenbasis(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, not below zero, and orthonormal eigenvectors of [.., s, s], found in float64."""
    values, basis = torch.linalg.eigh((moment + moment.mT).double() / 2)
    return values.clamp(min=0).to(moment.dtype), basis.to(moment.dtype)
