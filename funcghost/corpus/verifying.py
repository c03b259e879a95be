"""A store held to its checksums, and some of it to numbers computed anew."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from funcghost.corpus.asking import Corpus
from funcghost.corpus.asking import open as open_corpus
from funcghost.corpus.describing import of_tree
from funcghost.corpus.feeding import Cutting, Loaded, Samples, source_of
from funcghost.corpus.results import Results, results_of
from funcghost.errors import InputError, StoreError
from funcghost.options import Options
from funcghost.problem import Losses
from funcghost.store.manifest import refuse_other
from funcghost.transforms.steps import Transform
from funcghost.trees import Tree

OTHER = "these are other data, or in another order. Name another folder, or remove this one."
TOLERANCE = {"float16": 4e-3, "float32": 1e-3, "float64": 1e-3}


@dataclass(frozen=True)
class Verified:
    """How much was read and computed anew, and by how much that was off at most, relative to the column's size."""

    parts: int
    samples: int
    complete: bool
    recomputed: int
    worst: float


def verify(
    path: str | Path,
    losses: Losses | None = None,
    params: Tree = None,
    data: Any = None,
    reducers: Tree = None,
    *,
    count: int = 4,
    collate: Callable[..., Tree] | None = None,
    length: Callable[[Any], int] | None = None,
    has_aux: bool = False,
    options: Options | None = None,
) -> Verified:
    """Reads every part of a store; with the losses, `count` samples are scored anew, each by itself.

    The samples are spread evenly. Computed anew they differ by rounding, as the order of sums depends on the batch:
    at most by 1e-3 of the root mean square of the column (4e-3 in float16).

    Raises:
        StoreError: a part is damaged, of another store, missing in the middle, or a number is another one.
        InputError: parameters are not those of the store, or the data have no positions.
    """
    found = open_corpus(path, partial=True)
    parts, gaps = found.store.parts(), found.store.missing()
    for _, _table in found.tables():
        pass
    for name in found.projections:
        for _ in found.vectors(name):
            pass
    end = found.store.end()
    if inner := [gap for gap in gaps if end is None or gap[1] != end]:
        raise StoreError(f"{path}: the samples from {inner[0][0]} to {inner[0][1]} are missing. Score again to go on.")
    recomputed, worst = 0, 0.0
    if losses is not None and len(found):
        refuse_other(Path(path), found.origin.get("params", {}).get("digest"), of_tree(params))
        cutting = Cutting(1, 1, collate, None, length)
        source = source_of(data, cutting)
        if not isinstance(source, Samples):
            raise InputError("data: must be a data set with positions, of which samples can be taken.")
        transform, kept = Transform(losses, None, has_aux, options, None), Kept(found)
        for position in sorted({int(p) for p in np.linspace(0, len(found) - 1, max(1, count))}):
            (loaded,) = cutting.batches(_at(source, position), 1)
            step = transform.step(params, loaded.batch, reducers)
            fresh = results_of(reducers, step.reduced, 1)
            worst = max(worst, kept.off(position, fresh, 0))
            recomputed += 1
            if not worst <= kept.tolerance:
                raise StoreError(
                    f"{path}: the sample at {position} has other values than are kept, by {worst:.1e} of their size: "
                    "the losses, the data or the numbers have changed."
                )
    return Verified(len(parts), len(found), found.complete, recomputed, worst)


def _at(source: Samples, position: int) -> Callable[[range], Any]:
    return lambda rows: source.take([position])


class Kept:
    """What a store holds, to be compared with numbers that are computed anew."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self.columns = {name: corpus.column(name) for name in corpus.columns}
        manifest = corpus.store.manifest
        self.tolerance = TOLERANCE[manifest.columns[-1].type if self.columns else manifest.vectors[0].type]

    def off(self, position: int, fresh: Results, row: int) -> float:
        """By how much a row of fresh results is off what is kept of a sample, relative to the size of its column."""
        parts = [
            _off(value[row], self.columns[name][position], self.columns[name]) for name, value in fresh.columns.items()
        ]
        for name, value in fresh.vectors.items():
            kept = self.corpus.vector(position, name)
            parts.append(_off(value[row], kept, kept))
        return max(parts, default=0.0)


def _off(fresh: Any, kept: Any, like: NDArray[Any]) -> float:
    """Relative to the root mean square of the finite values `like`; infinite where only one of two is finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        rounded = np.asarray(fresh).astype(like.dtype)  # what is too large for it is infinite on both sides
        one, other, values = (np.asarray(value, np.float64) for value in (rounded, kept, like))
        apart = np.where((one == other) | (np.isnan(one) & np.isnan(other)), 0.0, np.abs(one - other))
    apart = np.where(np.isnan(apart), np.inf, apart)
    finite = values[np.isfinite(values)]
    size = float(np.sqrt(np.mean(np.square(finite)))) if len(finite) else 0.0
    difference = float(np.max(apart, initial=0.0))
    return difference / size if size else difference


def check_first(found: Corpus, loaded: Loaded, results: Results) -> None:
    """The batch that is computed anew of a finished part gives what is kept of it.

    Raises:
        StoreError: it does not.
    """
    kept = Kept(found)
    ids = kept.corpus.ids()[loaded.rows].tolist()
    if loaded.ids is not None and ids != list(loaded.ids):
        raise StoreError(
            f"{found.store.folder}: the first samples are {ids[:3]} there and {loaded.ids[:3]} here: {OTHER}"
        )
    worst = max(kept.off(int(row), results, place) for place, row in enumerate(loaded.rows))
    if not worst <= kept.tolerance:
        off = f"have other values there than here, by {worst:.1e} of their size"
        raise StoreError(f"{found.store.folder}: the first samples {off}: {OTHER}")
