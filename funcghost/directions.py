"""Directions: trees like the parameters, along which per-sample gradients are measured."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from funcghost.errors import InputError
from funcghost.trees import Tree


@dataclass(frozen=True, eq=False)
class Stack:
    """Several directions, taken in one pass."""

    directions: tuple[Tree, ...]


def stack(directions: Sequence[Tree]) -> Stack:
    """K directions in one pass: `fg.dot(fg.stack([v1, .., vK]))` is [b, k], column k that of `fg.dot(vk)`.

    Nothing is copied. Cost: K products per use of a weight, where one direction costs one.

    Raises:
        InputError: there is no direction in the sequence.

    Example:
        >>> import funcghost as fg, torch
        >>> v = {"w": torch.ones(2)}
        >>> len(fg.stack([v, v]).directions)
        2
    """
    if not isinstance(directions, Sequence) or not directions:
        raise InputError(f"stack: takes a sequence of one or more directions, found {type(directions).__name__}.")
    return Stack(tuple(directions))


torch.utils._pytree.register_pytree_node(
    Stack,
    lambda value: (list(value.directions), None),
    lambda children, _: Stack(tuple(children)),
    serialized_type_name="funcghost.Stack",
)
