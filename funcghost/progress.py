"""How far something has come that may take long: for eyes in a terminal or a notebook, and for a log."""

import importlib.util
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

Item = TypeVar("Item")
PATIENCE = 2.0
"""Seconds before a bar is shown."""
OFTEN = 0.1
"""Seconds from one state of a plain bar to the next."""
EVERY = 10.0
"""Seconds from one line in a log to the next."""

log = logging.getLogger("funcghost")


def progress(items: Iterable[Item], what: str, units: str, total: int | None = None) -> Iterator[Item]:
    """The items, with a `Meter` of how many of the `total` are done."""
    with Meter(what, units, len(items) if isinstance(items, Sized) else total) as meter:
        for item in items:
            yield item
            meter.update(1)


def watched() -> bool:
    """Whether somebody looks: stderr is a terminal, or the output of a cell in a notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return sys.stderr.isatty() or hasattr(shell, "kernel")


class Meter:
    """A bar on stderr where somebody looks, by tqdm if it is installed; otherwise a line in the log now and then.

    The lines go to the logger "funcghost" at INFO, one in `EVERY` seconds. Use it in a `with` statement.
    """

    def __init__(self, what: str, units: str, total: int | None, done: int = 0, shown: bool = True) -> None:
        self.what, self.units, self.total = what, units, total
        self.done = self.first = done
        self._began = self._said = time.monotonic()
        self._bar: Any = None
        self._shown, self._plain, self._width = shown, shown and watched(), 0
        if self._plain and importlib.util.find_spec("tqdm") is not None:
            made = importlib.import_module("tqdm").tqdm
            self._bar = made(total=total, initial=done, desc=what, unit=f" {units}", delay=PATIENCE, leave=False)

    def update(self, count: int, note: str = "") -> None:
        """So many more are done."""
        self.done += count
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif self._plain:
            if now - self._began > PATIENCE and now - self._said > OFTEN:
                self._said = now
                self._print(self.line(note))
        elif self._shown and now - self._said > EVERY:
            self._said = now
            log.info("%s", self.line(note))

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._began

    def line(self, note: str = "") -> str:
        """How far it is, how fast, and how long it will take."""
        rate = (self.done - self.first) / max(self.seconds, 1e-9)
        text = f"{self.what}: {self.done}{f' of {self.total}' if self.total else ''} {self.units}, {rate:.1f} a second"
        if self.total and rate:
            minutes, seconds = divmod(round((self.total - self.done) / rate), 60)
            text += f", {minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"
        return f"{text}, {note}" if note else text

    def _print(self, line: str) -> None:
        """Over what was there before."""
        print(f"\r{line:{self._width}}", end="", file=sys.stderr, flush=True)
        self._width = len(line)

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._width:
            self._print("")
            print("\r", end="", file=sys.stderr, flush=True)
