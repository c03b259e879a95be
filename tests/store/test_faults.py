"""Full disks, damaged and foreign files: an error or what was written, nothing else."""

import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import funcghost as fg
from funcghost import store
from funcghost.store.files import checksum
from tests.store.disks import small_disk
from tests.store.runs import WAYS, add, assert_whole_steps, begin, damaged, write


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("record") / "run"
    write(folder)
    return folder


def test_a_full_disk_is_an_error_and_loses_nothing(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        with begin(folder) as kept:
            for step in range(1000):
                add(kept, step)
                kept.flush()

    with small_disk(tmp_path, 256) as disk:
        with pytest.raises(fg.StoreError, match=r"No space left on device.* are free there"):
            fill(disk / "run")
        steps = store.open_record(disk / "run").steps
        assert 3 < steps < 1000
        assert_whole_steps(store.open_record(disk / "run").table())
        assert list((disk / "run" / "unfinished").iterdir()) == []


def test_a_part_that_could_not_be_written_is_kept_for_another_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, start: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    with begin(tmp_path / "run") as kept:
        add(kept, 0)
        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(fg.StoreError, match="No space left"):
            kept.flush()
        monkeypatch.undo()
        assert store.open_record(tmp_path / "run").steps == 0
        kept.flush()
    assert store.open_record(tmp_path / "run").steps == 1


# -- damage -----------------------------------------------------------------------------------------------


@given(st.data(), st.sampled_from(WAYS), st.integers(0, 10**6), st.integers(1, 300))
def test_damaged_files_give_an_error_or_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, whole: Path, data: st.DataObject, way: str, at: int, length: int
) -> None:
    """With `forge` the checksum in the name is that of the damaged content: what Arrow makes of it is checked."""
    wanted = store.open_record(whole).table()
    folder = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(whole, folder)
    files = [folder / "manifest.json", *sorted((folder / "values").glob("part-0*"))]
    path = data.draw(st.sampled_from(files))
    content = damaged(path.read_bytes(), way, at, length)
    path.write_bytes(content)
    if way == "forge" and path.parent.name == "values":
        path.rename(path.with_name(path.name[:-16] + checksum(content) + ".parquet"))
    try:
        found = store.open_record(folder).table()
    except fg.StoreError:
        return
    finally:
        shutil.rmtree(folder)
    if way != "forge":
        assert found.equals(wanted)
    else:
        assert len(found) == len(wanted)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[" * 10**5,
        "{}",
        "null",
        '{"format": "funcghost-store-1"}',
        '{"format": "funcghost-store-1", "kind": "record", "columns": 3, "vectors": [], "origin": {}}',
        '{"format": "funcghost-store-1", "kind": "record", "columns": [], "vectors": [], "origin": {"x": NaN}}',
        '{"format": "funcghost-store-1", "kind": "corpus", "columns": [], "origin": {}, '
        '"vectors": [{"name": "../../etc", "dim": 1, "type": "float32"}]}',
        '{"format": "funcghost-store-1", "kind": "corpus", "columns": [], "origin": {}, '
        '"vectors": [{"name": "a", "dim": 99999999999, "type": "float32"}]}',
        '{"format": "funcghost-store-1", "kind": "record", "origin": {}, "vectors": [], '
        '"columns": [{"name": "a", "type": "int64"}, {"name": "a", "type": "int64"}]}',
        '{"format": "funcghost-store-1", "kind": "record", "origin": {}, "vectors": [], '
        '"columns": [{"name": "a", "type": "pickle"}]}',
    ],
)
def test_a_manifest_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(fg.StoreError):
        store.open_store(tmp_path, "corpus" if "corpus" in text else "record")


def test_a_part_of_another_store_is_refused(tmp_path: Path, whole: Path) -> None:
    with store.record(tmp_path / "other", ["first", "second"], {"domain": "string"}) as kept:
        kept.add(0, [1], {"first": [1.0], "second": [1.0]}, {"domain": ["a"]})
    with begin(tmp_path / "own") as kept:
        add(kept, 0)
    shutil.rmtree(tmp_path / "own" / "values")
    shutil.copytree(tmp_path / "other" / "values", tmp_path / "own" / "values")
    with pytest.raises(fg.StoreError, match="must have the columns"):
        store.open_record(tmp_path / "own").table()
    shutil.rmtree(tmp_path / "own" / "values")
    with store.record(tmp_path / "twin", ["first", "second"], {"domain": "string"}, origin={"seed": 5}) as kept:
        kept.add(0, [1], {"first": [1.0], "second": [1.0]}, {"domain": ["a"]})
    shutil.rmtree(tmp_path / "other" / "values")
    shutil.copytree(tmp_path / "twin" / "values", tmp_path / "other" / "values")
    with pytest.raises(fg.StoreError, match="is no part of this store"):
        store.open_record(tmp_path / "other").table()


def test_parts_that_overlap_are_refused(tmp_path: Path, whole: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    first, second, *_ = store.open_record(whole).store.parts()
    folder = tmp_path / "run" / "values"
    shutil.copy(folder / second.name("parquet"), folder / store.Part(1, 3, second.digest).name("parquet"))
    with pytest.raises(fg.StoreError, match="overlap"):
        store.open_record(tmp_path / "run").table()
    assert first.stop == 2


def test_links_and_pipes_are_refused(tmp_path: Path, whole: Path) -> None:
    secret = tmp_path / "secret.parquet"
    part = store.open_record(whole).store.parts()[0]
    shutil.copy(whole / "values" / part.name("parquet"), secret)
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / "values" / part.name("parquet")
    for make in (lambda: path.symlink_to(secret), lambda: os.mkfifo(path)):
        path.unlink()
        make()
        with pytest.raises(fg.StoreError, match=r"cannot be read|must be a file"):
            store.open_record(tmp_path / "run").table()
    shutil.rmtree(tmp_path / "run" / "values")
    (tmp_path / "run" / "values").symlink_to(whole / "values")
    with pytest.raises(fg.StoreError, match="must be a folder of this store"):
        store.open_record(tmp_path / "run")


def test_a_part_that_expands_is_refused(tmp_path: Path) -> None:
    """A string that is long and repeated is small in a dictionary, and nowhere else."""
    with store.record(tmp_path, ["value"], {"text": "string"}) as kept:
        found = kept.store
        kept.add(0, np.arange(3000), {"value": np.zeros(3000)}, {"text": ["x"] * 3000})
    big = pa.DictionaryArray.from_arrays(pa.array(np.zeros(3000, np.int32)), pa.array(["x" * 10**6]))
    table = found.read(found.parts()[0]).drop_columns(["text"]).append_column("text", big)
    content = store.tables.to_parquet(table, b"")
    assert len(content) < 10**6
    with pytest.raises(fg.StoreError, match="bytes of text, more than is ever written"):
        store.tables.from_parquet(bytes(content), found.schema, "it")
