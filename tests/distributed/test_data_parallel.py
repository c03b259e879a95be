"""Steps of several processes against one process on all samples; `ranks.py` is what each of them runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import funcghost as fg
from funcghost.distributed import data_parallel
from tests.corpus.stores import contents
from tests.models.corpora import make

ROOT = Path(__file__).resolve().parents[2]


def torchrun(**environment: str) -> subprocess.CompletedProcess[str]:
    """Two ranks on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", "2", "--max-restarts", "0", str(Path(__file__).with_name("ranks.py"))]
    settings = {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        **environment,
    }
    return subprocess.run(
        command, env=os.environ | settings, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
def test_two_ranks_are_one_process(tmp_path: Path) -> None:
    found = torchrun(FUNCGHOST_CORPUS=str(tmp_path / "ranks"))
    assert found.returncode == 0, found.stderr[-3000:]
    # Lines of two processes may interleave.
    assert all(found.stdout.count(f"rank {rank} agrees") == 1 for rank in range(2)), found.stdout
    make(tmp_path / "alone")
    assert contents(tmp_path / "ranks") == contents(tmp_path / "alone")


@pytest.mark.slow
def test_a_rank_that_raises_ends_the_job_and_is_named() -> None:
    found = torchrun(FUNCGHOST_FAIL="1")
    assert found.returncode != 0
    assert "a fault of rank 1" in found.stderr


def test_one_process_needs_no_group() -> None:
    params, batch = {"w": torch.tensor([1.0, 2.0])}, torch.eye(2)

    def losses(params: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return (x @ params["w"]).square()

    wanted = fg.grad_and_reduce(losses)(params, batch, fg.squared_norm())
    found = data_parallel.grad_and_reduce(losses)(params, batch, fg.squared_norm())
    assert torch.equal(found.grads["w"], wanted.grads["w"])
    assert torch.equal(found.reduced, wanted.reduced)


def test_validation_without_samples_is_refused() -> None:
    with pytest.raises(fg.InputError, match="no rank has a validation sample"):
        data_parallel.validation_gradient(lambda p, x: x @ p["w"], {"w": torch.zeros(2)}, [])
