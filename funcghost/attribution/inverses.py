"""A curvature of all parameters, block by block, and its damped inverse as a function of directions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from funcghost.algebra.metric import Weighting
from funcghost.attribution.batches import stacked
from funcghost.attribution.spectra import Spectrum, Whole, moved
from funcghost.errors import InputError
from funcghost.trees import Params, Tree


@dataclass(frozen=True, eq=False)
class Curvature:
    """A positive semidefinite matrix over all parameters, block diagonal, each block in its eigenbasis.

    `made_of` says what it was made of, and of how many samples. Scale: that of the mean over samples.

    Law: `curvature(v)` is the product of the matrix with v, linear and symmetric; `curvature.damped(..)` gives the
    inverse of the matrix plus the damping.
    """

    spectra: tuple[Spectrum, ...]
    params: Params
    made_of: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, direction: Tree) -> Tree:
        """`F v`, of one direction or of each of a stack, [k, *shape]."""
        return _scaled(self, direction, [spectrum.values for spectrum in self.spectra])

    def damped(self, damping: float | None = None, *, fraction: float | None = None, power: float = -1.0) -> "Damped":
        """`precondition(direction)`: the product with `(F + damping)^power`.

        With `fraction`, every block has a damping of its own: that fraction of the mean of its eigenvalues.

        Raises:
            InputError: neither or both are given, one is not above zero, or a block without curvature is damped by a
                fraction of nothing.
        """
        if (damping is None) == (fraction is None):
            raise InputError(
                "damped: pass either damping=, a number, or fraction= of the mean eigenvalue of each block."
            )
        given = damping if fraction is None else fraction
        if not isinstance(given, int | float) or not 0 < given < float("inf"):
            raise InputError(f"damped: the damping must be a number above zero, found {given!r}.")
        sizes = []
        for spectrum in self.spectra:
            size = given if fraction is None else fraction * float(spectrum.values.double().mean())
            if not size > 0:
                raise InputError(
                    f"damped: parameters {list(spectrum.names)} have no curvature of which to take a fraction: no loss "
                    "depends on them. Pass damping=, or leave them out of params."
                )
            sizes.append(size)
        return Damped(self, tuple(sizes), power)

    def to(self, target: torch.device | torch.dtype) -> "Curvature":
        """On another device, or in another dtype."""
        leaves = tuple(leaf.to(target) for leaf in self.params.leaves)
        spectra = tuple(moved(spectrum, target) for spectrum in self.spectra)
        return replace(self, spectra=spectra, params=self.params._replace(leaves=leaves))


@dataclass(frozen=True, eq=False)
class Damped:
    """`(F + damping)^power` as a function of directions, with a damping for each block."""

    curvature: Curvature
    dampings: tuple[float, ...]
    power: float = -1.0

    def scales(self) -> list[Tensor]:
        """Its eigenvalues, block by block."""
        pairs = zip(self.curvature.spectra, self.dampings, strict=True)
        return [(spectrum.values + damping) ** self.power for spectrum, damping in pairs]

    def metric(self) -> Tree:
        """The same matrix as a metric for `fg.squared_norm`, `fg.gram` and `fg.cosine`.

        Raises:
            InputError: a block is of several parameters together.
        """
        leaves: dict[str, Any] = {}
        for spectrum, scale in zip(self.curvature.spectra, self.scales(), strict=True):
            if isinstance(spectrum, Whole):
                raise InputError(
                    f"metric: {list(spectrum.names)} are in one block, and norms add up over parameters. Use ekfac."
                )
            leaves[spectrum.name] = Weighting(spectrum.form, spectrum.left, spectrum.right, scale)
        params = self.curvature.params
        return params.rebuild([leaves[name] for name in params.names])

    def __call__(self, direction: Tree) -> Tree:
        """The product with one direction, a tree like params, or with each of a stack: leaves [k, *shape], `fg.stack`.

        Law: linear, symmetric and positive definite: `<u, P v> = <P u, v>` and `<v, P v> > 0`.

        Raises:
            InputError: a direction is not like the parameters of the curvature.
        """
        return _scaled(self.curvature, direction, self.scales())


def _scaled(curvature: Curvature, direction: Tree, scales: Sequence[Tensor]) -> Tree:
    params = curvature.params
    leaves, many = stacked(direction, params)
    found = dict(zip(params.names, leaves, strict=True))
    for spectrum, scale in zip(curvature.spectra, scales, strict=True):
        own = spectrum.scaled([found[name] for name in spectrum.names], scale)
        found.update(zip(spectrum.names, own, strict=True))
    return params.rebuild([found[name] if many is not None else found[name].squeeze(0) for name in params.names])


def blank(params: Params) -> Params:
    """The parameters without values."""
    leaves = (torch.empty((), dtype=leaf.dtype, device=leaf.device).expand(leaf.shape) for leaf in params.leaves)
    return Params(params.names, tuple(leaves), params.spec)
