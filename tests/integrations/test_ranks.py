"""Trainers and loops under DDP and FSDP2, held to one process; `ranks.py` is what each process runs."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from funcghost import store
from funcghost.integrations.transformers import Trainer
from tests.integrations.test_transformers import model, texts, train
from tests.versions import SHARDS

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:UserWarning:torch.utils.data")


@pytest.mark.slow
def test_two_processes_make_the_step_of_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", "2", "--max-restarts", "0", str(Path(__file__).with_name("ranks.py"))]
    settings = {"PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    found = subprocess.run(
        [*command, str(tmp_path)],
        env=os.environ | settings,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert all(found.stdout.count(f"rank {rank} agrees") == 1 for rank in range(2)), found.stdout
    torch.manual_seed(1)
    rows = texts(3 + 16)
    settings_of_one = {"gradient_accumulation_steps": 4, "max_grad_norm": 0.1, "validation": 3}
    train(Trainer, model(), tmp_path / "alone", rows, {"rule": "simpson"}, **settings_of_one)
    wanted = kept(tmp_path / "alone")
    for name in ("even", *(("loaded", "plugin") if SHARDS else ())):
        found = kept(tmp_path / name)
        for column in ("step", "sample_id"):
            assert found[column].to_pylist() == wanted[column].to_pylist(), name
        assert found["value"].to_pylist() == pytest.approx(wanted["value"].to_pylist(), rel=1e-5, abs=1e-9), name


def kept(folder: Path) -> Any:
    return store.open_record(folder / "values").table().sort_by([("step", "ascending"), ("sample_id", "ascending")])
