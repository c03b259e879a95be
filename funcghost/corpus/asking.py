"""A store of a corpus, to be asked: columns, the best samples, the nearest in gradient space."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from funcghost.errors import InputError, StoreError
from funcghost.store.manifest import JSON
from funcghost.store.parts import Part, Store, open_store

Read = TypeVar("Read")

BLOCK = 1 << 24
"""Bytes of vectors that are multiplied at a time."""


class Hits(NamedTuple):
    """Samples, best first: their ids, positions in the data, and values, [k] each or [m, k] for m queries."""

    ids: NDArray[Any]
    positions: NDArray[np.int64]
    values: NDArray[Any]


class Corpus:
    """What `corpus.score` has kept."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __len__(self) -> int:
        return sum(part.stop - part.start for part in self.store.parts())

    @property
    def complete(self) -> bool:
        """Whether every sample of the data is there."""
        return self.store.end() is not None and not self.store.missing()

    @property
    def origin(self) -> dict[str, JSON]:
        """What the numbers follow from."""
        return dict(self.store.manifest.origin)

    @property
    def columns(self) -> list[str]:
        """The names of the columns of values."""
        return [column.name for column in self.store.manifest.columns[1:]]

    @property
    def projections(self) -> dict[str, int]:
        """The names of the columns of vectors, with their lengths."""
        return {vector.name: vector.dim for vector in self.store.manifest.vectors}

    def table(self) -> pa.Table:
        """Ids and values as an Arrow table, in the order of the data."""
        return pa.concat_tables([self.store.schema.empty_table(), *(table for _, table in self.tables())])

    def tables(self) -> Iterator[tuple[int, pa.Table]]:
        """The table a part at a time, each with the position of its first row."""
        for part in self.store.parts():
            table = self.store.read(part)
            if len(table) != part.stop - part.start:
                raise StoreError(f"{self.store.folder}: the part from {part.start} has {len(table)} rows. Remove it.")
            yield part.start, table

    def ids(self) -> NDArray[Any]:
        """The ids [n], integers or strings."""
        return _column(self.table(), "id")

    def column(self, name: str) -> NDArray[Any]:
        """A column of values [n].

        Raises:
            InputError: there is none of this name.
        """
        self._known(name, self.columns, "column")
        return _column(self.table(), name)

    def tensor(self, name: str) -> Tensor:
        """A column of values [n] as a tensor."""
        return torch.from_numpy(self.column(name).copy())

    def vectors(self, name: str | None = None) -> Iterator[tuple[int, NDArray[Any]]]:
        """Vectors [b, dim] a part at a time, with the position of the first: memory-mapped, without a copy.

        `torch.from_numpy` takes them as they are. Each part is held to its checksum when it first comes.

        Raises:
            InputError: there are none of this name, or several and no name.
        """
        name = self.projection(name)
        for part in self.store.parts():
            yield part.start, self.store.vectors(part, name)

    def vector(self, position: int, name: str | None = None) -> NDArray[Any]:
        """The vector [dim] of a sample.

        Raises:
            InputError: there is no such sample.
        """
        name = self.projection(name)
        for part in self.store.parts():
            if part.start <= position < part.stop:
                found: NDArray[Any] = self.store.vectors(part, name)[position - part.start].copy()
                return found
        raise InputError(f"position: must be that of a sample that was scored, found {position}.")

    def position(self, own: int | str) -> int:
        """The position of the first sample with an id.

        Raises:
            InputError: none has it.
        """
        for start, table in self.tables():
            found = np.flatnonzero(_column(table, "id") == own)
            if len(found):
                return start + int(found[0])
        raise InputError(f"id: no sample has the id {own!r}.")

    def top(self, k: int, column: str | None = None, *, largest: bool = True) -> Hits:
        """The k samples with the largest values in a column, or the smallest; of equal ones the first.

        NaN is never among them. Memory: k and one part.

        Raises:
            InputError: there is no such column, or several and no name; or k is not 1 or more.
        """
        name = self._only(column, self.columns, "column")
        best = Best(1, whole(k), self.store.schema.field("id").type)
        for start, table in self.tables():
            values = _column(table, name)
            best.take(start, (values if largest else -values)[None, :], _column(table, "id"))
        hits = of_query(best.hits())
        return hits if largest else hits._replace(values=-hits.values)

    def nearest(self, query: Any, k: int, *, normalised: bool = False, projection: str | None = None) -> Hits:
        """The k samples whose vectors have the largest inner products with a query [dim], or with each of [m, dim].

        Exact: every vector is looked at, block by block, once. With `normalised` by the cosine, in which a vector that
        is zero has none. Of equal ones the first. Products are in float32, or float64 for such vectors.

        Cost: reading the vectors, the first time against their checksums, and 2 n dim m FLOPs. Memory: m k and one
        block.

        Raises:
            InputError: the query is not of the length of the vectors, not finite, or k not 1 or more.
        """
        name = self.projection(projection)
        dim = self.projections[name]
        wide = np.float64 if self._type(name) == "float64" else np.float32
        queries, single = queries_of(query, dim, wide, normalised)
        best = Best(len(queries), whole(k), self.store.schema.field("id").type)
        step = max(1, BLOCK // (dim * np.dtype(wide).itemsize), 1)
        for part, (table, vectors) in _ahead(self.store.parts(), lambda part: self.store.read_with(part, name)):
            ids = _column(table, "id")
            for at in range(0, len(vectors), step):
                block = torch.from_numpy(vectors[at : at + step].astype(wide, copy=False))
                values = queries @ block.T
                if normalised:
                    values = values / torch.linalg.vector_norm(block, dim=1)
                best.take(part.start + at, values.numpy(), ids[at : at + step])
        return of_query(best.hits()) if single else best.hits()

    def _type(self, name: str) -> str:
        return next(vector.type for vector in self.store.manifest.vectors if vector.name == name)

    def projection(self, name: str | None = None) -> str:
        """The name of a column of vectors: this one, or the only one there is.

        Raises:
            InputError: there is none of this name, or several and no name.
        """
        return self._only(name, list(self.projections), "projection")

    def _only(self, name: str | None, known: list[str], what: str) -> str:
        if name is None and len(known) == 1:
            return known[0]
        self._known(name, known, what)
        assert name is not None
        return name

    def _known(self, name: str | None, known: list[str], what: str) -> None:
        if name not in known:
            raise InputError(f"{what}: must be one of {known}, found {name!r}.")


def queries_of(query: Any, dim: int, dtype: Any, normalised: bool) -> tuple[Tensor, bool]:
    """The queries [m, dim], of length one if `normalised`, and whether there was one without its axis.

    Raises:
        InputError: it is not of the length of the vectors, or not finite.
    """
    asked = np.asarray(query.detach().cpu().double() if isinstance(query, Tensor) else query)
    right = asked.ndim in (1, 2) and asked.shape[-1] == dim and asked.dtype.kind in "biuf"
    with np.errstate(over="ignore"):
        own = np.atleast_2d(asked).astype(dtype, copy=True) if right else asked
    if not right or not np.isfinite(own).all():
        raise InputError(
            f"query: must be [{dim}] or [m, {dim}] of finite numbers, found {asked.dtype} of the shape {asked.shape}."
        )
    queries = torch.from_numpy(own)
    if normalised:
        queries = torch.nn.functional.normalize(queries, dim=1, eps=1e-300 if dtype is np.float64 else 1e-30)
    return queries, asked.ndim == 1


def of_query(hits: Hits) -> Hits:
    """Those of the first query."""
    return Hits(hits.ids[0], hits.positions[0], hits.values[0])


def _ahead(parts: Iterable[Part], read: Callable[[Part], Read]) -> Iterator[tuple[Part, Read]]:
    """What is read of each part, while the next one is read and held to its checksum."""
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[tuple[Part, Future[Read]]] = deque()
        for part in parts:
            waiting.append((part, pool.submit(read, part)))
            if len(waiting) > 1:
                first, coming = waiting.popleft()
                yield first, coming.result()
        for first, coming in waiting:
            yield first, coming.result()


class Best:
    """The k largest values seen so far for each of m queries, with ids and positions."""

    def __init__(self, queries: int, k: int, kind: pa.DataType) -> None:
        self.k = k
        self.values: list[NDArray[Any]] = [np.empty(0)] * queries
        self.positions: list[NDArray[np.int64]] = [np.empty(0, np.int64)] * queries
        self.ids: list[NDArray[Any]] = [np.empty(0, np.int64 if pa.types.is_integer(kind) else object)] * queries

    def take(self, start: int, values: NDArray[Any], ids: NDArray[Any]) -> None:
        """Values [m, b] of the samples from a position on."""
        for query, row in enumerate(values):
            known = self.values[query]
            floor = known[-1] if len(known) == self.k else -np.inf
            places = np.flatnonzero(row > floor if len(known) == self.k else ~np.isnan(row))
            if len(places) > self.k:
                least = np.partition(row[places], -self.k)[-self.k]
                places = places[row[places] >= least]
            if not len(places):
                continue
            merged = np.concatenate([known.astype(row.dtype), row[places]])
            order = np.argsort(-merged, kind="stable")[: self.k]
            self.values[query] = merged[order]
            self.positions[query] = np.concatenate([self.positions[query], start + places])[order]
            self.ids[query] = np.concatenate([self.ids[query], ids[places]])[order]

    def hits(self) -> Hits:
        """[m, k'] each, best first."""
        least = min(map(len, self.values))
        values, positions, ids = (
            np.stack([row[:least] for row in each]) for each in (self.values, self.positions, self.ids)
        )
        return Hits(ids, positions, values)


def open(path: str | Path, *, partial: bool = False) -> Corpus:
    """The store of a corpus, to be asked.

    Args:
        path: its folder.
        partial: whether it may lack samples; what is asked is then about those that are there.

    Raises:
        StoreError: there is none, it is damaged, or lacks samples.
    """
    found = Corpus(open_store(path, "corpus"))
    if not partial and not found.complete:
        raise StoreError(
            f"{path}: {len(found)} samples are there, and not all. Score again to go on, or pass partial=True."
        )
    return found


def whole(k: int) -> int:
    """A number of samples.

    Raises:
        InputError: it is none.
    """
    if type(k) is not int or k < 1:
        raise InputError(f"k: must be a number of samples, 1 or more, found {k!r}.")
    return k


def _column(table: pa.Table, name: str) -> NDArray[Any]:
    found: NDArray[Any] = table[name].to_numpy()
    return found
