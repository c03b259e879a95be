"""What `on_gpu.sh` runs: tests, benchmarks and a profile on one device, each in a process of its own, in bounded time.

Every stage adds to `on_gpu.json` and `on_gpu.md` as soon as it is done, so that a run that is cut short is worth
something. A stage that fails is a row that says so.
"""

import argparse
import cProfile
import importlib.util
import json
import pstats
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import funcghost as fg
from tests.benchmarks.bench_dot import (
    DTYPES,
    LARGE_CASES,
    Case,
    Route,
    Setting,
    interleave,
    make_plan,
    training_gradient,
)
from tests.benchmarks.common import describe, quartiles, table
from tests.benchmarks.in_run_memory import can_measure, step_peak
from tests.benchmarks.models import LARGE, Decoder, next_token

ROOT, HERE = Path(__file__).resolve().parents[2], Path(__file__).resolve().parent
LIMIT = 480.0
"""Seconds of the whole."""

SHOWN = 12
"""Functions of the profile."""

CUDA_TESTS = (
    *("algebra/test_compression.py", "checking/test_facts.py", "engine/test_modes.py"),
    *("engine/test_no_waiting.py", "losses/test_functional.py"),
)
Json = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """A command, the most seconds it may take, and the modules that it cannot do without."""

    name: str
    command: tuple[str, ...]
    seconds: float
    needs: tuple[str, ...] = ()
    writes: bool = True


def stages(device: str, dtype: str, tiny: bool, folder: Path) -> list[Stage]:
    """What is run, in this order: what is quick and what matters most comes first."""
    long, longer = ("llama-tiny", "llama-tiny") if tiny else ("llama1024", "llama4096")
    share = 0.05 if tiny else 1.0
    place = ("--device", device)
    cases = tuple(dict.fromkeys((long, longer)))

    def benchmark(name: str, seconds: float, *more: str) -> Stage:
        command = (str(HERE / f"{name}.py"), *place, *more, "--out", str(folder / f"{name}.json"))
        return Stage(name, command, seconds)

    tests = [f"tests/{name}" for name in (CUDA_TESTS[2:3] if tiny else CUDA_TESTS)]
    return [
        Stage("doctor", ("-m", "funcghost", "doctor"), 60, writes=False),
        *(
            Stage(
                f"profile {case}",
                *((str(Path(__file__)), *place, "--dtype", dtype, "--profile", case, "--out", str(folder)), 100),
            )
            for case in cases
        ),
        benchmark("bench_dot", 80, "--dtype", dtype, "--seconds", str(12 * share), "--cases", *cases, "overhead"),
        Stage(
            "cuda tests",
            (
                "-m",
                "pytest",
                "-q",
                "-m",
                "cuda",
                "-p",
                "no:xdist",
                "-p",
                "no:cacheprovider",
                "--continue-on-collection-errors",
                *tests,
            ),
            *(110, ("pytest", "hypothesis"), False),
        ),
        benchmark(
            *("bench_in_run", 90, "--dtype", dtype, "--seconds", str(15 * share), "--cases", long, "--no-memory"),
            *("--groups", "cached"),
        ),
        benchmark(
            "bench_pairs", 90, "--seconds", str(15 * share), "--shapes", long, "--quick", "--only", "norm|cross|gram"
        ),
    ]


def run(stage: Stage, left: float, folder: Path) -> Json:
    """What a stage says: its JSON, or the end of what it prints, and how it ended."""
    lacking = [name for name in stage.needs if importlib.util.find_spec(name) is None]
    if lacking:
        return {"status": f"left out: {', '.join(lacking)} is missing"}
    if left < 10:
        return {"status": "left out: no time left"}
    written = folder / f"{stage.name.replace(' ', '_')}.json"
    written.unlink(missing_ok=True)  # that of an earlier run
    began, seconds = time.monotonic(), min(stage.seconds, left)
    try:
        done = subprocess.run(
            [sys.executable, *stage.command], cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
        )
        said, status = done.stdout, "done" if done.returncode == 0 else f"ended with {done.returncode}"
        if done.returncode == 5 and "deselected" in said:
            status = "done"  # pytest found no test to run
        complaint = done.stderr
    except subprocess.TimeoutExpired as late:
        said, complaint = (
            part.decode() if isinstance(part, bytes) else part or "" for part in (late.stdout, late.stderr)
        )
        status = f"stopped after {seconds:.0f} s"
    found: Json = {"status": status, "seconds": round(time.monotonic() - began, 1)}
    if stage.writes and written.exists():
        found["report"] = json.loads(written.read_text(encoding="utf-8"))
    found["said"] = said[-6000:]
    if status != "done":
        found["complaint"] = complaint[-3000:]
    return found


def routes_of(case: Case, plan: fg.Plan) -> dict[str, Route]:
    """A plain step and steps with reducers."""
    never = fg.Options(verify="never")
    step = fg.grad_and_reduce(case.losses, plan=plan, options=never)
    score = fg.reduce(case.losses, plan=plan, options=never)
    dot, small = fg.dot(case.direction), fg.dot(fg.compress(case.direction, rank=32))
    return {
        "plain step": lambda: training_gradient(case),
        "step with dot": lambda: step(case.params, case.batch, dot),
        "dot alone": lambda: score(case.params, case.batch, dot),
        "step with dot, rank 32": lambda: step(case.params, case.batch, small),
        "step with norms": lambda: step(case.params, case.batch, fg.squared_norm()),
        "step with norms and Gram matrix": lambda: step(case.params, case.batch, [fg.squared_norm(), fg.gram()]),
    }


def compiled(case: Case, plan: fg.Plan) -> dict[str, Route]:
    """The plain step and the one with dot, compiled."""
    step = fg.grad_and_reduce(case.losses, plan=plan, options=fg.Options(verify="never"))
    plain, ours, dot = torch.compile(training_gradient), torch.compile(step, fullgraph=True), fg.dot(case.direction)
    return {
        "plain step": lambda: training_gradient(case),
        "plain step, compiled": lambda: plain(case),
        "step with dot, compiled": lambda: ours(case.params, case.batch, dot),
    }


def runnable(routes: dict[str, Route], setting: Setting) -> tuple[dict[str, Route], dict[str, str]]:
    """Those that run, called twice, and the first line of the error of the others."""
    good, errors = dict[str, Route](), dict[str, str]()
    for name, route in routes.items():
        try:
            route(), route()
            setting.wait()
            good[name] = route
        except Exception as error:  # memory, a compiler that lacks: the row says it
            errors[name] = first_line(error)
    return good, errors


def first_line(error: Exception) -> str:
    """The class of an error and what it says first."""
    return f"{type(error).__name__}: {[*str(error).splitlines(), ''][0]}"


def graphs(routes: dict[str, Route]) -> tuple[dict[str, Route], dict[str, str]]:
    """Steps as CUDA graphs, beside the plain step as it is; and the errors of those that cannot be captured."""
    good, errors = {"plain step": routes["plain step"]}, dict[str, str]()
    for key in ("plain step", "step with dot"):
        try:
            good[f"{key}, CUDA graph"] = captured(routes[key])
        except Exception as error:
            errors[f"{key}, CUDA graph"] = first_line(error)
    return good, errors


def captured(route: Route) -> Route:
    """A step as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            route()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        route()
    torch.cuda.synchronize()
    return graph.replay


def rows_of(routes: dict[str, Route], setting: Setting, seconds: float, *, peaks: bool = True) -> Json:
    """Times side by side in units of the plain step of the same round, and peaks of memory beyond what is held."""
    times = interleave(routes, setting, time.monotonic() + seconds)
    plain, found = times["plain step"], Json()
    for key, taken in times.items():
        ratios = quartiles([own / base for own, base in zip(taken, plain, strict=False)])
        peak = step_peak(routes[key], setting.device) / 2**20 if peaks and can_measure(setting.device) else None
        found[key] = {"ms": [1e3 * value for value in quartiles(taken)], "x plain": ratios, "peak MiB": peak}
    return found


def thin(name: str, setting: Setting) -> Case:
    """A decoder with as many layers, so narrow that its kernels take next to no time."""
    model = setting.place(Decoder(vocabulary=64, width=32, layers=LARGE[name]["layers"], heads=4))
    return Case.of_model(f"{name}, thin", model, next_token, setting.tokens(2, 8, 64))


def python_seconds(name: str, setting: Setting, seconds: float) -> dict[str, float]:
    """Seconds of a plain step and of one with dot where only Python, dispatch and launches take time."""
    case = thin(name, setting)
    routes = routes_of(case, make_plan(case))
    chosen = {key: routes[key] for key in ("plain step", "step with dot")}
    good, _ = runnable(chosen, setting)
    times = interleave(good, setting, time.monotonic() + seconds)
    return {key: quartiles(taken)[1] for key, taken in times.items()}


def by_function(route: Route, rounds: int) -> list[Json]:
    """Where Python spends its own time in a step, most first."""
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(rounds):
        route()
    profile.disable()
    found: Any = pstats.Stats(profile)
    rows = [
        {"function": f"{Path(file).name}:{line} {name}", "ms": 1e3 * own / rounds, "calls": calls / rounds}
        for (file, line, name), (_, calls, own, _, _) in found.stats.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])[:SHOWN]


def profile(name: str, setting: Setting, seconds: float, save: Callable[[Json], None]) -> None:
    """One decoder: steps side by side, how much of a step is Python, CUDA graphs, and compiled steps.

    What is found is saved after each of these, the longest last.
    """
    case = LARGE_CASES[name](setting)
    plan = make_plan(case)
    routes, errors = runnable(routes_of(case, plan), setting)
    exact, beside = routes["dot alone"]().double(), routes["step with dot"]().reduced.double()
    rows = rows_of(routes, setting, seconds)
    python = python_seconds(name, setting, seconds / 4)
    found: Json = {
        "setting": describe(setting.device, setting.dtype),
        "case": name,
        "parameters": sum(value.numel() for value in case.params.values()),
        "scores of step and reduce differ by": float((beside - exact).abs().max() / exact.abs().max()),
        "rows": rows,
        "errors": errors,
        "python ms": {key: 1e3 * value for key, value in python.items()},
        "python of a step with dot": min(1e3 * python["step with dot"] / rows["step with dot"]["ms"][1], 1.0),
        "by function": by_function(routes["step with dot"], 2 if seconds < 2 else 5),
    }
    save(found)
    if setting.device.type == "cuda":
        for made in (lambda: graphs(routes), lambda: runnable(compiled(case, plan), setting)):
            good, wrong = made()
            errors |= wrong
            rows |= rows_of(good, setting, seconds / 4, peaks=False) | {"plain step": rows["plain step"]}
            save(found)


def saved(path: Path, found: Json) -> None:
    """Writes what was found so far, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found), encoding="utf-8")
    part.replace(path)


def show_profile(found: Json) -> str:
    """The table of a profile."""
    rows = [["step", "ms", "x plain", "quartiles", "peak MiB"]]
    for name, row in found["rows"].items():
        low, middle, high = row["x plain"]
        peak = "" if row["peak MiB"] is None else f"{row['peak MiB']:.0f}"
        rows.append([name, f"{row['ms'][1]:.2f}", f"{middle:.2f}", f"{low:.2f} - {high:.2f}", peak])
    python = found["python ms"]
    notes = [f"{name} does not run: {error}" for name, error in found["errors"].items()]
    notes.append(
        f"Python, dispatch and launches, by a decoder of as many thin layers: {python['plain step']:.1f} ms of a plain "
        f"step, {python['step with dot']:.1f} ms with dot, {found['python of a step with dot']:.0%} of its time "
        "if nothing of it is hidden behind kernels"
    )
    functions = [["function", "ms", "calls"]]
    functions += [[row["function"], f"{row['ms']:.2f}", f"{row['calls']:.0f}"] for row in found["by function"]]
    head = f"{found['case']}, {found['parameters']:,} parameters, {found['setting']['dtype']}"
    return "\n".join([head, table(rows), *notes, "", table(functions)])


def written(report: Json, folder: Path) -> None:
    """The JSON and the table of what is there so far."""
    (folder / "on_gpu.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    lines = [f"# {report['setting']['device_name']}, torch {report['setting']['torch']}", ""]
    for name, found in report["stages"].items():
        lines += [f"## {name}: {found['status']}, {found.get('seconds', 0)} s", ""]
        said = (
            show_profile(found["report"]) if name.startswith("profile") and "report" in found else found.get("said", "")
        )
        lines += ["```", (said + found.get("complaint", "")).strip(), "```", ""]
    (folder / "on_gpu.md").write_text("\n".join(lines), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all stages; 0 if all are done."""
    parser = argparse.ArgumentParser(description="Everything that needs a GPU, in at most eight minutes.")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--dtype", choices=DTYPES, help="default bfloat16, with --tiny float32")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes: shows that it runs")
    parser.add_argument("--stages", nargs="+", help="only those whose names start so")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "on_gpu", help="folder of the JSON and the table")
    parser.add_argument("--profile", choices=LARGE_CASES, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    dtype = args.dtype or ("float32" if args.tiny else "bfloat16")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.profile:
        torch.manual_seed(0)
        setting = Setting(args.device, DTYPES[dtype], time.perf_counter)
        path = args.out / f"profile_{args.profile}.json"
        profile(
            *(args.profile, setting, 0.5 if args.profile == "llama-tiny" else 20.0),
            lambda found: saved(path, found),
        )
        return 0
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --tiny shows that the script runs")
    began = time.monotonic()
    report: Json = {"setting": describe(args.device, DTYPES[dtype]), "stages": {}}
    chosen = stages(str(args.device), dtype, args.tiny, args.out)
    for stage in chosen:
        if args.stages and not stage.name.startswith(tuple(args.stages)):
            continue
        found = run(stage, LIMIT - (time.monotonic() - began), args.out)
        report["stages"][stage.name] = found
        print(f"{stage.name}: {found['status']}, {found.get('seconds', 0)} s", flush=True)
        written(report, args.out)
    print(args.out / "on_gpu.md")
    return 0 if all(found["status"] == "done" for found in report["stages"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
