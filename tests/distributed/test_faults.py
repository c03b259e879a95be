"""A rank that does not do its part ends the job in time, is named by the others, and costs no recorded value."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from funcghost import store
from tests.distributed.fault_ranks import FAULTS
from tests.distributed.launch import ROOT, SETTINGS, torchrun
from tests.versions import SHARDS

SAID = {
    "killed": r"RankError: sharded: .*ranks \[1\] say nothing: killed",
    "killed at first": r"RankError: data_parallel: .*ranks \[1\] say nothing: killed",
    "hangs": r"RankError: sharded: .*ranks \[1\] say nothing: .*hanging",
    "hangs, data parallel": r"RankError: data_parallel: .*ranks \[1\] say nothing: .*hanging",
    "raises": r"RankError: sharded: .*rank 1 failed: ValueError: a fault of its own",
    "raises, data parallel": r"RankError: data_parallel: .*rank 1 failed: ValueError: a fault of its own",
    "raises at first, data parallel": r"PlanError: rank 1 failed in its first step.*a fault of its own",
    "raises at first, tensor parallel": r"RankError: tensor_parallel: .*rank 1 failed: ValueError: a fault",
    "other layers at first": r"InputError: .*the losses of ranks \[1\] went through other layers",
    "other layers": r"InputError: .*the losses of ranks \[1\] went through other layers",
    "other ops, tensor parallel": r"InputError: .*other ops than those on rank 1 of the mesh \(mul here, add there\)",
}
JOBS = ["raises", "killed", "hangs"] if SHARDS else [f"{fault}, data parallel" for fault in ("raises", "hangs")]


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the ranks of every fault left."""
    folder = tmp_path_factory.mktemp("faults")
    command = [sys.executable, "-m", "tests.distributed.fault_ranks", str(folder)]
    found = subprocess.run(
        command, env=os.environ | SETTINGS, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert found.returncode == 0, found.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_the_other_rank_says_who_is_missing_and_what_was_recorded_is_kept(faults: Path, name: str) -> None:
    text = (faults / name / "0").read_text()
    assert re.search(SAID[name], text), text
    _, _, when = FAULTS[name]
    for rank in range(2):
        kept = store.open_record(faults / name / f"values{rank}").table()
        assert kept["step"].to_pylist() == [step for step in range(when) for _ in range(3)]


@pytest.mark.slow
@pytest.mark.deep  # the ranks of one launch say as much
@pytest.mark.parametrize("name", JOBS)
def test_the_job_ends(tmp_path: Path, name: str) -> None:
    found = torchrun("fault_ranks.py", str(tmp_path), name)
    assert found.returncode == 1
    assert re.search(SAID[name], found.stderr) or "rank      : 1 (local_rank: 1)" in found.stderr, found.stderr
