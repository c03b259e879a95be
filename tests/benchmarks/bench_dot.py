"""Exact `fg.dot` against a plain training step and against `torch.func.vmap`, side by side in one process.

Every round times each route once, in turn, so that what else the machine does falls on all of them alike. See the
README beside this file.
"""

import argparse
import importlib
import importlib.util
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import funcghost as fg

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.benchmarks.common import describe, parser_of, positive, quartiles, table
from tests.benchmarks.models import GPT, LARGE, Losses, Params, decoder, half_square, next_token, perceptron

# Typed for literal arguments, not for sizes handed on from one place; only two cases need it.
hf: Any = importlib.import_module("transformers") if importlib.util.find_spec("transformers") else None

Route = Callable[[], Any]

LEAST_ROUNDS = 3
FAR_SLOWER = 10.0
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class Case:
    """Losses, the point they are differentiated at, and a direction."""

    name: str
    losses: Losses
    params: Params
    batch: Any
    direction: Params

    @classmethod
    def of_model(cls, name: str, model: nn.Module, criterion: Callable[[Any, Any], Tensor], batch: Any) -> "Case":
        params: Params = dict(model.eval().named_parameters())
        direction = {key: torch.randn_like(parameter) for key, parameter in params.items()}
        return cls(name, fg.module_losses(model, criterion), params, batch, direction)


@dataclass(frozen=True)
class Setting:
    """Where and in what the cases run, and by which clock."""

    device: torch.device
    dtype: torch.dtype
    clock: Callable[[], float]

    def place(self, model: nn.Module) -> nn.Module:
        return model.to(self.device, self.dtype)

    def tokens(self, batch: int, length: int, vocabulary: int) -> Tensor:
        return torch.randint(3, vocabulary, (batch, length), device=self.device)

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def wait(self) -> None:
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize(self.device)


def next_token_of_mapping(output: Any, batch: dict[str, Tensor]) -> Tensor:
    return next_token(output.logits, batch["input_ids"])


def gpt(setting: Setting) -> Case:
    model = setting.place(GPT(vocabulary=8192, length=128, width=256, layers=4, heads=4))
    return Case.of_model("GPT", model, next_token, setting.tokens(8, 128, 8192))


def mlp(setting: Setting) -> Case:
    return Case.of_model("MLP", setting.place(perceptron([1024] * 5)), half_square, setting.noise(64, 1024))


def gpt2(setting: Setting) -> Case:
    special = {"bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "sdpa", "use_cache": False}
    config = hf.GPT2Config(n_embd=256, n_layer=4, n_head=4, vocab_size=1024, n_positions=64, **special)
    batch = {"input_ids": setting.tokens(8, 64, 1024)}
    return Case.of_model("HF GPT-2", setting.place(hf.GPT2LMHeadModel(config)), next_token_of_mapping, batch)


def llama(setting: Setting) -> Case:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    size = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 1024}
    config = hf.LlamaConfig(**size, **heads, attn_implementation="sdpa", use_cache=False)
    batch = {"input_ids": setting.tokens(8, 64, 1024)}
    return Case.of_model("HF Llama", setting.place(hf.LlamaForCausalLM(config)), next_token_of_mapping, batch)


CASES: dict[str, Callable[[Setting], Case]] = {"gpt": gpt, "mlp": mlp, "gpt2": gpt2, "llama": llama}


def large(name: str, setting: Setting) -> Case:
    """A decoder of a size that fills a GPU."""
    size = LARGE[name]
    batch = setting.tokens(size["batch"], size["length"], size["vocabulary"])
    return Case.of_model(name, setting.place(decoder(name)), next_token, batch)


LARGE_CASES: dict[str, Callable[[Setting], Case]] = {name: partial(large, name) for name in LARGE}


def tiny_mlp(setting: Setting) -> Case:
    return Case.of_model(
        "MLP, 64 layers of width 2", setting.place(perceptron([2] * 65)), half_square, setting.noise(2, 2)
    )


def tiny_gpt(setting: Setting) -> Case:
    model = setting.place(GPT(vocabulary=8, length=4, width=4, layers=8, heads=2))
    return Case.of_model("GPT, 8 layers of width 4", model, next_token, setting.tokens(2, 4, 8))


def training_gradient(case: Case) -> tuple[Tensor, ...]:
    """A training step without funcghost."""
    leaves = {name: parameter.detach().requires_grad_() for name, parameter in case.params.items()}
    return torch.autograd.grad(case.losses(leaves, case.batch).mean(), list(leaves.values()))


def by_vmap(case: Case) -> tuple[Params, Tensor]:
    """The training gradient and the scores from materialised per-sample gradients."""

    def loss(params: Params, example: Any) -> Tensor:
        return case.losses(params, optree.tree_map(lambda leaf: leaf.unsqueeze(0), example))[0]

    params = {name: parameter.detach() for name, parameter in case.params.items()}
    rows: Params = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, case.batch)
    scores = [(rows[name] * v).flatten(1).sum(1) for name, v in case.direction.items()]
    return {name: row.mean(0) for name, row in rows.items()}, torch.stack(scores).sum(0)


@dataclass(frozen=True)
class Measured:
    """Seconds per call (lower quartile, median, upper quartile) and times a plain step's in the same round."""

    route: str
    seconds: tuple[float, float, float]
    ratio: tuple[float, float, float]
    flops: int
    flop_ratio: float


@dataclass(frozen=True)
class Comparison:
    """What was measured for one case."""

    case: str
    parameters: int
    sites: int
    rounds: int
    planning_in_plain_steps: float
    routes: list[Measured]
    missing: dict[str, str]


@dataclass(frozen=True)
class Overhead:
    """Microseconds per site that a step takes beyond a plain one where the maths is next to nothing."""

    case: str
    sites: int
    rounds: int
    microseconds: tuple[float, float, float]


def seconds(route: Route, setting: Setting) -> float:
    setting.wait()
    start = setting.clock()
    route()
    setting.wait()
    return setting.clock() - start


def interleave(routes: dict[str, Route], setting: Setting, deadline: float) -> dict[str, list[float]]:
    """Times the routes in rounds, each round starting with another one, until the deadline.

    Routes that are far slower than a plain step take part in the first rounds alone, so as to leave time for the rest.
    """
    times: dict[str, list[float]] = {name: [] for name in routes}
    names, plain = list(routes), times["plain step"]
    while len(plain) < LEAST_ROUNDS or time.monotonic() < deadline:
        if len(plain) == LEAST_ROUNDS:
            names = [name for name in names if min(times[name]) < FAR_SLOWER * min(plain)]
        names.append(names.pop(0))
        for name in names:
            times[name].append(seconds(routes[name], setting))
    return times


def count_flops(route: Route) -> int:
    with FlopCounterMode(display=False) as counter:
        route()
    return counter.get_total_flops()


def planned_routes(case: Case, plan: fg.Plan) -> dict[str, Route]:
    reducer = fg.dot(case.direction)
    step, score = fg.grad_and_reduce(case.losses, plan=plan), fg.reduce(case.losses, plan=plan)
    return {
        "plain step": lambda: training_gradient(case),
        "grad_and_reduce(dot)": lambda: step(case.params, case.batch, reducer).reduced,
        "reduce(dot)": lambda: score(case.params, case.batch, reducer),
    }


def make_plan(case: Case) -> fg.Plan:
    return fg.plan(case.losses, case.params, case.batch)


def agree(scores: Tensor, reference: Tensor) -> bool:
    coarser = max(torch.finfo(own.dtype).eps for own in (scores, reference))
    tolerance = min(1e3 * coarser, 1 / 8)  # vmap's are in the dtype of the model
    return bool((scores - reference).abs().max() <= tolerance * reference.abs().max())


def add_vmap(routes: dict[str, Route], case: Case, reference: Tensor) -> dict[str, str]:
    """Adds the route by vmap; where it does not run, says why."""
    try:
        _, scores = by_vmap(case)
    except (RuntimeError, ValueError, TypeError) as error:
        return {"vmap(grad)": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    if not agree(scores, reference):
        raise RuntimeError(f"{case.name}: vmap(grad) and fg.reduce give different scores, {scores} and {reference}.")
    routes["vmap(grad)"] = lambda: by_vmap(case)
    return {}


def timed_plan(case: Case, setting: Setting) -> tuple[fg.Plan, float]:
    training_gradient(case)
    setting.wait()
    start = setting.clock()
    plan = make_plan(case)
    setting.wait()
    return plan, setting.clock() - start


def compare(case: Case, setting: Setting, budget: float) -> Comparison:
    deadline = time.monotonic() + budget
    plan, planning = timed_plan(case, setting)
    routes = planned_routes(case, plan)
    reference = routes["reduce(dot)"]()
    if not agree(routes["grad_and_reduce(dot)"](), reference):
        raise RuntimeError(f"{case.name}: fg.grad_and_reduce and fg.reduce give different scores.")
    missing = add_vmap(routes, case, reference)
    flops = {name: count_flops(route) for name, route in routes.items()}
    times = interleave(routes, setting, deadline)
    plain = times["plain step"]
    measured = [
        Measured(
            name,
            quartiles(taken),
            quartiles([mine / base for mine, base in zip(taken, plain, strict=False)]),
            flops[name],
            flops[name] / flops["plain step"],
        )
        for name, taken in times.items()
    ]
    return Comparison(
        case=case.name,
        parameters=sum(parameter.numel() for parameter in case.params.values()),
        sites=count_sites(plan),
        rounds=len(plain),
        planning_in_plain_steps=planning / quartiles(plain)[1],
        routes=measured,
        missing=missing,
    )


def count_sites(plan: fg.Plan) -> int:
    return sum(site.action != "skip" for site in plan.sites)


def measure_overhead(case: Case, setting: Setting, budget: float) -> Overhead:
    deadline = time.monotonic() + budget
    plan = make_plan(case)
    routes = planned_routes(case, plan)
    del routes["reduce(dot)"]
    for route in routes.values():
        route()
    times = interleave(routes, setting, deadline)
    sites = count_sites(plan)
    pairs = zip(times["grad_and_reduce(dot)"], times["plain step"], strict=True)
    return Overhead(case.name, sites, len(times["plain step"]), quartiles([(a - b) / sites * 1e6 for a, b in pairs]))


def show(comparison: Comparison) -> str:
    rows = [["route", "ms", "quartiles", "x plain", "quartiles", "x FLOPs"]]
    for route in comparison.routes:
        low, middle, high = (1e3 * second for second in route.seconds)
        ratios = [f"{ratio:.2f}" for ratio in route.ratio]
        rows.append(
            [
                *(route.route, f"{middle:.1f}", f"{low:.1f} - {high:.1f}"),
                *(ratios[1], f"{ratios[0]} - {ratios[2]}", f"{route.flop_ratio:.3f}"),
            ]
        )
    notes = [f"{route} does not run: {reason}" for route, reason in comparison.missing.items()]
    size = f"{comparison.parameters:,} parameters, {comparison.sites} sites, {comparison.rounds} rounds"
    head = f"\n{comparison.case}: {size}; planning takes {comparison.planning_in_plain_steps:.1f} plain steps"
    return "\n".join([head, table(rows), *notes])


def show_overheads(overheads: Sequence[Overhead]) -> str:
    rows = [["us per site beyond a plain step", "sites", "rounds", "us", "quartiles"]]
    for overhead in overheads:
        low, middle, high = (f"{value:.0f}" for value in overhead.microseconds)
        rows.append([overhead.case, str(overhead.sites), str(overhead.rounds), middle, f"{low} - {high}"])
    return "\n" + table(rows)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("Times exact fg.dot against a plain step and vmap(grad).", quick="under a minute: fewer rounds")
    parser.add_argument("--seconds", type=positive(float), help="time per case; default 45, with --quick 7")
    parser.add_argument("--cases", nargs="+", choices=[*CASES, *LARGE_CASES, "overhead"], default=[*CASES, "overhead"])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=positive(int), help="CPU threads; default torch's own choice")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: this process alone; with --threads 1")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.clock == "cpu" and (args.device.type != "cpu" or args.threads != 1):
        parser.error("--clock cpu adds up the time of all threads, and sees none of a GPU's: use it with --threads 1")
    return args


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the cases, prints the tables and gives what --out writes."""
    args = parse_arguments(arguments)
    budget = args.seconds or (7.0 if args.quick else 45.0)
    if args.threads:
        torch.set_num_threads(args.threads)
    if hf is not None:
        hf.logging.set_verbosity_error()
    # vmap says that it loops where an op has no batching rule: attention kernels on the CPU.
    warnings.filterwarnings("ignore", message="There is a performance drop")
    setting = Setting(args.device, DTYPES[args.dtype], CLOCKS[args.clock])
    report: dict[str, Any] = {
        "setting": describe(setting.device, setting.dtype) | {"clock": args.clock},
        "comparisons": [],
        "overheads": [],
    }
    print(", ".join(f"{key} {value}" for key, value in report["setting"].items()))
    for name in args.cases:
        torch.manual_seed(args.seed)
        if name == "overhead":
            found = [measure_overhead(make(setting), setting, budget / 6) for make in (tiny_mlp, tiny_gpt)]
            report["overheads"] = [asdict(overhead) for overhead in found]
            print(show_overheads(found))
        else:
            comparison = compare((CASES | LARGE_CASES)[name](setting), setting, budget)
            report["comparisons"].append(asdict(comparison))
            print(show(comparison), flush=True)
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")
    return report


if __name__ == "__main__":
    main()
