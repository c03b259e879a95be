"""Reducers: values that say what to make of the per-sample gradients. Any pytree of them is a reducer, too."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, overload

import optree
import torch
from torch import Tensor

from funcghost.contract import squared_norms, total
from funcghost.cost import Means, Route, Sketch, choose
from funcghost.directions import Stack
from funcghost.errors import InputError
from funcghost.factors import Factor, samples, wide
from funcghost.lowrank import Direction, LowRank, certified_bound, match_leaves
from funcghost.trees import Params, Tree, named_leaves


class Reducer:
    """A stateless description of something that the per-sample gradients of a batch determine."""

    def parts(self) -> tuple["Reducer", ...]:
        """The reducers that it is made of: those with directions, and those to which parameters contribute."""
        return (self,)

    def joined(self, results: Sequence[Any]) -> Any:
        """Its own result, from those of its parts."""
        (result,) = results
        return result


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
        return total(list(parts.values()))

    @property
    def adds_up(self) -> bool:
        """Whether it is that sum, so that nothing need be kept of each parameter."""
        return type(self).result is Additive.result


@dataclass(frozen=True, eq=False)
class Dot(Directional):
    """See `dot`."""

    direction: Tree

    def directions(self, params: Params) -> list[Direction]:
        """One per member of a stack."""
        if isinstance(self.direction, Stack):
            trees = self.direction.directions
            return [match_leaves(tree, params, f"direction {k} of the stack") for k, tree in enumerate(trees)]
        return [match_leaves(self.direction, params)]

    def result(self, scores: Tensor, params: Params) -> Tensor:
        """[b], or [b, k] for a stack."""
        return scores if isinstance(self.direction, Stack) else scores.squeeze(-1)


@dataclass(frozen=True, eq=False)
class BoundedDot(Reducer):
    """See `dot`."""

    direction: Tree

    def parts(self) -> tuple[Reducer, ...]:
        """The scores, and the norms of the gradients of what has low rank."""
        trees = self.direction.directions if isinstance(self.direction, Stack) else (self.direction,)
        low = {
            name for tree in trees for name, leaf in zip(*named_leaves(tree)[:2], strict=True) if type(leaf) is LowRank
        }
        return Dot(self.direction), PerParamAdditive(SquaredNorm(), frozenset(low))

    def joined(self, results: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Scores and bounds."""
        scores, norms = results
        return scores, certified_bound(self.direction, norms)


@overload
def dot(direction: Tree, with_bound: Literal[False] = False) -> Dot: ...


@overload
def dot(direction: Tree, with_bound: bool) -> Dot | BoundedDot: ...


def dot(direction: Tree, with_bound: bool = False) -> Dot | BoundedDot:
    """The inner product of every per-sample gradient with a direction: `out[i] = <grad losses[i], direction>`.

    Shapes: `direction` is a tree like params; the result is [b]. With `fg.stack([v1, .., vK])` it is [b, k]. Leaves may
    be low-rank (`fg.compress`), and the direction may be `Pairs`: the sum of the gradients of their samples. With
    `with_bound=True` the result is a pair of the scores and of how far each may be off because of what `fg.compress`
    dropped, the sum over leaves of `|dropped| |grad_i|`, from norms taken in the same pass.

    Units: those of the losses as the user's function returned them, per unit of the direction; no factor of
    1/b. Accumulated in float32, or float64 for float64 parameters.

    Cost: per use of a weight with t positions, d inputs and p outputs one product of b t d p, as much as its
    forward, on top of the 3 b t d p of a training step: 4/3 of its FLOPs; in memory as much as the output of the use,
    or as its input where that is less than half. A leaf of rank r costs b t r (d + p). The bound costs as
    `fg.squared_norm` of the parameters with low-rank leaves.

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
    factored = getattr(direction, "as_direction", None)
    tree = factored() if factored is not None else direction
    return BoundedDot(tree) if with_bound else Dot(tree)


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
class SquaredNorm(Additive):
    """See `funcghost.quadratic.squared_norm`."""

    def of_parameter(self, name: str, uses: Sequence[Factor], means: Means) -> Tensor:
        """[b]."""
        return squared_norms(uses, means, name)

    def route(self, uses: Sequence[Sketch], batch: int, means: Means, name: str) -> tuple[Route, list[Route]]:
        """As in `of_parameter`."""
        return choose(uses, uses, (batch, batch), means, diagonal=True, same=True, name=name)

    def zero(self, batch: int, like: Tensor) -> Tensor:
        """[b]."""
        return like.new_zeros((batch,))


@dataclass(frozen=True, eq=False)
class PerParamAdditive(Additive):
    """`per_param` of a reducer to which parameters contribute; with `names`, to those alone, zero for the others."""

    reducer: Additive
    names: frozenset[str] | None = None

    @property
    def degree(self) -> int:  # type: ignore[override]
        """As the reducer."""
        return self.reducer.degree

    def of_parameter(self, name: str, uses: Sequence[Factor], means: Means) -> Tensor:
        """That of the reducer."""
        if self.names is not None and name not in self.names:
            return self.zero(samples(uses[0]), wide(uses[0].tensors[-1]))
        return self.reducer.of_parameter(name, uses, means)

    def zero(self, batch: int, like: Tensor) -> Tensor:
        """That of the reducer."""
        return self.reducer.zero(batch, like)

    def route(self, uses: Sequence[Sketch], batch: int, means: Means, name: str) -> tuple[Route, list[Route]] | None:
        """That of the reducer."""
        wanted = self.names is None or name in self.names
        return self.reducer.route(uses, batch, means, name) if wanted else None

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
register(SquaredNorm, ())
register(PerParamDirectional, ("reducer",))
register(PerParamAdditive, ("reducer",), ("names",))
register(BoundedDot, ("direction",))
