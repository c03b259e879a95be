"""Trainers and loops under DDP and FSDP2, held to one process; `ranks.py` is what each process runs."""

import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from funcghost import store
from funcghost.integrations.transformers import Trainer
from tests.integrations.test_transformers import model, texts, train
from tests.versions import SHARDS

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:UserWarning:torch.utils.data")


def run(script: str, *args: str) -> None:
    """A script of this folder in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", "2", "--max-restarts", "0", str(Path(__file__).with_name(script)), *args]
    settings = {"PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    found = subprocess.run(
        command, env=os.environ | settings, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert all(found.stdout.count(f"rank {rank} agrees") == 1 for rank in range(2)), found.stdout


def kept(folder: Path) -> Any:
    return store.open_record(folder / "values").table().sort_by([("step", "ascending"), ("sample_id", "ascending")])


def assert_same(folder: Path, alone: Path) -> None:
    found, wanted = kept(folder), kept(alone)
    for column in ("step", "sample_id"):
        assert found[column].to_pylist() == wanted[column].to_pylist(), folder
    assert found["value"].to_pylist() == pytest.approx(wanted["value"].to_pylist(), rel=1e-5, abs=1e-9), folder


@pytest.mark.slow
def test_two_processes_make_the_step_of_one(tmp_path: Path) -> None:
    run("ranks.py", str(tmp_path))
    torch.manual_seed(1)
    rows = texts(3 + 16)
    settings_of_one = {"gradient_accumulation_steps": 4, "max_grad_norm": 0.1, "validation": 3}
    train(Trainer, model(), tmp_path / "alone", rows, {"rule": "simpson"}, **settings_of_one)
    for name in ("even", *(("loaded", "plugin") if SHARDS else ())):
        assert_same(tmp_path / name, tmp_path / "alone")


@pytest.mark.slow
def test_lightning_and_trl_in_two_processes_make_the_step_of_one(tmp_path: Path) -> None:
    there = [name for name in ("lightning", "trl") if find_spec(name)]
    if not there:
        pytest.skip("neither Lightning nor TRL is installed")
    run("optional_ranks.py", str(tmp_path), *there)
    if "lightning" in there:
        tests: Any = import_module("tests.integrations.test_lightning")
        rows, validation = tests.rows_of_ranks()
        module = tests.Mine()
        module.net[1] = nn.Identity()
        record = tests.ours.Record(tmp_path / "alone/values", validation, rule="simpson")
        tests.fit(module, rows, record, batch_size=4, sampler=range(len(rows)))
        assert_same(tmp_path / "lightning", tmp_path / "alone")
