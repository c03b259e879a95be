"""Trains a small language model and values its training data in the very run: In-Run Data Shapley.

A byte-level GPT learns from the sources of Python's standard library and the prose of its manual. Ten percent of its
documents are corrupted. Every step of AdamW says what each of its windows did to the loss on held-out text of one
domain, and what the optimizer did by itself, and the run asserts that

- the values of a step and this rest sum to the change of the validation loss which that step really made,
- corrupted documents stand out by their values,
- the values are those of per-sample gradients taken one by one,
- a direction of low rank changes no score by more than its certified bound.

A validation gradient is taken at every step. What it would cost in scores to keep one for some steps, to average it, or
to cut it to low rank, is measured beside the run, and reported.

    python examples/lm_in_run_shapley.py --out runs/lm

writes `scores` (a record whose `values/*.parquet` is one table at any time), `checkpoint.pt`, from which `--resume`
continues, and `report.html`.
"""

import argparse
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import funcghost as fg
from lm_corpus import DOMAINS, SHORTEST, Corpus, WindowSampler, build_corpus, validation_tokens
from lm_findings import Claim, Findings, claims_of, explained, find, overhead, remark_of
from lm_model import GPT, HEADS, Batch, ModelSize, WindowLosses, initial_params
from lm_report import write_report
from lm_scores import record_scores, tally
from lm_training import UNFINISHED, Log, Optimizer, State, Trainer, load_checkpoint, save_checkpoint

SCORES, CHECKPOINT, REPORT = "scores", "checkpoint.pt", "report.html"
HELD_OUT_DOCUMENTS = 32
ORIGIN = (
    "seed",
    "validation_domain",
    "documents",
    "batch_size",
    "context",
    "width",
    "layers",
    "dropout",
    "lr",
    "validation_windows",
)


class ClaimError(AssertionError):
    """The run measured something else than it claims."""


@dataclass(frozen=True)
class Summary:
    """What a run wrote and found; `seconds` is the time since this start, without what a resumed run took before."""

    out: Path
    steps: int
    seconds: float
    findings: Findings
    claims: tuple[Claim, ...]
    remark: str

    def __str__(self) -> str:
        found = self.findings
        lines = [f"{'holds' if claim.holds else 'FAILS'}  {claim.text}: {claim.measured}" for claim in self.claims]
        if self.remark:
            lines.append(self.remark)
        lines.append(explained(found))
        if not math.isnan(found.overhead):
            lines.append(
                f"a step with its account, validation gradient included, costs {found.overhead:.2f} plain ones"
            )
        lines += [
            f"kept {name}: rank correlation with fresh scores {cost.correlation:.3f} (lowest {cost.lowest:.3f}), "
            f"{cost.error:.2%} off" + (f", certified within {cost.bound:.0%}" if cost.bound else "")
            for name, cost in found.costs.items()
        ]
        lines.append(f"{self.steps} steps, {self.seconds:.0f} s since the start; in {self.out}: {REPORT}, {SCORES}")
        return "\n".join(lines)


def whole(least: int) -> Callable[[str], int]:
    """An argument that must be a whole number of at least this."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, found {text!r}")
        return int(text)

    return parse


def number(low: float, high: float) -> Callable[[str], float]:
    """An argument that must be a number in [low, high)."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value < high:
            raise argparse.ArgumentTypeError(f"must be a number in [{low:g}, {high:g}), found {text!r}")
        return value

    return parse


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """The arguments, checked one by one and against each other."""
    parser = argparse.ArgumentParser(description="Train a small language model and value its data in the run.")
    parser.add_argument("--out", type=Path, default=Path("runs/lm"), help="folder to write")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue the run in --out, possibly with more --steps")
    again.add_argument("--overwrite", action="store_true", help="remove the run in --out, if there is one")
    parser.add_argument("--steps", type=whole(1), default=400)
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--validation-domain", choices=DOMAINS, default="email", help="what the values are about")
    parser.add_argument("--documents", type=whole(4), default=40, help="training documents of each domain, at most")
    parser.add_argument("--validation-windows", type=whole(1), default=32)
    parser.add_argument("--batch-size", type=whole(2), default=32)
    parser.add_argument("--context", type=whole(1), default=64, help="bytes that a window predicts")
    parser.add_argument("--width", type=whole(HEADS), default=64)
    parser.add_argument("--layers", type=whole(1), default=2)
    parser.add_argument("--dropout", type=number(0.0, 1.0), default=0.0)
    parser.add_argument("--lr", type=number(1e-9, math.inf), default=5e-4)
    parser.add_argument("--check", type=whole(1), default=10, help="steps between checks of the values' sums")
    parser.add_argument("--compare", type=whole(1), default=21, help="steps between comparisons with fresh scores")
    parser.add_argument("--flush", type=whole(1), default=10, help="steps between two parts of scores and checkpoints")
    parser.add_argument("--threads", type=whole(1), default=1, help="more gain little here, and lose on shared cores")
    parser.add_argument("--max-change-error", type=number(0.0, math.inf), default=0.01, help="what the run asserts")
    parser.add_argument("--min-auroc", type=number(0.0, 1.0), default=0.9, help="what the run asserts; 0 for nothing")
    args = parser.parse_args(argv)
    if args.context >= SHORTEST:
        parser.error(f"--context {args.context}: must be less than {SHORTEST}, the length of the shortest documents")
    if args.width % HEADS:
        parser.error(f"--width {args.width}: must be a multiple of {HEADS}, the number of heads")
    return args, parser


def check_out(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Ends with an error where --out is not what the other arguments say; nothing is touched."""
    out: Path = args.out
    if out.exists() and not out.is_dir():
        parser.error(f"--out {out}: is a file. Name a folder")
    if args.resume and not (out / CHECKPOINT).is_file():
        parser.error(f"--resume: there is no {CHECKPOINT} in {out}, nothing to continue. Start without --resume")
    if out.exists() and not args.resume and not args.overwrite:
        parser.error(f"--out {out}: exists. Name another folder, or pass --resume or --overwrite")
    if out.exists() and args.overwrite:
        strange = [path.name for path in out.iterdir() if path.name.removeprefix(UNFINISHED) not in _own_names()]
        if strange:
            parser.error(f"--overwrite: {out} holds {sorted(strange)[0]!r}, which is no part of a run. Remove it first")


def _own_names() -> tuple[str, ...]:
    return SCORES, CHECKPOINT, REPORT


def origin_of(args: argparse.Namespace, corpus: Corpus) -> dict[str, Any]:
    """All that the scores follow from."""
    return {**{name: getattr(args, name) for name in ORIGIN}, "corpus": corpus.digest()}


def continue_run(
    args: argparse.Namespace, parser: argparse.ArgumentParser, origin: dict[str, Any]
) -> tuple[State, Log]:
    """The state and the log of the run in --out, if it is the same run."""
    state, log, begun = load_checkpoint(args.out / CHECKPOINT)
    for name, value in origin.items():
        if begun[name] != value and name == "corpus":
            parser.error(f"--resume: the run in {args.out} read other text; Python's library has changed since")
        elif begun[name] != value:
            parser.error(f"--resume: the run in {args.out} has --{name.replace('_', '-')} {begun[name]}, not {value}")
    if state.step > args.steps:
        parser.error(f"--steps {args.steps}: the run in {args.out} has come to step {state.step} already")
    return state, log


class Run:
    """A run in its folder: draws batches, takes scored steps, and writes as it goes."""

    def __init__(self, args: argparse.Namespace, corpus: Corpus) -> None:
        self.args = args
        self.corpus = corpus
        size = ModelSize(args.context, args.width, args.layers, args.dropout)
        model = GPT(size, args.seed)
        self.params = initial_params(model)
        losses = WindowLosses(model)
        self.sampler = WindowSampler(corpus.training, args.context, args.batch_size, (args.seed, 0))
        validation = Batch(validation_tokens(corpus.validation, args.context, args.validation_windows))
        plan = fg.plan(losses, self.params, self.batch(0))
        optimizer = Optimizer(args.lr)
        self.trainer = Trainer(losses, optimizer, self.params, [validation], args.check, args.compare, plan)

    def batch(self, step: int) -> Batch:
        """The windows of a step, with dropout if the run has it."""
        tokens = self.sampler.draw(step).tokens
        return Batch(tokens, torch.tensor(self.args.seed + step) if self.args.dropout else None)

    def begin(self) -> State:
        """The state before the first step."""
        return self.trainer.begin(self.params)

    def go(self, state: State, log: Log, origin: dict[str, Any]) -> None:
        """Takes the steps from this state on; scores, then checkpoint, so that no checkpoint is ahead of its scores."""
        args = self.args
        documents = self.corpus.training
        with (
            record_scores(args.out / SCORES, origin, state.step) as scores,
            Progress(args.steps, state.step) as progress,
        ):
            for step in range(state.step, args.steps):
                drawn = self.sampler.draw(step)
                state, out = self.trainer.step(state, self.batch(step), torch.from_numpy(drawn.documents), log)
                names = [documents[index].name for index in drawn.documents]
                domains = [documents[index].domain for index in drawn.documents]
                scores.add(step, drawn.windows, {"value": out.values}, {"document": names, "domain": domains})
                if state.step % args.flush == 0 or state.step == args.steps:
                    scores.flush()
                    save_checkpoint(args.out / CHECKPOINT, state, log, origin)
                progress.update(self._status(out, log))

    def _status(self, out: Any, log: Log) -> dict[str, str]:
        sum_law = abs((out.values.sum() + out.rest - out.change) / out.change).item() if out.change else math.nan
        found = {"loss": f"{out.losses.mean():.3f}", "validation": f"{out.after.loss:.3f}", "law": f"{sum_law:.2%}"}
        return found | ({"account": f"{overhead(log.seconds):.2f}x"} if log.seconds else {})


class Progress:
    """A bar on a terminal; elsewhere, as in a log, a line every few seconds."""

    EVERY = 5.0

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done, self.shown = total, done, time.monotonic()
        self.bar = tqdm(total=total, initial=done, unit="step") if sys.stderr.isatty() else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, status: dict[str, str]) -> None:
        """One more step is done."""
        self.done += 1
        if self.bar is not None:
            self.bar.set_postfix(status, refresh=False)
            self.bar.update()
        elif self.done == self.total or time.monotonic() - self.shown > self.EVERY:
            self.shown = time.monotonic()
            words = ", ".join(f"{name} {value}" for name, value in status.items())
            print(f"step {self.done} of {self.total}: {words}", file=sys.stderr, flush=True)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Has torch use this many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def value_in_run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Summary:
    """Trains, scores, reports, and asserts."""
    began = time.perf_counter()
    corpus = build_corpus(args.validation_domain, args.documents, HELD_OUT_DOCUMENTS, args.seed)
    origin = origin_of(args, corpus)
    state, log = continue_run(args, parser, origin) if args.resume else (None, Log())
    run = Run(args, corpus)
    if state is None:
        if args.out.exists():
            shutil.rmtree(args.out)
        args.out.mkdir(parents=True)
        state = run.begin()
        save_checkpoint(args.out / CHECKPOINT, state, log, origin)
    run.go(state, log, origin)

    sums = tally(args.out / SCORES, corpus.training, args.steps)
    found = find(sums, log, corpus, args.validation_domain)
    claims = claims_of(args, found)
    remark = remark_of(args, found, claims)
    summary = Summary(args.out, args.steps, time.perf_counter() - began, found, claims, remark)
    facts = {"seconds": f"{summary.seconds:.0f}", "steps": str(args.steps), **{k: str(v) for k, v in origin.items()}}
    write_report(args.out / REPORT, corpus, sums, log, found, claims, remark, facts)
    print(summary)
    failed = [claim for claim in claims if not claim.holds]
    if failed:
        raise ClaimError("; ".join(f"not so: {claim.text}; {claim.measured}" for claim in failed))
    return summary


def main(argv: Sequence[str] | None = None) -> Summary:
    """Runs the example; the summary it prints.

    Raises:
        SystemExit: an argument is not what it must be, or --out exists; before anything is written.
        ClaimError: the run is complete, its report is written, and a claim does not hold.
    """
    args, parser = parse(argv)
    check_out(args, parser)
    with torch_threads(args.threads):
        return value_in_run(args, parser)


if __name__ == "__main__":
    try:
        main()
    except ClaimError as error:
        sys.exit(str(error))
