"""What each of two ranks runs on tensor parallel models: everything is compared with one process."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

import funcghost as fg
from funcghost.attribution import in_run
from funcghost.distributed import sharded, tensor_parallel
from funcghost.training import updates
from tests.depth import DEEP
from tests.versions import SHARDS

VOCABULARY, WIDTH, LENGTH = 10, 6, 4


class Layer(nn.Module):
    """A perceptron behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """An embedding, two layers, of which the second is checkpointed, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.first, self.second, self.norm, self.checkpointed = Layer(), Layer(), nn.RMSNorm(WIDTH), True

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.first(self.tokens(tokens))
        if self.checkpointed:
            x = checkpoint(self.second, x, use_reentrant=False, context_fn=fg.checkpoint_context)
        else:
            x = self.second(x)
        return self.head(self.norm(x))


def net() -> Any:
    torch.manual_seed(0)
    return Net().double()


def losses_of(net: nn.Module) -> Any:
    return lambda params, batch: losses_on(net(batch), batch)


def losses_on(logits: Tensor, batch: Tensor) -> Tensor:
    each = F.cross_entropy(logits.flatten(0, 1), batch.roll(1, 1).flatten(), reduction="none")
    return each.view(batch.shape).sum(1)


PLANS: dict[str, Any] = {
    "columns and rows": lambda: {
        f"{layer}.{part}": style()
        for layer in ("first", "second")
        for part, style in (("up", ColwiseParallel), ("down", RowwiseParallel))
    },
    "sequence": lambda: {
        "tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        **{
            f"{layer}.{part}": style
            for layer in ("first", "second")
            for part, style in (
                ("norm", SequenceParallel()),
                ("up", ColwiseParallel(input_layouts=Shard(1))),
                ("down", RowwiseParallel(output_layouts=Shard(1))),
            )
        },
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    },
}


def close(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11)


def held_to_one_process(mesh: Any, plan: Any) -> None:
    """Scores, norms, products, pairs and gradients."""
    plain, split = net(), net()
    parallelize_module(split, mesh, plan)
    alone, params = dict(plain.named_parameters()), dict(split.named_parameters())
    batch = torch.randint(VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    truth = {n: torch.linspace(-1, 1, p.numel(), dtype=p.dtype).view(p.shape).cos() for n, p in alone.items()}
    direction = {
        n: distribute_tensor(truth[n], p.device_mesh, p.placements) if isinstance(p, DTensor) else truth[n]
        for n, p in params.items()
    }

    def asked(v: Any) -> Any:
        return {
            "dot": fg.dot(v),
            "low": fg.dot(fg.compress(truth, rank=2)),
            "norm": fg.squared_norm(),
            "gram": fg.gram(),
        }

    wanted = fg.grad_and_reduce(losses_of(plain))(alone, batch, asked(truth))
    step = tensor_parallel.grad_and_reduce(losses_of(split))
    for given in (direction, direction, truth):
        found = step(params, batch, asked(given))
        assert all(type(value) is Tensor for value in found.reduced.values())
        close(found.reduced, wanted.reduced)
    close({n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in found.grads.items()}, wanted.grads)
    for name, param in params.items():
        if isinstance(param, DTensor):
            assert found.grads[name].placements == param.placements, name
    kept = tensor_parallel.pairs(losses_of(split))(params, batch)
    close(fg.apply(fg.dot(truth), kept), wanted.reduced["dot"])


def pure_functions(mesh: Any) -> None:
    """DTensors as params of losses of one's own."""
    w, x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)), torch.ones(5, 6).cumsum(0) / 7
    asked = {"norm": fg.squared_norm(), "dot": fg.dot({"w": w.cos()})}
    wanted = fg.reduce(lambda p, x: (x @ p["w"].T).tanh().square().sum(1))({"w": w}, x, asked)
    given = distribute_tensor(x, mesh, [Replicate()])
    for placement in (Shard(0), Shard(1), Replicate()):
        leaf = distribute_tensor(w, mesh, [placement])
        found = tensor_parallel.reduce(lambda p, x: (x @ p["w"].T).tanh().square().sum(1).full_tensor())(
            {"w": leaf}, given, asked
        )
        torch.testing.assert_close(found, wanted)
    with pytest.raises(fg.InputError, match="found a DTensor"):
        tensor_parallel.reduce(lambda p, x: (x @ p["w"].T).square().sum(1))({"w": leaf}, given, asked)


def sharded_as_well(shards: int, plans: Iterable[str]) -> None:
    """Tensor parallel and then sharded: samples of a group of tensor parallel ranks, gradients of all."""
    ranks = distributed.get_world_size()
    mesh = init_device_mesh("cpu", (shards, ranks // shards), mesh_dim_names=("shard", "tensor"))
    for plan in (PLANS[name] for name in plans):
        plain, split = net(), net()
        parallelize_module(split, mesh["tensor"], plan())
        for part in (split.first, split.second, split):
            fully_shard(part, mesh=mesh["shard"])
        alone, params = dict(plain.named_parameters()), dict(split.named_parameters())
        source = torch.Generator().manual_seed(0)
        batch, validation = (torch.randint(VOCABULARY, (5, LENGTH), generator=source) for _ in range(2))
        here = mesh.get_local_rank("shard")
        own, other = batch.tensor_split(shards)[here], validation.tensor_split(shards)[here]
        losses = losses_of(split)
        direction = sharded.validation_gradient(losses, split, params, [other])
        truth = fg.grad_and_reduce(losses_of(plain))(alone, validation).grads
        close({n: g.full_tensor() for n, g in direction.items()}, truth)
        step = sharded.grad_and_reduce(losses, split)
        wanted = fg.grad_and_reduce(losses_of(plain))(alone, batch, {"dot": fg.dot(truth), "norm": fg.squared_norm()})
        for given in (direction, truth, direction):
            found = step(params, own, {"dot": fg.dot(given), "norm": fg.squared_norm()})
            close(found.reduced, {n: v.tensor_split(shards)[here] for n, v in wanted.reduced.items()})
            close({n: g.full_tensor() for n, g in found.grads.items()}, wanted.grads)


def accounted(shards: int) -> None:
    """In-run values of a model that is tensor parallel as well, clipped by the norm of all its shares."""
    ranks = distributed.get_world_size()
    mesh = init_device_mesh("cpu", (shards, ranks // shards), mesh_dim_names=("shard", "tensor"))
    plain, split = net(), net()
    plain.checkpointed = False
    parallelize_module(split, mesh["tensor"], PLANS["columns and rows"]())
    for part in (split.first, split.second, split):
        fully_shard(part, mesh=mesh["shard"])
    source, here = torch.Generator().manual_seed(0), mesh.get_local_rank("shard")
    batch, validation = (torch.randint(VOCABULARY, (5, LENGTH), generator=source) for _ in range(2))
    found = list[in_run.Account]()
    for model, parts in ((plain, 1), (split, shards)):
        params: dict[str, Any] = dict(model.named_parameters())
        update, state = updates.of(torch.optim.Adam(params.values(), lr=0.01), params)
        clipped, losses = updates.clipped(update, 0.1), losses_of(model)
        given = [rows.tensor_split(parts)[here if parts > 1 else 0] for rows in (batch, validation)]
        step = (
            in_run.along_path(fg.module_losses(plain, losses_on), clipped)
            if model is plain
            else sharded.along_path(losses, split, clipped)
        )
        found.append(step(params, given[0], state=state, validation=[given[1]]))
    one, ours = found
    close(ours.values, one.values.tensor_split(shards)[here])
    for own, wanted in ((ours.rest, one.rest), (ours.change, one.change)):
        close(own, wanted.to(own.dtype))
    close({n: p.full_tensor() for n, p in ours.params.items()}, one.params)


class Scaled(nn.Module):
    """An ordinary parameter between a column and a row parallel layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.scale, self.down = nn.Linear(6, 8), nn.Parameter(torch.ones(())), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) * self.scale)


def refused(rank: int, mesh: Any) -> None:
    """What would be a part of a sum, and other batches on other ranks."""
    torch.manual_seed(0)
    plan, x = {"up": ColwiseParallel(), "down": RowwiseParallel()}, torch.ones(3, 6).cumsum(1)
    scaled = parallelize_module(Scaled(), mesh, plan)
    score = tensor_parallel.reduce(lambda params, x: scaled(x).square().sum(1))
    with pytest.raises(fg.InputError, match=r"the gradient of params\['scale'\] must be the same on all ranks"):
        score(dict(scaled.named_parameters()), x, fg.squared_norm())
    with pytest.raises(fg.InputError, match="tensor 0 of the batch must be the same"):
        score({n: p for n, p in scaled.named_parameters() if n != "scale"}, x * (1 + rank), fg.squared_norm())
    with pytest.raises(fg.InputError, match="no parameter is a DTensor"):
        tensor_parallel.reduce(lambda p, x: x @ p["w"])({"w": torch.ones(6)}, x, fg.squared_norm())


def cases(rank: int) -> None:
    """All of them, on two ranks."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for name in PLANS if DEEP else ("sequence",):
        held_to_one_process(mesh, PLANS[name]())
    pure_functions(mesh)
    refused(rank, mesh)
    for shards in {1, distributed.get_world_size() // 2}:
        if SHARDS:
            sharded_as_well(shards, PLANS if DEEP else ("columns and rows",))
            accounted(shards)
