"""A store held to its checksums, and some of it to numbers computed anew."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from funcghost.corpus.asking import open as open_corpus
from funcghost.corpus.describing import of_tree
from funcghost.corpus.feeding import Cutting, Samples, source_of
from funcghost.corpus.results import results_of
from funcghost.errors import InputError, StoreError
from funcghost.options import Options
from funcghost.problem import Losses
from funcghost.store.manifest import refuse_other
from funcghost.transforms.steps import Transform
from funcghost.trees import Tree

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
        transform = Transform(losses, None, has_aux, options, None)
        sizes = {
            name: float(np.sqrt(np.mean(np.square(found.column(name).astype(np.float64))))) for name in found.columns
        }
        for position in sorted({int(p) for p in np.linspace(0, len(found) - 1, max(1, count))}):
            (loaded,) = cutting.batches(_at(source, position), 1)
            step = transform.step(params, loaded.batch, reducers)
            fresh = results_of(reducers, step.reduced, 1)
            for name, value in fresh.columns.items():
                worst = max(worst, _off(value[0], found.column(name)[position], sizes[name]))
            for name, value in fresh.vectors.items():
                kept = found.vector(position, name)
                worst = max(worst, _off(value[0], kept, float(np.sqrt(np.mean(np.square(kept.astype(np.float64)))))))
            recomputed += 1
            kind = found.store.manifest.columns[-1].type if found.columns else found.store.manifest.vectors[0].type
            if not worst <= TOLERANCE[kind]:
                raise StoreError(
                    f"{path}: the sample at {position} has other values than are kept, by {worst:.1e} of their size: "
                    "the losses, the data or the numbers have changed."
                )
    return Verified(len(parts), len(found), found.complete, recomputed, worst)


def _at(source: Samples, position: int) -> Callable[[range], Any]:
    return lambda rows: source.take([position])


def _off(fresh: Any, kept: Any, size: float) -> float:
    difference = float(np.max(np.abs(np.asarray(fresh, np.float64) - np.asarray(kept, np.float64)), initial=0.0))
    return difference / size if size else difference
