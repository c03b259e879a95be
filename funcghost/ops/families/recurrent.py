"""Recurrent layers and cells: no products, but each sample by itself."""

from collections.abc import Mapping, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from funcghost.ops.call import Call
from funcghost.ops.known import Slices, in_front, know
from funcghost.ops.recurrence import Kind, sequences_of
from funcghost.ops.rules import Op

KINDS: dict[Op, Kind] = {torch.lstm: "lstm", torch.gru: "gru", torch.rnn_tanh: "tanh", torch.rnn_relu: "relu"}
_SETTINGS = ("params", "has_biases", "num_layers", "dropout", "train", "bidirectional")
PADDED, PACKED = ("input", "hx", *_SETTINGS, "batch_first"), ("input", "batch_sizes", "hx", *_SETTINGS)
"""The arguments of a recurrent layer, of sequences of one length and of packed ones."""


def _padded(
    data: Tensor, batch_sizes: Tensor, batch_first: bool, padding_value: float, total_length: int
) -> tuple[Tensor, Tensor]:
    """With zeros, whatever it is that a sequence is padded with."""
    found: tuple[Tensor, Tensor] = torch._VF._pad_packed_sequence(data, batch_sizes, batch_first, 0.0, total_length)
    return found


def arguments_of(call: Call) -> tuple[str, ...]:
    """The names of the arguments of a call of a recurrent layer: the packed one has its batch sizes in second place."""
    second = call.leaves[1]
    return PACKED if isinstance(second, Tensor) and not second.is_floating_point() else PADDED


def _through(data: Tensor, batch_sizes: Any, hx: Any, *others: Any) -> tuple[Tensor, ...]:
    """Of packed sequences: every row and state has what is in any row of its sequence, and in its states."""
    if not isinstance(batch_sizes, Tensor) or batch_sizes.is_floating_point():
        raise RuntimeError("the sequences are not packed")
    states = [hx] if isinstance(hx, Tensor) else list(hx)
    sequence = sequences_of(batch_sizes, len(data)).to(data.device)
    whole = data[:, :1].new_zeros(states[0].shape[1], 1).index_add(0, sequence, data[:, :1])
    for state in states:
        whole = whole + state[..., :1].sum(0)
    return whole[sequence], *(whole.expand(len(state), -1, -1) for state in states)


ALIKE: dict[Op, Op] = {
    torch._VF._pad_packed_sequence: _padded,
    **dict.fromkeys(KINDS, _through),
}
"""Ops, by others that bring samples to where they do, and compute nothing."""


def _recurrent(slots: Mapping[str, Any], leaves: Sequence[Any]) -> Slices | None:
    """Samples are the first or second axis of sequences, and the second of states; where nothing is packed or drawn."""
    sequence, states = slots["input"], optree.tree_leaves(slots["hx"])
    if "batch_first" not in slots or any(leaves[slot].dim() != 3 for slot in (sequence, *states)):
        return None
    if leaves[slots["dropout"]] and leaves[slots["train"]]:
        return None
    axis = 0 if leaves[slots["batch_first"]] else 1
    return Slices({sequence: axis, **dict.fromkeys(states, 1)}, (axis, *(1 for _ in states)))


know(*KINDS, arguments=PADDED, samples=_recurrent)
know(
    *(torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell),
    arguments=("input", "hx"),
    samples=in_front("input", "hx", dims=2),
)
