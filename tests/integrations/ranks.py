"""What each of two processes runs for `test_ranks.py`: steps and trainers under DDP by accelerate, and under FSDP2."""

import gc
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, distributed, nn

import funcghost as fg
import trainer_accelerate
from funcghost import store
from funcghost.attribution import in_run
from funcghost.integrations.steps import Kind, Steps
from funcghost.integrations.transformers import Trainer, Valuation, Valued
from funcghost.training import updates
from tests.integrations import sharded_ranks
from tests.integrations.test_transformers import Own, OwnValued, Seen, assert_adds_up, model, texts
from tests.versions import SHARDS

OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1),
}


class World:
    """A network with a parameter that the batches of one rank alone use."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        self.params = {**fg.trainable(self.net), "shift": nn.Parameter(torch.zeros(2).double())}
        self.optimizer = OPTIMIZERS[kind](self.params.values())
        sizes = (4, 3, 1)
        self.batches: list[Any] = [
            {"x": torch.randn(n, 3).double(), "y": torch.randint(2, (n,)), "n": n} for n in sizes
        ]
        self.validation: Any = {"x": torch.randn(9, 3).double(), "y": torch.randint(2, (9,)), "n": 1}

    def losses(self, params: Any, batch: Any) -> Tensor:
        of_net = {name: leaf for name, leaf in params.items() if name != "shift"}
        logits = torch.func.functional_call(self.net, of_net, (batch["x"],))
        return F.cross_entropy(logits + params["shift"] if batch["n"] == 1 else logits, batch["y"], reduction="none")

    def validate(self) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.losses(self.params, self.validation).mean()
        found = torch.autograd.grad(loss, list(self.params.values()))
        return loss.detach(), dict(zip(self.params, found, strict=True))


def steps_are_those_of_one_process(rank: int) -> None:
    """Seven samples on the one rank and one on the other make the step that one process makes of all."""
    cases: list[tuple[str, Kind]] = [("sgd", "path"), ("adamw", "path"), ("sgd", "score")]
    for optimizer, kind in cases:
        world = World(optimizer)
        update, state = updates.of(world.optimizer, world.params)
        clipped = updates.clipped(update, 0.05)

        def halves(params: Any, batch: Any, world: World = world) -> Tensor:
            return world.losses(params, batch) / 2

        account = in_run.along_path(halves, clipped, reduction="sum", rule="simpson", validation_losses=world.losses)
        params = {name: value.detach().clone() for name, value in world.params.items()}
        steps = Steps(world.losses, world.params, world.validate, kind=kind, rule="simpson")
        for _ in range(2):
            direction = world.validate()[1]
            for place, batch in (
                ((0, world.batches[0]), (4, world.batches[1])) if rank == 0 else ((7, world.batches[2]),)
            ):
                steps.take(batch, torch.arange(place, place + len(batch["x"])))
            steps.settle(world.optimizer, 0.05)
            nn.utils.clip_grad_norm_(world.params.values(), 0.05)
            world.optimizer.step()
            world.optimizer.zero_grad()
            found = steps.settled()
            wanted = account(params, in_run.Microbatches(world.batches), state=state, validation=[world.validation])
            scores = [fg.reduce(halves)(params, batch, fg.dot(direction)) for batch in world.batches]
            params, state = wanted.params, wanted.state
            assert found.ids.tolist() == list(range(8))
            torch.testing.assert_close(found.values, wanted.values if kind == "path" else torch.cat(scores))
            for name, leaf in world.params.items():
                torch.testing.assert_close(leaf.detach(), params[name])
            if kind == "path":
                torch.testing.assert_close(found.rest, wanted.rest)
                torch.testing.assert_close(found.change, wanted.change, rtol=1e-4, atol=0)


def a_sample_of_both_ranks_has_one_row(rank: int) -> None:
    world = World("sgd")
    steps = Steps(world.losses, world.params, world.validate, kind="score")
    steps.take(world.batches[1], torch.tensor([5, 6, 7 + rank]))
    steps.settle(world.optimizer)
    wanted = fg.reduce(world.losses)(world.params, world.batches[1], fg.dot(world.validate()[1])).repeat(2) / 2
    found = steps.settled()
    assert found.ids.tolist() == [5, 6, 7, 8]
    torch.testing.assert_close(found.values, torch.stack([2 * wanted[0], 2 * wanted[1], wanted[2], wanted[2]]))


def refused(what: str, run: Callable[[], object]) -> None:
    with pytest.raises(fg.InputError, match=what):
        run()


def ranks_that_differ_are_refused(rank: int) -> None:
    def run(world: World) -> None:
        steps = Steps(world.losses, world.params, world.validate)
        steps.take(world.batches[0], torch.arange(4))
        steps.settle(world.optimizer)

    other = World("sgd")
    other.validation["x"] += rank
    refused("ranks give other losses", lambda: run(other))
    apart = World("sgd")
    with torch.no_grad():
        apart.params["0.bias"].add_(rank)
    refused("not those of rank 0", lambda: run(apart))


def trained(kind: Any, folder: Path, rows: Any, valuation: Any = None, **settings: Any) -> tuple[Any, Seen]:
    extra = {} if valuation is None else {"valuation": Valuation(folder / "values", **valuation)}
    given: dict[str, Any] = {
        **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 1, "seed": 3},
        **{"use_cpu": True, "disable_tqdm": True, "report_to": [], "logging_steps": 1, "save_strategy": "no"},
        **{"learning_rate": 1e-3, "max_grad_norm": 0.1, **settings},
    }
    args = transformers.TrainingArguments(str(folder / "out"), **given)
    made = model()
    trainer, seen = kind(made, args, train_dataset=rows[3:], eval_dataset=rows[:3], **extra), Seen()
    trainer.add_callback(seen)
    trainer.train()
    return trainer, seen


def a_step_is_the_trainers(folder: Path) -> None:
    """As many rows as the steps take, or one fewer: accelerate evens batches out by a row that stands in twice."""
    torch.manual_seed(1)
    rows = texts(3 + 16)
    for name, (plain, mine), count, valuation, settings in (
        ("even", (transformers.Trainer, Trainer), 16, {"rule": "simpson"}, {}),  # held to one process by the test
        ("odd", (transformers.Trainer, Trainer), 15, {"rule": "simpson"}, {"average_tokens_across_devices": False}),
        ("own", (Own, OwnValued), 15, {"kind": "score"}, {}),
    ):
        one, wanted = trained(plain, folder / f"{name}-plain", rows[: 3 + count], **settings)
        two, found = trained(mine, folder / name, rows[: 3 + count], valuation, **settings)
        for gradients, theirs in zip(found.gradients, wanted.gradients, strict=True):
            torch.testing.assert_close(gradients, theirs)
        for log, other in zip(one.state.log_history[:2], two.state.log_history[:2], strict=True):
            assert abs(log["loss"] - other["loss"]) < 1e-9
            assert abs(log["grad_norm"] - other["grad_norm"]) < 1e-9
        distributed.barrier()
        table = store.open_record(folder / name / "values").table()
        kept = list(zip(table["step"].to_pylist(), table["sample_id"].to_pylist(), strict=True))
        assert len(set(kept)) == len(kept)
        assert {sample for _, sample in kept} == set(range(count))
        if name != "own":
            assert_adds_up(two, 1e-5)
            values, steps = table["value"].to_numpy().astype("float64"), table["step"].to_numpy()
            for account in two.accounts:
                assert abs(values[steps == account.step].sum() - account.values) < 1e-6 * abs(values).sum()


class Gathering(Valued, transformers.Trainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.accelerator.gather(torch.ones(()))
        return super().compute_loss(*args, **kwargs)


def main() -> None:
    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1])
    transformers.TrainingArguments(str(folder / "first"), use_cpu=True)  # makes the process group
    rank = distributed.get_rank()
    assert distributed.get_world_size() == 2
    steps_are_those_of_one_process(rank)
    a_sample_of_both_ranks_has_one_row(rank)
    ranks_that_differ_are_refused(rank)
    gc.freeze()  # a Trainer collects garbage before it trains, and what was imported is none
    a_step_is_the_trainers(folder)
    refused("gathers over processes", lambda: trained(Gathering, folder / "gathering", texts(7), {}))
    for values, rest, change in trainer_accelerate.main():
        assert abs(values + rest - change) < 1e-4 * abs(change)
    if SHARDS:
        torch.manual_seed(1)
        sharded_ranks.main(folder, texts(3 + 16))
    sys.stdout.write(f"rank {rank} agrees\n")
    distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
