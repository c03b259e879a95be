"""A step of a model under `fully_shard` with scores, beside the plain step: time, and memory of a rank.

    python tests/benchmarks/bench_sharded.py --quick --ranks 2
    python tests/benchmarks/bench_sharded.py --quick --ranks 2 --compile

Rounds take each contender once, in turn, all ranks together; the slowest rank's wall time counts. The memory of a rank
is in units of the whole parameters: what it holds of parameters and directions between steps, and what tensors take on
the CPU at the step's peak beyond it.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard

import funcghost as fg
from funcghost.algebra.directions import LowRank
from funcghost.distributed import sharded

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.benchmarks.common import parser_of, positive, table
from tests.benchmarks.memory import peak_allocated
from tests.benchmarks.models import GPT, next_token

AIMS = {"dot": 1.45}


def contenders(args: argparse.Namespace) -> tuple[dict[str, Callable[[], Any]], int, dict[str, int]]:
    """Steps of one rank, by name; the bytes of all parameters, and those that the rank holds of what a step takes."""
    torch.manual_seed(args.seed)
    model = GPT(args.vocabulary, args.length, args.width, args.layers, 4)
    size = sum(parameter.nbytes for parameter in model.parameters())
    low = fg.compress({name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}, rank=32)
    for block in model.blocks:
        if args.compile:
            block.compile()
        fully_shard(block)
    fully_shard(model)
    params: dict[str, Any] = dict(model.named_parameters())
    direction = {name: torch.randn_like(parameter).detach() for name, parameter in params.items()}
    torch.manual_seed(args.seed + distributed.get_rank())
    tokens = torch.randint(args.vocabulary, (args.batch, args.length))

    def losses(params: Any, tokens: torch.Tensor) -> torch.Tensor:
        return next_token(model(tokens), tokens)

    def plain() -> None:
        losses(params, tokens).mean().backward()
        model.zero_grad()

    def uncompiled() -> None:
        with torch.compiler.set_stance("force_eager"):
            plain()

    step = sharded.grad_and_reduce(losses, model)
    share = sum(cast(Any, parameter).to_local().nbytes for parameter in params.values())
    factors = sum(value.rows.nbytes + value.cols.nbytes for value in low.values() if isinstance(value, LowRank))
    held = {"plain": share, "dot": 2 * share, "dot, rank 32": share + factors, "norms": share, "uncompiled": share}
    routes = {
        "plain": plain,
        "dot": lambda: step(params, tokens, fg.dot(direction)),
        "dot, rank 32": lambda: step(params, tokens, fg.dot(low)),
        "norms": lambda: step(params, tokens, fg.squared_norm()),
    }
    return (routes | {"uncompiled": uncompiled} if args.compile else routes), size, held


def main(arguments: Sequence[str] | None = None) -> int:
    """Starts the processes; in each of them measures, of which rank 0 prints the table and writes what --out says."""
    parser = parser_of("Times steps of a sharded model.", quick="fewer rounds")
    parser.add_argument("--rounds", type=positive(int), help="default 31, with --quick 9")
    parser.add_argument("--ranks", type=positive(int), default=2, help="processes to start; default 2")
    parser.add_argument("--threads", type=positive(int), default=1, help="CPU threads of a rank; default 1")
    parser.add_argument("--batch", type=positive(int), default=8, help="samples of a rank")
    parser.add_argument("--length", type=positive(int), default=128)
    parser.add_argument("--width", type=positive(int), default=256)
    parser.add_argument("--layers", type=positive(int), default=4)
    parser.add_argument("--vocabulary", type=positive(int), default=8192)
    parser.add_argument("--compile", action="store_true", help="blocks under torch.compile, as torchtitan has them")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if "RANK" not in os.environ:
        start = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        own = [__file__, *(sys.argv[1:] if arguments is None else arguments)]
        command = [sys.executable, *start, "--nproc-per-node", str(args.ranks), *own]
        return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": str(args.threads)}, check=False).returncode
    torch.set_num_threads(args.threads)
    distributed.init_process_group("gloo")
    try:
        measure(args)
    finally:
        distributed.destroy_process_group()
    return 0


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of all contenders."""
    routes, size, held = contenders(args)
    for route in routes.values():
        route()
        route()
    seconds: dict[str, list[float]] = {name: [] for name in routes}
    for _ in range(args.rounds or (9 if args.quick else 31)):
        for name, route in routes.items():
            distributed.barrier()
            start = time.perf_counter()
            route()
            took = torch.tensor(time.perf_counter() - start)
            distributed.all_reduce(took, distributed.ReduceOp.MAX)
            seconds[name].append(took.item())
    rows = list[dict[str, Any]]()
    for name, route in routes.items():
        ratio = median(own / base for own, base in zip(seconds[name], seconds["plain"], strict=True))
        distributed.barrier()
        memory = peak_allocated(route) / size
        ranks = distributed.get_world_size()
        rows.append({"step": name, "ratio": ratio, "held": held[name] / size, "memory": memory, "ranks": ranks})
    if distributed.get_rank() == 0:
        cells = list[tuple[str, ...]]()
        for row in rows:
            sizes = row["held"], row["memory"], row["held"] + row["memory"]
            aim = str(AIMS.get(row["step"], ""))
            cells.append((row["step"], f"{row['ratio']:.2f}", aim, *(f"{size:.2f}" for size in sizes)))
        head = (f"{rows[0]['ranks']} ranks", "x plain", "aim", "held, x parameters", "peak", "both")
        print(table([head, *cells]), flush=True)
        if args.out:
            args.out.write_text(json.dumps(rows, indent=2) + "\n")
    return rows


if __name__ == "__main__":
    sys.exit(main())
