"""Running checksums of the ops a function runs, so that a plan is not used for another program.

The first covers every op, not only those that parameters reach: whether `batch_norm` mixes the samples is a flag of an
op that may see no parameter at all.
"""

from collections.abc import Sequence
from typing import Any
from zlib import crc32

import torch
from torch import SymFloat, SymInt, Tensor
from torch.overrides import resolve_name

from funcghost.ops.values import Value

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


class Digest:
    """Two checksums of a run: of its ops, their flags and what goes into each, and of all sizes.

    Sizes may differ from the plan's. Numbers are flags in so far as they are zero: a term with weight zero is none.
    While a compiler traces, sizes are symbols, which stand for those of the call that is traced.
    """

    def __init__(self) -> None:
        """Starts before the first op."""
        self.ops = self.sizes = self.count = 0

    def add(self, op: Any, leaves: Sequence[Any], values: Sequence[Value[Any] | None], returned: Any) -> None:
        """One more op, with the records of those leaves that are tensors.

        Questions such as `x.requires_grad` or `x.shape` are left out: profilers ask them, too.
        """
        if not isinstance(returned, Tensor) and op is not Tensor.__setitem__ and not _holds_tensors(returned):
            return
        flags: list[int] = [self.ops, _code(op), torch.is_grad_enabled()]
        sizes: list[Any] = [self.sizes]
        for leaf, value in zip(leaves, values, strict=True):
            if value is not None:
                sizes.append(leaf.shape)
                flags.append(value.number or self.number(value))
            elif isinstance(leaf, bool):
                flags.append(2 + leaf)
            elif isinstance(leaf, int | SymInt):
                sizes.append(leaf)
            elif isinstance(leaf, float | SymFloat):
                flags.append(bool(leaf == 0))
            elif isinstance(leaf, str):
                flags.append(_code(leaf))
            elif isinstance(leaf, slice):
                sizes.extend(end for end in (leaf.start, leaf.stop, leaf.step) if isinstance(end, int | SymInt))
        # Hashes of tuples of numbers are the same in every process.
        self.ops = hash(tuple(flags))
        try:
            self.sizes = hash(tuple(sizes))
        except TypeError:  # symbols
            self.sizes = hash(tuple(map(_of_this_call, sizes)))

    def number(self, value: Value[Any]) -> int:
        """Numbers a value, if it has no number yet: in the order in which they come."""
        if not value.number:
            self.count += 1
            value.number = self.count
        return value.number


def _of_this_call(size: Any) -> Any:
    """The numbers that symbols stand for in the call that is traced; None where that is not known yet."""
    if isinstance(size, SymInt):
        return size.node.hint if size.node.has_hint() else None
    return tuple(map(_of_this_call, size)) if isinstance(size, tuple) else size


def _holds_tensors(returned: Any) -> bool:
    return isinstance(returned, tuple | list) and any(isinstance(value, Tensor) for value in returned)
