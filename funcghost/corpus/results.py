"""What reducers give for a batch, as columns and vectors."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import optree
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from funcghost.corpus.feeding import Loaded, Stretch
from funcghost.errors import InputError
from funcghost.reducers.bases import Reducer
from funcghost.reducers.by_parameter import PerParamAdditive
from funcghost.reducers.projections import Project
from funcghost.reducers.quadratic import Cross, Gram
from funcghost.store.manifest import JSON, Column, Manifest, VectorColumn, is_plain
from funcghost.store.parts import Store
from funcghost.trees import Tree, named_leaves

DTYPES: dict[str, Any] = {"float16": np.float16, "float32": np.float32, "float64": np.float64}
ID, ONLY = "id", "value"
MOST_COLUMNS = 4096


def dtype_of(name: str) -> str:
    """A dtype for what is kept.

    Raises:
        InputError: there is no such.
    """
    if name not in DTYPES:
        raise InputError(f"dtype: must be one of {tuple(DTYPES)}, found {name!r}.")
    return name


@dataclass(frozen=True)
class Results:
    """The columns [b] and vectors [b, dim] of a batch of b = `size`, as they were computed."""

    size: int
    columns: dict[str, NDArray[Any]]
    vectors: dict[str, NDArray[Any]]

    def manifest(self, origin: dict[str, JSON], dtype: str, id_type: Any) -> Manifest:
        """That of a store for such results; it says what is rounded."""
        kind: Any = dtype
        both = {**self.columns, **self.vectors}
        rounded = {
            name: f"{value.dtype} to {dtype}"
            for name, value in both.items()
            if value.dtype.itemsize > np.dtype(dtype).itemsize
        }
        columns = (Column(ID, id_type), *(Column(name, kind) for name in self.columns))
        vectors = tuple(VectorColumn(name, value.shape[1], kind) for name, value in self.vectors.items())
        return Manifest("corpus", columns, vectors, {**origin, "rounded": rounded})


def results_of(reducers: Tree, reduced: Tree, batch: int) -> Results:
    """The results of a batch by column.

    Raises:
        InputError: a reducer gives something that is not of one sample.
    """
    columns: dict[str, NDArray[Any]] = {}
    vectors: dict[str, NDArray[Any]] = {}
    for name, reducer, result in _by_reducer(reducers, reduced):
        project = reducer.reducer if isinstance(reducer, PerParamAdditive) else reducer
        for path, leaf in zip(*named_leaves(result)[:2], strict=True):
            own = name if path == "<root>" else path if name == ONLY else f"{name}.{path}"
            if not isinstance(leaf, Tensor) or leaf.dim() not in (1, 2) or leaf.shape[0] != batch:
                raise InputError(
                    f"reducers[{name!r}]: must give a number or a vector for each sample, [b] or [b, k], found "
                    f"{tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__}."
                )
            value = as_numpy(leaf)
            if isinstance(project, Project):
                vectors[own] = value
            elif value.ndim == 1:
                columns[own] = value
            else:
                columns |= {f"{own}_{k}": value[:, k] for k in range(value.shape[1])}
    return checked(Results(batch, columns, vectors), "reducers")


def checked(results: Results, what: str) -> Results:
    """Results whose names a store can have.

    Raises:
        InputError: it cannot.
    """
    strange = [name for name in results.vectors if not is_plain(name)]
    if strange or ID in results.columns or len(results.columns) > MOST_COLUMNS:
        raise InputError(
            f"{what}: names of vectors must be plain words and no column may be called {ID!r}, found {strange}; "
            f"at most {MOST_COLUMNS} columns, found {len(results.columns)}."
        )
    return results


def _by_reducer(reducers: Tree, reduced: Tree) -> Iterator[tuple[str, Reducer, Tree]]:
    leaves, spec = optree.tree_flatten(reducers, is_leaf=lambda node: isinstance(node, Reducer))
    names = [".".join(map(str, path)) or ONLY for path in spec.paths()]
    for name, reducer, result in zip(names, leaves, spec.flatten_up_to(reduced), strict=True):
        mixed = isinstance(getattr(reducer, "reducer", reducer), Gram | Cross) or getattr(reducer, "by_position", False)
        if mixed:
            raise InputError(
                f"reducers[{name!r}]: {type(reducer).__name__} is about the samples of a batch or their positions, not "
                "about each sample: keep fg.dot, fg.squared_norm, fg.project, or fg.per_param of them."
            )
        yield name, reducer, result


def as_numpy(leaf: Tensor) -> NDArray[Any]:
    """On the host; bfloat16, which numpy has not, as float32."""
    found = leaf.detach().cpu()
    value: NDArray[Any] = (found.float() if found.dtype == torch.bfloat16 else found).numpy()
    return value


def id_type(ids: list[Any] | None) -> str:
    """The type of the column of ids.

    Raises:
        InputError: they are neither all integers nor all strings.
    """
    kinds = {int if isinstance(value, int | np.integer) else type(value) for value in ids or [0]}
    if kinds not in ({int}, {str}):
        raise InputError(f"ids: must all be integers or all strings, found {sorted(kind.__name__ for kind in kinds)}.")
    return "int64" if kinds == {int} else "string"


def gathered(
    store: Store, stretch: Stretch, rows: Iterable[tuple[Loaded, Results]]
) -> tuple[pa.Table, dict[str, NDArray[Any]]]:
    """The table and the vectors of a part, in the order of the data."""
    manifest = store.manifest
    ids: list[Any] = list(range(stretch.start, stretch.start + stretch.size))
    columns = {column.name: np.empty(stretch.size, column.type) for column in manifest.columns[1:]}
    vectors = {vector.name: np.empty((stretch.size, vector.dim), vector.type) for vector in manifest.vectors}
    for loaded, results in rows:
        if len(loaded.rows) != results.size:
            raise InputError(f"losses: must be of the {len(loaded.rows)} samples of a batch, found {results.size}.")
        with np.errstate(over="ignore"):
            for name, value in results.columns.items():
                columns[name][loaded.rows] = value
            for name, value in results.vectors.items():
                vectors[name][loaded.rows] = value
        for row, own in zip(loaded.rows, loaded.ids or [], strict=loaded.ids is not None):
            ids[row] = own
    table = pa.Table.from_pydict({ID: ids, **columns}, schema=store.schema)
    return table, vectors
