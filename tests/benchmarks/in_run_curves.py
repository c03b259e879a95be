"""How ratios of `bench_in_run.py` grow with length, width, batch, validation samples and directions; and its plot."""

import importlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import funcghost as fg
from tests.benchmarks.bench_dot import Case, Route, Setting, interleave, make_plan, training_gradient
from tests.benchmarks.common import quartiles, table
from tests.benchmarks.in_run_contenders import InRun, validation_gradient
from tests.benchmarks.models import GPT, next_token

USUAL = {"length": 64, "width": 128, "batch": 8, "validation": 4, "directions": 1}
AXES: dict[str, tuple[int, ...]] = {
    "length": (16, 64, 256),
    "width": (64, 128, 256),
    "batch": (2, 8, 32),
    "validation": (1, 4, 16),
    "directions": (1, 2, 4, 8),
}
VOCABULARY = 1024


@dataclass(frozen=True)
class Point:
    """One size on one axis, the others as usual; quartiles of what a contender takes, in plain steps."""

    axis: str
    size: int
    contender: str
    ratio: tuple[float, float, float]


def routes(problem: InRun, directions: int) -> dict[str, Route]:
    case, plan = problem.train, make_plan(problem.train)
    step, pairs = fg.grad_and_reduce(case.losses, plan=plan), fg.pairs(case.losses, plan=plan)
    dense = [{k: torch.randn_like(v) for k, v in case.direction.items()} for _ in range(directions)]
    exact, small = fg.dot(fg.stack(dense)), fg.dot(fg.stack([fg.compress(v, rank=32) for v in dense]))
    found: dict[str, Route] = {
        "plain step": lambda: training_gradient(case),
        "exact": lambda: step(case.params, case.batch, exact),
        "rank 32": lambda: step(case.params, case.batch, small),
    }
    if directions == 1:
        found |= {
            "fresh, exact": lambda: step(case.params, case.batch, fg.dot(validation_gradient(problem))),
            "fresh, pairs": lambda: step(case.params, case.batch, fg.dot(pairs(case.params, problem.validation.batch))),
        }
    return found


def measure_curves(setting: Setting, seconds: float) -> list[Point]:
    """All axes, some seconds for each size."""
    points = []
    for axis, sizes in AXES.items():
        for size in sizes:
            now = USUAL | {axis: size}
            model = setting.place(GPT(VOCABULARY, now["length"], now["width"], layers=2, heads=4))
            case = Case.of_model("GPT", model, next_token, setting.tokens(now["batch"], now["length"], VOCABULARY))
            problem = InRun.of(case, setting.tokens(now["validation"], now["length"], VOCABULARY))
            found = routes(problem, now["directions"])
            for route in found.values():
                route()
            times = interleave(found, setting, time.monotonic() + seconds)
            plain = times.pop("plain step")
            points += [
                Point(axis, size, name, quartiles([a / b for a, b in zip(taken, plain, strict=False)]))
                for name, taken in times.items()
            ]
    return points


def show_curves(points: Sequence[Point]) -> str:
    names = list(dict.fromkeys(point.contender for point in points))
    lines = [["x plain step", *names]]
    for axis, size in dict.fromkeys((point.axis, point.size) for point in points):
        here = {point.contender: point for point in points if (point.axis, point.size) == (axis, size)}
        cells = [f"{here[name].ratio[1]:.3f}" if name in here else "" for name in names]
        lines.append([f"{axis} {size}", *cells])
    usual = ", ".join(f"{axis} {size}" for axis, size in USUAL.items())
    return f"{table(lines)}\nGPT of 2 layers, vocabulary {VOCABULARY}; where not said otherwise {usual}"


def draw(report: dict[str, Any], path: Path) -> None:
    """The ratios of all contenders with their quartiles, and the curves where there are some."""
    cases, axes = report["cases"], list(dict.fromkeys(point["axis"] for point in report["curves"]))
    # Only who wants a plot needs matplotlib.
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(5 * (len(cases) + len(axes)), 5))
    grid = figure.subplots(1, len(cases) + len(axes), squeeze=False)
    panels = list(grid[0])
    for name, case in cases.items():
        panel, rows = panels.pop(0), case["rows"][::-1]
        panel.set(title=f"{name}: CPU time, in steps of the base", xlim=(0.8, 2.2))
        middle = [row["cpu_ratio"][1] for row in rows]
        spread = [[abs(row["cpu_ratio"][1] - row["cpu_ratio"][k]) for row in rows] for k in (0, 2)]
        panel.barh([row["name"] for row in rows], middle, xerr=spread, color="#4c78a8")
        floors = [(row["floor"], i) for i, row in enumerate(rows) if row["floor"]]
        panel.plot(*zip(*floors, strict=True), "|", color="black", markersize=12, label="floor in FLOPs")
        panel.legend()
    for axis in axes:
        panel = panels.pop(0)
        panel.set(title=axis, xscale="log", ylabel="x plain step")
        for name in dict.fromkeys(point["contender"] for point in report["curves"]):
            here = [p for p in report["curves"] if p["axis"] == axis and p["contender"] == name]
            panel.plot([p["size"] for p in here], [p["ratio"][1] for p in here], "o-", label=name)
        panel.legend()
    figure.tight_layout()
    figure.savefig(path)
