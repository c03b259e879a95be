"""Passes and records that are killed at any point, or stopped by a limit: what is finished stays, and they go on."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest

import funcghost as fg
from funcghost import corpus, store
from tests.corpus.stores import contents
from tests.corpus.victim import DATA, EVERY, PARAMS, REDUCERS, SIZES, losses, score
from tests.store.runs import ROWS, STEPS, assert_whole_steps, begin, write

ROOT = Path(__file__).resolve().parents[2]


class Victim(NamedTuple):
    process: "subprocess.Popen[bytes]"
    folder: Path
    plan: fg.Plan


@pytest.fixture(scope="module")
def victim() -> Iterator[Victim]:
    """A process that breaks its children in every way and then writes on; its folder is in memory if there is any."""
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(dir=where) as name:
        folder = Path(name)
        plan = fg.plan(losses, PARAMS, DATA[:4], REDUCERS)
        (folder / "plan.json").write_text(plan.to_json())
        process = subprocess.Popen([sys.executable, "-m", "tests.corpus.victim", name], env=environment, cwd=ROOT)
        try:
            deadline = time.monotonic() + 240
            while not (folder / "on" / "manifest.json").exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            yield Victim(process, folder, plan)
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("record") / "run"
    write(folder)
    return folder


def test_a_pass_killed_at_its_file_calls(victim: Victim, tmp_path: Path) -> None:
    """What is there is right, and going on gives the same bits as a pass without a break."""
    done = score(tmp_path / "whole", victim.plan)
    wanted = contents(tmp_path / "whole")
    norms = done.corpus.column("norm")
    sketches = np.concatenate([block for _, block in done.corpus.vectors()])
    reached = set()
    for run in sorted((victim.folder / "corpus").iterdir(), key=lambda path: int(path.name)):
        if (run / "manifest.json").exists():
            found = corpus.open(run, partial=True)
            reached.add(len(found))
            np.testing.assert_array_equal(found.column("norm"), norms[: len(found)])
            for start, block in found.vectors():
                np.testing.assert_array_equal(block, sketches[start : start + len(block)])
        score(run, victim.plan)
        assert contents(run) == wanted, run
    assert reached == {0, 8, 16, 23}


def test_a_record_killed_at_its_file_calls(victim: Victim, whole: Path) -> None:
    """What is there is whole steps; going on gives the run without a break, and leaves nothing behind."""
    wanted = store.open_record(whole).table()
    runs = sorted((victim.folder / "record").iterdir(), key=lambda path: int(path.name))
    assert len(runs) > 30 / EVERY
    reached = []
    for run in runs:
        start = 0
        if (run / "manifest.json").exists():
            found = store.open_record(run)
            assert_whole_steps(found.table())
            start = found.steps
        reached.append(start)
        write(run, start, STEPS, resume=start)
        assert store.open_record(run).table().equals(wanted)
        assert list((run / "unfinished").iterdir()) == []
        # Other tools see every row once, too: what was cut off is gone.
        assert len(pq.read_table(run / "values")) == len(wanted)
    assert set(reached) >= {0, 2, 4, 5}
    assert EVERY > 1 or 3 in reached


@pytest.mark.parametrize("size", SIZES)
def test_a_limit_on_files_is_an_error(victim: Victim, size: int) -> None:
    folder = victim.folder / "limit" / str(size)
    assert "cannot be written: File too large" in folder.with_suffix(".txt").read_text()
    if (folder / "manifest.json").exists():
        assert len(store.open_record(folder).table()) == 0
    write(folder, resume=0)
    assert store.open_record(folder).steps == STEPS


def test_killed_at_any_moment_while_it_is_read(victim: Victim) -> None:
    process, folder = victim.process, victim.folder / "on"
    first = store.open_record(folder).steps
    deadline, steps = time.monotonic() + 60, first
    while steps < first + 5:
        assert process.poll() is None
        assert time.monotonic() < deadline
        found = store.open_record(folder).table()
        assert_whole_steps(found)
        steps = len(found) // ROWS
        with pytest.raises(fg.StoreError, match="another process is writing"):
            begin(folder, resume=0)
    process.kill()
    process.wait()
    assert_whole_steps(store.open_record(folder).table())
    begin(folder, resume=steps).close()
