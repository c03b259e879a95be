"""Selects training windows while a language model trains, at equal compute: half of every batch, by its gradients.

The corpus is that of the main job, with 30 % of its documents corrupted; what counts is the loss on held-out text of
one of eleven domains. Every step scores its candidates by what their gradients take off the validation loss through
AdamW, `<grad losses[i], P V>` with the validation gradient V and the optimizer's denominators P, and takes the mean
gradient of the best: `weighting.weighted_gradient` with `selection.quantile`, one forward and one backward. Random
selection spends the same FLOPs on larger batches drawn at random: it needs no scores and no validation gradient. FLOPs
are counted, not estimated, those of validation gradients included.

    python examples/online_selection.py

prints, for every seed, the share of random selection's compute after which selected training has reached the loss that
random selection ends with, and whether that is at most two thirds. It says so if it is not.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import funcghost as fg
from funcghost.attribution import in_run
from funcghost.training import selection, updates, weighting
from funcghost.trees import match_direction, split_params
from lm_corpus import WindowSampler, build_corpus, validation_tokens
from lm_model import GPT, Batch, ModelSize, Tree, WindowLosses, initial_params, mean_loss
from lm_training import plain_gradient

DOMAIN, CORRUPTED, CLAIM = "email", 0.3, 2 / 3


@dataclass(frozen=True)
class Curve:
    """A training: FLOPs spent and loss on held-out text, at some steps."""

    flops: list[int]
    losses: list[float]

    def reached(self, loss: float) -> float:
        """The FLOPs after which the loss was this or less for the first time; infinite if it never was."""
        return next((float(f) for f, own in zip(self.flops, self.losses, strict=True) if own <= loss), float("inf"))


@dataclass(frozen=True)
class Summary:
    """The share of random selection's compute that selected training took to its loss, and both losses, by seed.

    `trained` is the share of selected training's compute that plain steps on what it chose would have cost.
    """

    shares: list[float]
    random: list[float]
    selected: list[float]
    trained: float

    @property
    def holds(self) -> bool:
        """Whether every seed was there within two thirds."""
        return max(self.shares) <= CLAIM

    def __str__(self) -> str:
        lines = [
            f"seed {seed}: random ends at {a:.4f}, selected at {b:.4f}; there after {share:.2f} of the compute"
            for seed, (share, a, b) in enumerate(zip(self.shares, self.random, self.selected, strict=True))
        ]
        verdict = "is" if self.holds else "is NOT"
        lines.append(
            f"selected training {verdict} at random selection's loss within {CLAIM:.2f} of its compute in every seed "
            f"(median {statistics.median(self.shares):.2f})"
        )
        if not self.holds:
            lines.append(
                f"of its compute {self.trained:.0%} is that of plain steps on the windows it chose, the rest goes into "
                "candidates, scores and validation gradients: random selection puts that into batches "
                f"{1 / self.trained:.1f} times as large, and on this corpus, model and length these bring more than "
                "the choice does, though three tenths of their documents are noise"
            )
        return "\n".join(lines)


def counted(call: Callable[[], Any]) -> tuple[Any, int]:
    """What a call gives, and its FLOPs."""
    with FlopCounterMode(display=False) as counter:
        found = call()
    return found, counter.get_total_flops()


class Race:
    """One seed: both trainings, from the same parameters, on the same stream of windows."""

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self.args, self.seed = args, seed
        self.corpus = build_corpus(DOMAIN, args.documents, 48, seed, CORRUPTED)
        model = GPT(ModelSize(args.context, args.width, args.layers), seed)
        self.start, self.losses = initial_params(model), WindowLosses(model)
        steering, judging = self.corpus.validation[::2], self.corpus.validation[1::2]
        self.steering = [Batch(validation_tokens(steering, args.context, args.validation_windows))]
        self.judging = [Batch(validation_tokens(judging, args.context, 64))]
        adam = torch.optim.AdamW(self.start.values(), lr=args.lr, betas=(0.9, 0.99))
        self.update, self.state = updates.of(adam, self.start)
        self.plan = fg.plan(self.losses, self.start, self.batch(4, 0))
        self.pick = weighting.weighted_gradient(self.losses, selection.quantile(args.keep), plan=self.plan)

    def batch(self, size: int, step: int) -> Batch:
        """The windows of a step."""
        sampler = WindowSampler(self.corpus.training, self.args.context, size, (self.seed,))
        return Batch(sampler.draw(step).tokens)

    def through(self, params: Tree, state: Any, slope: Tree) -> Tree:
        """`P V`: what a gradient has to lie along to take the most off the validation loss through the optimizer."""
        split = split_params(params)
        v, none = match_direction(slope, split), [torch.zeros_like(leaf) for leaf in split.leaves]
        [along] = self.update.share(split, none, state, [v], "impulse", 1e-3).along
        return split.rebuild([-leaf for leaf in along])

    def train(self, gradient: Callable[[Tree, Any, int], Tree], costs: Callable[[int], int], budget: int) -> Curve:
        """Steps of AdamW along these gradients, until the FLOPs are spent."""
        params, state, spent, step = self.start, self.state, 0, 0
        curve = Curve([], [])
        while spent < budget:
            grads = gradient(params, state, step)
            with torch.no_grad():
                params, state = self.update(params, grads, state)
            spent, step = spent + costs(step), step + 1
            if step % self.args.look == 0 or spent >= budget:
                curve.flops.append(spent)
                curve.losses.append(mean_loss(self.losses, params, self.judging))
        return curve

    def run(self) -> tuple[Curve, Curve, float]:
        """Random selection, selection by scores, and the share of its compute that is trained on."""
        args, kept = self.args, dict[str, Tree]()

        def selected(params: Tree, state: Any, step: int) -> Tree:
            if step % args.refresh == 0:
                slope = in_run.validation_gradient(self.losses, params, self.steering)
                kept["direction"] = self.through(params, state, slope)
            return self.pick(params, self.batch(args.candidates, step), fg.dot(kept["direction"])).grads

        selected(self.start, self.state, 0)  # what is verified in a first call is no part of a step
        _, with_refresh = counted(lambda: selected(self.start, self.state, 0))
        _, without = counted(lambda: selected(self.start, self.state, 1)) if args.refresh > 1 else (None, with_refresh)
        mean = (with_refresh + (args.refresh - 1) * without) / args.refresh
        _, of_one = counted(lambda: plain_gradient(self.losses, self.start, self.batch(8, 0)))
        size = round(8 * mean / of_one)
        budget = round(args.steps * mean)
        plain = self.train(
            lambda params, _, step: plain_gradient(self.losses, params, self.batch(size, step)),
            lambda _: round(of_one * size / 8),
            budget,
        )
        ours = self.train(selected, lambda step: without if step % args.refresh else with_refresh, budget)
        return plain, ours, args.keep * args.candidates * of_one / 8 / mean


def main(argv: Sequence[str] | None = None) -> Summary:
    """Runs all seeds, and prints and gives what came of it."""
    parser = argparse.ArgumentParser(description="Selected against random training windows, at equal FLOPs.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=240, help="steps of selected training")
    parser.add_argument("--candidates", type=int, default=32, help="windows scored in a step")
    parser.add_argument("--keep", type=float, default=0.5, help="the share of them that is trained on")
    parser.add_argument("--validation-windows", type=int, default=32)
    parser.add_argument("--refresh", type=int, default=4, help="steps for which a validation gradient is kept")
    parser.add_argument("--documents", type=int, default=40, help="training documents of each domain, at most")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--look", type=int, default=5, help="steps between two looks at the held-out loss")
    args = parser.parse_args(argv)
    races = [Race(args, seed).run() for seed in range(args.seeds)]
    ends = [plain.losses[-1] for plain, _, _ in races]
    shares = [ours.reached(end) / plain.flops[-1] for (plain, ours, _), end in zip(races, ends, strict=True)]
    summary = Summary(shares, ends, [ours.losses[-1] for _, ours, _ in races], races[0][2])
    print(summary)
    return summary


if __name__ == "__main__":
    main()
