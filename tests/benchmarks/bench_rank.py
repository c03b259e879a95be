"""How low the rank of a validation gradient is: what `fg.compress` and `fg.track` drop from scores, and what it saves.

Trains the small GPT of the examples on real text and stops at several steps. There the scores of a training batch along
the validation gradient are compared with those along its compressed parts, in float64, so that ranks alone make the
difference; and so along the gradient divided by the root of Adam's second moments, which is what in-run values of Adam
take. See the README beside this file.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import funcghost as fg
from funcghost.algebra.compression import certified_bound
from funcghost.attribution import in_run
from funcghost.laws.oracle import per_sample_gradients

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from lm_corpus import DOMAINS, SHORTEST, WindowSampler, build_corpus, validation_tokens
from lm_model import GPT, HEADS, Batch, ModelSize, WindowLosses
from tests.benchmarks.common import parser_of, positive, table

Params = dict[str, Tensor]

SETTINGS: tuple[dict[str, Any], ...] = (
    *({"rank": rank} for rank in (4, 8, 16, 32, 64)),
    *({"rtol": rtol} for rtol in (0.3, 0.1, 0.03, 0.01)),
)
TRACKED = (8, 32)
"""Ranks at which the validation gradient is tracked from step to step, too."""
LOOKED_UP = "positions.weight"


@dataclass(frozen=True)
class Row:
    """One setting at one step.

    `dropped`: sqrt(sum residual^2) / |V|, or where these are not known, the norm of what is missing. `error`:
    |scores' - scores| / |scores| over the batch. `bound`: the median of bound / |error| over samples. `flops`: a step
    with `fg.dot`, in steps without. `seconds` are those of `fg.compress` or `fg.track`.
    """

    step: int
    direction: str
    setting: str
    ranks: list[int]
    dropped: float
    error: float
    bound: float
    flops: float
    seconds: float


def training(
    losses: WindowLosses, args: argparse.Namespace, sampler: WindowSampler, follow: Callable[[Params], None]
) -> Iterator[tuple[int, Params, Params | None]]:
    """Trains with Adam; at every stop the step, the parameters and what Adam divides by, once there is such.

    Before every step the parameters are shown to `follow`.
    """
    leaves = [parameter.detach().requires_grad_() for parameter in losses.model.parameters()]
    params = dict(zip(dict(losses.model.named_parameters()), leaves, strict=True))
    optimizer = torch.optim.Adam(leaves, lr=args.lr, betas=(0.9, 0.99))
    for step in range(max(args.stops) + 1):
        follow(params)
        if step in args.stops:
            moments = [optimizer.state[leaf]["exp_avg_sq"] / (1 - 0.99**step) for leaf in leaves] if step else None
            scale = None if moments is None else [moment.sqrt() + 1e-8 for moment in moments]
            yield step, params, None if scale is None else dict(zip(params, scale, strict=True))
        optimizer.zero_grad()
        losses(params, Batch(sampler.draw(step).tokens)).mean().backward()
        optimizer.step()


@dataclass
class Follower:
    """The validation gradient at ranks `TRACKED`, compressed at the first step and tracked from there on, by rank."""

    losses: WindowLosses
    validation: Batch
    found: dict[int, tuple[Any, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pairs = fg.pairs(self.losses)

    def __call__(self, params: Params) -> None:
        """The next step."""
        pairs = self.pairs(params, self.validation)
        mean = pairs.weighted(torch.full((len(pairs),), 1 / len(pairs)))
        for rank in TRACKED:
            start = time.perf_counter()
            small = fg.track(mean, self.found[rank][0]) if rank in self.found else fg.compress(mean, rank=rank)
            self.found[rank] = small, time.perf_counter() - start


def compare(
    step: int,
    losses: WindowLosses,
    params: Params,
    direction: Params,
    kind: str,
    batch: Batch,
    tracked: Mapping[int, tuple[Any, float]],
) -> list[Row]:
    """All settings at one point: the scores of all compressed directions come from one pass."""
    found = list[tuple[str, Any, float]]()
    for options in SETTINGS:
        start = time.perf_counter()
        small = fg.compress(direction, **options)
        found.append((", ".join(f"{k}={v}" for k, v in options.items()), small, time.perf_counter() - start))
    found += [(f"rank={rank}, tracked", small, seconds) for rank, (small, seconds) in tracked.items()]
    precise = {name: parameter.detach().double() for name, parameter in params.items()}
    dense = [
        {name: as_dense(leaf).double() for name, leaf in small.items()}
        for small in [direction, *(s for _, s, _ in found)]
    ]
    exact, *scores = fg.reduce(losses)(precise, batch, fg.dot(fg.stack(dense))).unbind(1)
    gradients = per_sample_gradients(losses, precise, batch)
    norms = {name: gradient.flatten(1).square().sum(1) for name, gradient in gradients.items()}
    total = torch.stack([leaf.norm() for leaf in direction.values()]).norm()
    rows = []
    for (setting, small, seconds), score in zip(found, scores, strict=True):
        low = {name: leaf for name, leaf in small.items() if isinstance(leaf, fg.LowRank)}
        error, bound = (score - exact).abs(), certified_bound(small, norms)
        # dense() rounds to float32.
        if bool((error > bound + 1e-6 * total * sum(norms.values()).sqrt()).any()):
            raise RuntimeError(f"step {step}, {setting}: a score is off by {error.max()}, more than its bound")
        residual = torch.stack([leaf.residual for leaf in low.values()]).norm() if low else torch.zeros(())
        if not bool(residual.isfinite()):
            residual = torch.stack([(leaf.dense() - direction[name]).norm() for name, leaf in low.items()]).norm()
        rows.append(
            Row(
                step=step,
                direction=kind,
                setting=setting,
                ranks=sorted(leaf.rank for leaf in low.values()),
                dropped=float(residual / total),
                error=float(error.norm() / exact.norm()),
                bound=float((bound / error.clamp(min=1e-300)).median()),
                flops=1 + products(small) / products(direction) / 3,
                seconds=seconds,
            )
        )
    return rows


def as_dense(leaf: Tensor | fg.LowRank) -> Tensor:
    return leaf.dense() if isinstance(leaf, fg.LowRank) else leaf


def products(direction: dict[str, Any]) -> int:
    """Multiplications per token: each matrix is used in one product, but for the positions, which are looked up."""
    leaves = {name: leaf for name, leaf in direction.items() if len(leaf.shape) > 1 and name != LOOKED_UP}
    return sum(leaf.cost if isinstance(leaf, fg.LowRank) else leaf.numel() for leaf in leaves.values())


def show(rows: Sequence[Row]) -> str:
    head = ["V, setting", "ranks", "dropped", "error of scores", "bound / error", "x FLOPs", "compress ms"]
    lines = [head]
    for row in rows:
        ranks = f"{row.ranks[0]}-{row.ranks[-1]}" if row.ranks else "dense"
        lines.append(
            [
                f"{row.direction}, {row.setting}",
                *(ranks, f"{100 * row.dropped:.2f} %", f"{100 * row.error:.3f} %", f"{row.bound:.0f}"),
                *(f"{row.flops:.3f}", f"{1e3 * row.seconds:.0f}"),
            ]
        )
    return table(lines)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(
        "Measures what fg.compress and fg.track drop from scores.", quick="a smaller model and fewer steps"
    )
    parser.add_argument(
        "--stops", type=int, nargs="+", help="steps to stop at; default 0 100 600, with --quick 0 20 100"
    )
    parser.add_argument("--width", type=positive(int), help="default 256, with --quick 128")
    parser.add_argument("--layers", type=positive(int), default=2)
    parser.add_argument("--context", type=positive(int), default=64)
    parser.add_argument("--batch", type=positive(int), default=32)
    parser.add_argument("--validation-windows", type=positive(int), default=32)
    parser.add_argument("--validation-domain", choices=DOMAINS, default="email")
    parser.add_argument("--lr", type=positive(float), default=1e-3)
    parser.add_argument("--threads", type=positive(int), default=1, help="CPU threads; more lose much on shared cores")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    args.stops = args.stops or ([0, 20, 100] if args.quick else [0, 100, 600])
    args.width = args.width or (128 if args.quick else 256)
    if args.width % HEADS or args.context >= SHORTEST or min(args.stops) < 0:
        parser.error(f"--width must be a multiple of {HEADS}, --context below {SHORTEST}, --stops not below 0")
    return args


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Trains, measures, prints a table for each stop and gives what --out writes."""
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    corpus = build_corpus(args.validation_domain, 40, 32, args.seed)
    model = GPT(ModelSize(args.context, args.width, args.layers), args.seed)
    losses = WindowLosses(model)
    sampler = WindowSampler(corpus.training, args.context, args.batch, (args.seed, 0))
    validation = Batch(validation_tokens(corpus.validation, args.context, args.validation_windows))
    rows: list[Row] = []
    follower = Follower(losses, validation)
    for step, params, scale in training(losses, args, sampler, follower):
        batch = Batch(sampler.draw(step).tokens)
        gradient = in_run.validation_gradient(losses, params, [validation])
        directions = {"grad": gradient}
        if scale is not None:
            directions["grad/adam"] = {name: v / scale[name] for name, v in gradient.items()}
        here = [
            row
            for kind, v in directions.items()
            for row in compare(step, losses, params, v, kind, batch, follower.found if kind == "grad" else {})
        ]
        with torch.no_grad():
            loss = float(losses(params, validation).mean())
        print(
            f"\nstep {step}: validation loss {loss:.2f} nats per byte; dense: 1.333 x FLOPs\n{show(here)}", flush=True
        )
        rows += here
    found = [asdict(row) for row in rows]
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n")
    return found


if __name__ == "__main__":
    main()
