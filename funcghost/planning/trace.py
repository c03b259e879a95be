"""Measuring: one forward that follows everything computed from parameters, then a few backwards over its graph.

Every op downstream of a parameter is recorded with the gradients of its outputs. From these the layouts follow.
"""

import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import _disable_current_modes

from funcghost.engine.unseen import edge_of, now, stretch_of, walk
from funcghost.engine.walker import Visit, Walker
from funcghost.errors import UnsupportedOpError
from funcghost.ops.call import Call, is_float, outputs, physical, swap
from funcghost.ops.digest import op_name
from funcghost.ops.families.tables import BY_DATA
from funcghost.ops.meter import Clock, Meter
from funcghost.ops.moves import Move
from funcghost.ops.values import Value
from funcghost.planning.drawn import Generic
from funcghost.planning.observe import Observe
from funcghost.problem import Problem
from funcghost.side_effects import random_state, set_random_state
from funcghost.trees import is_distributed, tensors


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
    of an op in place), so it cannot be put behind a tap. `move`: the number of the call among those in `moves.MOVES`.
    `unseen`: the number of the tensor that came from a stretch of graph of which this is the record.
    """

    op: str
    inputs: dict[int, int]
    outputs: tuple[Output, ...]
    written: tuple[int, ...]
    fixed: bool
    bound: bool
    random: bool
    move: int | None
    unseen: int | None = None


class Noted(NamedTuple):
    """A call that may move samples: by the values in the slots `by`, or by an order if `by_data` all the same."""

    move: Move
    by: tuple[int, ...]
    by_data: bool


class Downstream(NamedTuple):
    """What is known of a value downstream of a parameter: its number, and whether parameters alone are upstream."""

    number: int
    fixed: bool


class Trace(Walker[Downstream]):
    """Records what is computed from the parameters while the losses run.

    A backward as far as the `roots` comes past every meter.
    """

    sees_parts = True

    def __init__(self, problem: Problem, leaves: Sequence[Tensor], clock: Clock, drawn: bool) -> None:
        super().__init__()
        params, names = leaves, problem.params.names
        self.devices, self.in_parts = problem.devices(), problem.in_parts
        self.memory = {storage_of(param): name for param, name in zip(params, names, strict=True)}
        self.clock = clock
        self.records: list[Record] = []
        for number, param in enumerate(params):
            self.values.note(param, Downstream(number, True))
        self.count = len(params)
        self.watching, self.started = True, now()
        self.names = {param.data_ptr(): name for param, name in zip(params, names, strict=True) if param.numel()}
        self.given = {id(t) for t in (*params, *tensors(problem.batch))}
        self.dtypes = {param.dtype for param in params}
        self.foreign: dict[int, weakref.ref[Tensor]] = {}
        self.roots: list[Any] = []
        self.moves: dict[int, Noted] = {}
        self.generic = Generic(clock) if drawn else None
        self.result: int | None = None

    def visit(self, visit: Visit[Downstream]) -> Any:
        """Runs the op as it is and notes what went in and came out."""
        op, leaves = visit.op, visit.leaves
        given = {slot: leaf for slot, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        known = {slot: value for slot, value in enumerate(visit.values) if value is not None}
        if not self.in_parts and any(map(is_distributed, given.values())):
            raise UnsupportedOpError(
                f"a DTensor goes into {op_name(op)}: several ranks compute the losses together, and the gradient of a "
                "parameter may be a part of a sum on each of them. Pass all parameters of the model to "
                "funcghost.distributed.tensor_parallel, those that are DTensors among them."
            )
        for slot, leaf in given.items():
            if not known[slot].number and id(leaf) not in self.given and physical(leaf) is leaf:
                self.foreign.setdefault(id(leaf), known[slot].reference)
                if leaf.requires_grad and leaf.is_leaf:
                    self._refuse_aliases([leaf])
        inputs = {slot: value.note for slot, value in known.items() if value.note is not None}
        if inputs and any(leaf.is_nested for leaf in given.values()):
            raise UnsupportedOpError(
                f"a nested tensor and what was computed from parameters go into {op_name(op)}: its samples lie on no "
                "axis. Call the ops on its rows, `h = layer(nested.values())` with the parts `h.split(lengths)`, or on "
                "padded samples with a mask."
            )
        self._note_move(visit, given, inputs)
        versions = {slot: physical(leaf)._version for slot, leaf in given.items() if not leaf.is_inference()}
        copies = {slot: leaf.clone() for slot, leaf in given.items() if inputs and self._may_be_statistics(leaf)}
        kept = self._before_a_write(op, leaves, inputs) if inputs else None
        before = random_state(self.devices)
        returned = self.run(visit)
        drew = any(not a.equal(b) for (_, a), (_, b) in zip(before, random_state(self.devices), strict=True))
        if not inputs or not torch.is_grad_enabled():
            return returned
        written = tuple(
            slot
            for slot, version in versions.items()
            if physical(given[slot])._version != version or (slot in copies and not _equal(copies[slot], given[slot]))
        )
        self._refuse_writes(op, [given[slot] for slot in written])
        found = outputs(returned, [given[slot] for slot in written])
        if all(any(value is leaf for leaf in given.values()) for value in found) and not written:
            return returned
        # Views of one memory count as written, all of them: which of them an op changed cannot be told.
        as_before = kept if kept is not None and len(written) == 1 else None
        call = Call(op, tuple(leaves if as_before is None else as_before), visit.spec, tuple(inputs), written)
        in_general = as_before is not None or not written
        return self._record(call, given, inputs, found, returned, drew, visit.move, in_general)

    def _record(
        self,
        call: Call,
        given: dict[int, Tensor],
        inputs: dict[int, Downstream],
        found: tuple[Tensor, ...],
        returned: Any,
        drew: bool,
        move: int | None,
        in_general: bool,
    ) -> Any:
        fixed = len(inputs) == len(given) and all(known.fixed for known in inputs.values())
        smooth = [value for value in found if physical(value).requires_grad]
        memory = {storage_of(leaf) for leaf in given.values()}
        bound = any(storage_of(value) in memory for value in smooth)
        drawn = found
        if self.generic and in_general and not fixed and (call.written or not bound):
            after = random_state(self.devices) if drew else []
            with _disable_current_modes():  # what the op writes to has been seen when it ran
                drawn = self.generic.outputs(call, found)
            set_random_state(after)
        outs, replaced = [], {}
        for original, value in zip(map(id, found), drawn, strict=True):
            if id(value) != original:
                replaced[original] = value
            if not physical(value).requires_grad:
                self.values.of(value).note = None
                outs.append(Output(None, tuple(value.shape)))
                continue
            self.dtypes.add(value.dtype)
            wrapped = physical(value) is not value
            meter = None if fixed or (bound and wrapped) else Meter(self.clock, None if wrapped else value.shape)
            if meter is not None:
                if any(known.fixed for known in inputs.values()):
                    self.roots.append(get_gradient_edge(physical(value)))
                if wrapped or (value._is_view() and not bound):
                    # A hook would stay with the view's present node, which an op in place on it replaces.
                    value = replaced[original] = Observe.apply(meter.see, value)
                else:
                    _ = value.grad_fn  # A view's history must be up to date first: torch crashes otherwise (#196459).
                    value.register_hook(meter.see)
            self.nodes[edge_of(physical(value))] = known = Downstream(self.count, fixed)
            self.values.note(value, known)
            outs.append(Output(self.count, tuple(value.shape), meter))
            self.count += 1
        numbers = {slot: known.number for slot, known in inputs.items()}
        self.records.append(Record(op_name(call.op), numbers, tuple(outs), call.written, fixed, bound, drew, move))
        return swap(returned, replaced) if replaced else returned

    def meet(self, tensor: Tensor, value: Value[Downstream], number: int) -> None:
        """Records the stretch of graph between known tensors and one that no op was seen to give."""
        walked = walk(tensor, self.known_at, self.started)
        self._refuse_aliases(walked.leaves)
        ends = walked.ends.values()
        if any(end.old for end in ends):
            raise UnsupportedOpError(
                "the losses use something that was made of params before they were called: a cache that an earlier "
                "call filled, or a value computed outside of them. A step runs the losses several times, and each run "
                "has to start from params. Empty the cache inside the losses (some modules keep none in training "
                "mode), compute from params inside, or .detach() what is meant as a constant."
            )
        own = walked.ends.get(edge_of(tensor))
        if not ends or (own is not None and own.known is value.note):
            return
        self.dtypes.add(tensor.dtype)
        meter = Meter(self.clock, tensor.shape)
        tensor.register_hook(meter.see)
        edge = get_gradient_edge(tensor)
        if any(end.known.fixed for end in ends):
            self.roots.append(edge)
        # Whether data went in as well cannot be seen.
        known = self.nodes[edge.node, edge.output_nr] = Downstream(self.count, False)
        self.values.note(tensor, known)
        output = Output(self.count, tuple(tensor.shape), meter)
        inputs = {place: end.known.number for place, end in enumerate(ends)}
        name = walked.names[0] if walked.names else "view"
        carried = stretch_of(tensor, walked).is_differentiable()
        self.records.append(Record(name, inputs, (output,), (), False, carried, False, None, number))
        self.count += 1

    def _refuse_aliases(self, leaves: Sequence[Tensor]) -> None:
        """A tensor of the model's own that requires gradients, where the parameter was handed in as another one."""
        for leaf in leaves:
            if self.values.noted(leaf) is None and (name := self.names.get(leaf.data_ptr())) is not None:
                raise UnsupportedOpError(
                    f"the losses use another tensor than params[{name!r}] on its memory, which requires gradients: the "
                    "model's own parameter, or what an earlier call kept of it. Pass the very tensors that the losses "
                    "use, dict(model.named_parameters()), or .detach() what is meant as a constant."
                )

    def _before_a_write(self, op: Any, leaves: Sequence[Any], inputs: dict[int, Downstream]) -> list[Any] | None:
        """The leaves of a call that may write to one of them, with copies of those."""
        fixed = {slot for slot, known in inputs.items() if known.fixed}
        name, flag = op_name(op).rpartition(".")[2], any(leaf is True for leaf in leaves)
        writes = flag or op is Tensor.__setitem__ or re.fullmatch(r".*[^_]_|__i.*__", name) is not None
        if self.generic is None or not writes or len(fixed) == len(inputs):
            return None
        return [leaf.clone() if is_float(leaf) and slot not in fixed else leaf for slot, leaf in enumerate(leaves)]

    def _may_be_statistics(self, leaf: Tensor) -> bool:
        """Batch norms update their running statistics without a trace in the version counter."""
        return (
            is_float(leaf)
            and physical(leaf) is leaf
            and leaf.dim() == 1
            and self.values.noted(leaf) is None
            and not leaf.requires_grad
        )

    def _note_move(self, visit: Visit[Downstream], given: dict[int, Tensor], inputs: dict[int, Downstream]) -> None:
        """Keeps a call that may move samples, to be looked at when layouts are known."""
        if visit.move is None or any(physical(leaf) is not leaf for leaf in given.values()):
            return  # under vmap, samples stay apart
        op = visit.op
        moved = tuple(slot for slot, known in inputs.items() if not known.fixed)
        if moved and any(leaf.layout is not torch.strided for leaf in given.values()):
            if op in BY_DATA:  # no numbers of samples go the way of the entries of a sparse tensor
                self.moves[visit.move] = Noted(Move(op, (), visit.spec, moved), (), True)
        elif moved:
            index = tuple(slot for slot, leaf in given.items() if not is_float(leaf)) if op in BY_DATA else ()
            kept = tuple(
                (leaf.new_empty(()).expand(leaf.shape) if is_float(leaf) else leaf.clone()) if slot in given else leaf
                for slot, leaf in enumerate(visit.leaves)
            )
            ordering = op in BY_DATA and op not in (Tensor.__getitem__, Tensor.__setitem__)
            self.moves[visit.move] = Noted(Move(op, kept, visit.spec, moved), index, bool(index) or ordering)

    def _refuse_writes(self, op: Any, written: Sequence[Tensor]) -> None:
        for value in written:
            name = self.memory.get(storage_of(value))
            if name is not None:
                raise UnsupportedOpError(
                    f"parameter {name!r} is written to by {op_name(op)} inside the losses (embeddings do so with "
                    "max_norm). Losses must leave params as they are: change the parameter before the step."
                )

    def captured(self) -> tuple[Tensor, ...]:
        """The tensors of the user that went into ops without being parameters or batch: buffers, constants."""
        alive = (reference() for reference in self.foreign.values())
        return tuple(tensor for tensor in alive if tensor is not None and tensor.is_leaf)


def storage_of(value: Tensor) -> int | None:
    """What is the same for tensors that share memory; None for a sparse one."""
    value = physical(value)
    return value.untyped_storage()._cdata if value.layout is torch.strided else None


def _equal(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())
