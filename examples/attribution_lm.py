"""Finds the documents that a small language model has a passage from, by attribution.

A small GPT learns short documents, several of them packed into each row. Then it is asked about pieces of some of them,
and every method scores all documents against every piece, document by document within the rows. Known is where a piece
comes from: recall and mean reciprocal rank say how often that document comes first, and a tail patch says how much one
more training step on the best-scored rows lowers the loss of the piece. What a method costs is told in trainings.

    python examples/attribution_lm.py --out runs/attribution_lm.json
    python examples/attribution_lm.py --quick
    python examples/attribution_lm.py --quick --unrolled

The last also goes backwards through the whole training, for every piece, which takes many times longer.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

import funcghost as fg
from funcghost import evaluation
from funcghost.attribution import curvature, gradient, projected, unrolled
from funcghost.training import updates
from lm_corpus import build_corpus
from lm_model import GPT, Batch, ModelSize, Tree, WindowLosses, initial_params

LENGTH, PACKED, ROWS, LEARNING_RATE, PATCH_RATE, TOP, CHECKPOINTS = 32, 4, 16, 3e-3, 0.02, 4, 5
EPSILON = 1e-3
"""Adam's. With far less the training is too rough for a derivative through it: `--quick` has a smoothness of -1 at 1e-6
and of .5 here, where the derivative, though exact, still does not tell documents apart; in few steps it does."""


@dataclass(frozen=True)
class Size:
    """How much is computed."""

    documents: int
    queries: int
    epochs: int
    width: int


SIZES = {"full": Size(384, 32, 60, 64), "quick": Size(192, 16, 30, 48), "tiny": Size(32, 3, 2, 16)}


@dataclass(frozen=True)
class Row:
    """What a method achieved; `patch` is the mean change of a piece's loss, in nats a byte.

    `cost` is its CPU time in units of one training.
    """

    method: str
    recall: float
    reciprocal_rank: float
    patch: float
    cost: float


def packed(documents: Sequence[bytes]) -> Tensor:
    """Rows [b, t + 1] of several documents end to end; the last byte of a row is the first once more."""
    tokens = torch.tensor([list(document[:LENGTH]) for document in documents]).view(-1, PACKED * LENGTH)
    return torch.cat([tokens, tokens[:, :1]], 1)


class DocumentLosses(WindowLosses):
    """One loss for each document of every row, or for each piece: the mean over its bytes."""

    def __call__(self, params: Tree, batch: Batch) -> Tensor:
        """[b * documents]."""
        logits, targets = functional_call(self.model, params, (batch.tokens[:, :-1],)), batch.tokens[:, 1:]
        surprise = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return surprise.view(-1, min(LENGTH, targets.shape[1])).mean(1)


@dataclass(frozen=True)
class Setting:
    """A training, what was trained on, and the pieces that are asked about."""

    losses: WindowLosses
    documents: DocumentLosses
    initial: Tree
    rows: Tensor
    epochs: int
    checkpoints: Sequence[Tree]
    pieces: Batch

    @property
    def params(self) -> Tree:
        """At the end."""
        return self.checkpoints[-1]

    @property
    def batches(self) -> list[Batch]:
        """All rows, in their order."""
        return [Batch(part) for part in self.rows.split(ROWS)]


def order(count: int, epochs: int) -> list[list[Tensor]]:
    """The rows of every step, epoch by epoch."""
    source = torch.Generator().manual_seed(0)
    return [list(torch.randperm(count, generator=source).split(ROWS)) for _ in range(epochs)]


def begun(initial: Tree) -> tuple[Any, Any, Tree]:
    """Adam's update, its state, and the initial parameters as it takes them."""
    params = {name: value.clone().requires_grad_() for name, value in initial.items()}
    return *updates.of(torch.optim.Adam(list(params.values()), lr=LEARNING_RATE, eps=EPSILON), params), params


def trained(losses: WindowLosses, initial: Tree, rows: Tensor, epochs: int) -> list[Tree]:
    """By Adam, in batches drawn anew in every epoch; the parameters at some points on the way, and at the end."""
    update, state, params = begun(initial)
    found = []
    for number, epoch in enumerate(order(len(rows), epochs), 1):
        for chosen in epoch:
            total = losses(params, Batch(rows[chosen])).mean()
            grads = dict(zip(params, torch.autograd.grad(total, list(params.values())), strict=True))
            after, state = update(params, grads, state)
            params = {name: value.detach().requires_grad_() for name, value in after.items()}
        if number % max(1, epochs // CHECKPOINTS) == 0 or number == epochs:
            found.append({name: value.detach() for name, value in params.items()})
    return found


def along(given: Setting, params: Tree, directions: Tree) -> Tensor:
    """The scores of every document along every direction, [n, q]."""
    count = len(next(iter(directions.values())))
    stack = fg.stack([{name: value[k] for name, value in directions.items()} for k in range(count)])
    score = fg.reduce(given.losses)
    segments = torch.arange(PACKED).repeat_interleave(LENGTH)
    found = []
    for batch in given.batches:
        ids = segments.expand(len(batch.tokens), -1)
        found.append(score(params, batch, fg.per_segment(fg.dot(stack), ids)).flatten(0, 1))
    return torch.cat(found)


def by_gradients(given: Setting) -> Tensor:
    """Inner products at the end."""
    return along(given, given.params, gradient.query_gradients(given.losses)(given.params, given.pieces))


def by_tracin(given: Setting) -> Tensor:
    """Inner products, summed over the checkpoints."""
    ask = gradient.query_gradients(given.losses)
    return torch.stack([along(given, params, ask(params, given.pieces)) for params in given.checkpoints]).sum(0)


def by_cosines(given: Setting) -> Tensor:
    """Of the gradients of the documents' own losses."""
    return gradient.cosine(given.documents)(given.params, given.batches, [given.pieces])


def by_curvature(make: Any, given: Setting) -> Tensor:
    """Influence by the empirical Fisher matrix of the rows."""
    precondition = make(given.losses, given.params, given.batches).damped(fraction=0.1)
    directions = precondition(gradient.query_gradients(given.losses)(given.params, given.pieces))
    return along(given, given.params, directions)


def by_trak(given: Setting) -> Tensor:
    """Of one model."""
    return projected.trak(given.documents, 256, damping=0.1)([given.params], given.batches, [given.pieces])


def by_unrolling(given: Setting) -> Tensor:
    """How much lower every document's weight in the training has made the pieces' losses, through all of it.

    Whether that means anything, the smoothness of the training says: 1 if it is smooth, 0 or less if it is not.
    """
    steps = [chosen for epoch in order(len(given.rows), given.epochs) for chosen in epoch]
    update, state, params = begun(given.initial)
    batches = [Batch(given.rows[chosen]) for chosen in steps]

    def query(at: Tree) -> Tensor:
        return given.losses(at, given.pieces)

    smoothness = unrolled.smoothness(given.documents, update, params, state, batches, query)
    print(f"smoothness of the training: {smoothness:.2f}", flush=True)
    out = unrolled.attribute(given.documents, update, params, state, batches, query)
    samples = [(chosen.unsqueeze(1) * PACKED + torch.arange(PACKED)).flatten() for chosen in steps]
    return -unrolled.by_sample(out.scores, samples, len(given.rows) * PACKED)


METHODS: dict[str, Callable[[Setting], Tensor]] = {
    "gradient dot": by_gradients,
    "gradient cosine": by_cosines,
    "TracIn": by_tracin,
    "TRAK": by_trak,
    "diagonal": partial(by_curvature, curvature.diagonal),
    "K-FAC": partial(by_curvature, curvature.kfac),
    "EK-FAC": partial(by_curvature, curvature.ekfac),
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, checked before anything is computed."""
    parser = argparse.ArgumentParser(description="Trace pieces of text to the documents of a small GPT.")
    parser.add_argument("--out", type=Path, help="file for the table, as JSON")
    parser.add_argument("--size", choices=sorted(SIZES), default="full")
    parser.add_argument("--unrolled", action="store_true", help="attribution through the whole training, too")
    parser.add_argument("--quick", action="store_const", const="quick", dest="size", help="the same as --size quick")
    args = parser.parse_args(argv)
    if args.out is not None and args.out.exists():
        parser.error(f"--out {args.out} exists; name another file")
    return args


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs the example; the rows of the table it prints."""
    args = parse(argv)
    size = SIZES[args.size]
    corpus = build_corpus("json", size.documents // 8, 1, seed=0)
    texts = [document.text for document in corpus.training if not document.corruption][: size.documents]
    texts = texts[: len(texts) // (PACKED * ROWS) * PACKED * ROWS] or texts[: len(texts) // PACKED * PACKED]
    rows = packed(texts)
    model = GPT(ModelSize(context=PACKED * LENGTH, width=size.width, layers=2), seed=0)
    losses, initial = WindowLosses(model), initial_params(model)
    start = time.process_time()
    checkpoints = trained(losses, initial, rows, size.epochs)
    unit = time.process_time() - start

    # The pieces: the second halves of some documents, alone.
    asked = torch.randperm(len(texts), generator=torch.Generator().manual_seed(1))[: size.queries]
    pieces = Batch(torch.tensor([list(texts[int(i)][LENGTH // 2 : LENGTH]) for i in asked]))
    sources = torch.zeros(len(texts), len(asked), dtype=torch.bool)
    sources[asked, torch.arange(len(asked))] = True
    given = Setting(losses, DocumentLosses(model), initial, rows, size.epochs, checkpoints, pieces)

    def step(at: Tree, batch: Batch) -> Tree:
        leaves = {name: value.requires_grad_() for name, value in at.items()}
        grads = torch.autograd.grad(losses(leaves, batch).mean(), list(leaves.values()))
        return {n: (v - PATCH_RATE * g).detach() for (n, v), g in zip(leaves.items(), grads, strict=True)}

    found = []
    more = {"unrolled": by_unrolling} if args.unrolled else {}
    for name, method in (METHODS | more).items():
        start = time.process_time()
        scores = method(given)
        cost = (time.process_time() - start) / unit
        changes = []
        for k in range(len(asked)):
            best = scores[:, k].topk(TOP).indices // PACKED
            changes.append(
                evaluation.tail_patch(
                    step,
                    lambda at, k=k: losses(at, Batch(pieces.tokens[k : k + 1]))[0],  # type: ignore[misc]
                    given.params,
                    [Batch(rows[best])],
                )
            )
        recall = float(evaluation.recall_at(5, scores, sources).mean())
        rank = evaluation.mean_reciprocal_rank(scores, sources)
        found.append(Row(name, recall, rank, float(torch.cat(changes).mean()), cost))
    print(f"{len(texts)} documents, {len(asked)} pieces")
    print(f"{'method':<16} {'recall at 5':>12} {'MRR':>7} {'tail patch':>11} {'cost':>7}")
    for row in found:
        print(f"{row.method:<16} {row.recall:12.3f} {row.reciprocal_rank:7.3f} {row.patch:11.4f} {row.cost:7.2f}")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps([asdict(row) for row in found], indent=1), encoding="utf-8")
    if args.size != "tiny":
        by_name = {row.method: row for row in found}
        assert by_name["EK-FAC"].reciprocal_rank > by_name["gradient dot"].reciprocal_rank, "curvature should help"
    return found


if __name__ == "__main__":
    main()
