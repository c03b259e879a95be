"""Values and vectors on the disk in parts that are there whole or not at all, for any reader of Parquet and Arrow.

    folder/manifest.json                  what is there, and what it follows from
    folder/values/part-*.parquet          ids and values
    folder/vectors/NAME/part-*.arrow      ids and vectors, where there are any

Nothing is unpickled. The locks and the flushes are those of POSIX systems.
"""

from funcghost.store import needs
from funcghost.store.files import write_whole
from funcghost.store.manifest import Column, Manifest, VectorColumn
from funcghost.store.parts import Part, Store, Writer, open_store, writing
from funcghost.store.record import Record, Recorder, open_record, record

__all__ = [
    "Column",
    "Manifest",
    "Part",
    "Record",
    "Recorder",
    "Store",
    "VectorColumn",
    "Writer",
    "needs",
    "open_record",
    "open_store",
    "record",
    "write_whole",
    "writing",
]
