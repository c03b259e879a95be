"""Ops that are no products but treat each sample by itself: which axes of arguments and of outputs are the samples'."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import optree
import torch
import torch.nn.functional as F
from torch import Tensor

from funcghost.ops.products import bound
from funcghost.ops.rules import Op
from funcghost.ops.tangent import Call, physical


class Slices(NamedTuple):
    """The axis of the samples in the tensors of some slots, and in each output."""

    axes: Mapping[int, int]
    outputs: tuple[int, ...]

    def of(self, leaves: Sequence[Any], sample: int) -> list[Any]:
        """The arguments of one sample, which is still an axis of length 1."""
        axes = self.axes
        return [leaf.narrow(axes[slot], sample, 1) if slot in axes else leaf for slot, leaf in enumerate(leaves)]


Describe = Callable[[Mapping[str, Any], Sequence[Any]], Slices | None]
"""From the slots of the arguments by name, and all arguments."""


def slices_of(call: Call) -> Slices | None:
    """The axes of the samples in a call, if it is known to treat samples apart."""
    described = _SLICES.get(call.op)
    tensors = [leaf for leaf in call.leaves if isinstance(leaf, Tensor)]
    if described is None or call.written or any(physical(leaf) is not leaf for leaf in tensors):
        return None
    names, slices = described
    return slices(bound(call, names, range(len(call.leaves))), call.leaves)


def _in_front(*names: str, dims: int | None = None) -> Describe:
    """These arguments, of so many axes each, and the output have the samples in front."""

    def slices(slots: Mapping[str, Any], leaves: Sequence[Any]) -> Slices | None:
        given: Any = [slots[name] for name in names if name in slots]
        own: list[int] = optree.tree_leaves(given)
        if not own or any(leaves[slot].dim() != (dims or leaves[own[0]].dim()) for slot in own):
            return None
        return Slices(dict.fromkeys(own, 0), (0, 0))

    return slices


def _recurrent(slots: Mapping[str, Any], leaves: Sequence[Any]) -> Slices | None:
    """Samples are the first or second axis of sequences, and the second of states; where nothing is packed or drawn."""
    sequence, states = slots["input"], optree.tree_leaves(slots["hx"])
    if "batch_first" not in slots or any(leaves[slot].dim() != 3 for slot in (sequence, *states)):
        return None
    if leaves[slots["dropout"]] and leaves[slots["train"]]:
        return None
    axis = 0 if leaves[slots["batch_first"]] else 1
    return Slices({sequence: axis, **dict.fromkeys(states, 1)}, (axis, *(1 for _ in states)))


_RECURRENT = ("input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first")
_SLICES: dict[Op, tuple[tuple[str, ...], Describe]] = {
    F.bilinear: (("input1", "input2"), _in_front("input1", "input2")),
    F.conv_transpose1d: (("input",), _in_front("input", dims=3)),
    F.conv_transpose2d: (("input",), _in_front("input", dims=4)),
    F.conv_transpose3d: (("input",), _in_front("input", dims=5)),
    F.instance_norm: (("input",), _in_front("input")),
    F.prelu: (("input",), _in_front("input")),
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), (_RECURRENT, _recurrent)),
    **dict.fromkeys(
        (torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell),
        (("input", "hx"), _in_front("input", "hx", dims=2)),
    ),
}
