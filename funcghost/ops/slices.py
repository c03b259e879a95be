"""Ops that are no products but treat each sample by itself: which axes of arguments and of outputs are the samples'."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import optree
from torch import Tensor

from funcghost.ops.products import bound
from funcghost.ops.tangent import Call, physical


class Slices(NamedTuple):
    """The axis of the samples in the tensors of some slots, and in each output."""

    axes: Mapping[int, int]
    outputs: tuple[int, ...]

    def of(self, leaves: Sequence[Any], sample: int) -> list[Any]:
        """The arguments of one sample, which is still an axis of length 1."""
        axes = self.axes
        return [leaf.narrow(axes[slot], sample, 1) if slot in axes else leaf for slot, leaf in enumerate(leaves)]


Slice = Callable[[Mapping[str, Any], Sequence[Any]], Slices | None]
"""From the slots of the arguments by name, and all arguments."""


def sliced(call: Call, names: Sequence[str], slices: Slice) -> Slices | None:
    """The axes of the samples in a call with arguments of these names."""
    tensors = [leaf for leaf in call.leaves if isinstance(leaf, Tensor)]
    if call.written or any(physical(leaf) is not leaf for leaf in tensors):
        return None
    return slices(bound(call, names, range(len(call.leaves))), call.leaves)


def in_front(*names: str, dims: int | None = None) -> Slice:
    """These arguments, of so many axes each, and the output have the samples in front."""

    def slices(slots: Mapping[str, Any], leaves: Sequence[Any]) -> Slices | None:
        given: Any = [slots[name] for name in names if name in slots]
        own: list[int] = optree.tree_leaves(given)
        if not own or any(leaves[slot].dim() != (dims or leaves[own[0]].dim()) for slot in own):
            return None
        return Slices(dict.fromkeys(own, 0), (0, 0))

    return slices
