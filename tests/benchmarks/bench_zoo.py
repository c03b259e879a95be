"""The training step with `fg.dot` against a plain step on vision models of timm and torchvision, in both modes.

In training mode batch norm mixes the samples of a batch, and tangents are carried to the losses; in eval mode each site
is tapped. Medians over the models, and the worst, stand beside what is promised; steps count where a plain one takes
over 60 ms. `pip install 'funcghost[zoo]'` brings the models, and a torch that they fit.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import funcghost as fg
from tests.benchmarks.bench_dot import Case, Setting, agree, interleave, make_plan, planned_routes, training_gradient
from tests.benchmarks.common import describe, parser_of, positive, quartiles, table

SAMPLES, SIDE, LONG = 8, 96, 0.06
TORCHVISION = (
    *("resnet18", "resnext50_32x4d", "densenet121", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large"),
    *("shufflenet_v2_x1_0", "squeezenet1_1", "mnasnet1_0", "regnet_y_400mf", "efficientnet_b0", "vgg11_bn", "swin_t"),
    *("convnext_tiny", "googlenet"),
)
TIMM = (
    *("resnet26d", "seresnet18", "efficientnet_lite0", "ghostnet_100", "hardcorenas_a", "mixnet_s", "rexnet_100"),
    *("repvgg_a0", "dla34", "hrnet_w18_small", "cspresnet50", "vit_tiny_patch16_224", "mixer_s32_224"),
)
QUICK = ("torchvision/resnet18", "torchvision/mobilenet_v3_small", "timm/ghostnet_100")
PROMISED = {"train": 2.2, "eval": 1.5}
PLANNING = (8.0, 20.0)
"""Plain steps that planning takes in the median, and at worst."""


@dataclass(frozen=True)
class Row:
    """What was measured of a model in a mode: seconds of a plain step, and plain steps of ours and of planning."""

    model: str
    mode: str
    plain: float
    step: float
    planning: float
    carried: int
    tapped: int


def made(name: str) -> torch.nn.Module:
    """The model, with random weights."""
    package, _, own = name.partition("/")
    if package == "torchvision":
        options = {"init_weights": False, "aux_logits": False} if own == "googlenet" else {}
        model: torch.nn.Module = importlib.import_module("torchvision.models").get_model(own, num_classes=16, **options)
        return model
    sized = {"img_size": SIDE} if own.startswith(("vit", "mixer")) else {}
    found: torch.nn.Module = importlib.import_module("timm").create_model(own, num_classes=16, **sized)
    return found


def first_class(output: Tensor, batch: Tensor) -> Tensor:
    """The cross-entropy with the first class."""
    return output.log_softmax(1)[:, 0].neg()


def measured(name: str, mode: str, setting: Setting, budget: float) -> Row:
    """The steps of a model, in turns; its plan between two plain steps."""
    model = setting.place(made(name))
    case = Case.of_model(name, model, first_class, setting.noise(SAMPLES, 3, SIDE, SIDE))
    model.train(mode == "train")
    training_gradient(case)

    def seconds(route: Callable[[], Any]) -> float:
        start = setting.clock()
        route()
        return setting.clock() - start

    around = [seconds(lambda: training_gradient(case))]
    start = setting.clock()
    plan = make_plan(case)
    planning = setting.clock() - start
    around.append(seconds(lambda: training_gradient(case)))
    routes = planned_routes(case, plan)
    scored, alone = routes["grad_and_reduce(dot)"](), routes.pop("reduce(dot)")()
    if mode == "eval" and not agree(scored, alone):
        raise RuntimeError(f"{name}: fg.grad_and_reduce and fg.reduce give different scores.")
    times = interleave(routes, setting, time.monotonic() + budget)
    plain, ours = times["plain step"], times["grad_and_reduce(dot)"]
    return Row(
        name,
        mode,
        quartiles(plain)[1],
        quartiles([a / b for a, b in zip(ours, plain, strict=True)])[1],
        planning / (sum(around) / 2),
        sum(site.action == "carry" for site in plan.sites),
        sum(site.action == "tap" for site in plan.sites),
    )


def show(rows: Sequence[Row]) -> str:
    """The table, and the medians beside what is promised."""
    lines = [["", "mode", "plain ms", "x plain", "planning", "tapped", "carried"]]
    for row in rows:
        numbers = (f"{1e3 * row.plain:.0f}", f"{row.step:.2f}", f"{row.planning:.1f}", str(row.tapped))
        lines.append([row.model, row.mode, *numbers, str(row.carried)])
    said = ["", table(lines), ""]
    for mode, promise in PROMISED.items():
        steps = [row.step for row in rows if row.mode == mode and row.plain > LONG]
        if steps:
            said.append(f"{mode}: {median(steps):.2f} plain steps in the median of {len(steps)} (promised {promise})")
    if plans := [row.planning for row in rows]:
        said.append(
            f"planning: {median(plans):.1f} in the median (promised {PLANNING[0]:.0f}), {max(plans):.1f} at worst "
            f"(promised {PLANNING[1]:.0f})"
        )
    return "\n".join(said)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Prints the table, and gives its rows."""
    known = [*(f"torchvision/{name}" for name in TORCHVISION), *(f"timm/{name}" for name in TIMM)]
    said = "Times exact fg.dot on vision models in training and in eval mode."
    parser = parser_of(said, quick=f"a minute: {', '.join(QUICK)}")
    parser.add_argument("--models", nargs="+", choices=known, help="default all")
    parser.add_argument(
        "--seconds", type=positive(float), default=2.0, help="time per model and mode, past three rounds"
    )
    parser.add_argument("--threads", type=positive(int), default=1)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    setting = Setting(torch.device("cpu"), torch.float32, time.perf_counter)
    print(", ".join(f"{key} {value}" for key, value in describe(setting.device).items()))
    rows: list[Row] = []
    for name in args.models or (QUICK if args.quick else known):
        for mode in PROMISED:
            torch.manual_seed(0)
            try:
                rows.append(row := measured(name, mode, setting, args.seconds))
                print(f"{name}, {mode}: {row.step:.2f}, planning {row.planning:.1f}", flush=True)
            except fg.GhostError as error:
                print(f"{name}, {mode}: {type(error).__name__}: {error}", flush=True)
            except ModuleNotFoundError as error:
                print(f"{name}, {mode}: left out: {error}; pip install 'funcghost[zoo]'", flush=True)
    print(show(rows))
    if args.out:
        report = {"setting": describe(setting.device), "rows": [asdict(row) for row in rows]}
        args.out.write_text(json.dumps(report, indent=2) + "\n")
    return rows


if __name__ == "__main__":
    main()
