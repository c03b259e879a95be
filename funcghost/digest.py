"""A running checksum of the ops a function runs, so that a plan is not used for another program.

It covers every op, not only those that parameters reach: whether `batch_norm` mixes the samples is a flag of an op
that may see no parameter at all.
"""

from collections.abc import Sequence
from typing import Any
from zlib import crc32

import torch
from torch import Tensor
from torch.overrides import resolve_name

_names: dict[Any, str] = {}


def op_name(op: Any) -> str:
    """The name under which users know an op."""
    name = _names.get(op)
    if name is None:
        name = _names[op] = resolve_name(op) or getattr(op, "__qualname__", repr(op))
    return name


def fold(digest: int, op: Any, leaves: Sequence[Any], returned: Any) -> int:
    """The checksum after one more op: its name, its flags, and whether gradients are recorded.

    Questions such as `x.requires_grad` or `x.shape` are left out: profilers ask them, too.
    """
    if not isinstance(returned, Tensor | tuple | list) and op is not Tensor.__setitem__:
        return digest
    if isinstance(returned, tuple | list) and not any(isinstance(value, Tensor) for value in returned):
        return digest
    flags = [leaf for leaf in leaves if leaf is True or leaf is False or isinstance(leaf, str)]
    return crc32(f"{op_name(op)}{flags}{torch.is_grad_enabled()}".encode(), digest)
