"""Trains the main job's model on several processes, values its windows in the run, and holds all of it to one process.

    torchrun --nproc-per-node 2 examples/distributed_in_run.py --strategy fsdp2 --steps 20
    torchrun --nproc-per-node 2 examples/distributed_in_run.py --strategy ddp --steps 20

Every process has windows of its own, of both batches. A step is that of SGD with momentum on the mean loss of all
windows; the value of a window in it is what its gradient does to the validation loss, to first order,

    values[i] = - lr / n <grad losses[i], V>,        V the gradient of the mean validation loss of all processes

In the end the first process runs the same training alone, on all windows, and compares: parameters and values must be
equal but for rounding (float64). Under `ddp` every process has the whole model, under `fsdp2` a share of every
parameter, of every direction and of every gradient. Under `tp` all processes have the same windows, and each a share of
the perceptrons; under `fsdp2+tp` half of the processes do so, if there are four or more, and the halves share the rest.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import funcghost as fg
from funcghost.distributed import data_parallel, sharded, tensor_parallel
from lm_corpus import WindowSampler, build_corpus, validation_tokens
from lm_model import GPT, ModelSize

STRATEGIES = ("ddp", "fsdp2", "tp", "fsdp2+tp")
MOMENTUM, TOLERANCE = 0.9, 1e-9


class Windows(NamedTuple):
    """What a run sees: training windows [steps, b, t + 1] and validation windows [v, t + 1]."""

    training: Tensor
    validation: Tensor


class Run(NamedTuple):
    """What came of a run: values [steps, b] of all windows, the parameters, and the validation loss at both ends."""

    values: Tensor
    params: dict[str, Tensor]
    before: float
    after: float


Valued = Callable[[Tensor, Tensor], tuple[dict[str, Tensor], Tensor]]
"""From a training batch and validation windows to the gradient and the scores of the batch."""


def main(argv: Sequence[str] | None = None) -> Run:
    """Runs as one of the processes of torchrun; gives what it found, of all windows."""
    parser = argparse.ArgumentParser(description="In-run values over several processes, held to one.")
    parser.add_argument("--strategy", choices=STRATEGIES, default="fsdp2")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--windows", type=int, default=8, help="training windows of a step, of all processes together")
    parser.add_argument("--validation-windows", type=int, default=8)
    parser.add_argument("--context", type=int, default=32)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.1)
    args = parser.parse_args(argv)
    ours = not distributed.is_initialized()
    if ours:
        distributed.init_process_group("gloo")
    try:
        return run(args)
    finally:
        if ours:
            distributed.destroy_process_group()


def run(args: argparse.Namespace) -> Run:
    """The training of all processes, and on the first one that of a single process, which it must equal."""
    rank = distributed.get_rank()
    windows = drawn(args)
    found = trained(args, windows, args.strategy)
    if rank == 0:
        alone = trained(args, windows, None)
        apart = max(
            float((own - other).abs().max() / other.abs().max())
            for own, other in [(found.values, alone.values), *((found.params[n], p) for n, p in alone.params.items())]
        )
        change, said = found.after - found.before, float(found.values.sum())
        print(
            f"{args.strategy} on {distributed.get_world_size()} processes, {args.steps} steps: parameters and values "
            f"are those of one process to {apart:.1e}.\nThe validation loss went from {found.before:.4f} to "
            f"{found.after:.4f} by {change:+.4f}; without momentum, the values account for {said:+.4f}."
        )
        assert apart < TOLERANCE, f"{args.strategy} differs from one process by {apart:.1e}"
    distributed.barrier()
    return found


def drawn(args: argparse.Namespace) -> Windows:
    """The same on every process."""
    corpus = build_corpus("email", per_domain=10, held_out=10, seed=0)
    sampler = WindowSampler(corpus.training, args.context, args.windows, [0])
    training = torch.stack([sampler.draw(step).tokens for step in range(args.steps)])
    return Windows(training, validation_tokens(corpus.validation, args.context, args.validation_windows))


def losses_of(model: nn.Module) -> Callable[[Any, Tensor], Tensor]:
    """For every window the mean cross-entropy of its next bytes; a sharded model is called as it is."""

    def mean(logits: Tensor, tokens: Tensor) -> Tensor:
        targets = tokens[:, 1:]
        each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return each.view(targets.shape).mean(1)

    return fg.module_losses(model, mean, inputs=lambda tokens: tokens[:, :-1])


def trained(args: argparse.Namespace, windows: Windows, strategy: str | None) -> Run:
    """A training by one of the strategies; None for all windows in one process."""
    model = GPT(ModelSize(args.context, args.width, args.layers), seed=0).double()
    mesh = mesh_of(strategy)
    rank, ranks = (mesh.get_local_rank("samples"), mesh["samples"].size()) if mesh else (0, 1)
    valued, params = prepared(model, strategy, mesh)
    optimizer = torch.optim.SGD(params.values(), lr=args.lr, momentum=MOMENTUM)
    validation = share(windows.validation, rank, ranks)
    before = validation_loss(model, validation, mesh)
    values = []
    for batch in windows.training:
        gradient, scores = valued(share(batch, rank, ranks), validation)
        values.append(joined(-args.lr / len(batch) * scores, mesh))
        for name, param in params.items():
            param.grad = gradient[name]
        optimizer.step()
    after = validation_loss(model, validation, mesh)
    return Run(torch.stack(values), {name: whole(param) for name, param in params.items()}, before, after)


def mesh_of(strategy: str | None) -> DeviceMesh | None:
    """The processes by the samples that they have, and by the share of a layer; none for a process by itself."""
    ranks = distributed.get_world_size()
    together = {"ddp": 1, "fsdp2": 1, "tp": ranks, "fsdp2+tp": ranks // 2 if ranks > 2 else ranks}
    if strategy is None:
        return None
    shape = ranks // together[strategy], together[strategy]
    return init_device_mesh("cpu", shape, mesh_dim_names=("samples", "layers"))


def prepared(model: GPT, strategy: str | None, mesh: DeviceMesh | None) -> tuple[Valued, dict[str, nn.Parameter]]:
    """The step of a strategy, and the parameters that it trains."""
    own: Any = DistributedDataParallel(model).module if strategy == "ddp" else model
    if mesh is not None and strategy in ("tp", "fsdp2+tp"):
        for block in own.blocks:
            parallelize_module(block, mesh["layers"], {"expand": ColwiseParallel(), "contract": RowwiseParallel()})
    if mesh is not None and strategy in ("fsdp2", "fsdp2+tp"):
        for part in (*own.blocks, own):
            fully_shard(part, mesh=mesh["samples"])
    params, losses = dict(own.named_parameters()), losses_of(own)
    if strategy in ("fsdp2", "fsdp2+tp"):
        step = sharded.grad_and_reduce(losses, own)
    elif strategy == "tp":
        step = tensor_parallel.grad_and_reduce(losses)
    else:
        step = data_parallel.grad_and_reduce(losses) if strategy == "ddp" else fg.grad_and_reduce(losses)

    def valued(batch: Tensor, validation: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        out = step(params, batch, fg.dot(step(params, validation).grads))  # of all processes, each as it has its share
        return out.grads, out.reduced

    return valued, params


def share(windows: Tensor, rank: int, ranks: int) -> Tensor:
    """The windows of a process: as many as those of the others, or one less."""
    return windows.tensor_split(ranks)[rank]


def joined(values: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """The values of all windows, in their order."""
    if mesh is None:
        return values
    group = mesh.get_group("samples")
    told: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(told, values, group=group)
    return torch.cat(told)


def validation_loss(model: GPT, validation: Tensor, mesh: DeviceMesh | None) -> float:
    """The mean over the windows of all processes."""
    with torch.no_grad():
        own = losses_of(model)(dict(model.named_parameters()), validation)
    return float(joined(own, mesh).mean())


def whole(param: Tensor) -> Tensor:
    """A parameter as one process has it."""
    return (param.full_tensor() if hasattr(param, "full_tensor") else param).detach().clone()


if __name__ == "__main__":
    main()
