"""The report of a store of values, of a run or of a corpus."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from funcghost.errors import InputError
from funcghost.plots.cards import contact_sheet
from funcghost.plots.drawings import by_group, by_group_over_time, distributions, over_steps
from funcghost.plots.page import image, passages, table, write_page
from funcghost.plots.reading import Floats, Values, averages, largest_groups, less_their_steps, read, rows_of
from funcghost.store.manifest import JSON

SHOWN = 10
LISTED = 200
"""Rows of the table of items: half of them the largest, half the smallest."""

BINS = 20
UNGROUPED = "no group"
LONGEST = 4000
"""Characters of a text that are shown."""


@dataclass(frozen=True)
class Reported:
    """What a report is of: a column, its rows, and the items that these are about."""

    column: str
    rows: int
    items: int


@dataclass(frozen=True)
class Items:
    """What the rows are about: names, their mean values, how many rows each has, and the place of each row's."""

    names: Any
    means: Floats
    counts: Any
    place: Any

    @property
    def order(self) -> Any:
        """Those with a value, the smallest first."""
        known = np.flatnonzero(~np.isnan(self.means))
        return known[np.argsort(self.means[known], kind="stable")]


def report(
    path: str | Path,
    out: str | Path,
    *,
    column: str | None = None,
    by: str | None = None,
    group: str | None = None,
    groups: Mapping[Any, str] | None = None,
    texts: Mapping[Any, str] | None = None,
    images: Any = None,
    figures: Mapping[str, Figure] | None = None,
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
        groups: in its place the group of each item, as with texts; those that have none are one.
        texts: texts by item, or by the item as a string.
        images: as in `plots.contact_sheet`, where the items are positions in them.
        figures: more figures, by their headings, such as `plots.account(...)`.
        title: what stands on top.

    Raises:
        InputError: there is no such column, or no rows; or groups are given twice.
        StoreError: the store is damaged, or the file cannot be written.
    """
    if group is not None and groups is not None:
        raise InputError("groups: must come from a column or by item, found both.")
    found = read(Path(path), column, by, group)
    if not len(found.values):
        raise InputError(f"{path}: there are no rows yet, nothing to report.")
    own = less_their_steps(found)
    names, place = np.unique(found.items, return_inverse=True)
    if groups is not None:
        named = np.array([str(_of_item(item, groups) or UNGROUPED) for item in names], dtype=object)
        found = replace(found, groups=named[place])
    items = Items(names, averages(place, own), np.bincount(place), place)
    sections = [("", table(_facts(found, len(names))))]
    label = f"mean {found.column} of {by or 'a sample'}" + ("" if found.steps is None else ", less its step's mean")
    shares = distributions(_by_group(found, items), label)
    sections.append(("Distribution", image(shares, "distribution")))
    if found.steps is not None:
        sections.append(("Over steps", image(over_steps(found), "values over steps")))
    if found.groups is not None:
        heads = ("group", "rows", "mean", "median", "5 %", "95 %")
        compared = image(by_group(found), "values by group") + table(_by_rows(found, own), heads)
        over_time = "" if found.steps is None else image(_over_time(found), "groups over steps")
        sections.append(("By group", compared + over_time))
    sections += [(head, image(drawn, head)) for head, drawn in (figures or {}).items()]
    for head, smallest in (("Largest values", False), ("Smallest values", True)):
        chosen = items.order if smallest else items.order[::-1]
        shown = [_passage(names[at], items.means[at], items.counts[at], texts) for at in chosen[:SHOWN]]
        sheet = ""
        if images is not None:
            sheet = image(contact_sheet(images, found, smallest=smallest), head, photographs=True)
        sections.append((head, sheet + passages(shown)))
    sections.append(("Items", _listed(items)))
    sections.append(("What the numbers follow from", table(_flat(found.origin))))
    write_page(Path(out), title or f"Values in {Path(path).name}", sections)
    return Reported(found.column, len(found.values), len(names))


def _by_group(found: Values, items: Items) -> dict[str, Floats]:
    if found.groups is None:
        return {"all": items.means}
    of_item = np.empty(len(items.means), dtype=object)
    of_item[items.place] = found.groups
    return {name: items.means[of_item == name] for name in largest_groups(found)}


def _over_time(found: Values) -> Figure:
    assert found.steps is not None
    last = int(found.steps.max()) + 1
    bins = min(BINS, last)
    names = largest_groups(found)
    cells = np.full((len(names), bins), np.nan)
    for row, name in enumerate(names):
        inside = rows_of(found, name)
        if inside.any():
            means = averages(found.steps[inside] * bins // last, found.values[inside])
            cells[row, : len(means)] = means
    return by_group_over_time(np.linspace(0, last, bins + 1), names, cells, f"mean {found.column}")


def _by_rows(found: Values, own: Floats) -> list[tuple[str, ...]]:
    rows = []
    for name in largest_groups(found):
        inside = own[rows_of(found, name)]
        if not len(inside):
            continue
        low, middle, high = np.quantile(inside, [0.05, 0.5, 0.95])
        numbers = (f"{value:.3e}" for value in (inside.mean(), middle, low, high))
        rows.append((name, str(len(inside)), *numbers))
    return rows


def _listed(items: Items) -> str:
    """A table of the items of the largest and of the smallest values."""
    order = items.order[::-1]
    chosen = order if len(order) <= LISTED else np.concatenate([order[: LISTED // 2], order[-LISTED // 2 :]])
    rows = [(str(items.names[at]), f"{items.means[at]:.4e}", str(items.counts[at])) for at in chosen]
    left = len(order) - len(chosen)
    note = f'<p class="note">{left} between them are left out.</p>' if left else ""
    return table(rows, ("item", "mean value", "rows")) + note


def _passage(item: Any, mean: float, count: int, texts: Mapping[Any, str] | None) -> tuple[str, str, str, str | None]:
    text = None if texts is None else _of_item(item, texts)
    note = f"{mean:.3e}" + (f" in {count} rows" if count > 1 else "")
    return str(item), "", note, None if text is None else text[:LONGEST]


def _of_item(item: Any, known: Mapping[Any, str]) -> str | None:
    """What is known by an item, or by the item as a string."""
    own = item.item() if hasattr(item, "item") else item
    return known.get(own, known.get(str(own)))


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
