"""Ways to write `losses(params, batch) -> [b]`."""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import optree
import torch
from torch import Tensor
from torch._functorch.predispatch import _add_batch_dim, _remove_batch_dim, lazy_load_decompositions
from torch._functorch.vmap import vmap_increment_nesting
from torch.overrides import handle_torch_function, has_torch_function

from funcghost.control_flow import AsPython, watching
from funcghost.errors import GhostError, InputError, MismatchError
from funcghost.losses.batching import Batching
from funcghost.ops.rules import register_rule
from funcghost.problem import Losses
from funcghost.side_effects import random_state
from funcghost.trees import Tree

log = logging.getLogger("funcghost")


def per_example(
    loss: Callable[[Tree, Tree], Any],
    in_dims: Any = 0,
    randomness: str = "error",
    chunk_size: int | None = None,
) -> Losses:
    """The losses of a batch from the loss of one example: `out[i] = loss(params, batch[i])`, by `torch.func.vmap`.

    Shapes: `loss(params, example)` gives a scalar; the result gives [b], where b is the size of the axes `in_dims`
    of the batch (an int, or a tree of ints and None like the batch or like the upper part of it; None: all examples
    are given the same, which may then be anything).

    The samples cannot mix here, and every op has its sample axis. A model that wants a batch axis is given one of a
    single example, `model(x[None])[0]`. `randomness` and `chunk_size` are those of `torch.func.vmap`: "different" draws
    other random numbers for each example, "same" the same ones. In chunks, scores are carried to the losses in forward
    mode: splitting the batch and calling the step for each part costs less. A loss that returns (scalar, aux) gives
    (losses, aux), for `has_aux=True`, with every tensor of aux stacked.

    Python may read a value (`if`, `.item()`) if all examples agree in it. What vmap refuses (an LSTM, batch norm in
    training, rows chosen by a mask, writes into zeros) is taken one example at a time, from the first refusal on, with
    a warning: exact, at the pace of a loop.

    Cost: the FLOPs of the batched losses, and about their time. `scaled_dot_product_attention` runs as one op on all
    examples.

    Raises:
        InputError: `in_dims` does not fit the batch, the examples' axes differ in size, something in the batch is not a
            tensor (before anything is computed); the loss of an example is not a scalar, or reads a value in which
            the examples differ.

    Example:
        >>> import funcghost as fg, torch
        >>> losses = fg.per_example(lambda params, x: (x @ params["w"]).square())
        >>> losses({"w": torch.tensor([1.0, 2.0])}, torch.eye(2))
        tensor([1., 4.])
    """
    if not callable(loss):
        raise InputError(f"per_example: loss must be a function loss(params, example), found {type(loss).__name__}.")
    if randomness not in ("error", "different", "same"):
        raise InputError(f"per_example: randomness must be 'error', 'different' or 'same', found {randomness!r}.")
    if chunk_size is not None and not (type(chunk_size) is int and chunk_size > 0):
        raise InputError(f"per_example: chunk_size must be a positive number of examples, found {chunk_size!r}.")

    refused: list[str] = []

    def losses(params: Tree, batch: Tree) -> Tree:
        axes = _example_axes(in_dims, batch)
        leaves, spec = optree.tree_flatten(batch, none_is_leaf=True)
        total = next(leaf.shape[axis] for leaf, axis in zip(leaves, axes, strict=True) if axis is not None)
        if not total:  # many ops cannot have no examples at all: run one of zeros, and keep nothing of it
            ones = [
                leaf if axis is None else leaf.new_zeros([*leaf.shape[:axis], 1, *leaf.shape[axis + 1 :]])
                for leaf, axis in zip(leaves, axes, strict=True)
            ]
            one = losses(params, optree.tree_unflatten(spec, ones))
            return optree.tree_map(lambda leaf: leaf[:0], one)

        def of_chunk(start: int, count: int) -> Tree:
            with vmap_increment_nesting(count, randomness) as level:
                examples = [
                    leaf if axis is None else _add_batch_dim(leaf.narrow(axis, start, count), axis, level)
                    for leaf, axis in zip(leaves, axes, strict=True)
                ]
                value = _checked(loss(params, optree.tree_unflatten(spec, examples)))
                return optree.tree_map(lambda leaf: gathered(leaf, count, level), value)

        def together() -> Tree:
            lazy_load_decompositions()  # batching rules of some ops come with them
            # Dynamo itself, outside of a step, follows vmap but not the mode: attention is a loop there.
            with nullcontext() if torch.compiler.is_dynamo_compiling() else Batching():
                if chunk_size is None or chunk_size >= total:
                    return of_chunk(0, total)
                chunks = [of_chunk(i, min(chunk_size, total - i)) for i in range(0, total, chunk_size)]
                return optree.tree_map(lambda *parts: torch.cat(parts), *chunks)

        def one_by_one() -> Tree:
            before = random_state([])
            values = [
                _checked(loss(params, optree.tree_unflatten(spec, example)))
                for example in (
                    [leaf if axis is None else leaf.select(axis, i) for leaf, axis in zip(leaves, axes, strict=True)]
                    for i in range(total)
                )
            ]
            if randomness != "different" and not all(
                a.equal(b) for (_, a), (_, b) in zip(before, random_state([]), strict=True)
            ):
                raise InputError(
                    "per_example: the loss draws random numbers, and torch.func.vmap cannot run it, so that examples "
                    f"are taken one by one, each with numbers of its own. Pass randomness='different', found "
                    f"{randomness!r}."
                )
            return optree.tree_map(lambda *parts: torch.stack(parts), *values)

        if refused:
            return one_by_one()
        try:
            return together()
        except GhostError:
            raise
        except RuntimeError as error:
            if torch.compiler.is_compiling():
                raise
            reason = str(error).splitlines()[0]
            mode = watching()
            if mode is None or isinstance(mode, AsPython):
                found = one_by_one()
                refused.append(reason)
                log.warning("per_example: torch.func.vmap refuses the loss (%s): one example at a time.", reason)
                return found
            # The mode has seen ops of an attempt that failed.
            refused.append(reason)
            raise MismatchError(f"per_example: torch.func.vmap refuses the loss ({reason}).") from error

    return losses


def gathered(value: Tensor, count: int, level: int) -> Tensor:
    """The values of all examples [b, ...] from that of one, where a vmap ends; an op that modes see."""
    if has_torch_function((value,)):
        together: Tensor = handle_torch_function(gathered, (value,), value, count, level)
        return together
    examples: Tensor = _remove_batch_dim(value, level, count, 0)
    return examples


register_rule(gathered, linear="jointly")


def _example_axes(in_dims: Any, batch: Tree) -> list[int | None]:
    """The axis of the examples for each leaf of the batch, checked against the leaf."""
    try:
        dims = optree.broadcast_prefix(in_dims, batch, none_is_leaf=True)
    except ValueError as error:
        raise InputError(
            f"per_example: in_dims={in_dims!r} is not like the batch: {error} Give an int for all of it, or a tree of "
            "ints and None with the keys of the batch."
        ) from error
    paths, leaves, _ = optree.tree_flatten_with_accessor(batch, none_is_leaf=True)
    axes: list[Any] = [None if leaf is None else dim for dim, leaf in zip(dims, leaves, strict=True)]
    sizes: dict[str, int] = {}
    for path, leaf, axis in zip(paths, leaves, axes, strict=True):
        name = path.codify("batch")
        if axis is None:
            continue
        if type(axis) is not int:
            raise InputError(f"per_example: in_dims has {axis!r} for {name}. It must be an axis (an int) or None.")
        if not isinstance(leaf, Tensor):
            raise InputError(
                f"per_example: {name} is no tensor but of type {type(leaf).__name__}, and has no axis {axis} to take "
                "examples from. Make it a tensor, or pass in_dims with None for it if all examples share it."
            )
        if not -leaf.dim() <= axis < leaf.dim():
            raise InputError(
                f"per_example: {name} has shape {tuple(leaf.shape)}, and no axis {axis} to take examples from. "
                "Pass in_dims with the axis of its examples, or None for it if all examples share it."
            )
        sizes[f"{name} (axis {axis} of {tuple(leaf.shape)})"] = leaf.shape[axis]
    if not sizes:
        raise InputError(
            f"per_example: with in_dims={in_dims!r} nothing in the batch has an axis of examples. Pass in_dims with "
            "the axis of the examples for at least one tensor."
        )
    first, *others = sizes.values()
    if any(size != first for size in others):
        found = ", ".join(f"{size} in {name}" for name, size in sizes.items())
        raise InputError(
            f"per_example: the tensors of the batch differ in their number of examples: {found}. Pass in_dims with the "
            "axis of the examples for each, or None for what all examples share."
        )
    return [None if axis is None else axis % leaf.dim() for axis, leaf in zip(axes, leaves, strict=True)]


def _checked(value: Any) -> Any:
    """What the loss of an example returned, which must be a scalar, or a pair of one and a tree of tensors."""
    first = value[0] if isinstance(value, tuple) and len(value) == 2 else value
    if not isinstance(first, Tensor) or first.dim():
        found = f"shape {tuple(first.shape)}" if isinstance(first, Tensor) else type(first).__name__
        raise InputError(
            f"per_example: the loss of one example must be a scalar tensor, found {found}. Sum it or take its mean; "
            "if the loss itself added an axis of one, as by x[None], take [0]."
        )
    for leaf in optree.tree_leaves(value):
        if not isinstance(leaf, Tensor):
            raise InputError(f"per_example: aux must be a tree of tensors, found a leaf {type(leaf).__name__}.")
    return value
