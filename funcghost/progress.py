"""A progress bar for what may take long."""

import importlib.util
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")
PATIENCE = 2.0
"""Seconds before it is shown."""


def progress(items: Sequence[Item], what: str) -> Iterable[Item]:
    """The items, with a bar on stderr if that is a terminal and they take long: by tqdm, where it is installed."""
    if not sys.stderr.isatty():
        return items
    if importlib.util.find_spec("tqdm") is None:
        return _counted(items, what)
    bar: Iterable[Item] = importlib.import_module("tqdm").tqdm(items, desc=what, delay=PATIENCE, leave=False)
    return bar


def _counted(items: Sequence[Item], what: str) -> Iterator[Item]:
    started, shown = time.monotonic(), ""
    try:
        for number, item in enumerate(items):
            if time.monotonic() - started > PATIENCE:
                shown = f"{what}: {number}/{len(items)}"
                print(f"\r{shown}", end="", file=sys.stderr, flush=True)
            yield item
    finally:
        if shown:
            print(f"\r{' ' * len(shown)}\r", end="", file=sys.stderr, flush=True)
