"""Values to be drawn: of a store, or of arrays."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from torch import Tensor

from funcghost.corpus.asking import open as open_corpus
from funcghost.errors import InputError
from funcghost.store.manifest import JSON, read_manifest
from funcghost.store.record import SAMPLE, STEP, open_record

MOST_GROUPS = 24

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Values:
    """Values by row, what they are of, their groups, and their steps where there are any."""

    column: str
    values: Floats
    items: NDArray[Any]
    groups: NDArray[Any] | None
    steps: NDArray[np.int64] | None
    origin: Mapping[str, JSON] = field(default_factory=dict)


Source = str | Path | Values | Tensor | NDArray[Any] | Sequence[float]
"""The folder of a record or of a corpus, or values [n]."""


def values_of(
    source: Source,
    *,
    column: str | None = None,
    by: str | None = None,
    group: str | None = None,
    steps: Any = None,
    groups: Any = None,
) -> Values:
    """The values of a store (`column`, `by` and `group` name columns of it), or those given, with what goes with them.

    Raises:
        InputError: there is no such column, or an array has another length.
        StoreError: the store is damaged.
    """
    if isinstance(source, Values):
        return source
    if isinstance(source, str | Path):
        return read(Path(source), column, by, group)
    values = array(source, 1, "values")
    beside = {"steps": steps, "groups": groups}
    for name, own in beside.items():
        if own is not None and len(own) != len(values):
            raise InputError(f"{name}: must be one for each of the {len(values)} values, found {len(own)}.")
    return Values(
        column or "value",
        values,
        np.arange(len(values)),
        None if groups is None else np.asarray([str(name) for name in groups], dtype=object),
        None if steps is None else array(steps, 1, "steps").astype(np.int64),
    )


def array(given: Any, axes: int, what: str) -> Floats:
    """Numbers in float64 from a tensor, an array or a sequence.

    Raises:
        InputError: they are no numbers, or have another number of axes.
    """
    held = given.detach().cpu().double().numpy() if isinstance(given, Tensor) else given
    try:
        found: Floats = np.asarray(held, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what}: must be numbers with {axes} axes, found {type(given).__name__}.") from error
    if found.ndim != axes:
        raise InputError(f"{what}: must have {axes} axes, found {list(found.shape)}.")
    return found


def read(path: Path, column: str | None, by: str | None, group: str | None) -> Values:
    """The values of a record of a run or of a corpus."""
    if read_manifest(path).kind == "record":
        record = open_record(path)
        schema, names, tables, step, origin = (
            *(record.store.schema, record.values, record.tables(), STEP, record.origin),
        )
        item = by or SAMPLE
    else:
        corpus = open_corpus(path, partial=True)
        schema, names, step, origin = corpus.store.schema, corpus.columns, None, corpus.origin
        tables, item = (found for _, found in corpus.tables()), by or "id"
    chosen = column if column is not None else next(iter(reversed(names)), "")
    for name, known in ((chosen, names), (item, schema.names), (group or item, schema.names)):
        if name not in known:
            raise InputError(f"column: must be one of {known}, found {name!r}.")
    wanted = list(dict.fromkeys([chosen, item, *filter(None, [group, step])]))
    whole = pa.concat_tables([schema.empty_table().select(wanted), *(found.select(wanted) for found in tables)])
    return Values(
        chosen,
        whole[chosen].to_numpy().astype(np.float64),
        whole[item].to_numpy(),
        None if group is None else np.asarray(pc.cast(whole[group], pa.string()).to_numpy(), dtype=object),
        None if step is None else whole[step].to_numpy(),
        origin,
    )


def averages(place: NDArray[np.int64], values: Floats) -> Floats:
    """The mean of the finite values at each place, nan where there are none."""
    finite = np.isfinite(values)
    size = int(place.max()) + 1
    counts = np.bincount(place[finite], minlength=size)
    sums = np.bincount(place[finite], values[finite], minlength=size)
    means: Floats = np.divide(sums, counts, out=np.full(size, np.nan), where=counts > 0)
    return means


def less_their_steps(found: Values) -> Floats:
    """Each value less the mean of its step: a step that moves the model much, moves it for all its samples."""
    if found.steps is None:
        return found.values
    _, batch = np.unique(found.steps, return_inverse=True)
    own: Floats = found.values - averages(batch, found.values)[batch]
    return own


def largest_groups(found: Values) -> list[str]:
    """The names of the largest groups; one that stands for all where there are none."""
    if found.groups is None:
        return ["all"]
    names, counts = np.unique(found.groups, return_counts=True)
    return sorted(names[np.argsort(-counts, kind="stable")[:MOST_GROUPS]].tolist())


def rows_of(found: Values, name: str) -> NDArray[np.bool_]:
    """Which rows are finite and of a group."""
    finite: NDArray[np.bool_] = np.isfinite(found.values)
    return finite if found.groups is None else finite & (found.groups == name)
