"""Measuring: one forward that follows everything computed from parameters, then a few backwards over its graph.

Every op downstream of a parameter is recorded with the gradients of its outputs. From these the layouts follow,
and from the layouts, in one walk, the sites: where a score is tapped and where a tangent is carried on.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from funcghost.digest import fold, op_name
from funcghost.errors import UnsupportedOpError
from funcghost.layout import Clock, Meter
from funcghost.plans import Action, OutputLayout, Site
from funcghost.state import random_state
from funcghost.tangent import flatten_call, outputs
from funcghost.tap import Observe


@dataclass(frozen=True, eq=False)
class Output:
    """One output of a recorded op. `value` is its number, None if it has no derivative."""

    value: int | None
    shape: tuple[int, ...]
    meter: Meter | None = None


@dataclass(frozen=True, eq=False)
class Record:
    """One op downstream of a parameter: the numbers of the values in its slots, and what came out.

    `fixed`: computed from parameters alone. `bound`: an output shares memory with an input (a view, or the result
    of an op in place), so it cannot be put behind a tap.
    """

    op: str
    inputs: dict[int, int]
    outputs: tuple[Output, ...]
    written: tuple[int, ...]
    fixed: bool
    bound: bool
    random: bool


class Trace(TorchFunctionMode):
    """Records what is computed from the parameters while the losses run."""

    def __init__(self, params: Sequence[Tensor], names: Sequence[str], batch: Sequence[Tensor], clock: Clock) -> None:
        super().__init__()
        self.memory = {param.untyped_storage()._cdata: name for param, name in zip(params, names, strict=True)}
        self.clock = clock
        self.records: list[Record] = []
        self.values = {id(param): number for number, param in enumerate(params)}
        self.count = len(params)
        self.digest = 0
        self.fixed = set(range(len(params)))
        self.seen: dict[int, Tensor] = {id(t): t for t in (*params, *batch)}
        self.dtypes = {param.dtype for param in params}
        self.foreign: dict[int, weakref.ref[Tensor]] = {}

    def __torch_function__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the op as it is and notes what went in and came out."""
        kwargs = kwargs or {}
        leaves, _ = flatten_call(args, kwargs)
        given = {slot: leaf for slot, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        for leaf in given.values():
            if id(leaf) not in self.seen and not torch._C._functorch.is_functorch_wrapped_tensor(leaf):
                self.foreign.setdefault(id(leaf), weakref.ref(leaf))
        inputs = {slot: self.values[id(leaf)] for slot, leaf in given.items() if id(leaf) in self.values}
        if not inputs or not torch.is_grad_enabled():
            returned = op(*args, **kwargs)
            self.digest = fold(self.digest, op, leaves, returned)
            return self._keep(returned)
        versions = {slot: leaf._version for slot, leaf in given.items() if not leaf.is_inference()}
        devices = list({leaf.device for leaf in given.values()})
        before = random_state(devices)
        returned = op(*args, **kwargs)
        self.digest = fold(self.digest, op, leaves, returned)
        written = tuple(slot for slot, version in versions.items() if given[slot]._version != version)
        self._refuse_writes(op, [given[slot] for slot in written])
        drew = any(not a.equal(b) for (_, a), (_, b) in zip(before, random_state(devices), strict=True))
        found = outputs(returned, [given[slot] for slot in written])
        if all(any(value is leaf for leaf in given.values()) for value in found) and not written:
            return returned
        return self._keep(self._record(op, given, inputs, written, found, returned, drew))

    def _record(
        self,
        op: Any,
        given: dict[int, Tensor],
        inputs: dict[int, int],
        written: tuple[int, ...],
        found: tuple[Tensor, ...],
        returned: Any,
        drew: bool,
    ) -> Any:
        fixed = len(inputs) == len(given) and self.fixed.issuperset(inputs.values())
        smooth = [value for value in found if physical(value).requires_grad]
        memory = {physical(leaf).untyped_storage()._cdata for leaf in given.values()}
        bound = any(physical(v).untyped_storage()._cdata in memory for v in smooth)
        outs, replaced = [], {}
        for value in found:
            if not physical(value).requires_grad:
                self.values.pop(id(value), None)
                outs.append(Output(None, tuple(value.shape)))
                continue
            self.dtypes.add(value.dtype)
            meter = None if fixed or bound else Meter(self.clock)
            original = id(value)
            if meter is not None and physical(value) is not value:
                value = replaced[original] = Observe.apply(meter.see, value)
            elif meter is not None:
                value.register_hook(meter.see)
            self.values[id(value)] = self.count
            self.seen[id(value)] = value
            outs.append(Output(self.count, tuple(value.shape), meter))
            if fixed:
                self.fixed.add(self.count)
            self.count += 1
        self.records.append(Record(op_name(op), inputs, tuple(outs), written, fixed, bound, drew))
        return swap(returned, replaced) if replaced else returned

    def _refuse_writes(self, op: Any, written: Sequence[Tensor]) -> None:
        for value in written:
            name = self.memory.get(physical(value).untyped_storage()._cdata)
            if name is not None:
                raise UnsupportedOpError(
                    f"parameter {name!r} is written to by {op_name(op)} inside the losses (embeddings do so with "
                    "max_norm). Losses must leave params as they are: change the parameter before the step."
                )

    def _keep(self, returned: Any) -> Any:
        """Holds on to what an op returned, since a dead tensor's id may come again."""
        for leaf in optree.tree_leaves(returned):
            if isinstance(leaf, Tensor):
                self.seen[id(leaf)] = leaf
        return returned

    def captured(self) -> tuple[Tensor, ...]:
        """The tensors of the user that went into ops without being parameters or batch: buffers, constants."""
        self.seen.clear()
        alive = (reference() for reference in self.foreign.values())
        return tuple(tensor for tensor in alive if tensor is not None)


def physical(value: Tensor) -> Tensor:
    """The tensor inside the wrappers of `torch.func` transforms."""
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value


def swap(returned: Any, replaced: dict[int, Tensor]) -> Any:
    """What an op returned, with some of its tensors replaced."""
    if isinstance(returned, Tensor):
        return replaced.get(id(returned), returned)
    return optree.tree_map(lambda leaf: replaced.get(id(leaf), leaf), returned)


def find_sites(records: Sequence[Record], names: Sequence[str], carry_all: bool = False) -> list[Site]:
    """Decides at each op that a tangent reaches: tap where every output has a layout, otherwise carry on.

    Values reached by a tangent are the parameters, what is computed from them alone, and what is carried.
    """
    reached = {i: frozenset([name]) for i, name in enumerate(names)}
    sites = []
    for record in records:
        hot = {slot: reached[value] for slot, value in record.inputs.items() if value in reached}
        if not hot:
            continue
        origin = frozenset[str]().union(*hot.values())
        layouts = tuple(output_layout(output) for output in record.outputs)
        action: Action = "tap"
        if all(layout == "constant" for layout in layouts):
            action = "skip"
        elif carry_all or "carried" in layouts:
            action = "carry"
            reached.update({output.value: origin for output in record.outputs if output.value is not None})
        sites.append(
            Site(
                op=record.op,
                tracked=tuple(hot),
                action=action,
                layouts=layouts,
                parameters=tuple(sorted(origin)),
                shapes=tuple(o.shape for o in record.outputs),
                written=record.written,
                random=record.random,
            )
        )
    return sites


def output_layout(output: Output) -> OutputLayout:
    """What the meter of an output found."""
    if output.value is None:
        return "constant"
    layout = output.meter.layout() if output.meter is not None else None
    return layout or "carried"
