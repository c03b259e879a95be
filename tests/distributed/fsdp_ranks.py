"""What each of two ranks runs on models under `fully_shard`: everything is compared with one process on all samples."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import funcghost as fg
from funcghost.attribution import in_run
from funcghost.distributed import sharded
from funcghost.distributed.collectives import summed_over_ranks
from funcghost.training import updates
from tests.depth import DEEP
from tests.distributed.test_compiled_blocks import counted

VOCABULARY, WIDTH, LENGTH = 11, 6, 5


class Block(nn.Module):
    """Attention and a perceptron, behind norms."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.inputs, self.output = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.expand, self.contract = nn.Linear(WIDTH, 2 * WIDTH + 1), nn.Linear(2 * WIDTH + 1, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.inputs(self.first(x)).chunk(3, -1))
        x = x + self.output(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.contract(F.gelu(self.expand(self.second(x))))


class Tied(nn.Module):
    """A small language model with a head tied to the embedding; blocks are checkpointed if asked for."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.tokens, self.norm, self.checkpointed = nn.Embedding(VOCABULARY, WIDTH), nn.LayerNorm(WIDTH), checkpointed
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for block in self.blocks:
            if self.checkpointed:
                x = checkpoint(block, x, use_reentrant=False, context_fn=fg.checkpoint_context)
            else:
                x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)


class Awkward(nn.Module):
    """Samples mixed before a layer, a weight in disguise, another weight in another op when a sample says so."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm, self.summary = nn.Embedding(VOCABULARY, WIDTH), nn.BatchNorm1d(LENGTH), Summary()
        self.blocks = nn.ModuleList([Disguised(), Disguised()])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.tokens(tokens))
        for block in self.blocks:
            x = block(x, self.summary(x))
        return x


class Summary(nn.Module):
    """What all samples have in common."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x).mean(0)).tanh()


class Disguised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor, common: Tensor) -> Tensor:
        return x * (1 + self.scale) * common + (x @ (self.weight.t() * 2)).tanh()


class Chooses(nn.Module):
    """Other ops where the batch says so: ranks need not run the same."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.one, self.other = (
            nn.Embedding(VOCABULARY, WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, WIDTH, bias=False),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        return F.linear(self.one(x) if bool((tokens == 0).any()) else self.other(x.tanh()), self.tokens.weight)


def model(kind: Callable[..., Any] = Tied, **how: Any) -> Any:
    torch.manual_seed(0)
    return kind(**how).double()


def losses_of(net: nn.Module) -> Any:
    def losses(params: Any, batch: Tensor) -> Tensor:
        return losses_on(net(batch), batch)

    return losses


def losses_on(logits: Tensor, batch: Tensor) -> Tensor:
    if logits.shape[-1] != VOCABULARY:
        return logits.square().flatten(1).sum(1)
    each = F.cross_entropy(logits.flatten(0, 1), batch.roll(1, 1).flatten(), reduction="none")
    return each.view(batch.shape).sum(1)


def close(found: Any, wanted: Any, rtol: float = 1e-11) -> None:
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=rtol, check_dtype=rtol < 1e-8)


def whole(tree: dict[str, Any]) -> dict[str, Tensor]:
    return {name: leaf.full_tensor().detach() for name, leaf in tree.items()}


def like(tree: dict[str, Tensor], params: dict[str, Any]) -> dict[str, Any]:
    return {n: distribute_tensor(tree[n], p.device_mesh, p.placements) for n, p in params.items()}


def shard(net: Any, *, nested: bool = True, **how: Any) -> Any:
    for block in net.blocks if nested else ():
        fully_shard(block, **how)
    return fully_shard(net, **how)


def drawn(seed: int, count: int, length: int = LENGTH) -> Tensor:
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def share(rank: int, counts: tuple[int, int]) -> slice:
    return slice(0, counts[0]) if rank == 0 else slice(counts[0], None)


def held_to_one_process(
    rank: int,
    counts: tuple[int, int],
    reduction: Any,
    *,
    checkpointed: bool = False,
    compiled: bool = False,
    rtol: float = 1e-11,
    **how: Any,
) -> None:
    """Scores, norms, products and gradients of a rank's samples are those of one process on the samples of all."""
    plain, net = model(), shard(model(checkpointed=checkpointed), **how)
    for block in net.blocks if compiled else ():
        block.compile(backend="eager")
    batch, validation, own = drawn(1, sum(counts)), drawn(2, sum(counts)), share(rank, counts)
    params, alone, losses = dict(net.named_parameters()), dict(plain.named_parameters()), losses_of(net)

    direction = sharded.validation_gradient(losses, net, params, [validation[own]])
    truth = fg.grad_and_reduce(losses_of(plain))(alone, validation).grads
    close(whole(direction), truth, rtol)
    source = torch.Generator().manual_seed(1)
    other = {name: torch.randn(p.shape, dtype=p.dtype, generator=source) for name, p in alone.items()}

    def reducers(v: Any, w: Any) -> Any:
        return {"dots": fg.dot(fg.stack([v, w])), "norm": fg.squared_norm(), "gram": fg.gram()}

    step = sharded.grad_and_reduce(losses, net, reduction=reduction)
    wanted = fg.grad_and_reduce(losses_of(plain), reduction=reduction)(alone, batch, reducers(truth, other))
    net.norm.weight.grad = kept = torch.ones_like(net.norm.weight)
    for _ in range(2):
        found = step(params, batch[own], reducers(direction, like(other, params)))
        close(found.losses, wanted.losses[own], rtol)
        for name in ("dots", "norm"):
            close(found.reduced[name], wanted.reduced[name][own], rtol)
        close(found.reduced["gram"], wanted.reduced["gram"][own, own], rtol)
        close(whole(found.grads), wanted.grads, rtol)
    assert net.norm.weight.grad is kept
    assert all(p.grad is None for name, p in params.items() if name != "norm.weight")
    net.norm.weight.grad = None
    # The plain step is as it was.
    losses(params, batch[own]).sum().backward()
    count = 1 if reduction == "sum" else sum(counts)
    close({name: 2 * p.grad.full_tensor() / count for name, p in params.items()}, wanted.grads, rtol)


def compiled_blocks(rank: int, **how: Any) -> None:
    """Blocks run as one op each where scores alone are wanted, with directions that come and go."""
    plain, net = model(), shard(model(**how))
    for block in net.blocks:
        block.compile(backend="aot_eager")
    params, alone, losses = dict(net.named_parameters()), dict(plain.named_parameters()), losses_of(net)
    batch, own = drawn(7, 5), share(rank, (2, 3))
    v, w = ({name: torch.randn_like(p).detach() for name, p in alone.items()} for _ in range(2))

    def reducers(v: Any) -> Any:
        return {"whole": fg.dot(v), "low": fg.dot(fg.compress(w, rank=2))}

    wanted = fg.grad_and_reduce(losses_of(plain))(alone, batch, reducers(v))
    step, score = sharded.grad_and_reduce(losses, net), sharded.reduce(losses, net)
    with counted() as count:
        for taken in range(1, 3):
            found = step(params, batch[own], reducers(like(v, params)))
            close(found.reduced, {name: value[own] for name, value in wanted.reduced.items()})
            close(whole(found.grads), wanted.grads)
            assert count[0] >= 2 * taken  # and once more in a backward, where they are checkpointed
        close(score(params, batch[own], reducers(like(v, params))), found.reduced)
        assert count[0] >= 6
    norms = fg.reduce(losses_of(plain))(alone, batch, fg.squared_norm())
    close(score(params, batch[own], fg.squared_norm()), norms[own])


def without_gradients(rank: int) -> None:
    """Scores alone, kept pairs, low-rank directions, projections."""
    plain, net = model(), shard(model())
    batch, own = drawn(3, 5), share(rank, (3, 2))
    params, alone, losses = dict(net.named_parameters()), dict(plain.named_parameters()), losses_of(net)
    truth = fg.grad_and_reduce(losses_of(plain))(alone, drawn(4, 3)).grads
    low = fg.compress(truth, rank=2)
    asked = {
        "low": fg.dot(low),
        "whole": fg.dot(truth),
        "sketch": fg.project(8),
        "each": fg.per_param(fg.squared_norm()),
    }
    wanted = fg.reduce(losses_of(plain))(alone, batch, asked)
    found = sharded.reduce(losses, net)(params, batch[own], asked)
    close(found["low"], wanted["low"][own])
    close(found["whole"], wanted["whole"][own])
    close(found["sketch"], wanted["sketch"][own])
    close(found["each"], {name: value[own] for name, value in wanted["each"].items()})
    # Plans from other shapes on each rank, as they may come out of a file.
    plan = fg.plan(losses_of(plain), alone, drawn(5, 2 + rank, 3 + rank))
    planned = sharded.reduce(losses, net, plan=fg.Plan.from_json(plan.to_json()))
    close(planned(params, batch[own], fg.dot(truth)), wanted["whole"][own])
    kept = sharded.pairs(fg.module_losses(net, losses_on), net)(params, batch[own])
    close(fg.apply(fg.dot(truth), kept), fg.reduce(losses_of(plain))(alone, batch[own], fg.dot(truth)))


def carried(rank: int) -> None:
    """Tangents that go from layer to layer; factors of these cannot be had."""
    plain, net = model(Awkward), shard(model(Awkward))
    params, alone, losses = dict(net.named_parameters()), dict(plain.named_parameters()), losses_of(net)
    batch, truth = drawn(5 + rank, 3), {n: torch.randn_like(p) for n, p in alone.items()}
    for value in truth.values():
        distributed.broadcast(value, 0)
    wanted = fg.reduce(losses_of(plain))(alone, batch, fg.dot(truth))
    score = sharded.reduce(losses, net)
    for _ in range(2):
        close(score(params, batch, fg.dot(like(truth, params))), wanted)
    norms = fg.reduce(losses_of(plain))(alone, batch, fg.squared_norm())
    close(score(params, batch, fg.squared_norm()), norms)
    apart = model(Awkward)
    fully_shard(apart.summary)
    net, params = shard(apart), dict(apart.named_parameters())
    score = sharded.reduce(losses_of(net), net)
    close(score(params, batch, fg.dot(like(truth, params))), wanted)
    with pytest.raises(fg.UnsupportedOpError, match=r"across groups.*before fully_shard"):
        score(params, batch, fg.squared_norm())
    close(score(params, batch, fg.dot(like(truth, params))), wanted)


def other_ops_on_other_ranks(rank: int) -> None:
    """Each rank's own, and what changes on one rank alone."""
    plain, net = model(Chooses), fully_shard(model(Chooses))
    params, alone, losses = dict(net.named_parameters()), dict(plain.named_parameters()), losses_of(net)
    net.set_reduce_scatter_unused_params(True)  # as any FSDP2 step needs where ranks use other parameters
    with_zero, without = drawn(6, 4).clamp(max=5) % 5, drawn(6, 4).clamp(min=1)
    assert bool((with_zero == 0).any())
    direction = {n: torch.linspace(-1, 1, p.numel(), dtype=p.dtype).view(p.shape) for n, p in alone.items()}
    step = sharded.grad_and_reduce(losses, net, reduction="sum")
    for batches in ((with_zero, with_zero), (with_zero, without), (without, with_zero[:3])):
        found = step(params, batches[rank], fg.dot(like(direction, params)))
        both = [fg.grad_and_reduce(losses_of(plain), reduction="sum")(alone, b, fg.dot(direction)) for b in batches]
        close(found.reduced, both[rank].reduced)
        close(whole(found.grads), {n: both[0].grads[n] + both[1].grads[n] for n in alone})


def adamw(params: dict[str, Any]) -> Any:
    return updates.of(torch.optim.AdamW(params.values(), lr=0.01), params)


def clipped_muon(params: dict[str, Any]) -> Any:
    """One matrix orthogonalized, the others by Adam; clipped by the norm of all, with a schedule around."""
    matrix = params["blocks.0.output.weight"]
    others = [p for p in params.values() if p is not matrix]
    update, state = updates.of([torch.optim.Muon([matrix], lr=0.01), torch.optim.AdamW(others, lr=0.01)], params)
    return updates.scheduled(updates.clipped(update, 0.5), state, lambda count: 0.5**count)


def accounted(rank: int, optimizer: Callable[[dict[str, Any]], Any], **how: Any) -> None:
    """In-run values, their rest, and the parameters after some steps are those of one process; they add up."""
    plain, net = model(), shard(model(), **how)
    params, alone = dict(net.named_parameters()), dict(plain.named_parameters())
    own = share(rank, (3, 2))
    found, single = list[in_run.Account](), list[in_run.Account]()
    for names, where, kept in ((params, found, own), (alone, single, slice(None))):
        update, state = optimizer(names)
        if names is params:
            step = sharded.along_path(losses_of(net), net, update, rule="discrete")
        else:
            step = in_run.along_path(fg.module_losses(plain, losses_on), update, rule="discrete", pairs_memory=0)
        before = None
        for turn in range(2):
            out = step(names, drawn(turn, 5)[kept], state=state, validation=[drawn(9, 5)[kept]], before=before)
            state, before = out.state, out.after
            with torch.no_grad():
                for name, leaf in names.items():
                    leaf.copy_(out.params[name])
            where.append(out)
    for ours, whole_run in zip(found, single, strict=True):
        close(ours.values, whole_run.values[own], 1e-9)
        close(ours.rest.double(), whole_run.rest.double(), 1e-9)
        close(ours.change, whole_run.change, 1e-9)
        close(whole(ours.params), whole_run.params, 1e-9)
        close(whole(ours.after.gradients[0]), whole_run.after.gradients[0], 1e-9)
        close(whole(ours.grads), whole_run.grads, 1e-9)
        # The values of all ranks and the rest are the change, up to the trapezoid's third order.
        (values,) = summed_over_ranks([ours.values.sum().view(1)])
        assert abs(float(values + ours.rest - ours.change)) < 0.02 * abs(float(ours.change))
    with pytest.raises(fg.InputError, match="a function takes whole parameters"):
        sharded.along_path(losses_of(net), net, updates.plain(lambda params, grads, state: (params, state)))  # type: ignore[arg-type]


class Bytes(TorchDispatchMode):
    """Counts the bytes that this rank receives from the others."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ranks = distributed.get_world_size()
        if func.namespace == "c10d":
            gathered = {"c10d::_allgather_base_": 0, "c10d::_reduce_scatter_base_": 1}[func._schema.name]
            self.count += args[gathered].nbytes * (ranks - 1) // ranks
        return func(*args, **(kwargs or {}))


def bytes_are_as_stated(rank: int) -> None:
    """Those of a plain step and of ours, by the formula: what a direction costs is one more gathering of its size."""
    net, plain = shard(model()), model()
    params, losses, batch = dict(net.named_parameters()), losses_of(net), drawn(9, 3)
    whole_of = {name: -(-len(p) // 2) * 2 * (p.numel() // len(p)) for name, p in plain.named_parameters()}
    size, inner = sum(whole_of.values()), sum(n for name, n in whole_of.items() if name.startswith("blocks"))
    truth = {name: torch.ones_like(p) for name, p in plain.named_parameters()}
    direction, low = like(truth, params), fg.compress(truth, rank=1)
    step = sharded.grad_and_reduce(losses, net)
    step(params, batch, fg.squared_norm())

    def received(body: Callable[[], Any]) -> int:
        body()  # which may have to agree on something for the first time
        with Bytes() as count:
            body()
        return count.count

    each, agreed = 8 // 2, 24
    base = each * (2 * size + inner)
    assert received(lambda: losses(params, batch).sum().backward()) == base
    for p in params.values():
        p.grad = None
    assert received(lambda: step(params, batch, fg.dot(direction))) == base + each * size + agreed
    assert received(lambda: step(params, batch, fg.dot(fg.stack([direction] * 2)))) == base + each * 2 * size + agreed
    assert received(lambda: step(params, batch, fg.dot(low))) == base + agreed
    assert received(lambda: step(params, batch, fg.squared_norm())) == base + agreed


def tensor_parallel_is_refused(rank: int) -> None:
    """Whether its parameters are passed, or those between."""
    net = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(net, mesh, {"1": ColwiseParallel(), "3": RowwiseParallel()})
    params, x = dict(net.named_parameters()), torch.ones(3, 6)

    def losses(params: Any, x: Tensor) -> Tensor:
        return net(x).square().sum(1)

    other: Any = fully_shard(nn.Linear(2, 2))
    for score in (fg.reduce(losses), sharded.reduce(losses, other)):
        with pytest.raises(fg.InputError, match=r"is a DTensor|is not sharded by fully_shard"):
            score(params, x, fg.squared_norm())
    with pytest.raises(fg.UnsupportedOpError, match="a DTensor goes into"):
        fg.reduce(losses)({name: params[name] for name in ("0.weight", "0.bias")}, x, fg.squared_norm())


def refused(rank: int) -> None:
    """Every misuse says so on every rank, and the model goes on as before."""
    net, plain = shard(model()), model()
    params, losses, batch = dict(net.named_parameters()), losses_of(net), drawn(7, 3)
    step = sharded.grad_and_reduce(losses, net)
    direction = like({n: torch.ones_like(p) for n, p in plain.named_parameters()}, params)
    with pytest.raises(fg.InputError, match="fully_shard was applied to, found Tied"):
        sharded.reduce(losses, plain)(params, batch, fg.squared_norm())
    net(batch)
    with pytest.raises(fg.InputError, match="not a parameter of the model"):
        sharded.reduce(losses, net.blocks[0])(params, batch, fg.squared_norm())
    with pytest.raises(fg.InputError, match=r"is a DTensor.*funcghost.distributed.sharded"):
        fg.reduce(losses)(params, batch, fg.squared_norm())
    with pytest.raises(fg.InputError, match="functional_call ignores other values"):
        step({name: leaf.detach().clone() for name, leaf in params.items()}, batch, fg.squared_norm())
    with pytest.raises(fg.InputError, match=r"must be sharded as the parameter is.*Replicate"):
        step(params, batch, fg.dot({n: v.redistribute(placements=[Replicate()]) for n, v in direction.items()}))
    with pytest.raises(fg.InputError, match=r"ranks \[1\] pass other"):
        step(params, batch, fg.dot(direction) if rank else fg.squared_norm())
    with pytest.raises(fg.InputError, match=r"\[1, 2\] batches"):
        sharded.validation_gradient(losses, net, params, [batch] * (rank + 1))
    net.set_requires_gradient_sync(False)
    with pytest.raises(fg.InputError, match="being accumulated"):
        step(params, batch, fg.squared_norm())
    net.set_requires_gradient_sync(True)
    for told, usual in (("set_is_last_backward", True), ("set_manual_backward_finalization", False)):
        if hasattr(net, told):  # the other is new in 2.15
            getattr(net, told)(not usual)
            with pytest.raises(fg.InputError, match="told not to wait for its gradients"):
                step(params, batch, fg.squared_norm())
            getattr(net, told)(usual)

    def fails(params: Any, batch: Tensor) -> Tensor:
        if rank == 1:
            raise ValueError("a fault of rank 1")
        return losses(params, batch)

    with pytest.raises(
        (ValueError, fg.PlanError), match=r"rank 1 could not plan.*a fault of rank 1|^a fault of rank 1"
    ):
        sharded.reduce(fails, net)(params, batch, fg.squared_norm())
    alone = dict(plain.named_parameters())
    wanted = fg.reduce(losses_of(plain))(alone, batch, fg.squared_norm())
    close(step(params, batch, fg.squared_norm()).reduced, wanted)


def cases(rank: int) -> None:
    """All of them, on two ranks."""
    hybrid = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    rounded = MixedPrecisionPolicy(param_dtype=torch.float32)
    offloaded = CPUOffloadPolicy(pin_memory=False)

    def along_rows(leaf: nn.Parameter) -> Shard:
        return Shard(leaf.dim() - 1) if leaf.shape[-1] % 2 == 0 else Shard(0)

    held_to_one_process(rank, (3, 2), "mean", compiled=True)
    held_to_one_process(rank, (0, 4), "sum", nested=False, mesh=hybrid, reshard_after_forward=False)
    held_to_one_process(
        rank, (2, 2), "mean", mp_policy=rounded, shard_placement_fn=along_rows, offload_policy=offloaded, rtol=2e-5
    )
    if DEEP:
        held_to_one_process(rank, (1, 1), "sum", checkpointed=True, reshard_after_forward=False)
        held_to_one_process(rank, (5, 0), "mean", mesh=hybrid)
        held_to_one_process(rank, (2, 1), "mean", shard_placement_fn=along_rows)
        held_to_one_process(rank, (1, 2), "sum", offload_policy=offloaded)
        held_to_one_process(rank, (1, 3), "mean", mp_policy=rounded, checkpointed=True, rtol=2e-5)
    if DEEP:  # one rank has them in every profile
        compiled_blocks(rank)
        compiled_blocks(rank, checkpointed=True)
    without_gradients(rank)
    carried(rank)
    other_ops_on_other_ranks(rank)
    accounted(rank, clipped_muon, mesh=hybrid, nested=False)
    if DEEP:
        accounted(rank, adamw)
        accounted(rank, clipped_muon)
        accounted(rank, adamw, mesh=hybrid)
    bytes_are_as_stated(rank)
    tensor_parallel_is_refused(rank)
    refused(rank)


def refused_on_an_older_torch() -> None:
    net = shard(model())
    with pytest.raises(fg.VersionError, match=r"a model under fully_shard needs torch 2\.13 or newer"):
        sharded.reduce(losses_of(net), net)(dict(net.named_parameters()), drawn(8, 3), fg.squared_norm())
