"""Who is missing when a step that several ranks take together fails.

A collective that fails says that a connection was closed, or that time is up, and not by whom. So a rank whose step
fails leaves word in the store of the process group, and a rank whose collective fails looks there before it raises.
"""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from torch import distributed

from funcghost.distributed.collectives import Group, several
from funcghost.errors import RankError

PATIENCE = timedelta(seconds=2)
"""How long a rank whose collective failed waits for word from the others, which see it fail a little later."""

_taken = Counter[str]()
"""How many steps this process has begun, by process group: the same step has the same number on all of its ranks."""


@contextmanager
def named(what: str, group: Group = None) -> Iterator[None]:
    """A step that all ranks of the group take together: if a collective in it fails, the error names who was missing.

    An error of this rank's own is raised as it is, and told to the others. With NCCL, whose collectives fail in the
    background, its watchdog ends the process instead.

    Raises:
        RankError: a collective failed.
    """
    if not several(group):
        yield
        return
    own = group or distributed.group.WORLD
    assert own is not None
    _taken[own.group_name] += 1
    place, rank = f"funcghost/{_taken[own.group_name]}", distributed.get_rank(group)
    try:
        yield
    except RankError:
        raise
    except Exception as error:
        apart = _of_a_collective(error)
        store = own.get_group_store()
        with suppress(distributed.DistError):  # the process that keeps it may be the one that ended
            store.set(f"{place}/{rank}", "" if apart else f"{type(error).__name__}: {error}")
        if not apart:
            raise
        said = dict[int, str]()
        others = [other for other in range(distributed.get_world_size(group)) if other != rank]
        end = time.monotonic() + PATIENCE.total_seconds()
        with suppress(distributed.DistError):
            while len(said) < len(others) and time.monotonic() < end:
                for other in others:
                    if other not in said and store.check([f"{place}/{other}"]):
                        said[other] = store.get(f"{place}/{other}").decode()
                time.sleep(0.02)
        failed = [f"rank {other} failed: {text}" for other, text in said.items() if text]
        silent = [other for other in others if other not in said]
        if silent:
            failed.append(f"ranks {silent} say nothing: killed, hanging, at something else, or waiting themselves")
        why = "; ".join(failed) or "all of them see the same: one was late, or the network failed"
        raise RankError(
            f"{what}: ranks take this step together, and rank {rank} got no answer from another; {why}. The process "
            "group cannot be used any more: end this process, and start the job anew from a checkpoint."
        ) from error


def _of_a_collective(error: Exception) -> bool:
    """Whether it is one of gloo's, which have no type of their own."""
    return isinstance(error, distributed.DistError) or (type(error) is RuntimeError and "gloo" in str(error))
