"""Steps of several processes against one process on all samples; `ranks.py` is what each of them runs."""

from pathlib import Path

import pytest
import torch

import funcghost as fg
from funcghost.distributed import data_parallel
from tests.corpus.stores import contents
from tests.distributed.launch import torchrun
from tests.models.corpora import make
from tests.versions import SHARDS


@pytest.mark.slow
def test_two_ranks_are_one_process(tmp_path: Path) -> None:
    found = torchrun("ranks.py", FUNCGHOST_CORPUS=str(tmp_path / "ranks"))
    assert found.returncode == 0, found.stderr[-3000:]
    # Lines of two processes may interleave.
    assert all(found.stdout.count(f"rank {rank} agrees") == 1 for rank in range(2)), found.stdout
    make(tmp_path / "alone")
    assert contents(tmp_path / "ranks") == contents(tmp_path / "alone")


@pytest.mark.skipif(not SHARDS, reason="what is drawn is sharded")
@pytest.mark.slow
@pytest.mark.deep  # two ranks draw in every profile
def test_four_ranks_are_one_process() -> None:
    found = torchrun("drawn_ranks.py", ranks=4)
    assert found.returncode == 0, found.stderr[-3000:]


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
