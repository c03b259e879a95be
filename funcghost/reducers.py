"""Reducers: values that say what to make of the per-sample gradients. Any pytree of them is a reducer, too."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import optree
import torch
from torch import Tensor

from funcghost.cost import Means, Route, Sketch
from funcghost.directions import Stack
from funcghost.errors import InputError
from funcghost.factors import Factor
from funcghost.trees import Params, Tree, match_direction

Direction = Sequence[Tensor | None]
"""One tensor per parameter, None for zero."""


class Reducer:
    """A stateless description of something that the per-sample gradients of a batch determine."""


class Directional(Reducer, ABC):
    """A reducer that is linear in the per-sample gradients.

    Law: the result for a batch depends on `scores[i, k] = <grad losses[i], directions[k]>` alone, or with
    `by_position` on the terms of these sums that belong to each position, [b, t, k].
    """

    by_position: ClassVar[bool] = False

    @abstractmethod
    def directions(self, params: Params) -> list[Direction]:
        """The directions wanted, each as one tensor per parameter."""

    @abstractmethod
    def result(self, scores: Tensor, params: Params) -> Any:
        """The reduced value from scores [..., k] in those directions."""


class Additive(Reducer, ABC):
    """A reducer to which every parameter contributes by itself.

    Law: the result depends on the contributions of the parameters alone, each from all uses of that parameter. They
    are homogeneous in the gradients, of this `degree`; at degree 1 the sum of those of the single uses.
    """

    degree: ClassVar[int] = 2

    @abstractmethod
    def of_parameter(self, name: str, uses: Sequence[Factor], means: Means) -> Tensor:
        """The contribution of a parameter, from the factors of its uses."""

    @abstractmethod
    def zero(self, batch: int, like: Tensor) -> Tensor:
        """The contribution of a parameter without a gradient."""

    def route(self, uses: Sequence[Sketch], batch: int, means: Means, name: str) -> tuple[Route, list[Route]] | None:
        """The route that the contribution of a parameter takes, and those rejected, if there is a choice."""
        return None

    def result(self, parts: Mapping[str, Tensor]) -> Any:
        """The reduced value from the contributions by name: their sum."""
        first, *others = parts.values()
        for other in others:
            first = first + other
        return first


@dataclass(frozen=True, eq=False)
class Dot(Directional):
    """See `dot`."""

    direction: Tree

    def directions(self, params: Params) -> list[Direction]:
        """One per member of a stack."""
        if isinstance(self.direction, Stack):
            trees = self.direction.directions
            return [match_direction(tree, params, f"direction {k} of the stack") for k, tree in enumerate(trees)]
        return [match_direction(self.direction, params)]

    def result(self, scores: Tensor, params: Params) -> Tensor:
        """[b], or [b, k] for a stack."""
        return scores if isinstance(self.direction, Stack) else scores.squeeze(-1)


def dot(direction: Tree) -> Dot:
    """The inner product of every per-sample gradient with a direction: `out[i] = <grad losses[i], direction>`.

    Shapes: `direction` is a tree like params; the result is [b]. With `fg.stack([v1, .., vK])` it is [b, k].

    Units: those of the losses as the user's function returned them, per unit of the direction; no factor of
    1/b. Accumulated in float32, or float64 for float64 parameters.

    Cost: per use of a weight with t positions, d inputs and p outputs one product of b t d p, as much as its
    forward, on top of the 3 b t d p of a training step: 4/3 of its FLOPs.

    Raises:
        InputError: (when used) a leaf is missing or differs from its parameter in shape, dtype or device.

    Example:
        >>> import funcghost as fg, torch
        >>> def losses(params, x):
        ...     return (x @ params["w"]).square()
        >>> params, x = {"w": torch.tensor([1.0, 2.0])}, torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> fg.reduce(losses)(params, x, fg.dot({"w": torch.tensor([1.0, 1.0])}))
        tensor([2., 4.])

    Source: Wang, Mittal, Song, Jia, "Data Shapley in One Training Run" (arXiv 2406.11011), section 4, where it
    is done for linear layers; here `<grad_i, V> = sum over sample i's entries of (J V) * g` for any op.
    """
    return Dot(direction)


@dataclass(frozen=True, eq=False)
class PerToken(Directional):
    """See `per_token`."""

    reducer: Directional
    by_position: ClassVar[bool] = True

    def directions(self, params: Params) -> list[Direction]:
        """Those of the reducer."""
        return self.reducer.directions(params)

    def result(self, scores: Tensor, params: Params) -> Any:
        """[b, t]."""
        return self.reducer.result(scores, params)


def per_token(reducer: Dot) -> PerToken:
    """The terms of `fg.dot(direction)` that belong to each position: `out[i, t]`, whose sum over t is `dot`'s result.

    The inner product is a sum over uses of parameters and over the entries of their outputs; entry `[i, t, ..]` is
    counted for position t. That is what the parameters' uses *at* position t contribute to the gradient of `losses[i]`,
    not the gradient of the loss at t: a loss sends gradients to all positions that it attends to.

    Shapes: [b, t], [b, t, k] for a stack. Positions are the first axis after the samples of what comes out of a use.

    Units and cost: those of `dot`.

    Raises:
        InputError: the reducer is not `fg.dot(...)`.
        SampleAxisError: (when used) the uses of the parameters differ in the number of positions, or have none.

    Example:
        >>> import funcghost as fg, torch
        >>> x, w = torch.arange(12.0).view(2, 3, 2), {"w": torch.zeros(2, 1)}
        >>> score = fg.reduce(lambda params, x: (x @ params["w"]).sum((1, 2)))
        >>> score(w, x, fg.per_token(fg.dot({"w": torch.ones(2, 1)})))
        tensor([[ 1.,  5.,  9.],
                [13., 17., 21.]])

    Source: the sum over positions in Wang et al. (arXiv 2406.11011), section 4, left open.
    """
    if not isinstance(reducer, Dot):
        raise InputError(f"per_token: takes fg.dot(direction), found {type(reducer).__name__}.")
    return PerToken(reducer)


@dataclass(frozen=True, eq=False)
class PerSegment(Directional):
    """See `per_segment`."""

    reducer: Directional
    segment_ids: Tensor
    segments: int
    by_position: ClassVar[bool] = True

    def directions(self, params: Params) -> list[Direction]:
        """Those of the reducer."""
        return self.reducer.directions(params)

    def result(self, scores: Tensor, params: Params) -> Any:
        """[b, s]."""
        ids = self.segment_ids
        if not len(scores) and not len(ids):  # nothing has come past, and nothing says how many positions there are
            return self.reducer.result(scores.new_zeros((0, self.segments, scores.shape[-1])), params)
        if ids.shape != scores.shape[:2]:
            raise InputError(
                f"per_segment: segment_ids must be [b, t], {list(scores.shape[:2])} for this batch, found "
                f"{list(ids.shape)}."
            )
        kept = torch.where((ids < 0) | (ids >= self.segments), self.segments, ids).unsqueeze(-1).expand(scores.shape)
        total = scores.new_zeros((len(scores), self.segments + 1, scores.shape[-1])).scatter_add(1, kept, scores)
        return self.reducer.result(total[:, :-1], params)


def per_segment(reducer: Dot, segment_ids: Tensor, segments: int | None = None) -> PerSegment:
    """The terms of `fg.dot(direction)` by segment of packed rows: `out[i, s]`, the sum of `per_token` where ids are s.

    Where rows are packed of documents that do not see each other (attention is block-diagonal, the loss of a row is
    the sum over its documents), `out[i, s]` is exactly `<grad loss of document s of row i, direction>`. Where documents
    see each other it is what the positions of the document contribute to the gradient of the row's loss, see
    `per_token`.

    Shapes: `segment_ids` is [b, t] of int64 from 0, negative for positions to leave out; the result is [b, segments].

    Args:
        reducer: `fg.dot(direction)`.
        segment_ids: the segment of each position.
        segments: how many there are; by default one more than the largest id, which waits for the device once, here.
            Larger ids are left out where looking at them would mean to wait.

    Raises:
        InputError: the ids are not integers [b, t], or more than `segments`, or the reducer is not `fg.dot(...)`.
        SampleAxisError: (when used) as in `per_token`.

    Example:
        >>> import funcghost as fg, torch
        >>> x, w = torch.arange(12.0).view(2, 3, 2), {"w": torch.zeros(2, 1)}
        >>> score = fg.reduce(lambda params, x: (x @ params["w"]).sum((1, 2)))
        >>> score(w, x, fg.per_segment(fg.dot({"w": torch.ones(2, 1)}), torch.tensor([[0, 0, 1], [0, 1, 1]])))
        tensor([[ 6.,  9.],
                [13., 38.]])
    """
    if not isinstance(reducer, Dot):
        raise InputError(f"per_segment: takes fg.dot(direction), found {type(reducer).__name__}.")
    if not isinstance(segment_ids, Tensor) or segment_ids.dim() != 2 or segment_ids.dtype != torch.int64:
        found = f"{segment_ids.dtype} {list(segment_ids.shape)}" if isinstance(segment_ids, Tensor) else segment_ids
        raise InputError(f"per_segment: segment_ids must be int64 numbers [b, t], found {found}.")
    if segments is None:
        if segment_ids.is_meta:
            raise InputError("per_segment: ids on the meta device have no values: pass segments=, their number.")
        segments = int(segment_ids.max()) + 1 if segment_ids.numel() else 0
    elif segment_ids.device.type == "cpu" and segment_ids.numel() and int(segment_ids.max()) >= segments:
        raise InputError(f"per_segment: there is an id {int(segment_ids.max())}, and segments={segments} is too few.")
    return PerSegment(reducer, segment_ids, segments)


@dataclass(frozen=True, eq=False)
class PerParamDirectional(Directional):
    """`per_param` of a reducer with directions."""

    reducer: Directional

    @property
    def by_position(self) -> bool:  # type: ignore[override]
        """As the reducer."""
        return self.reducer.by_position

    def directions(self, params: Params) -> list[Direction]:
        """Each direction in each parameter alone."""
        whole = self.reducer.directions(params)
        return [
            [value if i == own else None for i, value in enumerate(direction)]
            for own in range(len(params.names))
            for direction in whole
        ]

    def result(self, scores: Tensor, params: Params) -> dict[str, Any]:
        """The reducer's result for each parameter."""
        parts = scores.split(scores.shape[-1] // len(params.names), dim=-1)
        return {name: self.reducer.result(part, params) for name, part in zip(params.names, parts, strict=True)}


@dataclass(frozen=True, eq=False)
class PerParamAdditive(Additive):
    """`per_param` of a reducer to which parameters contribute."""

    reducer: Additive

    @property
    def degree(self) -> int:  # type: ignore[override]
        """As the reducer."""
        return self.reducer.degree

    def of_parameter(self, name: str, uses: Sequence[Factor], means: Means) -> Tensor:
        """That of the reducer."""
        return self.reducer.of_parameter(name, uses, means)

    def zero(self, batch: int, like: Tensor) -> Tensor:
        """That of the reducer."""
        return self.reducer.zero(batch, like)

    def route(self, uses: Sequence[Sketch], batch: int, means: Means, name: str) -> tuple[Route, list[Route]] | None:
        """That of the reducer."""
        return self.reducer.route(uses, batch, means, name)

    def result(self, parts: Mapping[str, Tensor]) -> dict[str, Any]:
        """One result for each parameter."""
        return {name: self.reducer.result({name: part}) for name, part in parts.items()}


def per_param(reducer: Reducer) -> Reducer:
    """The reducer for each parameter by itself: a dict from names to results, whose sum is the reducer's result.

    Law: `sum(per_param(r).values()) == r`, since inner products add up over parameters.

    Shapes: a dict with the names of the parameters (their paths in the tree, joined by dots).

    Cost: as the reducer where each parameter has taps of its own; a direction that is carried costs one pass more for
    each parameter.

    Raises:
        InputError: this is no reducer, or one by parameter already.

    Example:
        >>> import funcghost as fg, torch
        >>> params = {"w": torch.ones(2), "b": torch.ones(())}
        >>> score = fg.reduce(lambda params, x: x @ params["w"] + params["b"])
        >>> score(params, torch.eye(2), fg.per_param(fg.squared_norm()))
        {'b': tensor([1., 1.]), 'w': tensor([1., 1.])}
    """
    if isinstance(reducer, PerParamDirectional | PerParamAdditive):
        raise InputError("per_param: the reducer is by parameter already.")
    if isinstance(reducer, Directional):
        return PerParamDirectional(reducer)
    if isinstance(reducer, Additive):
        return PerParamAdditive(reducer)
    raise InputError(f"per_param: takes a reducer such as fg.squared_norm(), found {type(reducer).__name__}.")


def split_reducers(tree: Tree) -> tuple[list[Reducer], optree.PyTreeSpec]:
    """The reducers in a tree."""
    leaves, spec = optree.tree_flatten(tree, is_leaf=lambda node: isinstance(node, Reducer))
    for leaf in leaves:
        if not isinstance(leaf, Reducer):
            raise InputError(
                f"reducers: every leaf must be a reducer such as fg.dot(direction), found {type(leaf).__name__}. "
                "Wrap a direction in fg.dot(...)."
            )
    return leaves, spec


def register(kind: type[Any], tensors: tuple[str, ...], constants: tuple[str, ...] = ()) -> None:
    """Makes a reducer a node of torch's own pytrees, as `torch.compile` wants it."""
    fields = (*tensors, *constants)
    torch.utils._pytree.register_pytree_node(
        kind,
        lambda value: ([getattr(value, name) for name in tensors], tuple(getattr(value, name) for name in constants)),
        lambda children, context: kind(**dict(zip(fields, (*children, *context), strict=True))),
        serialized_type_name=f"funcghost.{kind.__name__}",
    )


register(Dot, ("direction",))
register(PerToken, ("reducer",))
register(PerSegment, ("reducer", "segment_ids"), ("segments",))
register(PerParamDirectional, ("reducer",))
register(PerParamAdditive, ("reducer",))
