"""Writes records in processes that are killed or starved, one forked for each point where that may happen.

    python -m tests.store.victim FOLDER

FOLDER/kill/N: killed at the file call N of a run; FOLDER/limit/N: with a limit of N bytes on the size of files, and the
error beside it; FOLDER/on: written on and on, until the process is killed.
"""

import itertools
import os
import resource
import signal
import sys
import time
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


def kill(folder: Path) -> None:
    for number in itertools.count():
        child = os.fork()
        if not child:
            die_at(number, folder)
            write(folder / str(number))
            write(folder / str(number), 3, 4, resume=3)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            return


def limit(folder: Path, size: int) -> None:
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


def main(folder: Path) -> None:
    for size in SIZES:
        limit(folder / "limit", size)
    kill(folder / "kill")
    with begin(folder / "on") as kept:
        for step in itertools.count():
            add(kept, step)
            kept.flush()
            time.sleep(0.05)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
