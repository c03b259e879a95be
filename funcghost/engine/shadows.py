"""Where values that were computed from parameters come from: the way back for per-sample gradients.

A value in disguise has its own autograd graph back to the parameters. Of a value whose tangent is carried through ops
on samples, a second graph is kept, in which everything that a tap has scored already is constant.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from funcghost.algebra.factors import Dense, Factor, Form, Outer, dense
from funcghost.errors import UnsupportedOpError
from funcghost.ops.call import Call, Outputs, physical
from funcghost.ops.tangent import Way
from funcghost.trees import as_whole

Pulled = list[tuple[int, Factor]]
"""Factors of the gradients of parameters, each with the number of its parameter."""


@dataclass(frozen=True, eq=False)
class Constant:
    """A value that depends on no parameter, though it came out of an op that a parameter went into."""

    value: Tensor

    @property
    def leaves(self) -> Mapping[int, Tensor]:
        """There are none."""
        return {}

    def pull(self, factor: Factor) -> Pulled:
        """Nothing."""
        return []


@dataclass(frozen=True, eq=False)
class Itself:
    """A parameter, and its number."""

    value: Tensor
    number: int

    @property
    def leaves(self) -> Mapping[int, Tensor]:
        """The parameter alone."""
        return {self.number: self.value}

    def pull(self, factor: Factor) -> Pulled:
        """The factor as it is."""
        return [(self.number, factor)]


@dataclass(frozen=True, eq=False)
class Computed:
    """A value computed from the parameters that are its `leaves`, by their numbers, and the `edge` of its graph."""

    value: Tensor
    leaves: Mapping[int, Tensor]
    edge: Any

    def pull(self, factor: Factor) -> Pulled:
        """Dense factors, by one derivative per sample along the value's own graph."""
        cotangents = dense(factor).to(self.value.dtype)
        inputs = list(self.leaves.values())
        rows: list[list[Tensor]] = [[] for _ in inputs]
        for cotangent in cotangents.unbind(0):
            found = torch.autograd.grad(self.edge, inputs, cotangent, retain_graph=True, allow_unused=True)
            for row, gradient, leaf in zip(rows, found, inputs, strict=True):
                row.append(torch.zeros_like(leaf, requires_grad=False) if gradient is None else as_whole(gradient))
        return [(number, Dense(torch.stack(row))) for number, row in zip(self.leaves, rows, strict=True)]


@dataclass(frozen=True, eq=False)
class Permuted(Computed):
    """The one parameter that is its leaf, as `parameter.permute(axes)`."""

    axes: tuple[int, ...]

    def pull(self, factor: Factor) -> Pulled:
        """The factor with its axes put back; where that takes a dense one, along the graph."""
        moved, (number,) = permuted(factor, self.axes), self.leaves
        return super().pull(factor) if moved is None else [(number, moved)]


Shadow = Constant | Itself | Computed | Permuted
"""A `value`, the `leaves` that it comes from, and the way back: `pull` gives their factors from one of the value."""


def of_parameters(leaves: Sequence[Tensor]) -> list[Shadow]:
    """The shadows of the parameters themselves."""
    return [Itself(leaf, number) for number, leaf in enumerate(leaves)]


def followed(call: Call, found: Outputs, tracked: Sequence[Shadow], way: Way | None) -> list[Shadow]:
    """The shadows of what came out of a call into which values with shadows went.

    Raises:
        UnsupportedOpError: the call is under vmap, where there is no graph for one sample's gradient.
    """
    together = {number: leaf for shadow in tracked for number, leaf in shadow.leaves.items()}
    leaves = dict(sorted(together.items()))
    owns = all(shadow.value is call.leaves[slot] for shadow, slot in zip(tracked, call.tracked, strict=True))
    alone = all(
        slot in call.tracked or not (isinstance(leaf, Tensor) and leaf.requires_grad)
        for slot, leaf in enumerate(call.leaves)
    )
    if any(physical(leaf) is not leaf for leaf in call.leaves if isinstance(leaf, Tensor)):
        raise UnsupportedOpError(
            "per-sample gradients in factored form are not to be had where a tangent is carried through a torch.func "
            "transform: under vmap with chunk_size, or where a parameter is written into a value in place; under grad "
            "or jvp, where samples mix. Write ops out of place; leave chunk_size out, or split the batch and call the "
            "step for each part; take derivatives inside the losses by torch.autograd.grad(..., create_graph=True)."
        )
    values: Outputs = found
    if not (found and owns and alone):
        given = dict(zip(call.tracked, (shadow.value for shadow in tracked), strict=True))
        with torch.enable_grad():
            values = call.evaluate(
                [
                    given.get(slot, leaf.detach() if isinstance(leaf, Tensor) else leaf)
                    for slot, leaf in enumerate(call.leaves)
                ]
            )
    shadows: list[Shadow] = []
    for value in values:
        if not value.requires_grad:
            shadows.append(Constant(value))
            continue
        edge, axes = get_gradient_edge(value), _axes(value, leaves) if way == "rule" and owns and alone else None
        shadows.append(Computed(value, leaves, edge) if axes is None else Permuted(value, leaves, edge, axes))
    return shadows


def _axes(value: Tensor, leaves: Mapping[int, Tensor]) -> tuple[int, ...] | None:
    """The order of axes in which a value is a parameter itself, seen by its memory."""
    if len(leaves) != 1:
        return None
    (param,) = leaves.values()
    if param._backward_hooks:  # which have a say in its gradient
        return None
    same = value.dim() == param.dim() and value.numel() == param.numel() and value.dtype == param.dtype
    if not same or value.dim() > 4 or value.untyped_storage()._cdata != param.untyped_storage()._cdata:
        return None
    place = (value.shape, value.stride(), value.storage_offset())
    for axes in permutations(range(param.dim())):
        moved = param.detach().permute(axes)
        if (moved.shape, moved.stride(), moved.storage_offset()) == place:
            return axes
    return None


def permuted(factor: Factor, axes: tuple[int, ...]) -> Factor | None:
    """The factor of a parameter from one of `parameter.permute(axes)`; None where it takes a dense one."""
    if axes == tuple(range(len(axes))):
        return factor
    back = [axes.index(i) for i in range(len(axes))]
    if isinstance(factor, Dense):
        return Dense(factor.value.permute(0, *(1 + i for i in back)))
    if isinstance(factor, Outer) and factor.form.base == factor.form.shape:
        shape = tuple(factor.form.shape[i] for i in back)
        q, m, n = (tuple(axes[i] for i in part) for part in factor.form.roles)
        if m and n and min(n) < min(m):
            return Outer(factor.cols, factor.rows, Form(shape, shape, (q, n, m)))
        return Outer(factor.rows, factor.cols, Form(shape, shape, (q, m, n)))
    return None
