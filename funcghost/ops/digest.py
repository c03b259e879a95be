"""A running checksum of the ops a function runs, and their sizes, so that a plan is not used for another program.

It covers every op, not only those that parameters reach: whether `batch_norm` mixes the samples is a flag of an
op that may see no parameter at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import SymFloat, SymInt, Tensor
from torch.overrides import resolve_name

from funcghost.ops.values import Value

_T: Any = Tensor

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


SHAPED = frozenset(
    [
        *(_T.view, _T.reshape, _T.expand, _T.broadcast_to, _T.unflatten, _T.repeat, F.interpolate),
        *(_T.new_empty, _T.new_zeros, _T.new_ones, _T.new_full, torch.reshape, torch.broadcast_to, torch.unflatten),
        *(torch.empty, torch.zeros, torch.ones, torch.full, torch.eye, torch.rand, torch.randn, torch.arange),
    ]
)
"""Ops about whose numbers the shape of what comes out says all, as far as they stand in it."""
ENTRY_BY_ENTRY = frozenset(
    [
        *(_T.add, _T.sub, _T.mul, _T.div, _T.eq, _T.ne, _T.lt, _T.le, _T.gt, _T.ge, _T.__floordiv__, _T.__mod__),
        *(_T.__eq__, _T.__ne__, _T.__lt__, _T.__le__, _T.__gt__, _T.__ge__),
        *(_T.__radd__, _T.__rsub__, _T.__rmul__, _T.__rtruediv__),
    ]
)
"""Ops whose numbers are values, as those of a batch are: no sample goes elsewhere by them."""


@dataclass(frozen=True, eq=False)
class Sizes:
    """All sizes of a run, and the other whole numbers among the arguments of its ops.

    `numbers`: in the order in which they came.
    `fixed`: the places of those that may be more than sizes: which row is taken, how far is rolled.
    `checksum`: of all of them.
    """

    numbers: tuple[int, ...]
    fixed: tuple[int, ...]
    checksum: int


NO_SIZES = Sizes((), (), 0)


class Digest:
    """Of a run: a checksum of its ops, their flags and what goes into each; and all sizes.

    Sizes may differ from the plan's. Numbers are flags in so far as they are zero: a term with weight zero is none.
    While a compiler traces, sizes are symbols, which stand for those of the call that is traced.
    """

    def __init__(self, *, traced: bool = False) -> None:
        """Starts before the first op. `traced`: no size may be compared."""
        self.ops = self.count = 0
        self.traced = traced
        self.numbers = list[Any]()
        self.fixed = list[int]()

    def add(self, op: Any, leaves: Sequence[Any], values: Sequence[Value[Any] | None], returned: Any) -> None:
        """One more op, with the records of those leaves that are tensors.

        Questions such as `x.requires_grad` or `x.shape` are left out: profilers ask them, too.
        """
        if not isinstance(returned, Tensor) and op is not _T.__setitem__ and not _holds_tensors(returned):
            return
        flags: list[int] = [self.ops, _code(op), torch.is_grad_enabled()]
        numbers = self.numbers
        for leaf, value in zip(leaves, values, strict=True):
            if value is not None:
                numbers += leaf.shape
                numbers.append(leaf.dim())
                flags.append(value.number or self.number(value))
            elif isinstance(leaf, bool):
                flags.append(2 + leaf)
            elif isinstance(leaf, int | SymInt):
                shaped = op in SHAPED and not self.traced and leaf in returned.shape
                self._note(leaf, fixed=not shaped and op not in ENTRY_BY_ENTRY)
            elif isinstance(leaf, float | SymFloat):
                flags.append(bool(leaf == 0))
            elif isinstance(leaf, str):
                flags.append(_code(leaf))
            elif isinstance(leaf, slice):
                # What is left of the first entries says where they end.
                first = leaf.step is None and (leaf.start is None or (type(leaf.start) is int and not leaf.start))
                for end in (leaf.start, leaf.stop, leaf.step):
                    if isinstance(end, int | SymInt):
                        self._note(end, fixed=not first)
        # Hashes of tuples of numbers are the same in every process.
        self.ops = hash(tuple(flags))

    def _note(self, number: Any, fixed: bool) -> None:
        if fixed:
            self.fixed.append(len(self.numbers))
        self.numbers.append(number)

    def sizes(self) -> Sizes:
        """The sizes of all ops so far."""
        numbers = tuple([n if type(n) is int else _of_this_call(n) for n in self.numbers])
        return Sizes(numbers, tuple(self.fixed), hash(numbers))

    def number(self, value: Value[Any]) -> int:
        """Numbers a value, if it has no number yet: in the order in which they come."""
        if not value.number:
            self.count += 1
            value.number = self.count
        return value.number


def _of_this_call(size: Any) -> int:
    """The number that a symbol stands for in the call that is traced; -1 where there is none, or none yet.

    The symbols of ragged sizes of nested tensors stand for no number.
    """
    if isinstance(size, SymInt):
        known = hasattr(size.node, "has_hint") and size.node.has_hint()
        size = size.node.hint if known else None
    return size if isinstance(size, int) else -1


def _holds_tensors(returned: Any) -> bool:
    return isinstance(returned, tuple | list) and any(isinstance(value, Tensor) for value in returned)
