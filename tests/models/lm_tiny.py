"""The language model example at a size for tests."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

import lm_in_run_shapley as example

BATCH, STEPS = 4, 6
TINY = [
    *("--documents", "4", "--batch-size", str(BATCH), "--context", "16", "--width", "8", "--layers", "1"),
    *("--validation-windows", "4", "--check", "2", "--compare", "3", "--flush", "3"),
    *("--min-auroc", "0"),
]


def run(out: Path, *more: str) -> example.Summary:
    return example.main([*TINY, "--out", str(out), *more])


def scores(out: Path) -> pa.Table:
    return pq.read_table(out / example.SCORES / "values").sort_by([("step", "ascending"), ("sample_id", "ascending")])
