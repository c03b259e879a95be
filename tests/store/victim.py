"""Writes records in processes that are killed or starved, one forked for each point where that may happen."""

import itertools
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import funcghost as fg
from tests.store.runs import add, begin, write

SIZES = (1, 600, 2500)
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.listdir", "os.scandir")


def die_at(number: int, folder: Path) -> None:
    """Kills this very process at the file call of this number among those on what is in a folder."""
    calls = itertools.count()

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and str(arguments[0]).startswith(str(folder)) and next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def killed(folder: Path, run: Callable[[Path], Any], every: int) -> None:
    """FOLDER/N is what a run leaves that was killed at its file call N, for each of `every` such calls."""
    for number in itertools.count(0, every):
        child = os.fork()
        if not child:
            die_at(number, folder)
            run(folder / str(number))
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            return


def broken_off(folder: Path) -> None:
    """A run that ends, and goes on from an earlier step."""
    write(folder)
    write(folder, 3, 4, resume=3)


def limit(folder: Path, size: int) -> None:
    """FOLDER/SIZE is what a run leaves with a limit of so many bytes on the size of files; its error is beside it."""
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        try:
            write(folder / str(size), every=1000)
        except fg.StoreError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            (folder / f"{size}.txt").write_text(str(error))
        os._exit(0)
    os.waitpid(child, 0)


def on_and_on(folder: Path) -> None:
    """Writes until the process is killed."""
    with begin(folder) as kept:
        for step in itertools.count():
            add(kept, step)
            kept.flush()
            time.sleep(0.05)
