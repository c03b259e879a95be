"""`fg.per_example` against the batched losses of the same model: a plain step and a step with `fg.dot`, side by side.

Every round times each route once, in turn. FLOPs are counted once and must be equal.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

import funcghost as fg

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.benchmarks.common import parser_of, positive
from tests.benchmarks.models import GPT, Losses, Params, next_token

Route = Callable[[], Any]

MOST = 1.15
"""What a step by example may take, against the batched step."""


@dataclass(frozen=True)
class Row:
    """Quartiles of the seconds of one step, and of its ratio to the batched step of the same round."""

    step: str
    batched: list[float]
    by_example: list[float]
    ratio: list[float]
    flops: list[int]


def routes(args: argparse.Namespace) -> dict[str, tuple[Route, Route]]:
    """For each kind of step, the batched one and the one by example."""
    torch.manual_seed(args.seed)
    model = GPT(args.vocabulary, args.length, args.width, 4, 4).to(args.device)
    params: Params = dict(model.named_parameters())
    tokens = torch.randint(args.vocabulary, (args.batch, args.length), device=args.device)
    direction = {name: torch.randn_like(parameter) for name, parameter in params.items()}

    def loss(params: Params, example: Tensor) -> Tensor:
        logits = functional_call(model, params, (example[None],))[0]
        return F.cross_entropy(logits[:-1], example[1:])

    batched, by_example = fg.module_losses(model, next_token), fg.per_example(loss)

    def plain(losses: Losses) -> Route:
        return lambda: torch.autograd.grad(losses(params, tokens).mean(), list(params.values()))

    def scored(losses: Losses) -> Route:
        step = fg.grad_and_reduce(losses)
        return lambda: step(params, tokens, fg.dot(direction))

    return {
        "plain step": (plain(batched), plain(by_example)),
        "step with dot": (scored(batched), scored(by_example)),
    }


def flops(route: Route) -> int:
    with FlopCounterMode(display=False) as counter:
        route()
    return int(counter.get_total_flops())


def measure(step: str, pair: tuple[Route, Route], seconds: float, device: torch.device) -> Row:
    """Times both in turn until the time is up, three rounds at least."""

    def timed(route: Route) -> float:
        start = time.perf_counter()
        route()
        if device.type != "cpu":
            torch.get_device_module(device).synchronize(device)
        return time.perf_counter() - start

    for route in pair:
        route()
    rounds: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < 3 or time.perf_counter() < end:
        rounds.append((timed(pair[0]), timed(pair[1])))
    batched, ours, ratio = (
        [f(found) for found in rounds] for f in (lambda r: r[0], lambda r: r[1], lambda r: r[1] / r[0])
    )
    return Row(step, quantiles(batched), quantiles(ours), quantiles(ratio), [flops(route) for route in pair])


def show(rows: Sequence[Row]) -> str:
    lines = [f"{'':<14} {'batched':>10} {'by example':>11} {'ratio':>6}  quartiles    FLOPs"]
    for row in rows:
        same = "equal" if row.flops[0] == row.flops[1] else f"{row.flops[1] / row.flops[0]:.3f}x"
        low, middle, high = row.ratio
        lines.append(
            f"{row.step:<14} {row.batched[1] * 1e3:>7.1f} ms {row.by_example[1] * 1e3:>8.1f} ms {middle:>6.2f}  "
            f"{low:.2f} - {high:.2f}  {same}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measures, prints the table and gives what --out writes."""
    parser = parser_of("Times fg.per_example against the batched losses.", quick="under a minute: fewer rounds")
    parser.add_argument("--seconds", type=positive(float), help="time per step; default 45, with --quick 10")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=positive(int), default=1, help="CPU threads; default 1")
    parser.add_argument("--batch", type=positive(int), default=8)
    parser.add_argument("--length", type=positive(int), default=128)
    parser.add_argument("--width", type=positive(int), default=256)
    parser.add_argument("--vocabulary", type=positive(int), default=8192)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    seconds = args.seconds or (10.0 if args.quick else 45.0)
    rows = [measure(step, pair, seconds, args.device) for step, pair in routes(args).items()]
    print(show(rows), flush=True)
    found = [asdict(row) for row in rows]
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n")
    if any(row.ratio[1] > MOST or row.flops[0] != row.flops[1] for row in rows):
        print(f"a step by example takes more than {MOST} of the batched step, or other FLOPs")
    return found


if __name__ == "__main__":
    main()
