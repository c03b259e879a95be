"""Trees of tensors, keyed by parameter name, on top of optree."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import sha256
from typing import Any, NamedTuple, TypeAlias

import optree
import torch
from torch import Tensor

from funcghost.errors import InputError

Tree: TypeAlias = Any
"""Any nest of containers that optree knows, with tensors as leaves."""


class Params(NamedTuple):
    """A tree of parameters taken apart: one name and one tensor per leaf."""

    names: tuple[str, ...]
    leaves: tuple[Tensor, ...]
    spec: optree.PyTreeSpec

    def rebuild(self, leaves: Sequence[Tensor]) -> Tree:
        """The tree of the same structure with these leaves."""
        return optree.tree_unflatten(self.spec, leaves)

    def digest(self) -> str:
        """See `digest`."""
        return digest(self.names, self.leaves)


def digest(names: Sequence[str], leaves: Sequence[Tensor]) -> str:
    """Sixteen hexadecimal digits of tensors: their names, shapes, dtypes and every byte."""
    found = sha256()
    for name, leaf in zip(names, leaves, strict=True):
        found.update(f"{name} {tuple(leaf.shape)} {leaf.dtype}\n".encode())
        flat = leaf.detach().to_dense() if leaf.layout != torch.strided else leaf.detach()
        found.update(flat.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def named_leaves(tree: Tree) -> tuple[tuple[str, ...], list[Any], optree.PyTreeSpec]:
    """The names of a tree's leaves, the leaves, and the structure."""
    leaves, spec = optree.tree_flatten(tree)
    return _names(spec), leaves, spec


@lru_cache(1024)
def _names(spec: optree.PyTreeSpec) -> tuple[str, ...]:
    return tuple(".".join(map(str, path)) or "<root>" for path in spec.paths())


_REAL = {
    False: "Only such tensors have gradients here: close over the others instead of passing them as parameters.",
    True: "Pass torch.view_as_real(w) in place of it, and take torch.view_as_complex(params[..]) in the losses.",
}


def split_params(tree: Tree) -> Params:
    """Takes a tree of parameters apart; every leaf must be a real floating-point tensor."""
    if isinstance(tree, Iterator | torch.nn.Module):
        own = "model" if isinstance(tree, torch.nn.Module) else "model.named_parameters()"
        raise InputError(
            f"params: must be a tree of tensors, found {type(tree).__name__}. Pass dict(model.named_parameters()), and "
            f"not {own} itself."
        )
    names, leaves, spec = named_leaves(tree)
    if not leaves:
        raise InputError(
            "params: the tree has no leaves. Pass at least one parameter, e.g. dict(model.named_parameters())."
        )
    for name, leaf in zip(names, leaves, strict=True):
        if not isinstance(leaf, Tensor):
            named = isinstance(leaf, str) and isinstance(tree, list)
            remedy = "Make a dict of the list of pairs." if named else "Leave it out of params."
            raise InputError(f"params[{name!r}] must be a tensor, found {type(leaf).__name__}. {remedy}")
        if not leaf.is_floating_point():
            raise InputError(
                f"params[{name!r}] must have a real floating-point dtype, found {leaf.dtype}. "
                + _REAL[leaf.is_complex()]
            )
        if isinstance(leaf, torch.nn.Parameter) and not leaf.requires_grad:
            raise InputError(
                f"params[{name!r}] is a frozen parameter (requires_grad=False), whose gradient would be counted in "
                "scores and norms. Pass fg.trainable(model): the losses take the frozen ones from the model. If its "
                f"gradients are meant, pass it as a plain tensor, params[{name!r}].detach()."
            )
    if len(set(map(id, leaves))) != len(leaves):
        first: dict[object, str] = {}
        for name, leaf in zip(names, leaves, strict=True):
            if (twin := first.setdefault(id(leaf), name)) != name:
                raise InputError(
                    f"params[{name!r}] and params[{twin!r}] are the same tensor object. Pass a tied parameter once, "
                    "as model.named_parameters() does; every use of it is counted."
                )
    if len(set(names)) != len(names):
        raise InputError(
            f"params: two leaves have the same name among {names}. Rename the keys so that their paths differ."
        )
    return Params(names, tuple(leaves), spec)


def is_distributed(leaf: Any) -> bool:
    """Whether a tensor is a DTensor, which ranks have shares of; without the import of what can make one."""
    return type(leaf) not in (Tensor, torch.nn.Parameter) and any(
        kind.__name__ == "DTensor" and kind.__module__.startswith("torch.distributed") for kind in type(leaf).__mro__
    )


def gathered(value: Tensor) -> Tensor:
    """Of a DTensor what its ranks have together, which takes them a message; any other tensor as it is."""
    whole: Tensor = value.full_tensor() if is_distributed(value) else value  # type: ignore[attr-defined]
    return whole


def as_whole(value: Tensor) -> Tensor:
    """All of a tensor, dense."""
    return gathered(value).to_dense()


def check_whole(params: Params) -> None:
    """No parameter may lie on several ranks in parts.

    Raises:
        InputError: naming a parameter that does.
    """
    for name, leaf in zip(params.names, params.leaves, strict=True):
        if is_distributed(leaf):
            raise InputError(
                f"params[{name!r}] is a DTensor, which lies on several ranks, and its gradient may be a part of a sum, "
                "or the same on some of them. Of a model under fully_shard pass these very parameters to "
                "funcghost.distributed.sharded, of one under parallelize_module, or of a function of your own, to "
                "funcghost.distributed.tensor_parallel."
            )


def match_direction(direction: Tree, params: Params, what: str = "direction") -> list[Tensor]:
    """The leaves of a direction, checked against the parameters they belong to."""
    names, found_leaves, _ = named_leaves(direction)
    found = dict(zip(names, found_leaves, strict=True))
    if found.keys() != set(params.names):
        missing = [n for n in params.names if n not in found]
        extra = [n for n in names if n not in params.names]
        raise InputError(
            f"{what}: must be a tree like params; missing leaves {missing[:5]}, unexpected leaves {extra[:5]}. "
            f"Give every parameter a leaf (zeros where the direction is zero). params has {len(params.names)} leaves, "
            f"such as {list(params.names[:3])}: if those are not meant, it is params that is wrong."
        )
    leaves = [found[name] for name in params.names]
    for name, leaf, param in zip(params.names, leaves, params.leaves, strict=True):
        if not isinstance(leaf, Tensor):
            raise InputError(f"{what}[{name!r}] must be a tensor, found {type(leaf).__name__}.")
        for trait in ("shape", "dtype", "device", "layout"):
            is_, wanted = getattr(leaf, trait), getattr(param, trait)
            if is_ != wanted:
                raise InputError(
                    f"{what}[{name!r}]: {trait} must be that of the parameter, {_show(wanted)}, found {_show(is_)}. "
                    "Convert it; funcghost casts and moves nothing on its own."
                )
    return leaves


def _show(trait: torch.Size | torch.dtype | torch.device | torch.layout) -> str:
    return str(tuple(trait)) if isinstance(trait, torch.Size) else str(trait)


def tensors(tree: Tree) -> list[Tensor]:
    """The tensor leaves of any tree."""
    return [leaf for leaf in optree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def in_short(record: Any) -> str:
    """The fields of a named tuple, with tensors by dtype and shape, and trees by the number of their leaves."""

    def short(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        leaves = optree.tree_leaves(value)
        if not leaves or leaves[0] is value:
            return type(value).__name__ if leaves else "None" if value is None else repr(value)
        return f"{type(value).__name__} of {len(leaves)}" if len(leaves) > 4 else str(optree.tree_map(_Word, value))

    class _Word:
        def __init__(self, leaf: Any) -> None:
            self.leaf = leaf

        def __repr__(self) -> str:
            return short(self.leaf)

    fields = (f"{name}={short(value)}" for name, value in zip(record._fields, record, strict=True))
    return f"{type(record).__name__}({', '.join(fields)})"
