"""Trains a classifier of digits by differentially private SGD: clipped gradients, noise, Poisson sampling.

Every step adds up the gradients of a random batch, each clipped to norm 1, in one forward and one backward, and adds
Gaussian noise. How private the run is follows from the noise, the sampling rate and the number of steps; the
accounting is left to a library made for it.

    python examples/private_digits.py --noise 1.0
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import funcghost as fg
from digits import Digits, load
from funcghost.laws.oracle import per_sample_gradients
from funcghost.training import clipping, geometry

Params = dict[str, Tensor]

TEST_SIZE = 400
SAMPLING_RATE = 0.06
STEPS = 80
LEARNING_RATE = 1.0
MAX_NORM = 1.0

model = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(128, 10)
)


@dataclass(frozen=True)
class Summary:
    """What the run found; `error` is that of a clipped sum against gradients taken one by one, relative to its norm.

    `losses` are those of the first and of the last ten batches, which are not private.
    """

    accuracy: float
    error: float
    clipped: float
    losses: tuple[float, float]
    noise_scale: float
    seconds: float


def losses(params: Params, batch: Digits) -> Tensor:
    """One loss per image."""
    return F.cross_entropy(functional_call(model, params, (batch.images,)), batch.labels, reduction="none")


def train_privately(train: Digits, noise: float) -> tuple[Params, float, list[float]]:
    """The parameters after the run, the share of gradients that were clipped, and the mean loss of each batch."""
    params = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    # Batches of a Poisson sample have any size: one plan, verified here, serves them all.
    plan = fg.plan(losses, params, train.take(torch.arange(8)), fg.squared_norm())
    step = clipping.clipped_gradient(losses, options=fg.Options(verify="never"), plan=plan)
    expected, clipped, seen = SAMPLING_RATE * len(train.labels), 0, 0
    curve = list[float]()
    for _ in range(STEPS):
        batch = train.take((torch.rand(len(train.labels)) < SAMPLING_RATE).nonzero().squeeze(1))
        out = step(params, batch, MAX_NORM)
        clipped, seen = clipped + int((out.weights["all"] < 1).sum()), seen + len(batch.labels)
        curve.append(float(out.losses.mean()))
        for name, total in out.grads.items():
            noisy = total + noise * MAX_NORM * torch.randn_like(total)
            params[name] = params[name] - LEARNING_RATE / expected * noisy
    return params, clipped / seen, curve


def error_of_clipping(params: Params, batch: Digits) -> float:
    """How far a clipped sum is from that of gradients by a backward for each sample."""
    gradients = per_sample_gradients(losses, params, batch)
    norms = torch.cat([g.flatten(1) for g in gradients.values()], 1).norm(dim=1)
    limit = float(norms.median())
    found = clipping.clipped_gradient(losses)(params, batch, limit).grads
    wanted = {name: torch.tensordot((limit / norms).clamp(max=1), g, 1) for name, g in gradients.items()}
    size = torch.cat([value.flatten() for value in wanted.values()]).norm()
    return float(torch.cat([(found[name] - value).flatten() for name, value in wanted.items()]).norm() / size)


def main(argv: Sequence[str] | None = None) -> Summary:
    """Runs the example; the summary it prints."""
    parser = argparse.ArgumentParser(description="Train on digits by differentially private SGD.")
    parser.add_argument("--noise", type=float, default=1.0, help="standard deviation in units of the largest norm")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if not args.noise >= 0:
        parser.error(f"--noise must be zero or more, found {args.noise}")
    start = time.perf_counter()
    torch.manual_seed(args.seed)
    train, test = load(TEST_SIZE)
    params, clipped, curve = train_privately(train, args.noise)
    start_of_run = {name: weight.detach() for name, weight in model.named_parameters()}
    out = fg.grad_and_reduce(losses)(start_of_run, train, fg.squared_norm())
    summary = Summary(
        accuracy=float((functional_call(model, params, (test.images,)).argmax(1) == test.labels).float().mean()),
        error=error_of_clipping(params, train.take(torch.arange(64))),
        clipped=clipped,
        losses=(fmean(curve[:10]), fmean(curve[-10:])),
        noise_scale=float(geometry.noise_scale(out.reduced, out.grads).scale),
        seconds=time.perf_counter() - start,
    )
    print(f"test accuracy          {summary.accuracy:.3f}")
    print(f"loss, first and last   {summary.losses[0]:.3f} {summary.losses[1]:.3f} (to look at, not to publish)")
    print(f"gradients clipped      {summary.clipped:.3f}")
    print(f"error of a clipped sum {summary.error:.1e}")
    print(f"gradient noise scale   {summary.noise_scale:.0f} samples at the start")
    print(f"seconds                {summary.seconds:.1f}")
    assert summary.error < 1e-6, "a clipped sum should be that of clipped gradients"
    assert args.noise > 1 or summary.accuracy > 0.85, "digits should be learnt in spite of the noise"
    return summary


if __name__ == "__main__":
    main()
