"""Other tools read a store as it is. Each test runs where its tool is installed."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from funcghost import corpus, store
from tests.corpus.stores import stored
from tests.store.runs import write


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("record") / "run"
    write(folder)
    return folder


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> corpus.Corpus:
    """A corpus of five documents with vectors [3], in parts of two."""
    random = np.random.default_rng(0)
    vectors = random.standard_normal((5, 3)).astype(np.float32)
    names = [f"document {number}" for number in range(5)]
    return stored(tmp_path_factory.mktemp("corpus") / "run", random.standard_normal(5), vectors, part=2, ids=names)


def rows(found: corpus.Corpus) -> dict[str, list[float]]:
    """The vector of each id."""
    vectors = np.concatenate([block for _, block in found.vectors()])
    return dict(zip(found.ids().tolist(), vectors.tolist(), strict=True))


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
    ((total, count, domain),) = duckdb.sql(question).fetchall()
    ours = store.open_record(run).table()
    assert (count, domain) == (len(ours), max(ours["domain"].to_pylist()))
    assert total == pytest.approx(float(ours["first"].to_numpy().astype(np.float64).sum()), abs=1e-5)


def test_pandas_reads_a_corpus(kept: corpus.Corpus) -> None:
    pandas = pytest.importorskip("pandas")
    folder = kept.store.folder
    values = pandas.read_parquet(folder / "values").set_index("id")["value"]
    assert values.to_dict() == dict(zip(kept.ids(), kept.column("value"), strict=True))
    parts = [pandas.read_feather(path) for path in sorted((folder / "vectors" / "v").iterdir())]
    found = pandas.concat(parts).set_index("id")["v"]
    assert {own: vector.tolist() for own, vector in found.items()} == rows(kept)


def test_polars_reads_a_corpus(kept: corpus.Corpus) -> None:
    polars = pytest.importorskip("polars")
    folder = kept.store.folder
    values = polars.read_parquet(folder / "values" / "*.parquet")
    found = polars.concat([polars.read_ipc(path) for path in sorted((folder / "vectors" / "v").iterdir())])
    joined = values.join(found, on="id").sort("value", descending=True)
    assert joined["id"].to_list() == kept.top(5).ids.tolist()
    assert dict(zip(found["id"].to_list(), found["v"].to_list(), strict=True)) == rows(kept)


def test_duckdb_reads_a_corpus(kept: corpus.Corpus) -> None:
    duckdb = pytest.importorskip("duckdb")
    folder = kept.store.folder
    vectors = pa.concat_tables([pa.ipc.open_file(path).read_all() for path in sorted((folder / "vectors/v").iterdir())])
    connection = duckdb.connect()
    connection.register("vectors", vectors)
    question = f"select id, v from '{folder}/values/*.parquet' join vectors using (id) order by value desc"
    found = connection.sql(question).fetchall()
    assert [own for own, _ in found] == kept.top(5).ids.tolist()
    assert {own: list(vector) for own, vector in found} == rows(kept)
