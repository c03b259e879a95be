"""The memory of one contender, measured in a process of its own."""

import gc
import multiprocessing
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import funcghost as fg
from tests.benchmarks.contenders import SHAPES, Shape, contenders, plain, quiet
from tests.benchmarks.models import half_square, perceptron


@dataclass(frozen=True)
class Memory:
    """Bytes: of the process beyond its peak in plain steps; of the tiles of contractions, as predicted and as found."""

    beyond_plain: int
    predicted: int | None = None
    found: int | None = None


def peak_allocated(work: Callable[[], Any]) -> int:
    """The most that was allocated at once by torch on the CPU, beyond what was there before; results are part of it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = work()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    del kept
    return most


def resident() -> int:
    """The peak of the process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _measure(shape_name: str, contender_name: str, text: str | None, threads: int, seed: int) -> Memory:
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    quiet()
    shape = SHAPES[shape_name](torch.device("cpu"))
    contender = next(found for found in contenders(forced=True, compiled=False) if found.name == contender_name)
    # What libraries import and set up in their first call is not the step's: the contender runs on a small model first.
    small = Shape("small", perceptron([4] * 3), half_square, torch.randn(6, 4), 2)
    contender.prepare(small, contender.plan(small))()
    step = plain(shape.losses, shape.params, contender.of(shape))
    for _ in range(2):
        step()
    # Planning takes memory of its own, so the plan comes from outside.
    plan = None if text is None else fg.Plan.from_json(text)
    gc.collect()
    before = resident()
    route = contender.prepare(shape, plan)
    kept = route()
    beyond = resident() - before
    del kept, route
    if contender.reducer is None or plan is None or not plan.contractions:
        return Memory(beyond)
    reducer, options = contender.reducer(shape), contender.options
    pairs = fg.pairs(shape.losses, plan=plan, options=options)(shape.params, contender.of(shape))
    fg.apply(reducer, pairs, options=options)
    found = peak_allocated(lambda: fg.apply(reducer, pairs, options=options))
    return Memory(beyond, max(row.bytes for row in plan.contractions), found)


class Children:
    """Measures in fresh processes, forked from one that has done nothing but import."""

    def __init__(self, threads: int, seed: int) -> None:
        # Freed memory goes back at once, so that the peak is that of what is in use.
        os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
        os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "65536")
        self.context, self.arguments = multiprocessing.get_context("forkserver"), (threads, seed)
        self.context.set_forkserver_preload(["tests.benchmarks.memory"])

    def measure(self, shape: str, contender: str, plan: fg.Plan | None) -> Memory | str:
        """Its memory, or why there is none."""
        answers, theirs = self.context.Pipe(duplex=False)
        text = None if plan is None else plan.to_json()
        child = self.context.Process(target=_answer, args=(theirs, shape, contender, text, *self.arguments))
        child.start()
        theirs.close()
        try:
            found: Memory | str = answers.recv()
        except EOFError:
            found = "the process ended without an answer"
        child.join()
        return found


def _answer(pipe: Any, *arguments: Any) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the profiler says on stderr that it starts and stops
    try:
        pipe.send(_measure(*arguments))
    except Exception as error:  # whatever a peer raises is reported, not hidden
        pipe.send(first_line(error))


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
