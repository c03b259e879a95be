"""Leaving the user's world as it was: random streams, and tensors that a rehearsed loss would write to."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
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


@cache
def _effects(op: Any) -> tuple[tuple[tuple[int, str], ...], bool]:
    """The arguments that an op writes to, by place and name, and whether it may return older memory.

    By the schema; those of batch norm do not say that the running statistics are written to.
    """
    schema = op._schema
    written = tuple(
        (place, argument.name)
        for place, argument in enumerate(schema.arguments)
        if (argument.alias_info is not None and argument.alias_info.is_write) or argument.name in RUNNING
    )
    return written, any(value.alias_info is not None for value in schema.returns)


class _WriteLog(TorchDispatchMode):
    """Copies every tensor that existed before the mode was entered just before it is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.originals: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.born: set[int] = set()
        self.generators: dict[torch.Generator, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written, aliases = _effects(func)
        for place, name in written:
            given = args[place] if place < len(args) else kwargs.get(name)
            for value in given if isinstance(given, list | tuple) else [given]:
                self._keep(value)
        for value in kwargs.values():
            if isinstance(value, torch.Generator) and value not in self.generators:
                self.generators[value] = value.get_state()
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
                self.originals[storage._cdata] = (storage, storage.clone())


Copies = Sequence[tuple[torch.UntypedStorage, torch.UntypedStorage]]
Snapshot = tuple[RandomState, Any, Any, Copies]


def snapshot(devices: Sequence[torch.device], written: Sequence[torch.UntypedStorage] = ()) -> Snapshot:
    """The state of all random streams (torch, numpy and Python), and copies of the memory that will be written to."""
    copies = [(storage, storage.clone()) for storage in written]
    return random_state(devices), random.getstate(), np.random.get_state(), copies


def restore(state: Snapshot) -> None:
    """Puts everything back."""
    drawn, python, numpy_state, copies = state
    set_random_state(drawn)
    random.setstate(python)
    np.random.set_state(numpy_state)
    for storage, copy in copies:
        storage.copy_(copy)


@contextmanager
def untouched(devices: Sequence[torch.device]) -> Iterator[Callable[[], list[torch.UntypedStorage]]]:
    """Undoes what the body does to random streams and to tensors older than the body.

    Gives a function that says which memory that was.
    """
    before, log = snapshot(devices), _WriteLog()
    try:
        with log:
            yield lambda: [storage for storage, _ in log.originals.values()]
    finally:
        restore((*before[:3], list(log.originals.values())))
        for generator, state in log.generators.items():
            generator.set_state(state)


@contextmanager
def undone_on_failure(
    devices: Sequence[torch.device], written: Sequence[torch.UntypedStorage] | None
) -> Iterator[Callable[[], tuple[torch.UntypedStorage, ...]]]:
    """Undoes what the body does to random streams and to the memory it writes to, if it raises.

    Where that memory is not known (None) it is found out, as by `untouched`. Gives a function that says which it was.
    """
    before, log = snapshot(devices, written or ()), None if written is not None else _WriteLog()
    try:
        with log or nullcontext():
            yield lambda: tuple(written or ()) if log is None else tuple(old for old, _ in log.originals.values())
    except BaseException:
        restore(before if log is None else (*before[:3], list(log.originals.values())))
        raise
