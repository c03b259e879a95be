"""Scores in the run against plain training: time, FLOPs and memory of every way to have them, beside what was promised.

Every round times each contender once, in turn, so that what else the machine does falls on all of them alike. See the
README beside this file.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.benchmarks.bench_dot import (
    DTYPES,
    Overhead,
    Setting,
    count_flops,
    gpt,
    large,
    measure_overhead,
    mlp,
    tiny_gpt,
    tiny_mlp,
)
from tests.benchmarks.common import describe, parser_of, positive, quartiles, table, writable_file
from tests.benchmarks.in_run_contenders import (
    COMPILED,
    COMPILED_BOTH,
    CONCATENATED,
    GROUPS,
    PLAIN,
    STEPPED,
    STEPPED_BOTH,
    Contender,
    InRun,
    check_agreement,
    contenders,
)
from tests.benchmarks.in_run_curves import draw, measure_curves, show_curves
from tests.benchmarks.in_run_memory import can_measure, in_child, size, step_peak
from tests.benchmarks.models import LARGE

LEAST_ROUNDS, FAR_SLOWER = 3, 4.0
EVERY_TENTH, REFRESH, CACHED = "fresh every 10th step, rank 32", "refresh of rank 32", "rank 32"
Quartiles = tuple[float, float, float]


def in_run_gpt(setting: Setting) -> InRun:
    case = gpt(setting)
    # Logits of the usual size: torch's own start makes softmax so sharp that gradients are full of subnormal numbers.
    case.params["tokens.weight"].detach().mul_(0.02)
    return InRun.of(case, setting.tokens(4, 128, 8192))


def in_run_mlp(setting: Setting) -> InRun:
    return InRun.of(mlp(setting), setting.noise(16, 1024))


def in_run_large(name: str, setting: Setting) -> InRun:
    size = LARGE[name]
    rows = max(size["batch"] // 2, 1)
    return InRun.of(large(name, setting), setting.tokens(rows, size["length"], size["vocabulary"]))


CASES: dict[str, Callable[[Setting], InRun]] = {"gpt": in_run_gpt, "mlp": in_run_mlp}
LARGE_CASES: dict[str, Callable[[Setting], InRun]] = {name: partial(in_run_large, name) for name in LARGE}
IN_MEMORY = (PLAIN, "exact", "rank 16", "rank 32", "scoring only, dense", "scoring only, rank 32")

PROMISES: dict[str, dict[str, float]] = {
    "GPT": {
        "exact": 1.36,
        "rank 32": 1.12,
        "rank 16": 1.06,
        "scoring only, dense": 1.05,
        "scoring only, rank 32": 1.05,
        "fresh, exact": 1.25,
        "fresh, rank 32": 1.08,
        "fresh, rank 32 tracked": 1.08,
        EVERY_TENTH: 1.08,
        "account": 2.4,
        "account, rank 32": 1.10,
    },
    "MLP": {
        "fresh, exact": 1.10,
        "fresh, rank 32": 1.10,
        "fresh, pairs": 1.10,
        "fresh, cross": 1.10,
        "compiled: fresh, cross": 1.10,
    },
}
MEMORY_PROMISES = {"exact": (1.10, True), "rank 32": (1.08, False)}
"""The most a step may take at its peak, in peaks of a plain step; and whether a copy of the parameters comes on top."""
MOST_MICROSECONDS = 100.0
NOTES = {
    PLAIN: "",
    CONCATENATED: " [c]",
    STEPPED: " [s]",
    STEPPED_BOTH: " [cs]",
    COMPILED: " [j]",
    COMPILED_BOTH: " [cj]",
}
"""What a name is followed by, for its base."""


@dataclass(frozen=True)
class Row:
    """One contender: milliseconds and times the base in the same round, by both clocks; FLOPs in those of the base."""

    name: str
    base: str
    wall_ms: Quartiles
    ratio: Quartiles
    cpu_ratio: Quartiles
    flops: float | None
    floor: float | None


@dataclass(frozen=True)
class Memory:
    """Peak bytes of tensors: those there before the step, and those of the step."""

    name: str
    held: int
    step: int


@dataclass(frozen=True)
class Verdict:
    """A promise beside what was measured."""

    case: str
    what: str
    promised: float
    measured: float

    @property
    def words(self) -> str:
        missed = self.measured - self.promised
        return "met" if missed <= 0 else f"missed by {missed:.3g}"


def interleave(routes: dict[str, Contender], setting: Setting, deadline: float) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of every contender, in rounds; those far slower take part in the first rounds alone."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in routes}
    names = list(routes)
    while len(times[PLAIN]) < LEAST_ROUNDS or time.monotonic() < deadline:
        if len(times[PLAIN]) == 2:
            names = [n for n in names if min(times[n])[0] < FAR_SLOWER * min(times[routes[n].base])[0]]
        names.append(names.pop(0))
        for name in names:
            setting.wait()
            start = time.perf_counter(), time.process_time()
            routes[name].route()
            setting.wait()
            times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return times


def measure(problem: InRun, setting: Setting, groups: tuple[str, ...], seconds: float) -> tuple[list[Row], int]:
    """The rows of a case and the number of rounds."""
    found = contenders(problem, groups)
    check_agreement(problem, found)
    for contender in found.values():
        contender.route()  # what is verified in a first call is no part of a step
    counted = {n: None if n.startswith("compiled") else count_flops(c.route) for n, c in found.items()}
    times = interleave(found, setting, time.monotonic() + seconds)
    if REFRESH in found and CACHED in found:
        # A step on the cached direction and a tenth of what makes a new one.
        found[EVERY_TENTH] = Contender(lambda: None, CONCATENATED)
        both = zip(times[CACHED], times[REFRESH], strict=False)
        times[EVERY_TENTH] = [(a[0] + b[0] / 10, a[1] + b[1] / 10) for a, b in both]
    rows = []
    for name, taken in times.items():
        base = found[name].base
        pairs = list(zip(taken, times[base], strict=False))
        wall, cpu = ([own[k] / other[k] for own, other in pairs] for k in (0, 1))
        flops, unit, floor = counted.get(name), counted.get(base), found[name].floor
        rows.append(
            Row(
                name=name,
                base=base,
                wall_ms=quartiles([1e3 * own[0] for own in taken]),
                ratio=quartiles(wall),
                cpu_ratio=quartiles(cpu),
                flops=flops / unit if flops and unit else None,
                floor=floor / unit if floor and unit else None,
            )
        )
    return rows, len(times[PLAIN])


def child(case: str, name: str, setting: Setting) -> None:
    """Measures the memory of one contender, and prints it."""
    problem = CASES[case](setting)
    contender = contenders(problem, ("cached",) if name != PLAIN else ())[name]
    here = size([*problem.train.params.values(), problem.train.batch, *contender.held])
    print(json.dumps(asdict(Memory(name, here, step_peak(contender.route, setting.device)))))


def measure_memory(case: str, args: argparse.Namespace) -> list[Memory]:
    shared = ["--device", str(args.device), "--dtype", args.dtype, "--threads", str(args.threads)]
    return [Memory(**in_child(__file__, ["--child", case, name, *shared])) for name in IN_MEMORY]


def verdicts(case: str, rows: Sequence[Row], memory: Sequence[Memory], copy: int) -> list[Verdict]:
    """What was promised for a case. Times are those of this process: the CPU's where it runs on one."""
    ratios = {row.name: row for row in rows}
    found = [
        Verdict(case, f"{name}, x {ratios[name].base}", most, ratios[name].cpu_ratio[1])
        for name, most in PROMISES.get(case, {}).items()
        if name in ratios
    ]
    peaks = {entry.name: entry.held + entry.step for entry in memory}
    for name, (most, copied) in MEMORY_PROMISES.items():
        if case == "GPT" and name in peaks:
            own = peaks[name] - (copy if copied else 0)
            note = ", less a copy of the parameters" if copied else ""
            found.append(Verdict(case, f"peak memory of {name}{note}, x {PLAIN}", most, own / peaks[PLAIN]))
    return found


def show_rows(rows: Sequence[Row]) -> str:
    lines = [["contender", "ms", "x base", "quartiles", "CPU x base", "quartiles", "x FLOPs", "floor"]]
    for row in rows:
        note = NOTES[row.base]
        cells = [f"{row.wall_ms[1]:.1f}"]
        for low, middle, high in (row.ratio, row.cpu_ratio):
            cells += [f"{middle:.3f}", f"{low:.3f} - {high:.3f}"]
        cells += ["" if value is None else f"{value:.3f}" for value in (row.flops, row.floor)]
        lines.append([row.name + note, *cells])
    bases = "[c]: base is the plain step on both batches; [s]: with the optimizer's step; [j]: compiled"
    return f"{table(lines)}\n{bases}"


def show_memory(memory: Sequence[Memory]) -> str:
    plain = next(entry for entry in memory if entry.name == PLAIN)
    lines = [["peak memory", "held MiB", "step MiB", "x plain"]]
    for entry in memory:
        total = (entry.held + entry.step) / (plain.held + plain.step)
        lines.append([entry.name, f"{entry.held / 2**20:.1f}", f"{entry.step / 2**20:.1f}", f"{total:.3f}"])
    return table(lines)


def show_verdicts(found: Sequence[Verdict]) -> str:
    lines = [["promise", "at most", "measured", "verdict"]]
    lines += [[f"{v.case}: {v.what}", f"{v.promised:.2f}", f"{v.measured:.3f}", v.words] for v in found]
    return table(lines)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(
        "Times every way to score in the run against plain training.", quick="few rounds, nothing compiled"
    )
    parser.add_argument("--seconds", type=positive(float), help="time per case; default 90, with --quick 20")
    parser.add_argument("--cases", nargs="+", choices=[*CASES, *LARGE_CASES], default=list(CASES))
    parser.add_argument("--groups", nargs="+", choices=GROUPS, help="default all; with --quick not compiled")
    parser.add_argument("--no-memory", action="store_true", help="start no processes to measure memory")
    parser.add_argument("--curves", action="store_true", help="scaling curves, about three minutes more")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=positive(int), default=1, help="CPU threads; more lose much on shared cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=writable_file, help="draw the ratios, and the curves, to this file (png, svg)")
    parser.add_argument("--child", nargs=2, metavar=("CASE", "CONTENDER"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.seconds = args.seconds or (20.0 if args.quick else 90.0)
    args.memory_of = ("gpt",) if args.quick else tuple(CASES)
    args.groups = tuple(args.groups or (GROUPS[:-1] if args.quick else GROUPS))
    return args


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints the tables and gives what --out writes."""
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    # vmap says that it loops where an op has no batching rule: attention kernels on the CPU.
    warnings.filterwarnings("ignore", message="There is a performance drop")
    setting = Setting(args.device, DTYPES[args.dtype], time.process_time)
    if args.child:
        child(args.child[0], args.child[1], setting)
        return {}
    report: dict[str, Any] = {
        "setting": describe(setting.device, setting.dtype),
        "cases": {},
        "curves": [],
        "overheads": [],
        "promises": [],
    }
    print(", ".join(f"{key} {value}" for key, value in report["setting"].items()))
    promises: list[Verdict] = []
    for key in args.cases:
        problem = (CASES | LARGE_CASES)[key](setting)
        rows, rounds = measure(problem, setting, args.groups, args.seconds)
        memory = (
            measure_memory(key, args)
            if "cached" in args.groups and not args.no_memory and can_measure(args.device) and key in args.memory_of
            else []
        )
        name = problem.train.name
        copy = size(list(problem.train.params.values()))
        promises += verdicts(name, rows, memory, copy)
        report["cases"][name] = {
            "rounds": rounds,
            "rows": [asdict(row) for row in rows],
            "memory": [asdict(entry) for entry in memory],
        }
        print(f"\n{name}: {rounds} rounds\n{show_rows(rows)}", flush=True)
        if memory:
            print(show_memory(memory), flush=True)
        del problem
    overheads: list[Overhead] = [measure_overhead(make(setting), setting, 3.0) for make in (tiny_mlp, tiny_gpt)]
    promises += [
        Verdict(found.case, "us of Python per site, dense", MOST_MICROSECONDS, found.microseconds[1])
        for found in overheads
    ]
    if args.curves:
        curves = measure_curves(setting, 2.0 if args.quick else 8.0)
        report["curves"] = [asdict(point) for point in curves]
        print("\n" + show_curves(curves), flush=True)
    report["overheads"] = [asdict(found) for found in overheads]
    report["promises"] = [asdict(found) | {"verdict": found.words} for found in promises]
    print("\n" + show_verdicts(promises))
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")
    if args.plot:
        draw(report, args.plot)
    return report


if __name__ == "__main__":
    main()
