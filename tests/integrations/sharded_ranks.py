"""What each of two processes runs of sharded models for `test_ranks.py`: loops under FSDP2, held to one process."""

from typing import Any

import accelerate
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

import funcghost as fg
from funcghost.attribution import in_run
from funcghost.distributed import sharded
from funcghost.integrations.sharded import ShardedSteps
from funcghost.training import updates

OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1),
}
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
    """Batches of two steps, of two microbatches each, of every rank; and a validation set."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        self.net = Net().double()
        self.optimizer: Any = OPTIMIZERS[kind](self.net.parameters())
        sizes = (4, 3, 1, 2)  # rank 0 has the first and the third
        self.steps = [[self.drawn(n) for n in sizes] for _ in range(2)]
        self.validation = [self.drawn(5), self.drawn(4)]

    def drawn(self, count: int) -> Any:
        return {"x": torch.randn(count, 3).double(), "y": torch.randint(2, (count,))}

    def losses(self, params: Any, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch["x"]), batch["y"], reduction="none")


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def accelerated(world: World) -> accelerate.Accelerator:
    """What accelerate makes of a model on devices for which it has FSDP: on the CPU it passes over the plugin."""
    AcceleratorState._reset_state()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=15)
    made = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin, gradient_accumulation_steps=2)
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    world.net, world.optimizer = made.prepare(world.net, world.optimizer)
    return made


def steps_are_those_of_one_process(rank: int) -> None:
    for optimizer, kind in (("sgd", "path"), ("adamw", "path"), ("sgd", "score")):
        world, alone = World(optimizer), World(optimizer)
        accelerator = accelerated(world)
        params: Any = fg.trainable(world.net)
        assert all(isinstance(leaf, DTensor) for leaf in params.values())
        validation = sharded.validation(world.losses, world.net, params, [world.validation[rank]])
        steps = ShardedSteps(world.losses, world.net, params, validation, kind=kind, rule="simpson")
        model = alone.net
        held = fg.trainable(model)
        for batches in world.steps:
            for place, batch in enumerate(batches[rank::2]):
                with accelerator.accumulate(world.net):
                    first = sum(len(other["y"]) for other in batches[: 2 * place + rank])
                    steps.take(batch, torch.arange(first, first + len(batch["y"])))
                    if accelerator.sync_gradients:
                        steps.settle(world.optimizer.optimizer, NORM)
                        accelerator.clip_grad_norm_(world.net.parameters(), NORM)
                    world.optimizer.step()
                    world.optimizer.zero_grad()
            found = steps.settled()
            wanted = alone_step(alone, held, batches, kind)
            order = found.ids.argsort()
            torch.testing.assert_close(found.ids[order], torch.arange(10))
            torch.testing.assert_close(found.values[order], wanted[0])
            if kind == "path":
                torch.testing.assert_close(found.rest, wanted[1])
                torch.testing.assert_close(found.change, wanted[2], rtol=1e-5, atol=0)
            for name, leaf in held.items():
                torch.testing.assert_close(whole(params[name].detach()), leaf.detach())


def alone_step(alone: World, params: Any, batches: Any, kind: str) -> tuple[Any, ...]:
    """The values, the rest and the change of a step that one process makes; its parameters are moved."""

    def losses(given: Any, batch: Any) -> Tensor:
        logits = torch.func.functional_call(alone.net, given, (batch["x"],))
        return F.cross_entropy(logits, batch["y"], reduction="none")

    def halves(given: Any, batch: Any) -> Tensor:
        return losses(given, batch) / 2

    reached = {name: leaf for name, leaf in params.items() if "unused" not in name}
    direction = in_run.validation_gradient(losses, params, alone.validation)
    scores = [fg.reduce(halves)(params, batch, fg.dot(direction)) for batch in batches]
    update, state = updates.of(alone.optimizer, params)
    clipped = updates.clipped(update, NORM)
    account = in_run.along_path(halves, clipped, reduction="sum", rule="simpson", validation_losses=losses)
    wanted = account(params, in_run.Microbatches(batches), state=state, validation=alone.validation)
    for batch in batches:
        halves(params, batch).sum().backward()
    nn.utils.clip_grad_norm_(reached.values(), NORM)
    alone.optimizer.step()
    alone.optimizer.zero_grad()
    return (torch.cat(scores) if kind == "score" else wanted.values), wanted.rest, wanted.change


def main() -> None:
    rank = distributed.get_rank()
    steps_are_those_of_one_process(rank)
