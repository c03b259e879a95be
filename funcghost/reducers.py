"""Reducers: values that say what to make of the per-sample gradients. Any pytree of them is a reducer, too."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import optree
import torch
from torch import Tensor

from funcghost.directions import Stack
from funcghost.errors import InputError
from funcghost.trees import Params, Tree, match_direction


class Reducer(ABC):
    """A stateless description of numbers that are linear in the per-sample gradients.

    Law: the result for a batch depends on `scores[i, k] = <grad losses[i], directions[k]>` alone.
    """

    @abstractmethod
    def directions(self, params: Params) -> list[list[Tensor]]:
        """The directions wanted, each as one tensor per parameter."""

    @abstractmethod
    def result(self, scores: Tensor) -> Tensor:
        """The reduced value from scores [b, k] in those directions."""


@dataclass(frozen=True, eq=False)
class Dot(Reducer):
    """See `dot`."""

    direction: Tree

    def directions(self, params: Params) -> list[list[Tensor]]:
        """One per member of a stack."""
        if isinstance(self.direction, Stack):
            trees = self.direction.directions
            return [match_direction(tree, params, f"direction {k} of the stack") for k, tree in enumerate(trees)]
        return [match_direction(self.direction, params)]

    def result(self, scores: Tensor) -> Tensor:
        """[b], or [b, k] for a stack."""
        return scores if isinstance(self.direction, Stack) else scores.squeeze(1)


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


torch.utils._pytree.register_pytree_node(
    Dot,
    lambda value: ([value.direction], None),
    lambda children, _: Dot(*children),
    serialized_type_name="funcghost.Dot",
)
