"""Leaving the user's world as it was: random streams, and tensors that a rehearsed loss would write to."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

RUNNING = ("running_mean", "running_var")

RandomState = list[tuple[torch.device, Tensor]]


def random_state(devices: Sequence[torch.device]) -> RandomState:
    """The state of torch's generators of the CPU and of these devices."""
    found: RandomState = [(torch.device("cpu"), torch.get_rng_state())]
    for device in devices:
        if device.type not in ("cpu", "meta"):
            found.append((device, torch.get_device_module(device).get_rng_state(device)))
    return found


def set_random_state(state: RandomState) -> None:
    """Puts torch's generators back."""
    for device, value in state:
        if device.type == "cpu":
            torch.set_rng_state(value)
        else:
            torch.get_device_module(device).set_rng_state(value, device)


@contextmanager
def replaying(state: RandomState | None) -> Iterator[None]:
    """Runs the body on an earlier random state and puts the present one back."""
    if state is None:
        yield
        return
    present = random_state([device for device, _ in state])
    set_random_state(state)
    try:
        yield
    finally:
        set_random_state(present)


COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")
"""Where torch has the ops by which processes talk to one another."""


@cache
def _effects(op: Any) -> tuple[tuple[tuple[int, str], ...], bool, bool]:
    """The arguments that an op writes to, by place and name, whether it may return older memory, and talks to ranks.

    By the schema; those of batch norm do not say that the running statistics are written to. What takes functions, as
    `torch.cond` does, has none: torch refuses such functions that write to what they are given.
    """
    schema = getattr(op, "_schema", None)
    if schema is None:
        return (), True, False
    written = tuple(
        (place, argument.name)
        for place, argument in enumerate(schema.arguments)
        if (argument.alias_info is not None and argument.alias_info.is_write) or argument.name in RUNNING
    )
    aliases = any(value.alias_info is not None for value in schema.returns)
    return written, aliases, op.namespace in COLLECTIVES


Memory = torch.UntypedStorage | torch.Generator
"""What the losses may leave changed: memory, or a stream of random numbers that they are given."""
Copies = Sequence[tuple[Memory, Any]]


def _copy(memory: Memory) -> Any:
    return memory.get_state() if isinstance(memory, torch.Generator) else memory.clone()


class _WriteLog(TorchDispatchMode):
    """Copies every tensor that existed before the mode was entered just before it is written to."""

    def __init__(self, collective: Callable[[str], None] | None) -> None:
        super().__init__()
        self.originals: dict[Any, tuple[Memory, Any]] = {}
        self.born: set[int] = set()
        self.collective = collective

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled while it is active; to say so costs more than the mode."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written, aliases, talks = _effects(func)
        if talks and self.collective is not None:
            self.collective(str(func))
        for place, name in written:
            given = args[place] if place < len(args) else kwargs.get(name)
            for value in given if isinstance(given, list | tuple) else [given]:
                self._keep(value)
        for value in kwargs.values():
            if isinstance(value, torch.Generator) and value not in self.originals:
                self.originals[value] = value, _copy(value)
        with torch._C.DisableTorchFunction():  # what runs is no call by the user
            out = func(*args, **kwargs)
        if not aliases:
            for value in out if isinstance(out, (list, tuple)) else [out]:
                if isinstance(value, Tensor) and value.layout is torch.strided:
                    self.born.add(value.untyped_storage()._cdata)
        return out

    def _keep(self, value: Any) -> None:
        if isinstance(value, Tensor) and value.layout is torch.strided:
            storage = value.untyped_storage()
            if storage._cdata not in self.born and storage._cdata not in self.originals:
                self.originals[storage._cdata] = storage, _copy(storage)


Snapshot = tuple[RandomState, Any, Any, Copies]


def snapshot(devices: Sequence[torch.device], written: Sequence[Memory] = ()) -> Snapshot:
    """The state of all random streams (torch, numpy and Python), and copies of the memory that will be written to."""
    copies = [(memory, _copy(memory)) for memory in written]
    return random_state(devices), random.getstate(), np.random.get_state(), copies


def restore(state: Snapshot) -> None:
    """Puts everything back."""
    drawn, python, numpy_state, copies = state
    set_random_state(drawn)
    random.setstate(python)
    np.random.set_state(numpy_state)
    for memory, copy in copies:
        if isinstance(memory, torch.Generator):
            memory.set_state(copy)
        else:
            memory.copy_(copy)


class Changes:
    """What a body changes: random streams, and the memory that it is known to write to, or is seen to (None).

    Where it is to be seen, `collective` hears of the ops by which processes talk to one another, before they run.
    """

    def __init__(
        self,
        devices: Sequence[torch.device],
        written: Sequence[Memory] | None = None,
        collective: Callable[[str], None] | None = None,
    ) -> None:
        """Before the body runs."""
        self.before = snapshot(devices, written or ())
        self.log = _WriteLog(collective) if written is None else None

    def watched(self) -> AbstractContextManager[Any]:
        """Where what is not known yet is found out, at a cost for each op."""
        return self.log or nullcontext()

    @property
    def _copies(self) -> Copies:
        return self.before[3] if self.log is None else list(self.log.originals.values())

    @property
    def written(self) -> tuple[Memory, ...]:
        """What was written to so far that is older than the body."""
        return tuple(memory for memory, _ in self._copies)

    def undo(self) -> None:
        """Puts everything back."""
        restore((*self.before[:3], self._copies))


@contextmanager
def untouched(
    devices: Sequence[torch.device],
    written: Sequence[Memory] | None = None,
    collective: Callable[[str], None] | None = None,
) -> Iterator[Changes]:
    """Undoes what the body does to random streams and to tensors older than the body: `written`, if that is known."""
    changes = Changes(devices, written, collective)
    try:
        with changes.watched():
            yield changes
    finally:
        changes.undo()


@contextmanager
def undone_on_failure(devices: Sequence[torch.device], written: Sequence[Memory] | None) -> Iterator[Changes]:
    """As `untouched`, if the body raises."""
    changes = Changes(devices, written)
    try:
        with changes.watched():
            yield changes
    except BaseException:
        changes.undo()
        raise
