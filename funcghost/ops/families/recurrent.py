"""Recurrent layers and cells: no products, but each sample by itself."""

from collections.abc import Mapping, Sequence
from typing import Any

import optree
import torch

from funcghost.ops.known import Slices, in_front, know


def _recurrent(slots: Mapping[str, Any], leaves: Sequence[Any]) -> Slices | None:
    """Samples are the first or second axis of sequences, and the second of states; where nothing is packed or drawn."""
    sequence, states = slots["input"], optree.tree_leaves(slots["hx"])
    if "batch_first" not in slots or any(leaves[slot].dim() != 3 for slot in (sequence, *states)):
        return None
    if leaves[slots["dropout"]] and leaves[slots["train"]]:
        return None
    axis = 0 if leaves[slots["batch_first"]] else 1
    return Slices({sequence: axis, **dict.fromkeys(states, 1)}, (axis, *(1 for _ in states)))


know(
    *(torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu),
    arguments=(
        *("input", "hx", "params", "has_biases", "num_layers"),
        *("dropout", "train", "bidirectional", "batch_first"),
    ),
    samples=_recurrent,
)
know(
    *(torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell),
    arguments=("input", "hx"),
    samples=in_front("input", "hx", dims=2),
)
