"""Which half of the digits is worth training on? Early norms of gradients say so.

A few networks are trained for one epoch. GraNd, the mean norm of a sample's gradient over them, and EL2N, the mean norm
of its error, rank the training images. Networks are then trained on the half of high, of low or of random rank.

    python examples/prune_digits.py
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import funcghost as fg
from digits import Digits, load
from funcghost.attribution import pruning
from funcghost.training import geometry

Params = dict[str, Tensor]

TEST_SIZE = 500
RUNS = 3
BATCH_SIZE = 32
LEARNING_RATE = 0.3
STEPS = 300

model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


@dataclass(frozen=True)
class Summary:
    """Test accuracies of the halves, the rank correlation of the scores, and the directions that each half fills."""

    accuracy: dict[str, float]
    agreement: float
    effective_rank: dict[str, float]
    seconds: float


def losses(params: Params, batch: Digits) -> Tensor:
    """One loss per image."""
    return F.cross_entropy(functional_call(model, params, (batch.images,)), batch.labels, reduction="none")


def trained(train: Digits, steps: int, seed: int) -> Params:
    """A network after some steps of SGD."""
    generator = torch.Generator().manual_seed(seed)
    params = {
        name: torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5
        for name, weight in model.named_parameters()
    }
    step = fg.grad_and_reduce(losses)
    for _ in range(steps):
        rows = torch.randint(len(train.labels), (BATCH_SIZE,), generator=generator)
        grads = step(params, train.take(rows), ()).grads
        params = {name: weight - LEARNING_RATE * grads[name] for name, weight in params.items()}
    return params


def accuracy(train: Digits, test: Digits) -> float:
    """That of a network trained on these images."""
    logits = functional_call(model, trained(train, STEPS, 100), (test.images,))
    return float((logits.argmax(1) == test.labels).float().mean())


def main(argv: Sequence[str] | None = None) -> Summary:
    """Runs the example; the summary it prints."""
    parser = argparse.ArgumentParser(description="Prune digits by early norms of their gradients.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    start = time.perf_counter()
    torch.manual_seed(args.seed)
    train, test = load(TEST_SIZE)

    epoch = len(train.labels) // BATCH_SIZE
    early = [trained(train, epoch, args.seed + run) for run in range(RUNS)]
    grand = pruning.grand(losses)(early, train)
    probabilities = torch.stack([functional_call(model, params, (train.images,)).softmax(1) for params in early])
    el2n = pruning.el2n(probabilities, train.labels)

    ranks, half = grand.argsort(), len(grand) // 2
    halves = {"high": ranks[half:], "random": torch.randperm(len(grand))[half:], "low": ranks[:half]}
    score = fg.reduce(losses)
    summary = Summary(
        accuracy={name: accuracy(train.take(rows), test) for name, rows in halves.items()},
        agreement=float(
            torch.corrcoef(torch.stack([grand.argsort().argsort(), el2n.argsort().argsort()]).float())[0, 1]
        ),
        effective_rank={
            name: float(geometry.effective_rank(score(early[0], train.take(rows), fg.gram())))
            for name, rows in halves.items()
        },
        seconds=time.perf_counter() - start,
    )
    for name in halves:
        rank = summary.effective_rank[name]
        print(f"half of {name + ' scores':<14} test accuracy {summary.accuracy[name]:.3f}  {rank:.1f} directions")
    print(f"rank correlation of GraNd and EL2N {summary.agreement:.3f}")
    print(f"seconds {summary.seconds:.1f}")
    assert summary.accuracy["high"] > summary.accuracy["low"] + 0.05, "samples of small gradients should teach little"
    assert summary.agreement > 0.9
    return summary


if __name__ == "__main__":
    main()
