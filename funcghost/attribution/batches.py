"""What attributions are asked of: sequences of batches, and trees of stacked directions."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from funcghost.algebra.directions import Stack
from funcghost.errors import InputError
from funcghost.trees import Params, Tree, match_direction, named_leaves


def check_batches(where: str, batches: Any) -> Iterable[Tree]:
    """Batches that can be gone through more than once, such as a list or a loader.

    Raises:
        InputError: this is one batch, a generator, or nothing to go through.
    """
    one = isinstance(batches, Tensor | Mapping | str) or hasattr(batches, "_fields")
    if one or not isinstance(batches, Iterable):
        raise InputError(f"{where}: must be a list of batches, found {type(batches).__name__}. Pass [batch].")
    if isinstance(batches, Iterator):
        raise InputError(
            f"{where}: must be a list or a loader, found {type(batches).__name__}, which can be gone through only once."
        )
    if isinstance(batches, list | tuple) and not batches:
        raise InputError(f"{where}: takes one batch or more, found none.")
    return batches


def joined(where: str, parts: list[Tensor]) -> Tensor:
    """What was found batch by batch, along the first axis.

    Raises:
        InputError: there was no batch.
    """
    if not parts:
        raise InputError(f"{where}: takes one batch or more, found none.")
    return torch.cat(parts)


def stacked(direction: Tree, params: Params, what: str = "direction") -> tuple[list[Tensor], int | None]:
    """The leaves of one direction with an axis in front, or of k in a stack, [k, *shape]; and k, None for one alone.

    A stack is a `fg.stack`, or one tree whose leaves all have an axis more in front.

    Raises:
        InputError: the trees are not like params.
    """
    if isinstance(direction, Stack):
        trees = [
            match_direction(tree, params, f"{what} {k} of the stack") for k, tree in enumerate(direction.directions)
        ]
        return [torch.stack(leaves) for leaves in zip(*trees, strict=True)], len(trees)
    names, leaves, _ = named_leaves(direction)
    found = dict(zip(names, leaves, strict=True))
    sizes = {
        len(found[name]) if isinstance(found.get(name), Tensor) and found[name].dim() == leaf.dim() + 1 else None
        for name, leaf in zip(params.names, params.leaves, strict=True)
    }
    if len(sizes) > 1 or None in sizes:
        return [leaf.unsqueeze(0) for leaf in match_direction(direction, params, what)], None
    (k,) = sizes
    assert k is not None
    like = Params(params.names, tuple(leaf.expand(k, *leaf.shape) for leaf in params.leaves), params.spec)
    return match_direction(direction, like, what), k
