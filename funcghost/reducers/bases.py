"""Reducers: values that say what to make of the per-sample gradients. Any pytree of them is a reducer, too."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import optree
import torch
from torch import Tensor

from funcghost.algebra.cost import Means, Route, Sketch
from funcghost.algebra.directions import Direction
from funcghost.algebra.factors import Factor
from funcghost.algebra.sums import total
from funcghost.errors import InputError
from funcghost.trees import Params, Tree


class Reducer:
    """A stateless description of something that the per-sample gradients of a batch determine.

    It is a `Directional`, an `Additive`, or made of such parts, whose results it joins.
    """

    def parts(self) -> tuple["Reducer", ...]:
        """The reducers that it is made of."""
        return (self,)

    def joined(self, results: Sequence[Any]) -> Any:
        """The reducer's own result, from those of its parts."""
        (result,) = results
        return result


class Directional(Reducer, ABC):
    """A reducer that is linear in the per-sample gradients: subclass it to make something of scores along directions.

    Law: the result for a batch depends on `scores[i, k] = <grad losses[i], directions[k]>` alone, or with
    `by_position` on the terms of these sums that belong to each position, [b, t, k].

    Example:
        >>> import dataclasses, torch, funcghost as fg
        >>> @dataclasses.dataclass(frozen=True, eq=False)
        ... class Contrast(fg.Directional):  # <grad losses[i], one - other>
        ...     one: dict
        ...     other: dict
        ...     def directions(self, params):
        ...         return fg.dot(fg.stack([self.one, self.other])).directions(params)
        ...     def result(self, scores, params):
        ...         return scores[..., 0] - scores[..., 1]
        >>> one, other = ({"w": torch.tensor([a, b])} for a, b in ((3.0, 4.0), (1.0, 1.0)))
        >>> score = fg.reduce(lambda params, x: x @ params["w"])
        >>> score({"w": torch.zeros(2)}, torch.eye(2), Contrast(one, other))
        tensor([2., 3.])
    """

    by_position: ClassVar[bool] = False

    @abstractmethod
    def directions(self, params: Params) -> list[Direction]:
        """The directions wanted, each as one tensor per parameter, None for zero."""

    @abstractmethod
    def result(self, scores: Tensor, params: Params) -> Any:
        """The reduced value from scores [..., k] in those directions."""


class Additive(Reducer, ABC):
    """A reducer to which every parameter contributes by itself: subclass it to make something of whole gradients.

    Law: the result depends on the contributions of the parameters alone, each from all uses of that parameter. They
    are homogeneous in the gradients, of this `degree`; at degree 1 the sum of those of the single uses.

    The gradients of a parameter are the sum over its uses of the factors of each (`funcghost.algebra.factors`), of
    which `funcghost.algebra.contractions` makes inner products; `dense(use)` is the gradients [b, *shape] themselves.

    Example:
        >>> import torch, funcghost as fg
        >>> from funcghost.algebra.factors import dense
        >>> class Sums(fg.Additive):  # the sum of all entries of each gradient
        ...     degree = 1
        ...     def of_parameter(self, name, uses):
        ...         return sum(dense(use).flatten(1).sum(1) for use in uses)
        ...     def zero(self, batch, like):
        ...         return like.new_zeros(batch)
        >>> score = fg.reduce(lambda params, x: x @ params["w"])
        >>> score({"w": torch.zeros(2)}, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), Sums())
        tensor([3., 7.])
    """

    degree: ClassVar[int] = 2

    @abstractmethod
    def of_parameter(self, name: str, uses: Sequence[Factor]) -> Tensor:
        """The contribution of a parameter, from the factors of its uses."""

    @abstractmethod
    def zero(self, batch: int, like: Tensor) -> Tensor:
        """The contribution of a parameter without a gradient, on the device and in the dtype of `like`."""

    def within(self, means: Means) -> Self:
        """The same reducer that keeps to a budget, a route and a dtype, if it can."""
        return self

    def route(self, uses: Sequence[Sketch], batch: int, name: str) -> tuple[Route, list[Route]] | None:
        """The route that the contribution of a parameter takes, and those rejected, if there is a choice."""
        return None

    def result(self, parts: Mapping[str, Tensor]) -> Any:
        """The reduced value from the contributions by name: their sum."""
        return total(list(parts.values()))

    @property
    def adds_up(self) -> bool:
        """Whether it is that sum, so that nothing need be kept of each parameter."""
        return type(self).result is Additive.result


def split_reducers(tree: Tree) -> tuple[list[Reducer], optree.PyTreeSpec]:
    """The reducers in a tree.

    Raises:
        InputError: a leaf is no reducer, or of neither of the two kinds.
    """
    leaves, spec = optree.tree_flatten(tree, is_leaf=lambda node: isinstance(node, Reducer))
    for leaf in leaves:
        if not isinstance(leaf, Reducer):
            raise InputError(
                f"reducers: every leaf must be a reducer such as fg.dot(direction), found {type(leaf).__name__}. "
                "Wrap a direction in fg.dot(...)."
            )
        single_parts(leaf)
    return leaves, spec


def single_parts(reducer: Reducer) -> list[Directional | Additive]:
    """The reducers of the two kinds that a reducer is made of.

    Raises:
        InputError: a part is of neither kind.
    """
    if isinstance(reducer, Directional | Additive):
        return [reducer]
    parts = reducer.parts()
    if any(part is reducer for part in parts):
        raise InputError(
            f"reducers: {type(reducer).__name__} is of neither kind. Derive it from fg.Directional (something made of "
            "scores along directions) or fg.Additive (something to which every parameter contributes), or let its "
            "parts() be such reducers."
        )
    return [single for part in parts for single in single_parts(part)]


def register(kind: type[Any], tensors: tuple[str, ...], constants: tuple[str, ...] = ()) -> None:
    """Makes a reducer a node of torch's own pytrees, as `torch.compile` wants it: None is no leaf there."""

    def flatten(value: Any) -> tuple[list[Any], tuple[tuple[str, ...], tuple[Any, ...]]]:
        given = tuple(name for name in tensors if getattr(value, name) is not None)
        return [getattr(value, name) for name in given], (given, tuple(getattr(value, name) for name in constants))

    def unflatten(children: Any, context: Any) -> Any:
        given, others = context
        return kind(**dict(zip((*given, *constants), (*children, *others), strict=True)))

    torch.utils._pytree.register_pytree_node(
        kind, flatten, unflatten, serialized_type_name=f"funcghost.{kind.__name__}"
    )
