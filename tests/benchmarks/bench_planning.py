"""What a first call costs beyond a planned step: its time and its peak memory, beside those of a plain step.

Every round times each route once, in turn. Memory is what torch allocates beyond what was there before, which is the
same in every run: a first call on the full batch (`plan`), a call with sizes not seen before (`new length`), a planned
step, and a plain one. With `--epoch N`, also N batches of lengths that differ, by plain steps and by a step that is
new, as in the first epoch with ordinary padding.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import funcghost as fg

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.benchmarks.bench_dot import CASES, Case, Setting, hf, next_token_of_mapping, training_gradient
from tests.benchmarks.common import describe, parser_of, positive, quartiles, table
from tests.benchmarks.memory import peak_allocated

Route = Callable[[], Any]
LEAST_ROUNDS = 3


def gpt2_large_head(setting: Setting) -> Case:
    """A GPT-2 whose logits are the largest of what a step keeps."""
    special = {"bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "sdpa", "use_cache": False}
    config = hf.GPT2Config(n_embd=256, n_layer=4, n_head=4, vocab_size=8192, n_positions=128, **special)
    batch = {"input_ids": setting.tokens(8, 128, 8192)}
    return Case.of_model("HF GPT-2, 8192", setting.place(hf.GPT2LMHeadModel(config)), next_token_of_mapping, batch)


ALL = CASES | {"gpt2-8192": gpt2_large_head}


@dataclass(frozen=True)
class Measured:
    """Seconds (quartiles) and bytes of a route, and both in those of a plain step."""

    route: str
    seconds: tuple[float, float, float]
    ratio: tuple[float, float, float]
    bytes: int
    bytes_ratio: float


def shorter(batch: Any, length: int) -> Any:
    """The batch with its second axis cut: other sizes of the same program."""
    if isinstance(batch, dict):
        return {name: shorter(leaf, length) for name, leaf in batch.items()}
    return batch[:, :length]


def routes_of(case: Case, *, lengths: bool, epoch: int) -> dict[str, Route]:
    """What is measured: each call of a route does the whole of it."""
    longest = next(iter(case.batch.values())).shape[1] if isinstance(case.batch, dict) else case.batch.shape[1]
    batches = [shorter(case.batch, longest - (29 * i) % (longest // 2)) for i in range(epoch)]
    plan, reducer = fg.plan(case.losses, case.params, case.batch), fg.dot(case.direction)
    step = fg.grad_and_reduce(case.losses, plan=plan)

    def first_call() -> Any:
        return fg.grad_and_reduce(case.losses)(case.params, case.batch, reducer).reduced

    def new_sizes() -> Any:
        fresh = fg.grad_and_reduce(case.losses, plan=at_another_length)
        return fresh(case.params, case.batch, reducer).reduced

    def first_epoch() -> Any:
        fresh = fg.grad_and_reduce(case.losses)
        return [fresh(case.params, batch, reducer).reduced for batch in batches]

    routes: dict[str, Route] = {
        "plain step": lambda: training_gradient(case),
        "planned step": lambda: step(case.params, case.batch, reducer).reduced,
        "plan": lambda: fg.plan(case.losses, case.params, case.batch),
        "first call": first_call,
    }
    if lengths:
        at_another_length = fg.plan(case.losses, case.params, shorter(case.batch, 48))
        routes["new length"] = new_sizes
    if lengths and epoch:
        routes[f"{epoch} lengths, plain"] = lambda: [training_gradient(replace(case, batch=batch)) for batch in batches]
        routes[f"{epoch} lengths, first epoch"] = first_epoch
    return routes


def measure(case: Case, setting: Setting, budget: float, *, lengths: bool, epoch: int) -> list[Measured]:
    routes = routes_of(case, lengths=lengths, epoch=epoch)
    deadline = time.monotonic() + budget
    for route in routes.values():
        route()
    size = {name: peak_allocated(route) for name, route in routes.items()} if setting.device.type == "cpu" else {}
    times: dict[str, list[float]] = {name: [] for name in routes}
    while len(times["plain step"]) < LEAST_ROUNDS or time.monotonic() < deadline:
        for name, route in routes.items():
            setting.wait()
            start = setting.clock()
            route()
            setting.wait()
            times[name].append(setting.clock() - start)
    plain = times["plain step"]
    return [
        Measured(
            name,
            quartiles(taken),
            quartiles([own / base for own, base in zip(taken, plain, strict=True)]),
            size.get(name, 0),
            size.get(name, 0) / size.get("plain step", 1),
        )
        for name, taken in times.items()
    ]


def show(name: str, rows: Sequence[Measured]) -> str:
    """The table of a case. A first call and one with a new length end with a step: the last column leaves that out."""
    step = next(row.ratio[1] for row in rows if row.route == "planned step")
    lines = [["route", "ms", "x plain", "quartiles", "beyond a step", "peak MB", "x plain"]]
    for row in rows:
        low, middle, high = (f"{value:.2f}" for value in row.ratio)
        beyond = f"{row.ratio[1] - step:.2f}" if row.route in ("first call", "new length") else ""
        peak = [f"{row.bytes / 1e6:.0f}", f"{row.bytes_ratio:.2f}"]
        lines.append([row.route, f"{1e3 * row.seconds[1]:.0f}", middle, f"{low} - {high}", beyond, *peak])
    return f"\n{name}\n{table(lines)}"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the cases, prints the tables and gives what --out writes."""
    parser = parser_of(__doc__, quick="two cases, few rounds")
    parser.add_argument("--cases", nargs="+", choices=list(ALL), help="default four of them, with --quick two")
    parser.add_argument("--seconds", type=positive(float), help="time per case; default 20, with --quick 5")
    parser.add_argument("--epoch", type=positive(int), default=0, help="also this many lengths, one after the other")
    parser.add_argument("--threads", type=positive(int), help="CPU threads; default torch's own choice")
    args = parser.parse_args(arguments)
    seconds = args.seconds or (5.0 if args.quick else 20.0)
    cases = args.cases or (["gpt", "mlp"] if args.quick else ["gpt", "mlp", "gpt2-8192", "llama"])
    if args.threads:
        torch.set_num_threads(args.threads)
    setting = Setting(torch.device("cpu"), torch.float32, time.perf_counter)
    report: dict[str, Any] = {"setting": describe(setting.device), "cases": {}}
    print(", ".join(f"{key} {value}" for key, value in report["setting"].items()))
    for name in cases:
        torch.manual_seed(0)
        case = ALL[name](setting)
        rows = measure(case, setting, seconds, lengths=name != "mlp", epoch=args.epoch)
        report["cases"][case.name] = [asdict(row) for row in rows]
        print(show(case.name, rows), flush=True)
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")
    return report


if __name__ == "__main__":
    main()
