"""The retraining bank: resumed, extended, shared out, and refused where it is of something else."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import funcghost as fg
from funcghost import evaluation

MASKS = evaluation.random_subsets(6, 4)


def outputs(mask: Tensor, seed: int) -> Tensor:
    return torch.stack([mask.double().sum(), mask.double() @ torch.arange(6.0).double() + seed])


class Counted:
    def __init__(self, fail_at: int | None = None) -> None:
        self.calls, self.fail_at = 0, fail_at

    def __call__(self, mask: Tensor, seed: int) -> Tensor:
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        self.calls += 1
        return outputs(mask, seed)


def expected(masks: Tensor, seeds: list[int]) -> Tensor:
    return torch.stack([torch.stack([outputs(mask, seed) for seed in seeds]) for mask in masks])


def test_outputs_by_subset_and_seed() -> None:
    bank = evaluation.retrain(outputs, MASKS, [3, 5])
    assert torch.equal(bank.outputs, expected(MASKS, [3, 5]))
    assert torch.equal(bank.mean, expected(MASKS, [3, 5]).mean(1))


def test_an_interrupted_bank_goes_on_where_it_was_and_can_be_extended(tmp_path: Path) -> None:
    first, second, third = Counted(fail_at=5), Counted(), Counted()
    with pytest.raises(KeyboardInterrupt):
        evaluation.retrain(first, MASKS, [0, 1], folder=tmp_path, made_of="mlp")
    found = evaluation.retrain(second, MASKS, [0, 1], folder=tmp_path, made_of="mlp")
    assert (first.calls, second.calls) == (5, 3)
    assert torch.equal(found.outputs, expected(MASKS, [0, 1]))
    more = torch.cat([evaluation.leave_out(6, [2]), MASKS])
    assert torch.equal(
        evaluation.retrain(third, more, [1, 0], folder=tmp_path, made_of="mlp").outputs, expected(more, [1, 0])
    )
    assert third.calls == 2
    assert not list(tmp_path.glob("*.part"))


def test_processes_give_the_same(tmp_path: Path) -> None:
    found = evaluation.retrain(outputs, MASKS[:2], [0, 1], folder=tmp_path, processes=2)
    assert torch.equal(found.outputs, expected(MASKS[:2], [0, 1]))


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    evaluation.retrain(outputs, MASKS, folder=tmp_path, made_of="mlp")
    with pytest.raises(fg.InputError, match="another folder"):
        evaluation.retrain(outputs, MASKS, folder=tmp_path, made_of="gpt")
    with pytest.raises(fg.InputError, match="another folder"):
        evaluation.retrain(outputs, MASKS[:, :5], folder=tmp_path, made_of="mlp")
    (broken,) = list(tmp_path.glob("*-0.npy"))[:1]
    broken.write_bytes(broken.read_bytes()[:20])
    with pytest.raises(fg.InputError, match="Remove it"):
        evaluation.retrain(outputs, MASKS, folder=tmp_path, made_of="mlp")
    (tmp_path / "bank.json").unlink()
    with pytest.raises(fg.InputError, match="no bank"):
        evaluation.retrain(outputs, MASKS, folder=tmp_path, made_of="mlp")


def test_bad_arguments() -> None:
    with pytest.raises(fg.InputError, match="one seed or more"):
        evaluation.retrain(outputs, MASKS, [])
    with pytest.raises(fg.InputError, match="that differ"):
        evaluation.retrain(outputs, MASKS, [0, 0])
    with pytest.raises(fg.InputError, match="processes"):
        evaluation.retrain(outputs, MASKS, processes=0)
    with pytest.raises(fg.InputError, match="floating numbers"):
        evaluation.retrain(lambda mask, seed: mask, MASKS)
    with pytest.raises(fg.InputError, match="same length"):
        evaluation.retrain(lambda mask, seed: torch.ones(int(mask[0]) + 1), MASKS)
