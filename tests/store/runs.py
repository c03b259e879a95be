"""A record as a run would write it, to be broken at any point."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from funcghost import store

STEPS, ROWS = 5, 3
ORIGIN = {"seed": 0, "model": {"width": 8, "names": ["a", "b"]}}
EXTRAS: Any = {"domain": "string", "length": "int64", "kept": "bool", "precise": "float64"}


def begin(folder: Path, **more: Any) -> store.Recorder:
    return store.record(folder, ["first", "second"], EXTRAS, origin=ORIGIN, **more)


def add(kept: store.Recorder, step: int) -> None:
    random = np.random.default_rng(step)
    values = {name: random.standard_normal(ROWS) for name in ("first", "second")}
    extras: Any = {
        "domain": [f"domain {n}" for n in range(ROWS)],
        "length": random.integers(0, 2**60, ROWS),
        "kept": random.random(ROWS) < 0.5,
        "precise": random.standard_normal(ROWS),
    }
    kept.add(step, random.integers(0, 2**60, ROWS), values, extras)


def write(folder: Path, start: int = 0, stop: int = STEPS, every: int = 2, resume: int | None = None) -> None:
    """The steps from start to stop, with a part for every two."""
    with begin(folder, resume=resume) as kept:
        for step in range(start, stop):
            add(kept, step)
            if step % every == every - 1:
                kept.flush()


def assert_whole_steps(table: pa.Table) -> None:
    steps = table["step"].to_numpy()
    np.testing.assert_array_equal(steps, np.repeat(np.arange(len(steps) // ROWS), ROWS))


WAYS = ("flip", "cut", "grow", "zero", "forge")


def damaged(content: bytes, way: str, at: int, length: int) -> bytes:
    at %= max(1, len(content))
    changed = bytearray(content)
    if way in ("flip", "forge"):
        changed[at] ^= 1 + length % 255
    elif way == "cut":
        del changed[at:]
    elif way == "grow":
        changed += bytes(length)
    else:
        changed[at : at + length] = bytes(len(changed[at : at + length]))
    return bytes(changed)
