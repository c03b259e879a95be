"""The head of a large vocabulary, as `F.cross_entropy` of its logits and in chunks: peak memory and time of a step.

Each contender's memory is that of a process of its own: the highest resident set of two steps, less that before them.
Linux only.
Times are taken in one process, in rounds of one step of each.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import funcghost as fg

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.benchmarks.common import parser_of, positive
from tests.benchmarks.models import Params

Route = Callable[[], Any]
CONTENDERS = ("plain step", "plain step, chunked", "step with dot", "step with dot, chunked")


def route(name: str, args: argparse.Namespace) -> tuple[Route, Callable[[], Tensor]]:
    """A step, and the losses that it is of."""
    torch.manual_seed(args.seed)
    shapes = {"tokens": (args.vocabulary, args.width), "up": (4 * args.width, args.width)}
    shapes["down"] = shapes["up"][::-1]
    params: Params = {k: (0.02 * torch.randn(shape)).requires_grad_() for k, shape in shapes.items()}
    tokens = torch.randint(args.vocabulary, (args.batch, args.length + 1))

    def losses(p: Params, tokens: Tensor) -> Tensor:
        x, targets = F.embedding(tokens[:, :-1], p["tokens"]), tokens[:, 1:]
        x = F.layer_norm(x + F.linear(F.gelu(F.linear(x, p["up"])), p["down"]), x.shape[-1:])
        if name.endswith("chunked"):
            return fg.functional.linear_cross_entropy(x, p["tokens"], targets, chunk=args.chunk, reduction="mean")
        logits = F.linear(x, p["tokens"])
        found = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return found.view(targets.shape).mean(1)

    if name.startswith("plain"):
        return lambda: torch.autograd.grad(losses(params, tokens).mean(), list(params.values())), lambda: losses(
            params, tokens
        )
    direction = {k: torch.randn_like(p, requires_grad=False) for k, p in params.items()}
    step = fg.grad_and_reduce(losses, plan=fg.plan(losses, params, tokens[:2, :9]), options=fg.Options(verify="never"))
    return lambda: step(params, tokens, fg.dot(direction)), lambda: losses(params, tokens)


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most since the mark was set back."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return 1024 * int(line.split()[1])


def peak(name: str, args: argparse.Namespace) -> int:
    """Bytes that two steps take at most beyond what is resident before them: parameters, direction and plan.

    The mark of `ru_maxrss` would be that of planning, or of the parent process: it is set back.
    """
    run, _ = route(name, args)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    for _ in range(2):
        run()
    return resident("VmHWM") - before


def in_a_process(name: str, arguments: Sequence[str]) -> int:
    command = [sys.executable, __file__, *arguments, "--peak-of", name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def times(args: argparse.Namespace, seconds: float) -> dict[str, list[float]]:
    """Quartiles of the seconds of a step, from rounds of all of them in turn."""
    routes = {name: route(name, args)[0] for name in CONTENDERS}
    for run in routes.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    end = time.perf_counter() + seconds
    while len(found[CONTENDERS[0]]) < 3 or time.perf_counter() < end:
        for name, run in routes.items():
            start = time.perf_counter()
            run()
            found[name].append(time.perf_counter() - start)
    return {name: quantiles(values) for name, values in found.items()}


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measures, prints the table and gives what --out writes."""
    parser = parser_of("Peak memory and time of a step with a large vocabulary.", quick="under a minute: fewer rounds")
    parser.add_argument("--seconds", type=positive(float), help="time for all rounds; default 60, with --quick 20")
    parser.add_argument("--threads", type=positive(int), default=1, help="CPU threads; default 1")
    parser.add_argument("--batch", type=positive(int), default=8)
    parser.add_argument("--length", type=positive(int), default=128)
    parser.add_argument("--width", type=positive(int), default=256)
    parser.add_argument("--vocabulary", type=positive(int), default=50257)
    parser.add_argument("--chunk", type=positive(int), help="tokens at a time; default that of the function")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak-of", choices=CONTENDERS, help=argparse.SUPPRESS)
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(given)
    torch.set_num_threads(args.threads)
    if args.peak_of:
        print(peak(args.peak_of, args))
        return []
    with torch.no_grad():
        torch.testing.assert_close(*(route(name, args)[1]() for name in CONTENDERS[:2]))
    memory = {name: in_a_process(name, given) for name in CONTENDERS}
    seconds = times(args, args.seconds or (20.0 if args.quick else 60.0))
    first = CONTENDERS[0]
    print(f"{'':<24} {'peak MiB':>9} {'x plain':>8} {'ms':>8} {'x plain':>8}  quartiles")
    for name in CONTENDERS:
        low, middle, high = seconds[name]
        print(
            f"{name:<24} {memory[name] / 2**20:>9.0f} {memory[name] / memory[first]:>8.2f} {middle * 1e3:>8.0f} "
            f"{middle / seconds[first][1]:>8.2f}  {low * 1e3:.0f} - {high * 1e3:.0f}"
        )
    found = [{"step": name, "peak": memory[name], "seconds": seconds[name]} for name in CONTENDERS]
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n")
    return found


if __name__ == "__main__":
    main()
