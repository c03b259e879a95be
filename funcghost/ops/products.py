"""Ops as products: which axes of a parameter meet which axes of the other argument and of the output.

Every linear use of a parameter is an einsum, `out = sum coefficient * param`: a linear layer, a convolution over
patches, a norm's scale over normalised values, a shift with nothing. From the letters alone follows the factored form
of the per-sample gradients (see `funcghost.ops.uses`). A description is never needed for a right result: it saves work.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from funcghost.ops.call import Call, is_float

Letter = int | str
Letters = tuple[Letter | None, ...]
"""The name of each axis; None for one of size 1 that is broadcast."""
Values = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True, eq=False)
class Product:
    """`out = scale * sum coefficient * param`.

    `param`, `coefficient`, `out`: the letters of the axes of each.
    `needed`: the slots of the tensors that the coefficient is made of.
    `values`: gives it from these; without one (None) it is 1.
    `groups`: if above 1, an axis of the output and the first of the parameter are each two: groups, what is in them.
    `base`: the sizes of the parameter's axes then.
    `gradients`: gives the per-sample gradients themselves, samples in front, from these tensors and the output's.
    """

    param: Letters
    coefficient: Letters
    out: Letters
    needed: tuple[int, ...] = ()
    values: Values | None = None
    scale: float = 1.0
    groups: int = 1
    base: tuple[int, ...] | None = None
    gradients: Callable[[Sequence[Tensor], Tensor], Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Table:
    """`out[t] = scale[t] * param[index[t]]`.

    `needed`: the slots of the tensors that the index and the scale are made of.
    `places`: how many axes the index has.
    `values`: gives the index, and the scale if there is one, from these tensors.
    `summed`: whether the output is the sum over the last of the places; then there is a scale.
    `ragged`: whether it is that over some of the places, on one axis; then the `values` also give the place in the
    output of each, behind the scale.
    """

    needed: tuple[int, ...]
    places: int
    values: Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
    summed: bool = False
    ragged: bool = False


Arguments = Mapping[str, Any]
Describe = Callable[[Call, dict[str, int], Arguments, str], Product | Table | None]
Description = tuple[tuple[str, ...], Describe]
"""The names of an op's arguments, and what describes a call of it."""


def describe(call: Call, described: Description, slot: int) -> Product | Table | None:
    """The op as a product with the argument in the slot, if it is one."""
    if slot in call.written or not _plain(call):
        return None
    names, product = described
    slots = bound(call, names, range(len(call.leaves)))
    name = next((name for name, where in slots.items() if type(where) is int and where == slot), None)
    if name is None:
        return None
    try:
        return product(call, slots, bound(call, names, call.leaves), name)
    except KeyError:  # an argument has another name
        return None


def bound(call: Call, names: Sequence[str], leaves: Sequence[Any]) -> dict[str, Any]:
    """Arguments by name."""
    args, kwargs = optree.tree_unflatten(call.spec, leaves)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _plain(call: Call) -> bool:
    """Whether all is real and of one kind, and nothing is written to."""
    floats = [leaf for leaf in call.leaves if is_float(leaf)]
    return not call.written and not any(leaf.is_complex() or leaf.layout is not torch.strided for leaf in floats)


def spread(letters: Letters, tensor: Tensor, sizes: dict[Letter, int]) -> Letters:
    """The letters without those of axes of size 1 that are broadcast to another size."""
    pairs = zip(letters, tensor.shape, strict=True)
    return tuple(None if size == 1 and letter in sizes and sizes[letter] != 1 else letter for letter, size in pairs)


def sizes_of(*operands: tuple[Letters, Tensor]) -> dict[Letter, int]:
    """How far each axis goes; 0 where one is empty."""
    found: dict[Letter, int] = {}
    for letters, tensor in operands:
        for letter, size in zip(letters, tensor.shape, strict=True):
            if letter is not None:
                found[letter] = max(found.get(letter, 1), size) if size else 0
    return found


def product_of_two(
    slots: dict[str, int],
    first: tuple[str, Letters, Tensor],
    second: tuple[str, Letters, Tensor],
    out: Letters,
    name: str,
    scale: float = 1.0,
) -> Product | None:
    """A product of two tensors, as one in the one of this name."""
    own, other = (first, second) if name == first[0] else (second, first)
    sizes = sizes_of(first[1:], second[1:])
    if 0 in sizes.values():
        return None
    param, coefficient = spread(own[1], own[2], sizes), spread(other[1], other[2], sizes)
    return Product(param, coefficient, out, (slots[other[0]],), itself, scale)


def itself(saved: Sequence[Tensor]) -> Tensor:
    """The other tensor of a product of two, as it is."""
    return saved[0]


def from_right(dims: int) -> Letters:
    """Axes counted from the last."""
    return tuple(range(-dims, 0))
