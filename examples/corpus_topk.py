"""Which documents of a corpus are behind a behaviour? Scores every document once, and asks the store.

A small GPT over bytes learns from the sources of Python's standard library. Then every document is scored into a store
with a projection of its gradient, and the store is asked for the documents nearest to a query, a passage of one
package, in gradient space. Copies of the query are planted among the documents. The example asserts that

- the planted copies come first,
- documents of the query's own package are among the nearest more often than by chance,
- rescoring a shortlist from the projections by exact inner products gives the top 20 of exact scores of all documents,
- a second pass over a finished store computes nothing.

    python examples/corpus_topk.py --out runs/corpus [--steps 300] [--documents 60] [--overwrite]

The store is read by other tools, too: `runs/corpus/values/*.parquet`, `runs/corpus/vectors/sketch/*.arrow`; and by
`python -m funcghost nearest runs/corpus --query ...`.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import funcghost as fg
from funcghost import corpus
from lm_corpus import Document, WindowSampler, build_corpus
from lm_model import GPT, Batch, ModelSize, WindowLosses, initial_params

PACKAGE, COPIES, SHORTLIST, NEAREST = "json", 3, 100, 20


@dataclass(frozen=True)
class Summary:
    """What was asserted.

    `enrichment` is the share of documents of the query's package among the nearest, over their share in the corpus;
    `agreement` the share of the exact top 20 that the rescored shortlist finds.
    """

    documents: int
    seconds: float
    copies_first: bool
    enrichment: float
    agreement: float
    rescanned: int

    def __str__(self) -> str:
        return (
            f"{self.documents} documents scored, {self.documents / self.seconds:.0f} a second\n"
            f"planted copies first    {self.copies_first}\n"
            f"own package, to chance  {self.enrichment:.1f}x among the {NEAREST} nearest\n"
            f"top 20 by a shortlist   {self.agreement:.0%} of those by exact scores of all"
        )


def tokens_of(document: Document, context: int) -> Tensor:
    """The head of a document, [context + 1] bytes."""
    return torch.frombuffer(bytearray(document.text[: context + 1]), dtype=torch.uint8).long()


def train(
    losses: WindowLosses, params: dict[str, Tensor], documents: Sequence[Document], args: argparse.Namespace
) -> None:
    """Trains the parameters where they lie."""
    sampler = WindowSampler(documents, args.context, 16, (args.seed,))
    for value in params.values():
        value.requires_grad_()
    optimizer = torch.optim.AdamW(params.values(), lr=2e-3)
    for step in range(args.steps):
        optimizer.zero_grad()
        losses(params, Batch(sampler.draw(step).tokens)).mean().backward()
        optimizer.step()
    for value in params.values():
        value.requires_grad_(False)


def with_copies(documents: Sequence[Document], query: Document) -> list[Document]:
    """The documents without corruption, and copies of the query spread among them."""
    kept = [document for document in documents if not document.corruption and document.name != query.name]
    for number in range(COPIES):
        kept.insert((number + 1) * len(kept) // (COPIES + 1), replace(query, name=f"copy {number}"))
    return kept


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description="Ask a corpus which documents are nearest to a query.")
    parser.add_argument("--out", type=Path, default=Path("runs/corpus"), help="the folder of the store")
    parser.add_argument("--overwrite", action="store_true", help="remove the store in --out, if there is one")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--documents", type=int, default=60, help="of each package, at most")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dim", type=int, default=1024, help="of the projections")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.out.exists() and not args.overwrite:
        parser.error(f"--out {args.out} exists; pass --overwrite")
    if args.out.exists() and not (args.out / "manifest.json").exists():
        parser.error(f"--out {args.out} holds something that is no store; name another folder")
    return args


def main(argv: Sequence[str] | None = None) -> Summary:
    """Trains, scores, asks, and asserts; the summary it prints."""
    args = parse(argv)
    if args.out.exists():
        shutil.rmtree(args.out)
    torch.manual_seed(args.seed)
    found = build_corpus(PACKAGE, args.documents, 1, args.seed)
    model = GPT(ModelSize(args.context, args.width, args.layers), args.seed)
    losses, params = WindowLosses(model), initial_params(model)
    train(losses, params, found.training, args)

    # The query is a passage of the package that was held out; its copies are in the corpus.
    query = found.validation[0]
    documents = with_copies(found.training, query)
    samples = [(document.name, tokens_of(document, args.context)) for document in documents]
    question = tokens_of(query, args.context)

    def collate(samples: Sequence[tuple[str, Tensor]]) -> Batch:
        return Batch(torch.stack([tokens for _, tokens in samples]))

    reducers = {"norm": fg.squared_norm(), "sketch": fg.project(args.dim, seed=1, kind="kronecker")}

    def score() -> corpus.Scored:
        return corpus.score(
            losses, params, samples, reducers, args.out, batch_size=32, collate=collate, ids=lambda sample: sample[0]
        )

    done, again = score(), score()
    store = corpus.open(args.out)

    sketch = fg.reduce(losses)(params, Batch(question[None]), reducers["sketch"])[0]
    near = store.nearest(sketch, COPIES + NEAREST, normalised=True)
    copies_first = {str(name) for name in near.ids[:COPIES]} == {f"copy {number}" for number in range(COPIES)}
    domain = {document.name: document.domain for document in documents}
    own = float(np.mean([domain[name] == PACKAGE for name in near.ids[COPIES:]]))
    chance = (sum(document.domain == PACKAGE for document in documents) - COPIES) / (len(documents) - COPIES)
    enrichment = own / chance

    gradient = fg.combine(fg.pairs(losses)(params, Batch(question[None])), torch.ones(1))
    shortlist = store.nearest(sketch, min(SHORTLIST, len(documents)))
    exact = corpus.rescore(losses, params, samples, fg.dot(gradient), shortlist, batch_size=32, collate=collate)
    every = corpus.Hits(store.ids(), np.arange(len(store)), np.zeros(len(store)))
    truth = corpus.rescore(losses, params, samples, fg.dot(gradient), every, batch_size=32, collate=collate)
    top, wanted = exact.positions[:NEAREST].tolist(), truth.positions[:NEAREST].tolist()
    agreement = len(set(top) & set(wanted)) / NEAREST

    summary = Summary(len(documents), done.seconds, copies_first, enrichment, agreement, again.samples)
    print(summary)
    assert summary.copies_first, f"first are {near.ids[:COPIES].tolist()}"
    assert summary.enrichment > 1.5, f"the package is {summary.enrichment:.2f} times as frequent as by chance"
    assert summary.agreement >= 0.95, f"the shortlist has {summary.agreement:.0%} of the exact top {NEAREST}"
    assert summary.rescanned == 0
    return summary


if __name__ == "__main__":
    try:
        main()
    except AssertionError as error:
        sys.exit(f"not so: {error}")
