"""Vectors as Arrow IPC files, in which they lie row by row: memory-mapped, they are read without a copy."""

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from funcghost.errors import StoreError
from funcghost.store.files import checksum, opened
from funcghost.store.manifest import VectorColumn

Vectors = NDArray[Any]
Checked = tuple[str, int, int, int]
"""A file as it was when it held: its path, number on the disk, size and time of the last change."""


def to_arrow(ids: pa.Array, vectors: Vectors, column: VectorColumn) -> tuple[memoryview, int]:
    """The bytes of an Arrow IPC file with the ids and the vectors [b, dim], and where in it the vectors start."""
    values = pa.array(np.ascontiguousarray(vectors).reshape(-1))
    listed = pa.FixedSizeListArray.from_arrays(values, column.dim)
    batch = pa.record_batch([ids, listed], names=["id", column.name])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    content = sink.getvalue()
    if not len(vectors):
        return memoryview(content), 0
    read = pa.ipc.open_file(pa.BufferReader(content)).get_batch(0)[1].flatten()
    return memoryview(content), read.buffers()[1].address - content.address


def mapped(path: Path, rows: int, column: VectorColumn, offset: int, digest: str, checked: set[Checked]) -> Vectors:
    """The vectors [rows, dim] in a file, as they lie on the disk.

    The array shares the pages of the file, privately: writing to it changes no file. All of the file is held to its
    checksum, unless it is among those that were `checked` and has not been written to since.

    Raises:
        StoreError: it is damaged, or too short for what it is said to hold.
    """
    dtype = np.dtype(column.type)
    with opened(path) as descriptor:
        found = os.fstat(descriptor)
        size, seen = found.st_size, (str(path), found.st_ino, found.st_size, found.st_mtime_ns)
        if not size or not 0 <= offset <= size - rows * column.dim * dtype.itemsize or offset % dtype.itemsize:
            raise StoreError(f"{path}: must hold {rows} vectors of {column.dim} {column.type}, found {size} bytes.")
        pages = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    pages.madvise(mmap.MADV_SEQUENTIAL)
    if seen not in checked:
        if checksum(memoryview(pages)) != digest:
            raise StoreError(f"{path}: is damaged: its bytes are not those that were written.")
        checked.add(seen)
    return np.frombuffer(pages, dtype, rows * column.dim, offset).reshape(rows, column.dim)
