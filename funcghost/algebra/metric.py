"""Inner products of gradients under a metric: `<g, M g'>` for M by entries, by rows and columns, or in a basis.

For a parameter as blocks of `m x n`, `M = (L (x) R) diag(values) (L (x) R)^T`: the gradients are taken into the basis,
still factored, and each entry counts by its value. Adam's metric has no basis, a Kronecker product no values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funcghost.algebra.contractions import inner_products, squared_norms
from funcghost.algebra.cost import Means
from funcghost.algebra.factors import Factor, Form, matrix_form
from funcghost.algebra.rotations import form_of, in_form, rotated, weighted_norms, weighted_products
from funcghost.errors import InputError
from funcghost.trees import Tree, named_leaves


@dataclass(frozen=True, eq=False)
class Kronecker:
    """A leaf of a metric: `<G, G'> = tr(G^T rows G' cols)` for gradients as matrices, the first axis as rows.

    `rows` [m, m] and `cols` [n, n] are symmetric and positive semidefinite, for a parameter [m, ...] of n columns.
    """

    rows: Tensor
    cols: Tensor


@dataclass(frozen=True, eq=False)
class Weighting:
    """The metric of one parameter: `left` [q, m, m'], `right` [q, n, n'] (None: identity), `values` (None: ones).

    `form` says which axes are rows and columns. Without one, sides are of the matrix with the first axis as rows, and
    values without sides are [*shape].
    """

    form: Form | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    values: Tensor | None = None

    def norms(self, uses: Sequence[Factor], means: Means, name: str) -> Tensor:
        """`<grad_i, M grad_i>`, [b]."""
        seen, values = self._seen(uses, self._form(uses, name))
        return squared_norms(seen, means, name) if values is None else weighted_norms(seen, values, means.budget)

    def products(self, a: Sequence[Factor], b: Sequence[Factor], means: Means, name: str) -> Tensor:
        """`<grad_i, M grad_j>`, [a, b]."""
        form = self._form(a, name)
        one, values = self._seen(a, form)
        other = one if a is b else self._seen(b, form)[0]
        if values is None:
            return inner_products(one, other, means, name)
        return weighted_products(one, other, values, means.budget)

    def _form(self, uses: Sequence[Factor], name: str) -> Form:
        shape = uses[0].shape
        entries, sides = self.form is None and self.values is not None, (self.left, self.right)
        form = self.form or (form_of(uses) if entries else matrix_form(shape) if shape else uses[0].form)
        sizes = [size if side is None else side.shape[-2] for side, size in zip(sides, form.blocks[1:], strict=True)]
        if form.shape != shape or sizes != [*form.blocks[1:]] or (entries and self.values.shape != shape):  # type: ignore[union-attr]
            found = list(self.values.shape) if entries else f"sides of {sizes}"  # type: ignore[union-attr]
            raise InputError(f"metric[{name!r}]: must be of the parameter's shape, {list(shape)}, found {found}.")
        return form

    def _seen(self, uses: Sequence[Factor], form: Form) -> tuple[list[Factor], Tensor | None]:
        found = [rotated(in_form(use, form), self.left, self.right) for use in uses]
        # Values without a form are as the parameter.
        values = form.fold(self.values) if self.values is not None and self.form is None else self.values
        return found, values


Metric = Mapping[str, Weighting]
"""The metric of every parameter, by name."""


def metric_of(metric: Tree) -> Metric:
    """A metric from a tree like params, whose leaves are weights [*shape], `Kronecker`, or `Weighting`.

    Raises:
        InputError: a leaf is something else, has entries below zero, or sides that are not square, or the parameters'.
    """
    names, leaves, _ = named_leaves(metric)
    if not leaves:
        raise InputError("metric: must be a tree like params, found no leaves.")
    return {name: _weighting(name, leaf) for name, leaf in zip(names, leaves, strict=True)}


def _weighting(name: str, leaf: Any) -> Weighting:
    if isinstance(leaf, Weighting):
        return leaf
    if isinstance(leaf, Kronecker):
        left, right = (_root(f"metric[{name!r}].{side}", getattr(leaf, side)) for side in ("rows", "cols"))
        return Weighting(left=left, right=right)
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        raise InputError(f"metric[{name!r}]: must be weights, a tensor, or Kronecker, found {type(leaf).__name__}.")
    if not leaf.is_meta and bool((leaf < 0).any()):
        raise InputError(f"metric[{name!r}]: weights must not be below zero, found {float(leaf.min()):.3g}.")
    return Weighting(values=leaf.detach())


def _root(where: str, side: Any) -> Tensor:
    """`S` with `S S^T` the side, [1, size, size]."""
    square = (
        isinstance(side, Tensor) and side.dim() == 2 and side.shape[0] == side.shape[1] and side.is_floating_point()
    )
    if not square:
        raise InputError(f"{where}: must be a square matrix of floating numbers.")
    values, basis = torch.linalg.eigh(side.double())
    size = float(values.abs().max()) if values.numel() else 0.0
    off = float((side - side.T).abs().max()) if values.numel() else 0.0
    floor = 1e-6 if side.dtype is torch.float32 else 1e-10
    if off > floor * size or float(values.min()) < -floor * size:
        raise InputError(f"{where}: must be symmetric and positive semidefinite.")
    root: Tensor = basis * values.clamp(min=0).sqrt()
    return root.to(side.dtype).unsqueeze(0)


def known(metric: Metric, name: str) -> Weighting:
    """That of a parameter.

    Raises:
        InputError: it has none.
    """
    if name not in metric:
        raise InputError(f"metric: there is no leaf for parameter {name!r}. Give every parameter one.")
    return metric[name]


torch.utils._pytree.register_pytree_node(
    Weighting,
    lambda own: ([own.left, own.right, own.values], own.form),
    lambda children, facts: Weighting(facts, *children),
    serialized_type_name="funcghost.Weighting",
)
