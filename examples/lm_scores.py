"""The values of a run, as `funcghost.store` records them, and what they add up to."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from funcghost import store
from lm_corpus import DOMAINS, Document, Integers

CORRUPTED = "corrupted"
GROUPS = (*DOMAINS, CORRUPTED)

Floats = NDArray[np.float64]


def record_scores(folder: Path, origin: dict[str, Any], step: int) -> store.Recorder:
    """The record of a run, to be written from this step on."""
    extras: Any = {"document": "string", "domain": "string"}
    return store.record(folder, ["value"], extras, origin=origin, resume=step)


@dataclass(frozen=True)
class Tally:
    """What the scores add up to.

    `values` [documents] are means over a document's windows of the value less the mean value of the window's batch (a
    batch that moves the model much, moves it for all its windows); nan for a document never drawn. `by_group` [groups,
    bins] is the mean value, as it is, of the windows of a group of documents in a stretch of steps: `GROUPS` are the
    domains without their corrupted documents, and the corrupted ones.
    """

    drawn: Integers
    values: Floats
    bin_edges: Floats
    by_group: Floats


def tally(folder: Path, documents: Sequence[Document], steps: int, bins: int = 20) -> Tally:
    """Adds up the scores in a folder, a part at a time."""
    index = {document.name: number for number, document in enumerate(documents)}
    group = np.array([GROUPS.index(CORRUPTED if d.corruption else d.domain) for d in documents])
    sums = np.zeros((2, len(documents)))
    cells = np.zeros((2, len(GROUPS), min(bins, steps)))
    for table in store.open_record(folder).tables():
        step, values = (table[name].to_numpy() for name in ("step", "value"))
        rows = np.array([index[name] for name in table["document"].to_pylist()])
        np.add.at(sums.T, rows, np.stack([np.ones(len(rows)), values - _batch_means(step, values)]).T)
        cell = group[rows], step * cells.shape[2] // steps
        np.add.at(cells[0], cell, 1.0)
        np.add.at(cells[1], cell, values)
    with np.errstate(invalid="ignore"):
        means, by_group = sums[1] / sums[0], cells[1] / cells[0]
    edges = np.linspace(0, steps, cells.shape[2] + 1)
    return Tally(sums[0].astype(np.int64), means, edges, by_group)


def _batch_means(step: Integers, values: Floats) -> Floats:
    """For every row the mean over the rows of its step."""
    _, batch = np.unique(step, return_inverse=True)
    means: Floats = (np.bincount(batch, values) / np.bincount(batch))[batch]
    return means


def auroc(scores: Floats, positive: NDArray[np.bool_]) -> float:
    """How likely a positive has a higher score than a negative; nan unless there are both."""
    ranks = np.argsort(np.argsort(scores)) + 1.0
    count = int(positive.sum())
    pairs = count * (len(scores) - count)
    return float((ranks[positive].sum() - count * (count + 1) / 2) / pairs) if pairs else float("nan")
