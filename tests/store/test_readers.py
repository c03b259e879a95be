"""Other tools read a store as it is. Each test runs where its tool is installed."""

from pathlib import Path

import numpy as np
import pytest

from funcghost import store
from tests.store.runs import write


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("record") / "run"
    write(folder)
    return folder


def test_pandas(run: Path) -> None:
    pandas = pytest.importorskip("pandas")
    found = pandas.read_parquet(run / "values")
    ours = store.open_record(run).table()
    assert found["domain"].tolist() == ours["domain"].to_pylist()
    np.testing.assert_array_equal(found["first"].to_numpy(), ours["first"].to_numpy())


def test_polars(run: Path) -> None:
    polars = pytest.importorskip("polars")
    found = polars.read_parquet(run / "values" / "*.parquet").sort("step", maintain_order=True)
    ours = store.open_record(run).table()
    assert found["domain"].to_list() == ours["domain"].to_pylist()
    np.testing.assert_array_equal(found["first"].to_numpy(), ours["first"].to_numpy())


def test_duckdb(run: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    question = f"select sum(first), count(*), max(domain) from '{run}/values/*.parquet'"
    total, count, domain = duckdb.sql(question).fetchone()
    ours = store.open_record(run).table()
    assert (count, domain) == (len(ours), max(ours["domain"].to_pylist()))
    assert total == pytest.approx(float(ours["first"].to_numpy().astype(np.float64).sum()), abs=1e-5)
