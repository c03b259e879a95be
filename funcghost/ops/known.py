"""What is known of ops besides the rules that users may add to: filled family by family in `funcghost.ops.families`.

Nothing here is needed for a right result, it saves work: an op that is not known is differentiated.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import optree
import torch
from torch import Tensor

from funcghost.ops.call import Call, physical
from funcghost.ops.products import Describe, Description, bound
from funcghost.ops.rules import Arguments, Op, register_rule


class Slices(NamedTuple):
    """The axis of the samples in the tensors of some slots, and in each output."""

    axes: Mapping[int, int]
    outputs: tuple[int, ...]

    def of(self, leaves: Sequence[Any], sample: int, batch: int) -> list[Any]:
        """The arguments of one sample: its index or its run of indices, still an axis."""
        axes = self.axes
        return [of_one(leaf, axes[slot], sample, batch) if slot in axes else leaf for slot, leaf in enumerate(leaves)]


def of_one(value: Tensor, axis: int, sample: int, batch: int) -> Tensor:
    """What belongs to a sample along an axis of the samples, each of which may have several indices on end."""
    length = value.shape[axis] // batch
    return value.narrow(axis, sample * length, length)


Slice = Callable[[Mapping[str, Any], Sequence[Any]], Slices | None]
"""From the slots of the arguments by name, and all arguments."""


Derivative = Callable[[Arguments, Mapping[str, Tensor]], Tensor]
"""`J V` of an op with one output, from its arguments and from the tangents of some of them, by name."""


class Known(NamedTuple):
    """What is known of an op.

    `arguments`: the names of the arguments in their order.
    `product`: describes a call as a product, or as a lookup in a table.
    `samples`: says which axes of a call are the samples', where it treats each by itself.
    `derivative`: gives `J V` where no rule of linearity does, for less than torch's forward derivative.
    """

    arguments: tuple[str, ...]
    product: Describe | None
    samples: Slice | None
    derivative: Derivative | None


_KNOWN: dict[Op, Known] = {}


def know(
    *ops: Op,
    arguments: Sequence[str] = (),
    linear: Literal["each", "jointly"] | Sequence[Sequence[str]] | None = None,
    when: Callable[[Arguments], bool] | None = None,
    factor: Callable[[Arguments], Any] | None = None,
    product: Describe | None = None,
    samples: Slice | None = None,
    derivative: Derivative | None = None,
) -> None:
    """States what is known of some ops: `linear`, `when` and `factor` as in `fg.register_rule`, the others in `Known`.

    The names of the arguments are read from the signature where none are given.
    """
    for op in ops:
        if linear is not None:
            register_rule(op, linear=linear, arguments=arguments or None, when=when, factor=factor)
        if product is not None or samples is not None or derivative is not None:
            names = tuple(arguments or inspect.signature(op).parameters)
            _KNOWN[op] = Known(names, product, samples, derivative)


def description(op: Op) -> Description | None:
    """What describes an op as a product, if anything does."""
    known = _KNOWN.get(op)
    return None if known is None or known.product is None else (known.arguments, known.product)


def derivative_of(op: Op) -> tuple[tuple[str, ...], Derivative] | None:
    """The names of an op's arguments and its derivative, if it is known."""
    known = _KNOWN.get(op)
    return None if known is None or known.derivative is None else (known.arguments, known.derivative)


def slices_of(call: Call) -> Slices | None:
    """The axes of the samples in a call, if it is known to treat samples apart."""
    known = _KNOWN.get(call.op)
    tensors = [leaf for leaf in call.leaves if isinstance(leaf, Tensor)]
    if known is None or known.samples is None or call.written or any(physical(leaf) is not leaf for leaf in tensors):
        return None
    return known.samples(bound(call, known.arguments, range(len(call.leaves))), call.leaves)


def named(*names: str) -> frozenset[Op]:
    """The ops of these names, as functions and as methods, out of place and in place."""
    return frozenset(
        getattr(owner, name + suffix)
        for name in names
        for owner in (torch, Tensor)
        for suffix in ("", "_")
        if hasattr(owner, name + suffix)
    )


def in_front(*names: str, dims: int | None = None) -> Slice:
    """These arguments, of so many axes each, and the output have the samples in front."""

    def slices(slots: Mapping[str, Any], leaves: Sequence[Any]) -> Slices | None:
        given: Any = [slots[name] for name in names if name in slots]
        own: list[int] = optree.tree_leaves(given)
        if not own or any(leaves[slot].dim() != (dims or leaves[own[0]].dim()) for slot in own):
            return None
        return Slices(dict.fromkeys(own, 0), (0, 0))

    return slices
