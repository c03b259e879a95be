"""What each of two processes runs of sharded models for `test_ranks.py`: loops and trainers, held to one process."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate
import pytest
import torch
import torch.nn.functional as F
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig

import funcghost as fg
from funcghost.attribution import in_run
from funcghost.distributed import sharded
from funcghost.integrations.sharded import ShardedRanks, ShardedSteps
from funcghost.integrations.steps import Kind
from funcghost.integrations.transformers import Trainer
from funcghost.training import updates
from funcghost.trees import split_params
from tests.integrations.test_transformers import assert_adds_up, model, train

NORM = 0.05


class Net(nn.Module):
    """A perceptron with shares of unlike sizes, and a layer that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.unused = nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.outer(self.inner(x).tanh())
        return found


class World:
    """Two steps of two microbatches of each rank, and a validation set."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = Net().double()
        self.optimizer: Any = torch.optim.AdamW(self.net.parameters(), lr=1e-3, weight_decay=0.1)
        self.steps = [[self.drawn(count) for count in (4, 3, 1, 2)] for _ in range(2)]
        self.validation = [self.drawn(5), self.drawn(4)]

    def drawn(self, count: int) -> Any:
        return {"x": torch.randn(count, 3).double(), "y": torch.randint(2, (count,))}

    def losses(self, params: Any, batch: Any) -> Tensor:
        own = isinstance(params["inner.weight"], DTensor)
        logits = self.net(batch["x"]) if own else torch.func.functional_call(self.net, params, (batch["x"],))
        return F.cross_entropy(logits, batch["y"], reduction="none")

    def halves(self, params: Any, batch: Any) -> Tensor:
        """What the mean over two ranks is the sum of."""
        return self.losses(params, batch) / 2

    def step(self, batches: Any) -> dict[str, Any]:
        """A step that one process makes, its account, and the scores of its samples."""
        params = fg.trainable(self.net)
        direction = in_run.validation_gradient(self.losses, params, self.validation)
        scores = [fg.reduce(self.halves)(params, batch, fg.dot(direction)) for batch in batches]
        update, state = updates.of(self.optimizer, params)
        how: Any = {"reduction": "sum", "rule": "discrete", "validation_losses": self.losses}
        account = in_run.along_path(self.halves, updates.clipped(update, NORM), **how)
        made = account(params, in_run.Microbatches(batches), state=state, validation=self.validation)
        torch.stack([self.halves(params, batch).sum() for batch in batches]).sum().backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"path": made.values, "rest": made.rest, "change": made.change, "score": torch.cat(scores)}


@contextmanager
def devices_with_fsdp() -> Iterator[None]:
    """Accelerate has FSDP for GPUs; on the CPU it passes over the plugin, and takes DDP."""
    known: Any = PartialState._shared_state
    kind = known["distributed_type"]
    AcceleratorState._reset_state()
    GradientState._reset_state()
    known["distributed_type"] = DistributedType.MULTI_GPU
    try:
        with mock.patch.dict(os.environ):
            yield
    finally:
        AcceleratorState._reset_state()
        known["distributed_type"] = kind


def a_loop_of_accelerate_is_one_process(rank: int, kind: Kind) -> None:
    """Rank 0 takes the first and the third batch, rank 1 the others."""
    world, alone = World(), World()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=15)
    accelerator = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin, gradient_accumulation_steps=2)
    net, optimizer = accelerator.prepare(world.net, world.optimizer)
    params: Any = fg.trainable(net)
    assert all(isinstance(leaf, DTensor) for leaf in params.values())
    validation = sharded.validation(world.losses, net, params, [world.validation[rank]])
    steps = ShardedSteps(world.losses, net, params, validation, kind=kind, rule="discrete")
    for batches in world.steps:
        for place in (rank, rank + 2):
            with accelerator.accumulate(net):
                first = sum(len(batch["y"]) for batch in batches[:place])
                steps.take(batches[place], torch.arange(first, first + len(batches[place]["y"])))
                if accelerator.sync_gradients:
                    steps.settle(optimizer.optimizer, NORM)
                    accelerator.clip_grad_norm_(net.parameters(), NORM)
                optimizer.step()
                optimizer.zero_grad()
        found = steps.settled()
        order = found.ids.argsort()
        assert found.ids[order].tolist() == list(range(10))
        wanted = alone.step(batches)
        torch.testing.assert_close(found.values[order], wanted[kind])
        if kind == "path":
            torch.testing.assert_close(found.rest, wanted["rest"])
            torch.testing.assert_close(found.change, wanted["change"], rtol=1e-5, atol=0)
        for name, leaf in alone.net.named_parameters():
            torch.testing.assert_close(params[name].detach().full_tensor(), leaf.detach())


def a_trainers_step_adds_up(folder: Path, rows: Any) -> None:
    """The record is held to one process by the test."""
    settings: dict[str, Any] = {"max_grad_norm": 0.1, "validation": 3}
    if distributed.get_rank() == 0:
        model().save_pretrained(folder / "model")
    distributed.barrier()
    how = DistributedConfig(fsdp_size=2)
    made = transformers.LlamaForCausalLM.from_pretrained(folder / "model", distributed_config=how, dtype=torch.float64)
    valued, _ = train(Trainer, made, folder / "loaded", rows, {"rule": "simpson"}, **settings)
    assert_adds_up(valued, 1e-5)
    settings |= {"fsdp": True, "fsdp_config": {"activation_checkpointing": True}}
    with ExitStack() as until_the_end:

        def with_fsdp(*args: Any, **kwargs: Any) -> Trainer:
            until_the_end.enter_context(devices_with_fsdp())  # arguments find out anew what there is
            return Trainer(*args, **kwargs)

        valued, _ = train(with_fsdp, model(), folder / "plugin", rows, {"rule": "simpson"}, **settings)
        assert valued.accelerator.is_fsdp2
        assert_adds_up(valued, 1e-5)
        valued.accelerator.state.fsdp_plugin.fsdp_version = 1
        with pytest.raises(fg.InputError, match="FSDP of version 1"):
            valued.check_values()


def shares_are_measured_as_what_they_are_shares_of(rank: int) -> None:
    net: Any = fully_shard(Net())
    ranks = ShardedRanks(net, split_params(fg.trainable(net)), None)
    leaves = [leaf.detach() for leaf in net.parameters()]
    wanted = [leaf.full_tensor().double().norm() for leaf in leaves]
    torch.testing.assert_close(ranks.norms(ranks.own(leaves + leaves)), torch.stack(wanted + wanted))
    assert ranks.largest(torch.tensor([rank, -rank])).tolist() == [1, 0]


def what_is_not_sharded_so_is_refused(rank: int) -> None:
    world = World()
    net: Any = fully_shard(world.net)
    params = fg.trainable(net)
    validation = sharded.validation(world.losses, net, params, [world.validation[rank]])
    with pytest.raises(fg.InputError, match="no pairs_memory"):
        ShardedSteps(world.losses, net, params, validation, pairs_memory=0)
    steps = ShardedSteps(world.losses, net, params, validation)
    with pytest.raises(fg.InputError, match="packed in one row"):
        steps.take(world.steps[0][0], torch.arange(4), torch.zeros(1, 4))
    net.set_gradient_divide_factor(1.0)
    with pytest.raises(fg.InputError, match="divided by"):
        ShardedSteps(world.losses, net, params, validation)
    with pytest.raises(fg.InputError, match="fully_shard was applied to"):
        ShardedSteps(world.losses, Net(), params, validation)


def main(folder: Path, rows: Any) -> None:
    rank = distributed.get_rank()
    with devices_with_fsdp():
        a_loop_of_accelerate_is_one_process(rank, "path")
        a_loop_of_accelerate_is_one_process(rank, "score")
    shares_are_measured_as_what_they_are_shares_of(rank)
    what_is_not_sharded_so_is_refused(rank)
    a_trainers_step_adds_up(folder, rows)
