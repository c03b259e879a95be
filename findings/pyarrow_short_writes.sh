#!/usr/bin/env bash
# pyarrow 26.0.1: a Parquet file written to an unbuffered Python file may be cut short without an error.
#
# Versions: pyarrow 26.0.1; CPU, Python 3.11.
# Guess: `pq.write_table(table, file)` writes all bytes to any writable binary file, or raises.
# Seen: `write` of a raw file (`open(..., buffering=0)`) may take fewer bytes than it is given and says how many, as
#   Python's io module documents; pyarrow does not look at the number. Where a limit on file sizes (or a disk that is
#   nearly full) cuts the last write, `write_table` returns, and the file is no Parquet file.
# So: hand pyarrow a path or a buffered file, or write its bytes by calls of one's own that count.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check pyarrow==26.0.1
cat > shown.py <<'PYTHON'
import os
import resource

import pyarrow as pa
import pyarrow.parquet as pq

table = pa.table({"x": list(range(100_000))})
pq.write_table(table, "whole.parquet", compression="none")
size = os.path.getsize("whole.parquet")

resource.setrlimit(resource.RLIMIT_FSIZE, (size - 2, resource.RLIM_INFINITY))
with open("raw.parquet", "wb", buffering=0) as file:
    try:
        pq.write_table(table, file, compression="none")
        raw = "no error"
    except OSError as error:
        raw = f"error: {error}"
print(f"pyarrow {pa.__version__}: {size} bytes with room for {size - 2}")
print(f"raw file: {raw}, {os.path.getsize('raw.parquet')} bytes written")
try:
    pq.read_table("raw.parquet")
    read = "read"
except pa.ArrowException as error:
    read = f"unreadable: {str(error)[:60]}"
print(f"raw file: {read}")
assert raw == "no error" and read.startswith("unreadable"), "this has changed"
PYTHON
venv/bin/python shown.py
