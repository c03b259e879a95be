"""The scores of a run on disk, as parts that are each written whole, and what they add up to."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lm_corpus import DOMAINS, Document, Integers

SCHEMA = pa.schema(
    {
        "step": pa.int32(),
        "sample_id": pa.int64(),
        "document": pa.string(),
        "domain": pa.string(),
        "first": pa.float32(),
        "second": pa.float32(),
    }
)
UNFINISHED = ".unfinished-"
CORRUPTED = "corrupted"
GROUPS = (*DOMAINS, CORRUPTED)

Floats = NDArray[np.float64]


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Writes a file beside `path`, out of readers' sight, and puts it in its place once it is on the disk."""
    unfinished = path.with_name(UNFINISHED + path.name)
    write(unfinished)
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)


class ScoreWriter:
    """Writes scores as a folder of Parquet parts, which `pyarrow.parquet.read_table(folder)` reads as one table.

    A Parquet file cannot be read before its last byte is written, so no file is left open: `flush` writes the steps
    since the last flush as a part of their own, under a hidden name first. The folder appears with an empty part in it.
    Whenever the process is killed, what can be seen is a table of whole steps, and no more than the steps of one part
    are in memory.
    """

    def __init__(self, folder: Path, documents: Sequence[Document]) -> None:
        self.folder = folder
        self.documents = documents
        self.rows: list[pa.Table] = []
        if not folder.exists():
            unfinished = folder.with_name(UNFINISHED + folder.name)
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            pq.write_table(SCHEMA.empty_table(), unfinished / "part-empty.parquet")
            unfinished.replace(folder)

    def add(self, step: int, documents: Integers, windows: Integers, first: Floats, second: Floats) -> None:
        """Takes in the scores of a step, all [b]."""
        drawn = [self.documents[index] for index in documents]
        columns = [
            np.full(len(drawn), step),
            windows,
            [document.name for document in drawn],
            [document.domain for document in drawn],
            first,
            second,
        ]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
        self.rows.append(pa.Table.from_arrays(arrays, schema=SCHEMA))

    def flush(self) -> None:
        """Writes the steps taken in since the last time, as one part named after the first of them."""
        if self.rows:
            table = pa.concat_tables(self.rows).combine_chunks()
            path = self.folder / f"part-{table['step'][0].as_py():09d}.parquet"
            write_atomically(path, lambda unfinished: pq.write_table(table, unfinished))
            self.rows = []

    def forget_from(self, step: int) -> None:
        """Removes the parts that begin at this step or later, and what a kill left unfinished."""
        for path in self.folder.glob(f"{UNFINISHED}*"):
            path.unlink()
        for path in _parts(self.folder):
            if int(path.stem.removeprefix("part-")) >= step:
                path.unlink()


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-[0-9]*.parquet"))


@dataclass(frozen=True)
class Tally:
    """What the scores add up to.

    `first` and `second` [documents] are means over a document's windows of the value less the mean value of the
    window's batch (a batch that moves the model much, moves it for all its windows); nan for a document never drawn.
    `by_group` [groups, bins] is the mean second-order value, as it is, of the windows of a group of documents in a
    stretch of steps: `GROUPS` are the domains without their corrupted documents, and the corrupted ones.
    """

    drawn: Integers
    first: Floats
    second: Floats
    bin_edges: Floats
    by_group: Floats


def tally(folder: Path, documents: Sequence[Document], steps: int, bins: int = 20) -> Tally:
    """Adds up the scores in a folder, a part at a time."""
    index = {document.name: number for number, document in enumerate(documents)}
    group = np.array([GROUPS.index(CORRUPTED if d.corruption else d.domain) for d in documents])
    sums = np.zeros((3, len(documents)))
    cells = np.zeros((2, len(GROUPS), min(bins, steps)))
    for step, names, first, second in _columns(folder):
        rows = np.array([index[name] for name in names])
        centred = [values - _batch_means(step, values) for values in (first, second)]
        np.add.at(sums.T, rows, np.stack([np.ones(len(rows)), *centred]).T)
        cell = group[rows], step * cells.shape[2] // steps
        np.add.at(cells[0], cell, 1.0)
        np.add.at(cells[1], cell, second)
    with np.errstate(invalid="ignore"):
        means, by_group = sums[1:] / sums[0], cells[1] / cells[0]
    edges = np.linspace(0, steps, cells.shape[2] + 1)
    return Tally(sums[0].astype(np.int64), means[0], means[1], edges, by_group)


def _columns(folder: Path) -> Iterator[tuple[Integers, list[str], Floats, Floats]]:
    for path in _parts(folder):
        table = pq.read_table(path)
        step = table["step"].to_numpy().astype(np.int64)
        first, second = (table[name].to_numpy().astype(np.float64) for name in ("first", "second"))
        yield step, table["document"].to_pylist(), first, second


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
