"""A curvature of all parameters, block by block, and its damped inverse as a function of directions."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from funcghost.algebra.factors import Form
from funcghost.algebra.metric import Weighting
from funcghost.attribution.batches import stacked
from funcghost.attribution.spectra import Sided, Spectrum, Whole, moved
from funcghost.errors import InputError
from funcghost.trees import Params, Tree, split_params


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

    def save(self, file: Path | str) -> None:
        """Writes it to a file of tensors, from which `load` reads it."""
        entries = []
        for spectrum in self.spectra:
            if isinstance(spectrum, Whole):
                facts: dict[str, Any] = {"names": list(spectrum.names), "shapes": [list(s) for s in spectrum.shapes]}
                tensors = {"basis": spectrum.basis, "values": spectrum.values}
            else:
                form = spectrum.form
                facts = {"name": spectrum.name, "shape": form.shape, "base": form.base, "roles": form.roles}
                sides = {"left": spectrum.left, "right": spectrum.right, "values": spectrum.values}
                tensors = {key: value for key, value in sides.items() if value is not None}
            entries.append({"facts": json.dumps(facts), **tensors})
        torch.save({"made_of": json.dumps(dict(self.made_of)), "spectra": entries}, file)

    @staticmethod
    def load(file: Path | str, params: Tree) -> "Curvature":
        """Reads it for parameters like those it was made for; nothing but tensors and text is read.

        Raises:
            InputError: the parameters differ in names or shapes.
        """
        split = split_params(params)
        content = torch.load(file, map_location=split.leaves[0].device, weights_only=True)
        spectra = tuple(map(_read, content["spectra"]))
        shapes = dict(zip(split.names, (tuple(leaf.shape) for leaf in split.leaves), strict=True))
        found = {
            name: shape
            for s in spectra
            for name, shape in zip(s.names, s.shapes if isinstance(s, Whole) else (s.form.shape,), strict=True)
        }
        if found != shapes:
            other = sorted(set(found.items()) ^ set(shapes.items()))[:4]
            raise InputError(f"Curvature.load: {file} is of other parameters; on one side only: {other}.")
        return Curvature(spectra, blank(split), json.loads(content["made_of"]))


def _read(entry: Mapping[str, Any]) -> Spectrum:
    facts = json.loads(entry["facts"])
    if "names" in facts:
        return Whole(tuple(facts["names"]), tuple(map(tuple, facts["shapes"])), entry["basis"], entry["values"])
    q, m, n = (tuple(axes) for axes in facts["roles"])
    form = Form(tuple(facts["shape"]), tuple(facts["base"]), (q, m, n))
    return Sided(facts["name"], form, entry.get("left"), entry.get("right"), entry["values"])


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
