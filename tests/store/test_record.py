"""A record of values: what is written is what is read, resumed without gaps or duplicates, by any tool."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcghost as fg
from funcghost import store
from tests.depth import fewer
from tests.store.runs import ROWS, STEPS, add, begin, write


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("record") / "run"
    write(folder)
    return folder


def test_what_is_written_is_read(whole: Path) -> None:
    table = store.open_record(whole).table()
    np.testing.assert_array_equal(table["step"].to_numpy(), np.repeat(np.arange(STEPS), ROWS))
    random = np.random.default_rng(4)
    values = [random.standard_normal(ROWS).astype(np.float32) for _ in range(2)]
    rows = table.slice(4 * ROWS, ROWS)
    np.testing.assert_array_equal(rows["first"].to_numpy(), values[0])
    np.testing.assert_array_equal(rows["second"].to_numpy(), values[1])
    np.testing.assert_array_equal(rows["length"].to_numpy(), random.integers(0, 2**60, ROWS))
    assert rows["domain"].to_pylist() == [f"domain {n}" for n in range(ROWS)]


def test_parquet_readers_read_it_as_it_is(whole: Path) -> None:
    ours = store.open_record(whole).table()
    assert (
        pq.read_table(whole / "values")
        .sort_by("step")
        .select(["step", "first"])
        .equals(ours.select(["step", "first"]).replace_schema_metadata(None))
    )


def test_a_record_describes_itself(whole: Path) -> None:
    found = store.open_record(whole)
    assert found.origin == {"seed": 0, "model": {"width": 8, "names": ["a", "b"]}}
    assert found.values == ["first", "second", "precise"]
    assert found.steps == STEPS
    assert sum(len(table) for table in found.tables()) == STEPS * ROWS


def test_nothing_written_is_a_table_without_rows(tmp_path: Path) -> None:
    with begin(tmp_path / "run"):
        pass
    found = store.open_record(tmp_path / "run")
    assert (found.steps, len(found.table())) == (0, 0)
    assert pq.read_table(tmp_path / "run" / "values").schema.names == found.table().schema.names


@fewer(4, least=8)
@given(st.lists(st.tuples(st.integers(0, STEPS), st.integers(1, 4)), max_size=3), st.integers(1, 4))
def test_resuming_anywhere_gives_the_run_without_a_break(
    tmp_path_factory: pytest.TempPathFactory, whole: Path, breaks: list[tuple[int, int]], every: int
) -> None:
    """Runs that stop at a step, and go on from any step before it with parts of another size."""
    folder = tmp_path_factory.mktemp("record") / "run"
    reached = 0
    write(folder, 0, 0)
    for stop, size in breaks:
        start = min(stop, reached)
        write(folder, start, max(stop, start), size, resume=start)
        reached = max(stop, start)
    write(folder, min(3, reached), STEPS, every, resume=min(3, reached))
    assert store.open_record(folder).table().equals(store.open_record(whole).table())


def test_memory_is_bounded_by_rows_and_one_step(tmp_path: Path) -> None:
    with begin(tmp_path / "run", rows=2 * ROWS) as kept:
        for step in range(STEPS):
            add(kept, step)
            add(kept, step)
            assert kept._size <= 4 * ROWS
    table = store.open_record(tmp_path / "run").table()
    np.testing.assert_array_equal(table["step"].to_numpy(), np.repeat(np.arange(STEPS), 2 * ROWS))


def test_an_error_in_the_run_leaves_whole_parts(tmp_path: Path) -> None:
    def fail() -> None:
        with begin(tmp_path / "run") as kept:
            add(kept, 0)
            kept.flush()
            add(kept, 1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert store.open_record(tmp_path / "run").steps == 1


# -- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"origin": {"seed": 1}}, "origin.seed is 0 there and 1 here"),
        ({"values": ["first"]}, "columns is"),
        ({"origin": {"seed": 0, "lr": 0.1}}, r"origin.lr is null there and 0.1 here"),
        ({"resume": 9}, "holds steps before 4, so that a run cannot go on from step 9"),
        ({"resume": None}, "holds a record already"),
    ],
)
def test_another_run_is_refused(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    right: dict[str, Any] = {"values": ["first", "second"], "origin": {"seed": 0}, "resume": 4}
    with store.record(tmp_path, right["values"], origin=right["origin"]) as kept:
        kept.add(3, [1], {"first": [1.0], "second": [2.0]})
    before = store.open_record(tmp_path).table()
    with pytest.raises(fg.StoreError, match=complaint):
        store.record(tmp_path, **{**right, **change})
    assert store.open_record(tmp_path).table().equals(before)
    store.record(tmp_path, **right).close()  # the lock is free again


@pytest.mark.parametrize(
    ("step", "samples", "values", "complaint"),
    [
        (0, [1], {"first": [1.0], "second": [1.0]}, "1 or more after the last one, found 0"),
        (1.0, [1], {"first": [1.0], "second": [1.0]}, "step must be an integer"),
        (1, [1], {"first": [1.0]}, r"must have the columns \['first', 'second'\]"),
        (1, [1], {"first": [1.0], "second": [1.0, 2.0]}, "'second' must have a row for each of 1 samples, found 2"),
        (1, ["a"], {"first": [1.0], "second": [1.0]}, "'sample_id' must be a column of int64"),
        (1, [1], {"first": [None], "second": [1.0]}, "'first' must have a value for every sample, found 1 missing"),
        (1, [1, None], {"first": [1.0, 1.0], "second": [1.0, 1.0]}, "found 1 missing"),
        (1, torch.ones(1, 1).long(), {"first": [1.0], "second": [1.0]}, "found the shape"),
    ],
)
def test_bad_rows_are_refused_and_nothing_is_lost(
    tmp_path: Path, step: Any, samples: Any, values: Any, complaint: str
) -> None:
    with store.record(tmp_path, ["first", "second"]) as kept:
        kept.add(0, [7], {"first": torch.tensor([1.0]), "second": torch.tensor([2.0], dtype=torch.bfloat16)})
        kept.flush()
        if complaint.startswith("1 or more"):
            kept.add(1, [8], {"first": [1.0], "second": [1.0]})
        with pytest.raises(fg.InputError, match=complaint):
            kept.add(step, samples, values)
    assert store.open_record(tmp_path).table()["sample_id"].to_pylist()[0] == 7


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"values": ["step"]}, "names of columns must be unlike"),
        ({"values": ["a", "a"]}, "names of columns must be unlike"),
        ({"values": ["a"], "extras": {"b": "object"}}, "types of extras"),
        ({"values": ["a"], "resume": -1}, "resume must be the step"),
        ({"values": ["a"], "origin": {"seed": float("nan")}}, "origin: must be a JSON object"),
        ({"values": ["a"], "origin": {"seed": (1, 2)}}, "lists, not tuples"),
        ({"values": ["a"], "origin": {"seed": object()}}, "origin: must be a JSON object"),
    ],
)
def test_bad_declarations_are_refused(tmp_path: Path, wrong: Any, complaint: str) -> None:
    with pytest.raises(fg.InputError, match=complaint):
        store.record(tmp_path / "run", **wrong)
    assert not (tmp_path / "run").exists()


def test_two_writers_are_refused(tmp_path: Path) -> None:
    with begin(tmp_path / "run"), pytest.raises(fg.StoreError, match="another process is writing it"):
        begin(tmp_path / "run")


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(fg.StoreError, match=r"holds 'notes\.txt' and is no store"):
        begin(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(fg.StoreError, match=r"must be a folder|cannot be written"):
        begin(tmp_path / "notes.txt")


def test_a_lost_part_is_said(tmp_path: Path) -> None:
    write(tmp_path / "run")
    part = store.open_record(tmp_path / "run").store.parts()[1]
    (tmp_path / "run" / "values" / part.name("parquet")).unlink()
    with pytest.raises(fg.StoreError, match="the steps from 2 to 4 are missing"):
        store.open_record(tmp_path / "run").table()


def test_the_manifest_is_plain_json(whole: Path) -> None:
    found = json.loads((whole / "manifest.json").read_text())
    assert found["format"] == "funcghost-store-1"
    assert found["columns"][0] == {"name": "step", "type": "int64"}
