"""Passes on full disks and by two writers, and damaged stores: an error or the right numbers, nothing else."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import funcghost as fg
from funcghost import corpus
from funcghost.store.files import checksum
from tests.corpus.stores import contents
from tests.corpus.victim import PARAMS, REDUCERS, losses
from tests.store.disks import small_disk
from tests.store.runs import WAYS, damaged

DATA = torch.randint(-4, 5, (60, 3), generator=torch.Generator().manual_seed(0)).float()


def score(out: Path) -> corpus.Scored:
    return corpus.score(losses, PARAMS, DATA, REDUCERS, out, batch_size=4, part=8, progress=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus") / "run"
    score(out)
    return out


def test_a_full_disk_ends_a_pass_and_loses_nothing(tmp_path: Path, whole: Path) -> None:
    with small_disk(tmp_path, 48) as disk:
        with pytest.raises(fg.StoreError, match=r"No space left on device.* are free there"):
            score(disk / "run")
        found = corpus.open(disk / "run", partial=True)
        assert 8 <= len(found) < len(DATA)
        np.testing.assert_array_equal(found.column("norm"), corpus.open(whole).column("norm")[: len(found)])
        assert list((disk / "run" / "unfinished").iterdir()) == []
        reached = len(found)
        shutil.copytree(disk / "run", tmp_path / "roomy")
    with pytest.raises(fg.StoreError, match="values: cannot be read: No such file"):
        found.table()  # its folder is gone
    assert score(tmp_path / "roomy").samples == len(DATA) - reached
    assert contents(tmp_path / "roomy") == contents(whole)


def test_two_writers_are_refused(tmp_path: Path, whole: Path) -> None:
    """The second one comes in the middle of the pass of the first."""
    refused = list[Any]()

    def collate(rows: Sequence[Tensor]) -> Tensor:
        if (tmp_path / "run" / "manifest.json").exists() and not refused:
            with pytest.raises(fg.StoreError, match="another process is writing it") as found:
                score(tmp_path / "run")
            refused.append(found)
        return torch.stack(list(rows))

    corpus.score(losses, PARAMS, DATA, REDUCERS, tmp_path / "run", batch_size=4, part=8, collate=collate)
    assert refused
    assert contents(tmp_path / "run") == contents(whole)


@given(st.data(), st.sampled_from(WAYS), st.integers(0, 10**6), st.integers(1, 300))
def test_damaged_files_give_an_error_or_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, whole: Path, data: st.DataObject, way: str, at: int, length: int
) -> None:
    """With `forge` the checksum in a name is that of the damaged content: what is made of it is checked."""
    folder = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(whole, folder, copy_function=os.link)
    path = data.draw(st.sampled_from(sorted(path for path in folder.rglob("*.*") if path.suffix != ".lock")))
    content = damaged(path.read_bytes(), way, at, length)
    path.unlink()
    name = path.name
    if way == "forge" and name.startswith("part-0"):
        name = f"{path.stem[:-8]}{checksum(content)}{path.suffix}"
    path.with_name(name).write_bytes(content)
    wanted = corpus.open(whole)
    try:
        found = corpus.open(folder)
        column = found.column("norm")
        vectors = np.concatenate([block for _, block in found.vectors()])
        best = found.top(3, "norm")
        corpus.verify(folder)
    except fg.StoreError:
        return
    finally:
        shutil.rmtree(folder)
    assert vectors.shape == (len(DATA), 4)
    np.testing.assert_array_equal(vectors, np.concatenate([block for _, block in wanted.vectors()]))
    if way != "forge":
        np.testing.assert_array_equal(column, wanted.column("norm"))
        assert best.positions.tolist() == wanted.top(3, "norm").positions.tolist()
