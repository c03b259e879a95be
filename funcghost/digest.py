"""Running checksums of the ops a function runs, so that a plan is not used for another program.

The first covers every op, not only those that parameters reach: whether `batch_norm` mixes the samples is a flag of an
op that may see no parameter at all.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor
from torch.overrides import resolve_name

_names: dict[Any, str] = {}
_codes: dict[Any, int] = {}


def op_name(op: Any) -> str:
    """The name under which users know an op."""
    name = _names.get(op)
    if name is None:
        name = _names[op] = resolve_name(op) or getattr(op, "__qualname__", repr(op))
    return name


def _code(text: Any) -> int:
    """A number for an op or a string, the same in every process."""
    code = _codes.get(text)
    if code is None:
        code = _codes[text] = crc32((text if isinstance(text, str) else op_name(text)).encode())
    return code


class Digest(NamedTuple):
    """Two checksums of a run: of its ops and their flags, and of all sizes. Sizes may differ from the plan's."""

    ops: int = 0
    sizes: int = 0

    def after(self, op: Any, leaves: Sequence[Any], returned: Any) -> "Digest":
        """The checksums after one more op.

        Questions such as `x.requires_grad` or `x.shape` are left out: profilers ask them, too.
        """
        if not isinstance(returned, Tensor) and op is not Tensor.__setitem__ and not _holds_tensors(returned):
            return self
        flags: list[int] = [self.ops, _code(op), torch.is_grad_enabled()]
        sizes: list[Any] = [self.sizes]
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                sizes.append(leaf.shape)
            elif isinstance(leaf, bool):
                flags.append(2 + leaf)
            elif isinstance(leaf, int):
                sizes.append(leaf)
            elif isinstance(leaf, str):
                flags.append(_code(leaf))
            elif isinstance(leaf, slice):
                sizes.extend(end for end in (leaf.start, leaf.stop, leaf.step) if type(end) is int)
        # Hashes of tuples of numbers are the same in every process.
        return Digest(hash(tuple(flags)), hash(tuple(sizes)))


def _holds_tensors(returned: Any) -> bool:
    return isinstance(returned, tuple | list) and any(isinstance(value, Tensor) for value in returned)
