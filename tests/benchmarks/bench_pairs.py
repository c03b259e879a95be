"""Norms, Gram matrices, products with validation and projections of per-sample gradients: time and memory.

Every round times each contender once, in turn, and divides by the plain step of the same round. Memory is measured in a
process of its own for each. Results are compared before anything is timed. See the README beside this file.
"""

import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import funcghost as fg

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.benchmarks.common import describe, parser_of, positive, quartiles, table
from tests.benchmarks.contenders import LARGE_SHAPES, SHAPES, Contender, Route, Shape, contenders, quiet
from tests.benchmarks.memory import Children, Memory, first_line

LEAST_ROUNDS = 3
FAR_SLOWER, HOPELESS = 5.0, 10.0
"""From so many plain steps on a contender takes part in the first rounds alone, or is timed once."""
TOLERANCE = 1e-4
QUICK_SHAPES, COMPILED = ("mlp", "gpt128"), ("mlp",)


@dataclass
class Row:
    """What was measured of one contender; times and ratios by quartiles, memory in bytes."""

    contender: str
    batch: str
    rounds: int = 0
    seconds: tuple[float, float, float] | None = None
    of_plain: tuple[float, float, float] | None = None
    of_both: tuple[float, float, float] | None = None
    cpu_of_plain: float | None = None
    cpu_of_both: float | None = None
    off: float | None = None
    memory: dict[str, Any] | None = None
    error: str | None = None


Timed = tuple[float, float]
"""Seconds by the clock, and of this process's CPU time."""


def timed(route: Route, device: torch.device) -> Timed:
    wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    route()
    wait(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def interleaved(
    routes: dict[str, Route], warm: dict[str, Timed], device: torch.device, seconds: float
) -> dict[str, dict[int, Timed]]:
    """The times by contender and round: rounds until the time is up, each starting with another contender."""
    plain = warm["plain step"][0]
    times: dict[str, dict[int, Timed]] = {name: {} for name in routes}
    slow = [name for name in routes if warm[name][0] >= HOPELESS * plain]
    names, deadline, number = [name for name in routes if name not in slow], time.monotonic() + seconds, 0
    while number < LEAST_ROUNDS or time.monotonic() < deadline:
        if number == LEAST_ROUNDS:
            fastest = {name: min(wall for wall, _ in found.values()) for name, found in times.items() if found}
            names = [name for name in names if fastest[name] < FAR_SLOWER * fastest["plain step"]]
        names.append(names.pop(0))
        for name in names:
            times[name][number] = timed(routes[name], device)
        number += 1
    for name in slow:
        times[name][0] = warm[name]
    return times


def ratios(times: dict[str, dict[int, Timed]], name: str, base: str, clock: int) -> list[float]:
    if base not in times:
        return []
    return [found[clock] / times[base][i][clock] for i, found in times[name].items()]


def prepared(
    shape: Shape, entries: Sequence[Contender], rows: dict[str, Row]
) -> tuple[dict[str, Route], dict[str, Timed], dict[str, fg.Plan | None]]:
    """Those that run, with the time of a second run (the first warms up) and their plans."""
    routes: dict[str, Route] = {}
    plans: dict[str, fg.Plan | None] = {}
    warm: dict[str, Timed] = {}
    references: dict[str, Tensor] = {}
    for entry in entries:
        row = rows[entry.name]
        try:
            plans[entry.name] = plan = entry.plan(shape)
            route = entry.prepare(shape, plan)
            started = time.perf_counter(), time.process_time()
            found = route()
            warm[entry.name] = time.perf_counter() - started[0], time.process_time() - started[1]
        except Exception as error:  # whatever a peer raises is reported, not hidden
            row.error = first_line(error)
            continue
        if entry.gives is not None:
            reference = references.setdefault(entry.gives, found.detach())
            row.off = float((found - reference).abs().max() / reference.abs().max())
            if not row.off <= TOLERANCE:
                row.error = f"gives other numbers, off by {row.off:.1e} of the largest"
        if entry.name in ("plain step", "plain step, both") or warm[entry.name][0] < HOPELESS * warm["plain step"][0]:
            warm[entry.name] = timed(route, shape.both.device)
        routes[entry.name] = route
    return routes, warm, plans


def measure(shape: Shape, entries: Sequence[Contender], seconds: float, children: Children | None) -> list[Row]:
    rows = {entry.name: Row(entry.name, entry.batch) for entry in entries}
    routes, warm, plans = prepared(shape, entries, rows)
    times = interleaved(routes, warm, shape.both.device, seconds)
    for name, found in times.items():
        row, plain, both = rows[name], *(ratios(times, name, base, 0) for base in ("plain step", "plain step, both"))
        row.rounds, row.seconds = len(found), quartiles([wall for wall, _ in found.values()])
        row.of_plain, row.of_both = quartiles(plain), quartiles(both) if both else None
        row.cpu_of_plain = median(ratios(times, name, "plain step", 1))
        row.cpu_of_both = median(ratios(times, name, "plain step, both", 1)) if both else None
    for name in routes if children is not None else ():
        assert children is not None
        if "compiled" in name:  # the compiler takes memory of its own
            continue
        memory = children.measure(shape.name, name, plans[name])
        rows[name].memory = asdict(memory) if isinstance(memory, Memory) else {"error": memory}
    return list(rows.values())


def spread(values: tuple[float, float, float] | None, scale: float = 1.0, digits: int = 2) -> str:
    if values is None:
        return ""
    low, middle, high = (f"{scale * value:.{digits}f}" for value in values)
    return f"{middle} ({low} - {high})"


def megabytes(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:.1f}"


HEAD = [
    "",
    "batch",
    "rounds",
    "ms",
    "x plain",
    "x both",
    "cpu",
    "cpu, both",
    "MB beyond plain",
    "tiles MB",
    "predicted",
]


def show(shape: Shape, rows: Sequence[Row]) -> str:
    number = sum(parameter.numel() for parameter in shape.params.values())
    lines = [HEAD]
    for row in rows:
        if row.seconds is None:
            continue
        memory = row.memory or {}
        ratio = [f"{value:.2f}" if value else "" for value in (row.cpu_of_plain, row.cpu_of_both)]
        lines.append(
            [
                row.contender + (" (!)" if row.error else ""),
                *(row.batch, str(row.rounds), f"{1e3 * row.seconds[1]:.1f}", spread(row.of_plain), spread(row.of_both)),
                *(*ratio, *(megabytes(memory.get(key)) for key in ("beyond_plain", "found", "predicted"))),
            ]
        )
    notes = [f"{row.contender}: {row.error}" for row in rows if row.error]
    notes += [f"{row.contender}: memory: {row.memory['error']}" for row in rows if row.memory and "error" in row.memory]
    head = f"\n{shape.name}: {number:,} parameters, {len(shape.train)} samples and {shape.num_val} of validation"
    return "\n".join([head, table(lines), *notes])


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints the tables and gives what --out writes."""
    parser = parser_of(
        "Times and weighs reducers of per-sample gradients and alternatives.",
        quick="two shapes, nothing forced, no memory",
    )
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES, *LARGE_SHAPES], help="default all, with --quick two")
    parser.add_argument("--only", type=re.compile, help="contenders whose name has this regular expression")
    parser.add_argument(
        "--seconds", type=positive(float), help="time for rounds per shape; default 40, with --quick 15"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave the processes that measure memory out")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=positive(int), help="CPU threads; default torch's own choice")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    quiet()
    seconds = args.seconds or (15.0 if args.quick else 40.0)
    weigh = not (args.quick or args.no_memory) and args.device.type == "cpu"
    children = Children(torch.get_num_threads(), args.seed) if weigh else None
    report: dict[str, Any] = {"setting": describe(args.device), "shapes": {}}
    print(", ".join(f"{key} {value}" for key, value in report["setting"].items()))
    for name in args.shapes or (QUICK_SHAPES if args.quick else SHAPES):
        torch.manual_seed(args.seed)
        shape = (SHAPES | LARGE_SHAPES)[name](args.device)
        entries = contenders(forced=not args.quick, compiled=name in COMPILED)
        if args.only:
            entries = [own for own in entries if own.name.startswith("plain step") or args.only.search(own.name)]
        rows = measure(shape, entries, seconds, children)
        report["shapes"][name] = [asdict(row) for row in rows]
        print(show(shape, rows), flush=True)
        if args.out:
            args.out.write_text(json.dumps(report, indent=2) + "\n")
    return report


if __name__ == "__main__":
    main()
