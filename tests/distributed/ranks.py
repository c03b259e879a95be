"""What each rank of the tests beside this runs, by torchrun: everything is compared with one process on all samples."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import distributed_in_run
import distributed_pretraining
import funcghost as fg
from funcghost.attribution import curvature
from funcghost.distributed import data_parallel, plans
from funcghost.distributed.collectives import summed_over_ranks
from tests.depth import DEEP
from tests.distributed import drawn_ranks, fsdp_ranks, tp_ranks
from tests.models.corpora import COUNT, make
from tests.versions import SHARDS

SPLITS = ((3, 2), (1, 6), (0, 4), (5, 0), (1, 1))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 11)).double()


def losses_of(net: nn.Module) -> Any:
    def losses(params: Any, batch: Any) -> torch.Tensor:
        logits = torch.func.functional_call(net, params, (batch,))
        return (
            nn.functional.cross_entropy(logits.flatten(0, 1), batch.roll(1, 1).flatten(), reduction="none")
            .view(batch.shape)
            .sum(1)
        )

    return losses


def close(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


def curvatures_are_those_of_one_process(net: nn.Module, rank: int) -> None:
    """Every factor is that of all batches, also of a parameter that no loss depends on."""
    own_losses, params = losses_of(net), {**dict(net.named_parameters()), "idle": torch.ones(2, dtype=torch.float64)}

    def losses(params: Any, batch: Any) -> torch.Tensor:
        return own_losses({name: leaf for name, leaf in params.items() if name != "idle"}, batch)

    batches = list(torch.randint(11, (7, 5), generator=torch.Generator().manual_seed(1)).split(2))
    v = {name: torch.ones_like(leaf) for name, leaf in params.items()}
    for kind in (curvature.diagonal, curvature.kfac, curvature.ekfac, curvature.exact):
        found = kind(losses, params, batches[rank::2], across=data_parallel.across())
        alone = kind(losses, params, batches)
        assert found.made_of == alone.made_of
        for name, leaf in found.damped(0.1)(v).items():
            torch.testing.assert_close(leaf, alone.damped(0.1)(v)[name], rtol=1e-8, atol=1e-10)


def held_to_one_process(net: nn.Module, rank: int, split: tuple[int, int], reduction: Any) -> None:
    """Scores, norms and gradients of a rank's samples are those of one process on the samples of all."""
    losses, params = losses_of(net), dict(net.named_parameters())
    generator = torch.Generator().manual_seed(sum(split))
    batch, validation = (torch.randint(11, (sum(split), 5), generator=generator) for _ in range(2))
    own = slice(0, split[0]) if rank == 0 else slice(split[0], None)
    direction = data_parallel.validation_gradient(losses, params, [validation[own]] if split[rank] else [])
    reducers = {"dot": fg.dot(direction), "norm": fg.squared_norm()}
    out = data_parallel.grad_and_reduce(losses, reduction=reduction)(params, batch[own], reducers)

    whole = fg.grad_and_reduce(losses)(params, validation, {}).grads
    close(direction, whole)
    alone = fg.grad_and_reduce(losses, reduction=reduction)(
        params, batch, {"dot": fg.dot(whole), "norm": fg.squared_norm()}
    )
    close(out.grads, alone.grads)
    close(out.losses, alone.losses[own])
    close(out.reduced, {name: value[own] for name, value in alone.reduced.items()})
    (total,) = summed_over_ranks([out.reduced["dot"].sum(0, keepdim=True)])
    inner = sum((a * b).sum() for a, b in zip(whole.values(), alone.grads.values(), strict=True))
    close(total / (sum(split) if reduction == "mean" else 1), inner.view(1))


def averaged_as_ddp_does(net: nn.Module, rank: int) -> None:
    """With as many samples on each rank, the gradient is DDP's, and DDP's own is undisturbed."""
    ddp = DistributedDataParallel(net)
    params, batch = dict(ddp.module.named_parameters()), torch.arange(20).view(4, 5) % 11 + 0
    own = batch[2 * rank : 2 * rank + 2]
    out = data_parallel.grad_and_reduce(losses_of(ddp.module))(params, own, {"norm": fg.squared_norm()})
    logits = ddp(own)
    nn.functional.cross_entropy(logits.flatten(0, 1), own.roll(1, 1).flatten(), reduction="sum").div(2).backward()
    close(out.grads, {name: param.grad for name, param in params.items()})


def planned_on_one_rank(net: nn.Module, rank: int) -> None:
    """No other plans, and all hear of it when that goes wrong."""
    losses, params = losses_of(net), dict(net.named_parameters())
    batch = torch.randint(11, (2 + rank, 5), generator=torch.Generator().manual_seed(rank))
    made = list[int]()

    def make() -> fg.Plan:
        made.append(rank)
        return fg.plan(losses, params, batch)

    plan = plans.shared_plan(make)
    assert made == [0] * (rank == 0)
    assert plan.digest == fg.plan(losses, params, batch).digest
    step = data_parallel.grad_and_reduce(losses, plan=plan)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr("funcghost.transforms.steps.make_plan")
        found = step(params, batch, fg.squared_norm())
    close(found.reduced, fg.reduce(losses)(params, batch, fg.squared_norm()))
    with pytest.raises(fg.PlanError if rank else fg.InputError, match="depend on params"):
        plans.shared_plan(lambda: fg.plan(lambda params, x: x, {"w": torch.ones(1)}, torch.ones(2)))
    with pytest.raises(fg.PlanError if rank else fg.InputError, match="must give a plan from"):
        plans.shared_plan(lambda: "none")  # type: ignore[arg-type, return-value]


def refused_where_ranks_differ(rank: int) -> None:
    step = data_parallel.grad_and_reduce(lambda params, x: x @ params["w"])
    for params, what in (
        ({"w": torch.full((2,), float(rank))}, "values"),
        ({"w": torch.zeros(2, dtype=(torch.float32, torch.float64)[rank])}, "dtypes"),
    ):
        with pytest.raises(fg.InputError, match=rf"{what} .*ranks \[1\]"):
            step(params, torch.eye(2, dtype=params["w"].dtype), {})


def refused_where_losses_talk(rank: int) -> None:
    """Experts, keys or samples that lie on other ranks: before anything is sent that the others do not wait for."""
    everyone = distributed.group.WORLD
    assert everyone is not None

    def losses(params: Any, x: torch.Tensor) -> torch.Tensor:
        other = all_to_all_single_autograd(x @ params["w"], None, None, everyone)
        return (other @ params["v"]).square()

    params = {"w": torch.eye(2), "v": torch.ones(2)}
    for score in (fg.reduce(losses), data_parallel.grad_and_reduce(losses)):
        for reducer in (fg.squared_norm(), fg.dot(params)):
            with pytest.raises(fg.UnsupportedOpError, match=r"talk to other processes .*all_to_all_single"):
                score(params, torch.ones(4, 2), reducer)


def refused_where_sharded() -> None:
    mesh = distributed.device_mesh.init_device_mesh("cpu", (2,))
    params = {"w": distribute_tensor(torch.ones(2), mesh, [Shard(0)])}
    with pytest.raises(fg.InputError, match=r"'w'.* is a DTensor"):
        data_parallel.grad_and_reduce(lambda params, x: x @ params["w"])(params, torch.eye(2), {})


def buckets_do_not_matter(rank: int) -> None:
    values = [torch.full(shape, rank + 1.0, dtype=dtype) for shape in ((3,), (), (2, 2), (0,)) for dtype in DTYPES]
    for size in (1, 16, 2**20):
        for found, value in zip(summed_over_ranks(values, bucket=size), values, strict=True):
            assert torch.equal(found, torch.full_like(value, 3.0)), size


DTYPES = (torch.float32, torch.float64)


def a_corpus(folder: Path) -> None:
    """Each scores its parts of a corpus, without a word to the other; what came of it the test compares."""
    assert make(folder, progress=False).samples in range(1, COUNT)


def main() -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    net = model()
    for split in SPLITS:
        for reduction in ("mean", "sum"):
            held_to_one_process(net, rank, split, reduction)
    curvatures_are_those_of_one_process(net, rank)
    averaged_as_ddp_does(model(), rank)
    planned_on_one_rank(net, rank)
    refused_where_ranks_differ(rank)
    refused_where_sharded()
    buckets_do_not_matter(rank)
    refused_where_losses_talk(rank)
    if SHARDS:
        fsdp_ranks.cases(rank)
        drawn_ranks.cases(rank)
        distributed_pretraining.main(["--steps", "1", "--windows", "3", "--context", "8", "--layers", "1"])
    else:
        fsdp_ranks.refused_on_an_older_torch()
    tp_ranks.cases(rank)
    strategies = distributed_in_run.STRATEGIES if SHARDS else ("ddp", "tp")
    for strategy in strategies if DEEP else strategies[-1:]:  # compares with one process
        distributed_in_run.main(["--strategy", strategy, "--steps", "2", "--windows", "5", "--context", "8"])
    a_corpus(Path(os.environ["FUNCGHOST_CORPUS"]))
    distributed.barrier()
    print(f"rank {rank} agrees", flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
