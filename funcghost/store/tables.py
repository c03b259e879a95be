"""Parquet files in memory: what is written, and what is read of a file that may be anybody's."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from funcghost.errors import StoreError
from funcghost.store.manifest import Column

MOST_ROWS = 1 << 24
MOST_EXPANDED = 1 << 31
"""Rows of a part, and bytes of it in memory."""

KEY = b"funcghost"


def schema_of(columns: Sequence[Column]) -> pa.Schema:
    """The schema of the table: no column has nulls."""
    return pa.schema([pa.field(column.name, pa.type_for_alias(column.type), nullable=False) for column in columns])


def to_parquet(table: pa.Table, note: bytes) -> memoryview:
    """The bytes of a Parquet file with a note in it."""
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({KEY: note}), sink, compression="zstd", write_page_checksum=True)
    return memoryview(sink.getvalue())


def from_parquet(content: bytes, schema: pa.Schema, where: object) -> tuple[pa.Table, bytes]:
    """The table in a Parquet file of this schema, and the note.

    Nothing is allocated that is out of proportion: rows, bytes and the expansion of repeated strings are bounded.

    Raises:
        StoreError: it is damaged, has other columns, or is too large.
    """
    strings = [field.name for field in schema if pa.types.is_string(field.type)]
    try:
        file = pq.ParquetFile(pa.BufferReader(content), read_dictionary=strings, page_checksum_verification=True)
        _check_sizes(file.metadata, where)
        note = (file.metadata.metadata or {}).get(KEY, b"")
        found = file.schema_arrow
        if found.names != schema.names or any(
            found.field(name).type != (pa.dictionary(pa.int32(), pa.string()) if name in strings else field.type)
            for name, field in zip(schema.names, schema, strict=True)
        ):
            raise StoreError(f"{where}: must have the columns {schema.names} of the manifest, found {found.names}.")
        table = file.read(use_threads=False)
        table.validate(full=True)
        for name in strings:
            _check_strings(table[name], where)
        if any(column.null_count for column in table.columns):
            raise StoreError(f"{where}: has missing values, which are never written.")
        return table.cast(schema), note
    except (pa.ArrowException, OSError, ValueError, LookupError, OverflowError, MemoryError) as error:
        raise StoreError(f"{where}: is damaged: {error}") from error


def _check_sizes(metadata: pq.FileMetaData, where: object) -> None:
    groups = [metadata.row_group(k) for k in range(metadata.num_row_groups)]
    expanded = sum(group.total_byte_size for group in groups)
    if not 0 <= metadata.num_rows <= MOST_ROWS or not 0 <= expanded <= MOST_EXPANDED:
        raise StoreError(f"{where}: has {metadata.num_rows} rows of {expanded} bytes, more than is ever written.")


def _check_strings(column: pa.ChunkedArray, where: object) -> None:
    total = 0
    for chunk in column.chunks:
        lengths = pc.binary_length(chunk.dictionary).to_numpy(zero_copy_only=False).astype(np.int64)
        total += int(np.dot(np.bincount(chunk.indices.to_numpy(zero_copy_only=False), minlength=len(lengths)), lengths))
    if total > MOST_EXPANDED:
        raise StoreError(f"{where}: has {total} bytes of text, more than is ever written.")
