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

from funcghost.digest import Digest, op_name
from funcghost.errors import UnsupportedOpError
from funcghost.layout import Clock, Layout, Meter
from funcghost.moves import MOVES, Move
from funcghost.plans import Action, OutputLayout, Site
from funcghost.run import Problem
from funcghost.state import random_state
from funcghost.tangent import flatten_call, is_float, outputs, physical, swap
from funcghost.tap import Observe
from funcghost.trees import tensors

PLAIN = (Tensor, int, float, complex, bool, str, bytes, type(None))
"""What a batch may hold besides containers for its tensors to be known."""

FROM_PYTHON = frozenset({torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy})
"""The ops that bring in numbers of any origin."""


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

    def __init__(self, problem: Problem, leaves: Sequence[Tensor], clock: Clock) -> None:
        super().__init__()
        params, names, batch = leaves, problem.params.names, tensors(problem.batch)
        self.devices = problem.devices()
        self.memory = {param.untyped_storage()._cdata: name for param, name in zip(params, names, strict=True)}
        self.clock = clock
        self.records: list[Record] = []
        self.values = {id(param): number for number, param in enumerate(params)}
        self.count = len(params)
        self.digest = Digest()
        self.fixed = set(range(len(params)))
        self.seen: dict[int, Tensor] = {id(t): t for t in (*params, *batch)}
        self.dtypes = {param.dtype for param in params}
        self.foreign: dict[int, weakref.ref[Tensor]] = {}
        self.constant: set[int] = set()
        self.without_samples: set[int] = set()
        self.opaque = any(not isinstance(x, PLAIN) for x in optree.tree_leaves(problem.batch))
        self.meters: dict[int, Meter] = {}
        self.moves: list[tuple[Move, dict[int, int | None]]] = []

    def __torch_function__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the op as it is and notes what went in and came out."""
        kwargs = kwargs or {}
        leaves, spec = flatten_call(args, kwargs)
        given = {slot: leaf for slot, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        for leaf in given.values():
            if id(leaf) not in self.seen and not torch._C._functorch.is_functorch_wrapped_tensor(leaf):
                self.foreign.setdefault(id(leaf), weakref.ref(leaf))
                if not self.opaque and leaf.grad_fn is None:  # an op that no mode shows gives a node
                    self.without_samples.add(id(leaf))
        inputs = {slot: self.values[id(leaf)] for slot, leaf in given.items() if id(leaf) in self.values}
        if op in MOVES:
            self._note_move(op, leaves, spec, given, inputs)
        versions = {slot: leaf._version for slot, leaf in given.items() if not leaf.is_inference()}
        copies = {slot: leaf.clone() for slot, leaf in given.items() if inputs and self._may_be_statistics(leaf)}
        before = random_state(self.devices)
        returned = op(*args, **kwargs)
        self.digest = self.digest.after(op, leaves, returned)
        drew = any(not a.equal(b) for (_, a), (_, b) in zip(before, random_state(self.devices), strict=True))
        if not drew and op not in FROM_PYTHON:
            self._note_origin(given, returned)
        if not inputs or not torch.is_grad_enabled():
            return self._keep(returned)
        written = tuple(
            slot
            for slot, version in versions.items()
            if given[slot]._version != version or (slot in copies and not _equal(copies[slot], given[slot]))
        )
        self._refuse_writes(op, [given[slot] for slot in written])
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
            wrapped, original = physical(value) is not value, id(value)
            meter = None if fixed or (bound and wrapped) else Meter(self.clock)
            if meter is not None:
                self.meters[self.count] = meter
                if wrapped or (value._is_view() and not bound):
                    # A hook would stay with the view's present node, which an op in place on it replaces.
                    value = replaced[original] = Observe.apply(meter.see, value)
                else:
                    value.register_hook(meter.see)
            self.values[id(value)] = self.count
            self.seen[id(value)] = value
            outs.append(Output(self.count, tuple(value.shape), meter))
            if fixed:
                self.fixed.add(self.count)
            self.count += 1
        self.records.append(Record(op_name(op), inputs, tuple(outs), written, fixed, bound, drew))
        return swap(returned, replaced) if replaced else returned

    def _note_origin(self, given: dict[int, Tensor], returned: Any) -> None:
        """Follows constants, and what comes from constants and the user's own tensors but not from the batch."""
        origins = [id(physical(leaf)) for leaf in given.values()]
        made = [id(physical(leaf)) for leaf in optree.tree_leaves(returned) if isinstance(leaf, Tensor)]
        if self.constant.issuperset(origins):
            self.constant.update(made)
        if all(origin in self.constant or origin in self.without_samples for origin in origins):
            self.without_samples.update(made)

    def _may_be_statistics(self, leaf: Tensor) -> bool:
        """Batch norms update their running statistics without a trace in the version counter."""
        return is_float(leaf) and leaf.dim() == 1 and id(leaf) not in self.values and not leaf.requires_grad

    def _note_move(
        self, op: Any, leaves: list[Any], spec: Any, given: dict[int, Tensor], inputs: dict[int, int]
    ) -> None:
        """Keeps a call that may move samples, with float tensors as shapes, to be looked at when layouts are known."""
        if any(physical(leaf) is not leaf for leaf in given.values()):
            return  # under vmap, samples stay apart
        floats = {slot: inputs.get(slot) for slot, leaf in given.items() if is_float(leaf)}
        index = tuple(slot for slot, leaf in given.items() if slot not in floats and id(leaf) not in self.constant)
        if not index and op in (Tensor.__getitem__, Tensor.__setitem__):
            return
        kept = {
            slot: number
            for slot, number in floats.items()
            if number not in self.fixed and id(given[slot]) not in self.without_samples
        }
        base = next(iter(given))
        if base in index and len(index) > 1 and id(given[base]) not in self.without_samples:
            kept[base], index = None, index[1:]
        if kept:
            stripped = tuple(tuple(leaf.shape) if slot in kept else leaf for slot, leaf in enumerate(leaves))
            self.moves.append((Move(op, stripped, spec, index), kept))

    def moved_by(self) -> str | None:
        """The name of an op that moves samples by the values of data, if there is one."""
        batch = self.clock.batch
        for move, floats in self.moves if batch > 1 else []:
            if move.moves_samples(
                {slot: self._layout_of(number, move.leaves[slot]) for slot, number in floats.items()}, batch
            ):
                return op_name(move.op)
        return None

    def _layout_of(self, number: int | None, shape: tuple[int, ...]) -> Layout | None:
        """The layout measured for a value; one that no parameter reaches is taken to have its samples in an axis."""
        if number is not None:
            layout = self.meters[number].layout() if number in self.meters else None
            return layout if isinstance(layout, Layout) else None
        axes = [axis for axis, size in enumerate(shape) if size == self.clock.batch]
        return Layout(axes[0]) if len(axes) == 1 else None

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
        return tuple(tensor for tensor in alive if tensor is not None and tensor.is_leaf)


def _equal(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


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
        layouts = tuple(output_layout(output, record.bound) for output in record.outputs)
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


def output_layout(output: Output, bound: bool) -> OutputLayout:
    """What the meter of an output found."""
    if output.value is None:
        return "constant"
    layout = output.meter.layout() if output.meter is not None and not bound else None
    return layout or "carried"
