"""A progress bar for what may take long."""

import importlib.util
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")
PATIENCE = 2.0
"""Seconds before it is shown."""

EVERY = 10.0
"""Seconds from one line in a log to the next."""

log = logging.getLogger("funcghost")


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


class Meter:
    """How far something has come: a bar on stderr if that is a terminal, and otherwise a line in the log now and then.

    The lines go to the logger "funcghost" at INFO, one in `EVERY` seconds. Use it in a `with` statement.
    """

    def __init__(self, what: str, unit: str, total: int | None, done: int = 0, shown: bool = True) -> None:
        self.what, self.unit, self.total = what, unit, total
        self.done = self.first = done
        self._began = self._said = time.monotonic()
        self._bar = None
        if shown and sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None:
            made = importlib.import_module("tqdm").tqdm
            self._bar = made(total=total, initial=done, desc=what, unit=unit, delay=PATIENCE, leave=False)
        self._line = shown and self._bar is None

    def update(self, count: int, note: str = "") -> None:
        """So many more are done."""
        self.done += count
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif self._line and time.monotonic() - self._said > EVERY:
            self._said = time.monotonic()
            log.info("%s", self.line(note))

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._began

    def line(self, note: str = "") -> str:
        """How far it is, how fast, and how long it will take."""
        rate = (self.done - self.first) / max(self.seconds, 1e-9)
        text = f"{self.what}: {self.done}{f' of {self.total}' if self.total else ''} {self.unit}s, {rate:.1f} a second"
        if self.total and rate:
            minutes, seconds = divmod(round((self.total - self.done) / rate), 60)
            text += f", {minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"
        return f"{text}, {note}" if note else text

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
