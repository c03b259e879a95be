"""Meshes, placements, groups, uneven shares and lengths, drawn alike on every rank, and held to one process."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

import funcghost as fg
from funcghost.distributed import data_parallel, sharded
from funcghost.distributed.collectives import told_by_all
from funcghost.problem import Reduction
from tests.depth import DEEP
from tests.distributed.fsdp_ranks import close, drawn, like, losses_of, model, whole


class Case(NamedTuple):
    """How a model lies on the ranks, and what they have: for every micro-batch and rank the samples and their length.

    `mesh` is empty for data parallel. Blocks are `grouped` each by itself, together, or with the root.
    """

    mesh: tuple[int, ...]
    grouped: str
    axes: tuple[int, ...]
    reshard: bool
    checkpointed: bool
    synchronized: bool
    reduction: Reduction
    sizes: tuple[tuple[tuple[int, int], ...], ...]


@st.composite
def cases_on(draw: st.DrawFn, ranks: int) -> Case:
    """A case for that many ranks; not all of them are without samples."""
    shards = draw(st.sampled_from([size for size in range(1, ranks + 1) if ranks % size == 0]))
    mesh = draw(st.sampled_from([(), (ranks,), (ranks // shards, shards)]))
    sizes = st.tuples(st.integers(0, 3), st.integers(2, 5))
    batches = st.tuples(*[sizes] * ranks).filter(lambda rows: any(count for count, _ in rows))
    return Case(
        mesh,
        draw(st.sampled_from(["apart", "together", "not"])),
        draw(st.tuples(*[st.integers(0, 1)] * 3)),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from(["mean", "sum"])),
        draw(st.tuples(*[batches] * draw(st.integers(1, 2)))),
    )


def laid_out(case: Case, net: Any) -> None:
    """Shards the model as the case says."""
    names = ("replicate", "shard")[-len(case.mesh) :]
    mesh = init_device_mesh("cpu", case.mesh, mesh_dim_names=names)

    def placed(leaf: nn.Parameter) -> Shard:
        axis = min(case.axes[leaf.numel() % 3], leaf.dim() - 1)
        return Shard(axis if leaf.shape[axis] % case.mesh[-1] == 0 else 0)

    how: Any = {"mesh": mesh, "reshard_after_forward": case.reshard, "shard_placement_fn": placed}
    if case.grouped == "together":
        fully_shard([*net.blocks], **how)
    for block in net.blocks if case.grouped == "apart" else ():
        fully_shard(block, **how)
    fully_shard(net, **how)


def prepared(case: Case) -> tuple[dict[str, Any], Callable[..., Any], Any]:
    """Parameters, step, and where the step is taken: also where DDP would not average its own gradients."""
    net = model(checkpointed=case.checkpointed)
    if case.mesh:
        laid_out(case, net)
        step = sharded.grad_and_reduce(losses_of(net), net, reduction=case.reduction)
        return dict(net.named_parameters()), step, nullcontext
    ddp = DistributedDataParallel(net)
    step = data_parallel.grad_and_reduce(losses_of(net), reduction=case.reduction)
    return dict(net.named_parameters()), step, nullcontext if case.synchronized else ddp.no_sync


def held_to_one_process(rank: int, case: Case) -> None:
    """Scores and norms of a rank's samples, and gradients of all, accumulated over micro-batches."""
    ranks = distributed.get_world_size()
    assert told_by_all(case, None) == [case] * ranks
    params, step, where = prepared(case)
    plain = model()
    alone, truth = dict(plain.named_parameters()), {n: (p * 40).cos().detach() for n, p in model().named_parameters()}
    direction = like(truth, params) if case.mesh else truth
    one = fg.grad_and_reduce(losses_of(plain), reduction="sum")
    total, wanted = dict[str, Tensor](), dict[str, Tensor]()
    for number, rows in enumerate(case.sizes):
        batches = [drawn(100 * number + r, count, length) for r, (count, length) in enumerate(rows)]
        with where():
            found = step(params, batches[rank], {"dot": fg.dot(direction), "norm": fg.squared_norm()})
        weight = 1 / sum(count for count, _ in rows) if case.reduction == "mean" else 1
        for r, batch in enumerate(batches):
            out = one(alone, batch, {"dot": fg.dot(truth), "norm": fg.squared_norm()} if r == rank else {})
            wanted = {n: wanted.get(n, 0) + weight * g for n, g in out.grads.items()}
            if r == rank:
                close(found.losses, out.losses)
                close(found.reduced, out.reduced)
        total = {n: total.get(n, 0) + g for n, g in found.grads.items()}
    close(whole(total) if case.mesh else total, wanted)
    assert all(p.grad is None for p in params.values())


def cases(rank: int) -> None:
    """As many as the profile says, the same on all ranks: what fails on one fails in its first try."""
    ranks = distributed.get_world_size()

    @settings(
        max_examples=40 if DEEP else 2,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases_on(ranks))
    def held(case: Case) -> None:
        held_to_one_process(rank, case)

    held()


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    cases(distributed.get_rank())
    distributed.destroy_process_group()
