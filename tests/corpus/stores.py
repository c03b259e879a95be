"""Stores with given numbers, for which nothing is computed; and what is in any store, to the byte."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from funcghost import corpus
from funcghost.store import Column, Manifest, VectorColumn, writing
from funcghost.store.tables import schema_of


def stored(out: Path, values: Any, vectors: Any, part: int = 3, ids: list[str] | None = None) -> corpus.Corpus:
    """A store with these values [n] and vectors [n, dim]."""
    kind: Any = "int64" if ids is None else "string"
    columns = (Column("id", kind), Column("value", "float32"))
    manifest = Manifest("corpus", columns, (VectorColumn("v", vectors.shape[1], "float32"),))
    own: list[Any] = list(range(len(values))) if ids is None else ids
    with writing(out, manifest) as writer:
        for at in range(0, len(values), part):
            stop = min(at + part, len(values))
            table = pa.Table.from_pydict({"id": own[at:stop], "value": values[at:stop]}, schema=schema_of(columns))
            writer.add(at, stop, table, {"v": vectors[at:stop]})
        writer.finish(len(values))
    return corpus.open(out)


def contents(folder: Path) -> dict[str, bytes]:
    """Every finished file by its name."""
    kept = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}
