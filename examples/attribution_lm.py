"""Finds the documents that a small language model has a passage from, by attribution.

A small GPT learns short documents, several of them packed into each row. Then it is asked about pieces of some of them,
and every method scores all documents against every piece, document by document within the rows. Known is where a piece
comes from: recall and mean reciprocal rank say how often that document comes first, and a tail patch says how much one
more training step on the best-scored rows lowers the loss of the piece.

    python examples/attribution_lm.py --out runs/attribution_lm.json
    python examples/attribution_lm.py --quick
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import funcghost as fg
from funcghost import evaluation
from funcghost.attribution import curvature, gradient
from funcghost.training import updates
from lm_corpus import build_corpus
from lm_model import GPT, Batch, ModelSize, Tree, WindowLosses, initial_params

LENGTH, PACKED, ROWS, LEARNING_RATE, PATCH_RATE, TOP = 32, 4, 16, 3e-3, 0.02, 4


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
    """What a method achieved; `patch` is the mean change of a piece's loss, in nats a byte."""

    method: str
    recall: float
    reciprocal_rank: float
    patch: float
    seconds: float


def packed(documents: Sequence[bytes]) -> Tensor:
    """Rows [b, t + 1] of several documents end to end; the last byte of a row is the first once more."""
    tokens = torch.tensor([list(document[:LENGTH]) for document in documents]).view(-1, PACKED * LENGTH)
    return torch.cat([tokens, tokens[:, :1]], 1)


def trained(losses: WindowLosses, params: Tree, rows: Tensor, epochs: int) -> Tree:
    """By Adam, in batches drawn anew in every epoch."""
    params = {name: value.requires_grad_() for name, value in params.items()}
    update, state = updates.of(torch.optim.Adam(list(params.values()), lr=LEARNING_RATE), params)
    source = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for chosen in torch.randperm(len(rows), generator=source).split(ROWS):
            total = losses(params, Batch(rows[chosen])).mean()
            grads = dict(zip(params, torch.autograd.grad(total, list(params.values())), strict=True))
            after, state = update(params, grads, state)
            params = {name: value.detach().requires_grad_() for name, value in after.items()}
    return {name: value.detach() for name, value in params.items()}


def by_document(losses: WindowLosses, params: Tree, batches: Sequence[Batch], directions: Tree) -> Tensor:
    """The scores of every document along every direction, [n, q]."""
    count = len(next(iter(directions.values())))
    stack = fg.stack([{name: value[k] for name, value in directions.items()} for k in range(count)])
    score = fg.reduce(losses)
    segments = torch.arange(PACKED).repeat_interleave(LENGTH)
    found = []
    for batch in batches:
        ids = segments.expand(len(batch.tokens), -1)
        found.append(score(params, batch, fg.per_segment(fg.dot(stack), ids)).flatten(0, 1))
    return torch.cat(found)


Method = Callable[[Tree], Tree]


def methods(losses: WindowLosses, params: Tree, batches: Sequence[Batch]) -> dict[str, Callable[[], Method]]:
    """What makes a direction of a piece's gradient."""
    fisher: dict[str, Callable[[], Method]] = {
        "gradient dot": lambda: lambda directions: directions,
        "diagonal": lambda: curvature.diagonal(losses, params, batches).damped(fraction=0.1),
        "K-FAC": lambda: curvature.kfac(losses, params, batches).damped(fraction=0.1),
        "EK-FAC": lambda: curvature.ekfac(losses, params, batches).damped(fraction=0.1),
    }
    return fisher


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, checked before anything is computed."""
    parser = argparse.ArgumentParser(description="Trace pieces of text to the documents of a small GPT.")
    parser.add_argument("--out", type=Path, help="file for the table, as JSON")
    parser.add_argument("--size", choices=sorted(SIZES), default="full")
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
    losses = WindowLosses(model)
    params = trained(losses, initial_params(model), rows, size.epochs)
    batches = [Batch(part) for part in rows.split(ROWS)]

    # The pieces: the second halves of some documents, alone.
    asked = torch.randperm(len(texts), generator=torch.Generator().manual_seed(1))[: size.queries]
    pieces = Batch(torch.tensor([list(texts[int(i)][LENGTH // 2 : LENGTH]) for i in asked]))
    sources = torch.zeros(len(texts), len(asked), dtype=torch.bool)
    sources[asked, torch.arange(len(asked))] = True
    gradients = gradient.query_gradients(losses)(params, pieces)

    def step(at: Tree, batch: Batch) -> Tree:
        leaves = {name: value.requires_grad_() for name, value in at.items()}
        grads = torch.autograd.grad(losses(leaves, batch).mean(), list(leaves.values()))
        return {n: (v - PATCH_RATE * g).detach() for (n, v), g in zip(leaves.items(), grads, strict=True)}

    found = []
    for name, make in methods(losses, params, batches).items():
        start = time.perf_counter()
        scores = by_document(losses, params, batches, make()(gradients))
        seconds = time.perf_counter() - start
        changes = []
        for k in range(len(asked)):
            best = scores[:, k].topk(TOP).indices // PACKED
            changes.append(
                evaluation.tail_patch(
                    step,
                    lambda at, k=k: losses(at, Batch(pieces.tokens[k : k + 1]))[0],  # type: ignore[misc]
                    params,
                    [Batch(rows[best])],
                )
            )
        recall = float(evaluation.recall_at(5, scores, sources).mean())
        rank = evaluation.mean_reciprocal_rank(scores, sources)
        found.append(Row(name, recall, rank, float(torch.cat(changes).mean()), seconds))
    print(f"{len(texts)} documents, {len(asked)} pieces")
    print(f"{'method':<14} {'recall at 5':>12} {'MRR':>7} {'tail patch':>11} {'seconds':>8}")
    for row in found:
        print(f"{row.method:<14} {row.recall:12.3f} {row.reciprocal_rank:7.3f} {row.patch:11.4f} {row.seconds:8.1f}")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps([asdict(row) for row in found], indent=1), encoding="utf-8")
    if args.size != "tiny":
        by_name = {row.method: row for row in found}
        assert by_name["EK-FAC"].reciprocal_rank > by_name["gradient dot"].reciprocal_rank, "curvature should help"
    return found


if __name__ == "__main__":
    main()
