"""A record of values: rows (step, sample, values, anything more), written while a run goes."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from funcghost.errors import InputError, StoreError
from funcghost.store.manifest import JSON, Column, Manifest, Type, differences
from funcghost.store.parts import Part, Store, Writer, open_store, writing

STEP, SAMPLE = "step", "sample_id"
DEFAULT_ROWS = 1 << 16


class Recorder:
    """Writes a record: `record(...)` makes one; use it in a `with` statement."""

    def __init__(self, writer: Writer, held: ExitStack, rows: int) -> None:
        self.store = writer.store
        self._writer, self._held, self._most = writer, held, rows
        self._tables: list[pa.Table] = []
        self._size = 0
        self._start = self._step = max((part.stop for part in self.store.parts()), default=0)

    def add(
        self, step: int, samples: Any, values: Mapping[str, Any], extras: Mapping[str, Sequence[Any]] | None = None
    ) -> None:
        """Takes in rows of a step: ids [b], for every column of values an array or tensor [b], and the extras.

        Rows of one step may come in several calls. Steps before it that make a part are written.

        Raises:
            InputError: a column is missing, unknown, of another length or type, or the step is before the last one.
            StoreError: a part cannot be written.
        """
        if type(step) is not int or step < self._step:
            raise InputError(
                f"record: step must be an integer, {self._step} or more after the last one, found {step!r}."
            )
        table = self._table(step, samples, {**values, **(extras or {})})
        if step > self._step and self._size >= self._most:
            self.flush()
        self._tables.append(table)
        self._size += len(table)
        self._step = step

    def flush(self) -> None:
        """Writes what was taken in as a part; no more rows of its last step can come. Do so before a checkpoint.

        Raises:
            StoreError: it cannot be written; it is kept for another try.
        """
        if not self._tables:
            return
        table = pa.concat_tables(self._tables).combine_chunks()
        stop = self._step + 1
        self._writer.add(self._start, stop, table, {})
        self._start = self._step = stop
        self._tables, self._size = [], 0

    def close(self) -> None:
        """Writes what is left, and lets go of the folder."""
        try:
            self.flush()
        finally:
            self._held.close()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._held.close()  # what was taken in since the last part goes, as in a kill

    def _table(self, step: int, samples: Any, values: Mapping[str, Any]) -> pa.Table:
        wanted = self.store.schema.names[2:]
        if sorted(values) != sorted(wanted):
            raise InputError(f"record: must have the columns {wanted}, found {sorted(values)}.")
        ids = _array(SAMPLE, samples, pa.int64())
        columns = [pa.array(np.full(len(ids), step), pa.int64()), ids]
        columns += [_array(name, values[name], self.store.schema.field(name).type) for name in wanted]
        for name, column in zip(wanted, columns[2:], strict=True):
            if len(column) != len(ids):
                raise InputError(
                    f"record: {name!r} must have a row for each of {len(ids)} samples, found {len(column)}."
                )
        return pa.Table.from_arrays(columns, schema=self.store.schema)

    def _forget_from(self, step: int) -> None:
        """Goes back to before a step."""
        parts = self.store.parts()
        reached = parts[-1].stop if parts else 0
        if step > reached:
            raise StoreError(
                f"{self.store.folder}: holds steps before {reached}, so that a run cannot go on from step {step}: "
                "flush the record before each checkpoint, and go on from an earlier one."
            )
        for part in reversed(parts):
            if part.stop <= step:
                break
            if part.start >= step:
                self._writer.remove(part)
            else:
                table = self.store.read(part)
                self._writer.add(part.start, step, table.filter(pa.compute.less(table[STEP], step)), {})
                self._writer.remove(part)
        self._start = self._step = step


def record(
    path: str | Path,
    values: Sequence[str],
    extras: Mapping[str, Type] | None = None,
    *,
    origin: Mapping[str, JSON] | None = None,
    resume: int | None = None,
    rows: int = DEFAULT_ROWS,
) -> Recorder:
    """A record of values, to be written while a run goes: rows of step, sample, values, and anything more.

        with store.record("runs/values", ["first", "second"], {"domain": "string"}, origin=settings) as kept:
            kept.add(step, ids, {"first": first, "second": second}, {"domain": domains})

    The columns are `step` and `sample_id` (int64), the values (float32: what is more precise is rounded to it) and the
    extras, of the types that they are declared with. `folder/values/*.parquet` is one table for any tool that reads
    Parquet, at any time: a part appears whole, and whenever the process is killed, what is there is whole steps
    without gaps. No more than `rows` rows and one step are in memory.

    Args:
        path: the folder.
        values: names of the columns of values.
        extras: names and types of further columns: "int64", "float32", "float64", "bool" or "string".
        origin: what the numbers follow from, a JSON object; a record with another origin is not added to.
        resume: the step to go on from: rows of this step and later ones are removed. None for a new record.
        rows: about how many rows make a part; `flush` makes one at any time.

    Raises:
        InputError: a name or a type is not what it must be.
        StoreError: there is a record already and `resume` is None; it belongs to another run, ends before the step to
            go on from, is damaged, or is being written to by another process.

    Example:
        >>> import tempfile, torch
        >>> from funcghost import store
        >>> folder = tempfile.mkdtemp()
        >>> with store.record(folder, ["value"], origin={"seed": 0}) as kept:
        ...     kept.add(0, [7, 8], {"value": torch.tensor([0.5, -1.0])})
        >>> store.open_record(folder).table()["value"].to_pylist()
        [0.5, -1.0]
    """
    more = dict(extras or {})
    names = [STEP, SAMPLE, *values, *more]
    if not all(type(name) is str and name for name in names) or len(set(names)) != len(names):
        raise InputError(
            f"record: names of columns must be unlike, and none of them {STEP} or {SAMPLE}, found {names}."
        )
    known = ("int64", "float32", "float64", "bool", "string")
    if wrong := {name: kind for name, kind in more.items() if kind not in known}:
        raise InputError(f"record: types of extras must be among {known}, found {wrong}.")
    if resume is not None and (type(resume) is not int or resume < 0):
        raise InputError(f"record: resume must be the step to go on from, 0 or more, found {resume!r}.")
    columns = (
        Column(STEP, "int64"),
        Column(SAMPLE, "int64"),
        *(Column(name, "float32") for name in values),
        *(Column(name, kind) for name, kind in more.items()),
    )
    held = ExitStack()
    writer = held.enter_context(writing(path, Manifest("record", columns, origin=checked_origin(origin))))
    kept = Recorder(writer, held, rows)
    try:
        if resume is not None:
            kept._forget_from(resume)
        elif kept.store.parts():
            raise StoreError(
                f"{path}: holds a record already. Pass resume=STEP to go on from it, or name another folder."
            )
    except BaseException:
        held.close()
        raise
    return kept


def checked_origin(origin: Mapping[str, JSON] | None) -> dict[str, JSON]:
    """The origin as it reads back from JSON.

    Raises:
        InputError: it is no JSON object.
    """
    try:
        found = json.loads(json.dumps(dict(origin or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(f"origin: must be a JSON object with finite numbers: {error}.") from error
    if changed := list(differences(found, dict(origin or {}))):
        raise InputError(f"origin: must be of JSON's own types (lists, not tuples): {'; '.join(changed[:3])}.")
    return dict(found)


class Record:
    """A record that is there, finished or not, to be read."""

    def __init__(self, store: Store) -> None:
        self.store = store

    @property
    def origin(self) -> Mapping[str, JSON]:
        """What the numbers follow from."""
        return self.store.manifest.origin

    @property
    def values(self) -> list[str]:
        """The names of the columns of values: numbers with a fraction."""
        return [column.name for column in self.store.manifest.columns[2:] if column.type.startswith("float")]

    @property
    def steps(self) -> int:
        """The step after the last one."""
        return max((part.stop for part in self._parts()), default=0)

    def tables(self) -> Iterator[pa.Table]:
        """The table, a part at a time."""
        for part in self._parts():
            yield self.store.read(part)

    def table(self) -> pa.Table:
        """The whole table; `table()["step"].to_numpy()` gives a column."""
        return pa.concat_tables([self.store.schema.empty_table(), *self.tables()])

    def _parts(self) -> list[Part]:
        missing = self.store.missing()
        if missing:
            raise StoreError(f"{self.store.folder}: the steps from {missing[0][0]} to {missing[0][1]} are missing.")
        return self.store.parts()


def open_record(path: str | Path) -> Record:
    """A record, to be read, at any time: what is being written to it appears a part at a time.

    Raises:
        StoreError: there is none, it is damaged, or is a store of another kind.
    """
    return Record(open_store(path, "record"))


def _array(name: str, column: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(column, Tensor):
        column = column.detach().cpu().double().numpy() if column.is_floating_point() else column.detach().cpu().numpy()
    if isinstance(column, np.ndarray) and column.ndim != 1:
        raise InputError(f"record: {name!r} must be a column [b], found the shape {column.shape}.")
    try:
        if not pa.types.is_float32(kind):
            found = pa.array(column, kind)
        else:
            wide = pa.array(column, pa.float64())
            rounded = wide.to_numpy(zero_copy_only=False).astype(np.float32)
            found = pa.array(rounded, mask=wide.is_null().to_numpy(False))
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"record: {name!r} must be a column of {kind}: {error}.") from error
    if found.null_count:
        raise InputError(f"record: {name!r} must have a value for every sample, found {found.null_count} missing.")
    return found
