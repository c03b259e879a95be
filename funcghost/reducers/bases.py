"""Reducers: values that say what to make of the per-sample gradients. Any pytree of them is a reducer, too."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import optree
import torch
from torch import Tensor

from funcghost.algebra.contractions import total
from funcghost.algebra.cost import Means, Route, Sketch
from funcghost.algebra.directions import Direction
from funcghost.algebra.factors import Factor
from funcghost.errors import InputError
from funcghost.trees import Params, Tree


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
