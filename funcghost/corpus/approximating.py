"""The nearest by an index of faiss, which looks at some of the vectors: quick for many queries, and not exact."""

import importlib
import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from funcghost.corpus.asking import Corpus, Hits, of_query, queries_of, whole
from funcghost.errors import InputError

FEW = 4096
"""Vectors below which an index has no lists: all of them are looked at, in eight bits a number."""
FOR_A_LIST = 64
"""Vectors that a list is learned from."""
SHORTLIST = 8
"""Candidates of the index for each of the k samples, of which exact products choose."""


class Index:
    """What `approximate` made: ask it with `nearest`.

    `recall` is the share of the exact nearest that it found: of `k` for each of `measured` samples of the store, these
    themselves left out.
    """

    def __init__(self, corpus: Corpus, projection: str, normalised: bool, index: Any) -> None:
        self.corpus, self.projection, self.normalised = corpus, projection, normalised
        self.recall, self.k, self.measured = math.nan, 0, 0
        self._index = index
        self._ids = corpus.ids()
        self._parts: list[tuple[int, NDArray[Any]]] = []
        self._ends = [0]

    def nearest(self, query: Any, k: int) -> Hits:
        """As `Corpus.nearest`, of samples that the index proposes: values are exact, some of the best may be missed.

        Fewer than k are found where the lists that are looked at hold fewer.

        Raises:
            InputError: the query is not of the length of the vectors, not finite, or k not 1 or more.
        """
        queries, single = queries_of(query, self.corpus.projections[self.projection], np.float32, self.normalised)
        most = min(SHORTLIST * whole(k), len(self._ids))
        _, proposed = self._index.search(queries.numpy(), most)
        found = [self._exact(own, np.sort(rows[rows >= 0]), k) for own, rows in zip(queries, proposed, strict=True)]
        least = min(len(hits.ids) for hits in found)
        hits = Hits(*(np.stack([each[:least] for each in column]) for column in zip(*found, strict=True)))
        return of_query(hits) if single else hits

    def _exact(self, query: torch.Tensor, rows: NDArray[np.int64], k: int) -> Hits:
        parts = np.searchsorted(self._ends, rows, side="right") - 1
        inside = rows - np.asarray(self._ends)[parts]
        taken = [self._parts[part][1][row] for part, row in zip(parts, inside, strict=True)]
        vectors = torch.from_numpy(_floats(np.stack(taken) if taken else np.empty((0, len(query)))))
        values = vectors @ query
        if self.normalised:
            values = values / torch.linalg.vector_norm(vectors, dim=1)
        exact = values.numpy()
        order = np.argsort(-exact, kind="stable")[: int((~np.isnan(exact)).sum())][:k]
        starts = np.array([start for start, _ in self._parts])
        return Hits(self._ids[rows[order]], (starts[parts] + inside)[order], exact[order])

    def _fill(self) -> None:
        for start, block in self.corpus.vectors(self.projection):
            self._index.add(_prepared(block, self.normalised))
            self._parts.append((start, block))
            self._ends.append(self._ends[-1] + len(block))

    def _measure(self, queries: int, k: int) -> None:
        """Compares with the exact answer for samples that are spread evenly."""
        rows = _spread(len(self._ids), queries)
        parts = np.searchsorted(self._ends, rows, side="right") - 1
        places = [(self._parts[part], row - self._ends[part]) for part, row in zip(parts, rows, strict=True)]
        asked = np.stack([_floats(block[row]) for (_, block), row in places])
        own = [start + row for (start, _), row in places]
        exact = self.corpus.nearest(asked, k + 1, normalised=self.normalised, projection=self.projection)
        shares = []
        for query, position, wanted in zip(asked, own, exact.positions, strict=True):
            others = [place for place in wanted if place != position][:k]
            found = [place for place in self.nearest(query, k + 1).positions if place != position][:k]
            shares += [place in found for place in others]
        self.recall, self.k, self.measured = float(np.mean(shares)) if shares else 1.0, k, len(rows)


def approximate(
    corpus: Corpus,
    projection: str | None = None,
    *,
    normalised: bool = False,
    kind: str | None = None,
    probes: int = 16,
    queries: int = 32,
    k: int = 10,
) -> Index:
    """An index of the vectors of a store, for many queries, with its recall measured.

        index = corpus.approximate(kept, "sketch")
        index.recall  # of 10 nearest, for 32 samples of the store
        index.nearest(query, 10)

    The index proposes eight times as many samples as are asked for, exact inner products of the stored vectors choose:
    what it gives is right, what it misses `recall` tells.

    Args:
        corpus: the store.
        projection: the name of the vectors; the only ones by default.
        normalised: by the cosine. Inner products of vectors of unlike lengths are harder for an index.
        kind: as in `faiss.index_factory`; by default lists, as many as the root of the vectors, in eight bits a number.
        probes: how many of the lists are looked at for a query.
        queries: samples of the store that the recall is measured by.
        k: how many of their nearest.

    Cost: the vectors are read three times. Memory: a byte a number, 64 vectors for each list, and the ids. For a few
    queries `Corpus.nearest` is cheaper: that reads once.

    Raises:
        InputError: faiss is not there, an argument is not what it must be, or faiss refuses the kind.

    Source: Johnson, Douze, Jegou, "Billion-scale similarity search with GPUs" (arXiv 1702.08734); Douze et al., "The
    Faiss library" (arXiv 2401.08281).
    """
    faiss = _faiss()
    for name, value in (("probes", probes), ("queries", queries), ("k", k)):
        if type(value) is not int or value < 1:
            raise InputError(f"{name}: must be an integer, 1 or more, found {value!r}.")
    name = corpus.projection(projection)
    count = len(corpus)
    if not count:
        raise InputError("corpus: there is no sample in it.")
    lists = 2 ** round(math.log2(count) / 2)
    described = kind if kind is not None else "SQ8" if count < FEW else f"IVF{lists},SQ8"
    try:
        index = faiss.index_factory(corpus.projections[name], described, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            index.train(_sample(corpus, name, normalised, min(count, max(FEW, FOR_A_LIST * lists))))
    except RuntimeError as error:
        raise InputError(f"kind: faiss refuses {described!r}: {str(error).splitlines()[-1]}") from error
    if described.startswith("IVF"):
        faiss.extract_index_ivf(index).nprobe = probes
    made = Index(corpus, name, normalised, index)
    made._fill()
    made._measure(min(queries, count), min(k, max(1, count - 1)))
    return made


def _faiss() -> ModuleType:
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise InputError("approximate: needs faiss: pip install 'funcghost[faiss]'.") from error


def _sample(corpus: Corpus, name: str, normalised: bool, most: int) -> NDArray[Any]:
    """Vectors that are spread evenly over the store."""
    return np.concatenate(list(_chosen(corpus, name, normalised, _spread(len(corpus), most))))


def _chosen(corpus: Corpus, name: str, normalised: bool, rows: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
    at = 0
    for _, block in corpus.vectors(name):
        inside = rows[(rows >= at) & (rows < at + len(block))] - at
        yield _prepared(block[inside], normalised)
        at += len(block)


def _spread(count: int, most: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, count - 1, most).astype(np.int64))


def _prepared(block: NDArray[Any], normalised: bool) -> NDArray[Any]:
    own = torch.from_numpy(_floats(block))
    return (torch.nn.functional.normalize(own, dim=1, eps=1e-30) if normalised else own).numpy()


def _floats(block: NDArray[Any]) -> NDArray[Any]:
    return block.astype(np.float32, copy=False)
