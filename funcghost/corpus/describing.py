"""What numbers follow from, as JSON: fingerprints of parameters, losses and reducers."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from hashlib import sha256
from typing import Any

import optree
from torch import Tensor, nn

from funcghost.algebra.directions import LowRank
from funcghost.attribution.features import Features
from funcghost.errors import InputError
from funcghost.reducers.bases import Reducer
from funcghost.store.manifest import JSON
from funcghost.trees import Params, Tree, digest, named_leaves

SHORT = 16


def of_tree(tree: Tree) -> str:
    """A digest of a tree of tensors, low-rank leaves included."""
    names, leaves, _ = named_leaves(tree)
    flat: list[tuple[str, Tensor]] = []
    for name, leaf in zip(names, leaves, strict=True):
        flat += (
            [(f"{name}.rows", leaf.rows), (f"{name}.cols", leaf.cols)] if isinstance(leaf, LowRank) else [(name, leaf)]
        )
    return digest([name for name, _ in flat], [leaf for _, leaf in flat])


def of_params(params: Params) -> JSON:
    """Parameters: a digest, how many numbers, and in how many leaves."""
    count = sum(leaf.numel() for leaf in params.leaves)
    return {"digest": params.digest(), "count": count, "leaves": len(params.names)}


def of_reducers(reducers: Tree) -> JSON:
    """For each reducer by its name what it is, seeds and all.

    Raises:
        InputError: one of them holds something that is no number, name or tensor.
    """
    leaves, spec = optree.tree_flatten(reducers, is_leaf=lambda node: isinstance(node, Reducer))
    names = [".".join(map(str, path)) or "value" for path in spec.paths()]
    return {name: _of_value(leaf, name) for name, leaf in zip(names, leaves, strict=True)}


def of_features(features: Features) -> JSON:
    """What features are, seeds and all.

    Raises:
        InputError: they hold something that is no number, name or tensor.
    """
    return _of_value(features, type(features).__name__)


def _of_value(value: Any, where: str) -> JSON:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, frozenset):
        return sorted(map(str, value))
    if isinstance(value, Reducer) or (is_dataclass(value) and not isinstance(value, LowRank)):
        if not is_dataclass(value):
            raise InputError(f"reducers[{where!r}]: must be a dataclass to be described, found {type(value).__name__}.")
        inside = {field.name: _of_value(getattr(value, field.name), where) for field in fields(value) if field.repr}
        return {"type": type(value).__name__, **inside}
    if isinstance(value, tuple):
        return [_of_value(item, where) for item in value]
    leaves = optree.tree_leaves(value)
    if leaves and all(isinstance(leaf, Tensor | LowRank) for leaf in leaves):
        return {"tensors": of_tree(value)}
    if leaves and isinstance(value, Mapping):
        return {str(name): _of_value(item, where) for name, item in value.items()}
    raise InputError(f"reducers[{where!r}]: holds {type(value).__name__}, which cannot be described in a manifest.")


def of_function(function: Callable[..., Any]) -> JSON:
    """The name of a function and a digest of its source, and of the source of what it closes over."""
    while isinstance(function, functools.partial):
        function = function.func
    sources = [_source(function)]
    for cell in getattr(function, "__closure__", None) or ():
        inside = cell.cell_contents
        if isinstance(inside, nn.Module):
            sources += [_source(kind) for kind in {type(module): None for module in inside.modules()}]
            sources.append(repr(inside))
        elif callable(inside):
            sources.append(_source(inside))
    named = function if hasattr(function, "__qualname__") else type(function)
    digest = sha256("\n".join(sources).encode()).hexdigest()[:SHORT]
    return {"name": named.__qualname__, "source": digest}  # the module of a script is __main__, or not


def _source(value: Any) -> str:
    if inspect.isroutine(value):
        return _read(value)
    kind: Any = value if inspect.isclass(value) else type(value)
    return _of_class(kind)


@functools.cache
def _of_class(kind: type) -> str:
    """That of a class, for which Python reads all of its file: once is enough."""
    return _read(kind)


def _read(value: Any) -> str:
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):
        return "unknown"
