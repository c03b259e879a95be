"""The report of a store of values, of a run or of a corpus."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from funcghost.corpus.asking import open as open_corpus
from funcghost.errors import InputError
from funcghost.plots.drawings import MOST_GROUPS, by_group_over_time, distributions
from funcghost.plots.page import image, passages, table, write_page
from funcghost.store.manifest import JSON, read_manifest
from funcghost.store.record import SAMPLE, STEP, open_record

SHOWN = 10
BINS = 20
LONGEST = 4000
"""Characters of a text that are shown."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Reported:
    """What a report is of: a column, its rows, and the items that these are about."""

    column: str
    rows: int
    items: int


@dataclass(frozen=True)
class Values:
    """Values by row, what they are of, their groups, and their steps where there are any."""

    column: str
    values: Floats
    items: NDArray[Any]
    groups: NDArray[Any] | None
    steps: NDArray[np.int64] | None
    origin: Mapping[str, JSON]


def report(
    path: str | Path,
    out: str | Path,
    *,
    column: str | None = None,
    by: str | None = None,
    group: str | None = None,
    texts: Mapping[Any, str] | None = None,
    title: str | None = None,
) -> Reported:
    """Writes the report of a store as one HTML file: distributions, groups over time, the best and the worst.

    The value of an item is the mean of its rows; in a record of a run each less the mean of its step, as a step that
    moves the model much, moves it for all its samples.

    Args:
        path: the folder of a record (`store.record`) or of a corpus (`corpus.score`).
        out: the file.
        column: which values; the last column of values by default.
        by: the column that says what a row is of, such as a document; the sample by default.
        group: a column of groups to tell apart.
        texts: texts by item, or by the item as a string.
        title: what stands on top.

    Raises:
        InputError: there is no such column, or no rows.
        StoreError: the store is damaged, or the file cannot be written.
    """
    found = _values(Path(path), column, by, group)
    if not len(found.values):
        raise InputError(f"{path}: there are no rows yet, nothing to report.")
    items, place = np.unique(found.items, return_inverse=True)
    counts = np.bincount(place)
    own = found.values if found.steps is None else found.values - _means(found.steps, found.values)
    means = _averages(place, own)
    sections = [("", table(_facts(found, len(items))))]
    name = f"mean {found.column} of {by or 'a sample'}" + ("" if found.steps is None else ", less its step's mean")
    sections.append(("Distribution", image(distributions(_by_group(found, place, means), name), "distribution")))
    if found.steps is not None:
        sections.append(("Over time", _over_time(found)))
    if found.groups is not None:
        sections.append(("By group", table(_by_rows(found, own), ("group", "rows", "mean", "median", "5 %", "95 %"))))
    known = np.flatnonzero(~np.isnan(means))
    order = known[np.argsort(means[known], kind="stable")]
    for head, chosen in (("Largest values", order[::-1]), ("Smallest values", order)):
        shown = [_passage(items[at], means[at], counts[at], texts) for at in chosen[:SHOWN]]
        sections.append((head, passages(shown)))
    sections.append(("What the numbers follow from", table(_flat(found.origin))))
    write_page(Path(out), title or f"Values in {Path(path).name}", sections)
    return Reported(found.column, len(found.values), len(items))


def _values(path: Path, column: str | None, by: str | None, group: str | None) -> Values:
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


def _means(steps: NDArray[np.int64], values: Floats) -> Floats:
    """For every row the mean over the finite rows of its step."""
    _, batch = np.unique(steps, return_inverse=True)
    means: Floats = _averages(batch, values)[batch]
    return means


def _averages(place: NDArray[np.int64], values: Floats) -> Floats:
    """The mean of the finite values at each place, nan where there are none."""
    finite = np.isfinite(values)
    size = int(place.max()) + 1
    counts = np.bincount(place[finite], minlength=size)
    sums = np.bincount(place[finite], values[finite], minlength=size)
    means: Floats = np.divide(sums, counts, out=np.full(size, np.nan), where=counts > 0)
    return means


def _groups(found: Values) -> list[str]:
    """The names of the largest groups."""
    assert found.groups is not None
    names, counts = np.unique(found.groups, return_counts=True)
    return sorted(names[np.argsort(-counts, kind="stable")[:MOST_GROUPS]].tolist())


def _by_group(found: Values, place: NDArray[np.int64], means: Floats) -> dict[str, Floats]:
    if found.groups is None:
        return {"all": means}
    of_item = np.empty(len(means), dtype=object)
    of_item[place] = found.groups
    return {name: means[of_item == name] for name in _groups(found)}


def _over_time(found: Values) -> str:
    assert found.steps is not None
    finite = np.isfinite(found.values)
    last = int(found.steps.max()) + 1
    bins = min(BINS, last)
    names = ["all"] if found.groups is None else _groups(found)
    cells = np.full((len(names), bins), np.nan)
    for row, name in enumerate(names):
        inside = finite if found.groups is None else finite & (found.groups == name)
        if inside.any():
            averages = _averages(found.steps[inside] * bins // last, found.values[inside])
            cells[row, : len(averages)] = averages
    drawn = by_group_over_time(np.linspace(0, last, bins + 1), names, cells, f"mean {found.column}")
    return image(drawn, "values over time")


def _by_rows(found: Values, own: Floats) -> list[tuple[str, ...]]:
    rows = []
    for name in _groups(found):
        inside = own[(found.groups == name) & np.isfinite(own)]
        if not len(inside):
            continue
        low, middle, high = np.quantile(inside, [0.05, 0.5, 0.95])
        numbers = (f"{value:.3e}" for value in (inside.mean(), middle, low, high))
        rows.append((name, str(len(inside)), *numbers))
    return rows


def _passage(item: Any, mean: float, count: int, texts: Mapping[Any, str] | None) -> tuple[str, str, str, str | None]:
    own = item.item() if hasattr(item, "item") else item
    text = None if texts is None else texts.get(own, texts.get(str(own)))
    note = f"{mean:.3e}" + (f" in {count} rows" if count > 1 else "")
    return str(own), "", note, None if text is None else text[:LONGEST]


def _facts(found: Values, items: int) -> list[tuple[str, str]]:
    finite = found.values[np.isfinite(found.values)]
    return [
        ("column", found.column),
        ("rows", str(len(found.values))),
        ("items", str(items)),
        ("mean", f"{finite.mean():.3e}" if len(finite) else "none"),
        ("not finite", str(len(found.values) - len(finite))),
    ]


def _flat(origin: Mapping[str, JSON], where: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in origin.items():
        inside = f"{where}.{name}" if where else name
        rows += _flat(value, inside) if isinstance(value, dict) and value else [(inside, str(value)[:200])]
    return rows
