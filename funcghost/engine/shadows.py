"""Where values that were computed from parameters come from: the way back for per-sample gradients.

A value in disguise has its own autograd graph back to the parameters. Of a value whose tangent is carried through ops
on samples, a second graph is kept, in which everything that a tap has scored already is constant.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from funcghost.algebra.factors import Dense, Factor, dense
from funcghost.errors import UnsupportedOpError
from funcghost.ops.tangent import Call, Outputs, Way, physical


@dataclass(frozen=True, eq=False)
class Shadow:
    """A value, the numbers of the parameters it was computed from, and the way back.

    Without an `edge` it is the parameter itself, or with no `sources` a value that depends on none; with `axes` it is
    `parameter.permute(axes)`. `leaves` are the tensors of all parameters.
    """

    value: Tensor
    sources: frozenset[int]
    leaves: Sequence[Tensor]
    edge: Any = None
    axes: tuple[int, ...] | None = None

    def pull(self, factor: Factor) -> list[tuple[int, Factor]]:
        """The gradients of the parameters, dense, by one derivative per sample along the value's own graph."""
        gradients = dense(factor).to(self.value.dtype)
        return self.derivatives(gradients.unbind(0))

    def derivatives(self, cotangents: Sequence[Tensor]) -> list[tuple[int, Factor]]:
        """A dense factor for each parameter, from the cotangent of the value for each sample."""
        if not self.sources:
            return []
        indices = sorted(self.sources)
        inputs = [self.leaves[index] for index in indices]
        rows: list[list[Tensor]] = [[] for _ in indices]
        for cotangent in cotangents:
            found = torch.autograd.grad(self.edge, inputs, cotangent, retain_graph=True, allow_unused=True)
            for row, gradient, leaf in zip(rows, found, inputs, strict=True):
                row.append(torch.zeros_like(leaf, requires_grad=False) if gradient is None else gradient.to_dense())
        return [(index, Dense(torch.stack(row))) for index, row in zip(indices, rows, strict=True)]


def of_parameters(leaves: Sequence[Tensor]) -> list[Shadow]:
    """Those of the parameters themselves."""
    return [Shadow(leaf, frozenset([index]), leaves) for index, leaf in enumerate(leaves)]


def followed(call: Call, found: Outputs, tracked: Sequence[Shadow], way: Way | None) -> list[Shadow]:
    """The shadows of what came out of a call into which values with shadows went; what has no derivative has no source.

    Raises:
        UnsupportedOpError: the call is under vmap, where there is no graph for one sample's gradient.
    """
    sources = frozenset[int]().union(*(shadow.sources for shadow in tracked))
    leaves = tracked[0].leaves
    owns = all(shadow.value is call.leaves[slot] for shadow, slot in zip(tracked, call.tracked, strict=True))
    alone = all(
        slot in call.tracked or not (isinstance(leaf, Tensor) and leaf.requires_grad)
        for slot, leaf in enumerate(call.leaves)
    )
    if any(physical(leaf) is not leaf for leaf in call.leaves if isinstance(leaf, Tensor)):
        raise UnsupportedOpError(
            "per-sample gradients in factored form are not to be had where a tangent is carried through "
            "torch.func.vmap, as with chunk_size or where a parameter is written into a value in place. Write ops out "
            "of place; leave chunk_size out, or split the batch and call the step for each part."
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
            shadows.append(Shadow(value, frozenset(), leaves))
            continue
        axes = _axes(value, leaves, sources) if way == "rule" and owns and alone else None
        shadows.append(Shadow(value, sources, leaves, get_gradient_edge(value), axes))
    return shadows


def _axes(value: Tensor, leaves: Sequence[Tensor], sources: frozenset[int]) -> tuple[int, ...] | None:
    """The order of axes in which a value is a parameter itself, seen by its memory."""
    if len(sources) != 1:
        return None
    (param,) = (leaves[index] for index in sources)
    same = value.dim() == param.dim() and value.numel() == param.numel() and value.dtype == param.dtype
    if not same or value.dim() > 4 or value.untyped_storage()._cdata != param.untyped_storage()._cdata:
        return None
    for axes in permutations(range(param.dim())):
        moved = param.detach().permute(axes)
        if (moved.shape, moved.stride(), moved.storage_offset()) == (
            value.shape,
            value.stride(),
            value.storage_offset(),
        ):
            return axes
    return None
