"""Running checksums of the ops a function runs, so that a plan is not used for another program.

The first covers every op, not only those that parameters reach: whether `batch_norm` mixes the samples is a flag of an
op that may see no parameter at all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Digest:
    """Two checksums of a run: of its ops and their flags, and of all sizes. Sizes may differ from the plan's."""

    ops: int = 0
    sizes: int = 0

    def after(self, op: Any, leaves: Sequence[Any], returned: Any) -> "Digest":
        """The checksums after one more op.

        Questions such as `x.requires_grad` or `x.shape` are left out: profilers ask them, too.
        """
        if not _gives_tensors(returned) and op is not Tensor.__setitem__:
            return self
        flags = [leaf for leaf in leaves if leaf is True or leaf is False or isinstance(leaf, str)]
        ops = crc32(f"{op_name(op)}{flags}{torch.is_grad_enabled()}".encode(), self.ops)
        return Digest(ops, hash((self.sizes, *_sizes(leaves))))


def _gives_tensors(returned: Any) -> bool:
    if isinstance(returned, tuple | list):
        return any(isinstance(value, Tensor) for value in returned)
    return isinstance(returned, Tensor)


def _sizes(leaves: Sequence[Any]) -> Iterator[Any]:
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            yield leaf.shape
        elif isinstance(leaf, slice):
            yield from (end for end in (leaf.start, leaf.stop, leaf.step) if type(end) is int)
        elif type(leaf) is int:
            yield leaf
