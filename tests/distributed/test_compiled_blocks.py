"""Blocks under `torch.compile` in one process; `fsdp_ranks.py` has them under `fully_shard`."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import funcghost as fg
from funcghost.distributed import sharded
from tests.models.small import like
from tests.versions import SHARDS

if SHARDS:
    from funcghost.distributed.compiled_blocks import compiled_blocks
    from funcghost.distributed.compiled_graphs import Block as Graph

pytestmark = [
    pytest.mark.skipif(not SHARDS, reason="compiled blocks are those of sharded models"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # Dynamo
]

WIDTH = 6


class Block(nn.Module):
    """A perceptron behind a norm, with something of Python's in it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.factor = nn.RMSNorm(WIDTH), 1.0
        self.expand, self.contract = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.contract(F.gelu(self.expand(self.norm(x)))) * self.factor


class Breaks(Block):
    """Dynamo does not take it as a whole."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if float(x.detach().sum()) > 1e9 else 2.0)


class Mixes(Block):
    """The samples, so that tangents go on to the next block."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.expand(x).mean(0).sum()


def net_of(kind: type[nn.Module], compiled: bool) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = kind(), kind()
    for block in blocks if compiled else ():
        block.compile(backend="aot_eager")
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *blocks, nn.Linear(WIDTH, WIDTH)).double()


def losses_of(net: nn.Module) -> Callable[..., Tensor]:
    return lambda params, x: net(x).square().sum(1)


@contextmanager
def counted() -> Iterator[list[int]]:
    """How many blocks have run as one op."""
    count, original = [0], Graph._as_one

    def counting(self: Any, *args: Any) -> Any:
        found = original(self, *args)
        count[0] += 1
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Graph, "_as_one", counting)
        yield count


def steps(net: nn.Module) -> tuple[Callable[[Tensor, Any], Any], dict[str, Any]]:
    """A step of a model whose blocks may be compiled, and its parameters."""
    step, params = fg.grad_and_reduce(losses_of(net)), dict(net.named_parameters())

    def taken(x: Tensor, reducers: Any) -> Any:
        with compiled_blocks(net):
            return step(params, x, reducers)

    return taken, params


def close(found: Any, wanted: Any) -> None:
    for own, other in ((found.losses, wanted.losses), (found.reduced, wanted.reduced), (found.grads, wanted.grads)):
        torch.testing.assert_close(own, other, rtol=1e-11, atol=1e-11)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    distributed.init_process_group("gloo", f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_scores_and_gradients_are_those_of_uncompiled_blocks(mesh: DeviceMesh) -> None:
    net, plain = net_of(Block, True), net_of(Block, False)
    for part in (net[1], net[2], net):
        fully_shard(part, mesh=mesh)
    params, alone = dict(net.named_parameters()), dict(plain.named_parameters())
    x, v, w = torch.randn(3, WIDTH).double(), like(alone), like(alone)
    step, truth = sharded.grad_and_reduce(losses_of(net), net), fg.grad_and_reduce(losses_of(plain))

    def compared(times: int) -> None:
        low, placed = fg.compress(w, rank=2), {n: distribute_tensor(leaf, mesh, [Shard(0)]) for n, leaf in v.items()}
        with counted() as count:
            found = step(params, x, {"one": fg.dot(placed), "low": fg.dot(low)})
            wanted = truth(alone, x, {"one": fg.dot(v), "low": fg.dot(low)})
            close(found._replace(grads={name: leaf.full_tensor() for name, leaf in found.grads.items()}), wanted)
        assert count == [times]

    compared(2)
    compared(2)
    for each in (net, plain):
        vars(each[1])["factor"] = 3.0  # what Python says in a block counts as it is now
    compared(2)
    with counted() as count:
        found, wanted = step(params, x, fg.squared_norm()), truth(alone, x, fg.squared_norm())
        torch.testing.assert_close(found.reduced, wanted.reduced, rtol=1e-11, atol=1e-11)
    assert count == [0]  # to make factors it looks at every op


def test_directions_are_not_read_before_the_backward() -> None:
    net, other = net_of(Block, True), net_of(Block, False)
    params, alone, x = dict(net.named_parameters()), dict(other.named_parameters()), torch.randn(1, WIDTH).double()
    v = like(params)
    kept = {name: leaf.clone() for name, leaf in v.items()}

    def come(_: Tensor) -> None:
        for name, leaf in v.items():
            leaf.data.copy_(kept[name])

    def losses(params: Any, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():  # it is none of the losses' ops
            for leaf in v.values():
                leaf.data.fill_(torch.nan)  # as good as freed
        found = losses_of(net)(params, x)
        found.register_hook(come)
        return found

    with compiled_blocks(net), counted() as count:
        step = fg.grad_and_reduce(losses, plan=fg.plan(losses_of(net), params, x))
        close(step(params, x, fg.dot(v)), fg.grad_and_reduce(losses_of(other))(alone, x, fg.dot(kept)))
    assert count == [2]


@pytest.mark.parametrize(("kind", "runs"), [(Breaks, 0), (Mixes, 1)])
def test_what_cannot_run_as_one_op_runs_as_it_is(
    kind: type[nn.Module], runs: int, caplog: pytest.LogCaptureFixture
) -> None:
    (step, params), (plain, _) = steps(net_of(kind, True)), steps(net_of(kind, False))
    x, v = torch.randn(3, WIDTH, dtype=torch.float64), like(params)
    with counted() as count, caplog.at_level(logging.WARNING, "funcghost"):
        close(step(x, fg.dot(v)), plain(x, fg.dot(v)))
    assert count == [runs]
    assert caplog.text.count("given to torch.compile runs") == 1
