"""A pretraining loop in the form of torchtitan's, with values of every sample: sharded, compiled, clipped, scheduled.

    torchrun --nproc-per-node 2 examples/distributed_pretraining.py --steps 5

`parallelize` does to the model what torchtitan's function of that name does: per block an activation checkpoint,
`torch.compile` and `fully_shard`. The loop keeps its optimizer, its clipping by the norm over all processes and its
schedule. Two lines are ours: the account of the step, which gives its gradient and the values of this process's
windows, and `param.grad = ...` in place of `.backward()`. Blocks run compiled in the account as well (with the backends
inductor and aot_eager).

In the end the values of all processes and the rests must add up to what the steps did to the validation loss, the
parameters must be where the accounts say that the optimizer took them, and all of it must be that of one process.
"""

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import funcghost as fg
from distributed_in_run import Windows, drawn, joined, losses_of, share, whole
from funcghost.attribution import in_run
from funcghost.distributed import sharded
from funcghost.training import updates
from lm_model import GPT, ModelSize

TOLERANCE = 1e-8


class Run(NamedTuple):
    """What came of a run: values [steps, b] of all windows, rests and changes [steps], and the parameters."""

    values: Tensor
    rests: Tensor
    changes: Tensor
    params: dict[str, Tensor]


def main(argv: Sequence[str] | None = None) -> Run:
    """Runs as one of the processes of torchrun; gives what it found, of all windows."""
    parser = argparse.ArgumentParser(description="A sharded pretraining with values, held to one process.")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--windows", type=int, default=8, help="training windows of a step, of all processes together")
    parser.add_argument("--validation-windows", type=int, default=8)
    parser.add_argument("--context", type=int, default=32)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--max-norm", type=float, default=0.5)
    parser.add_argument("--compile", default="eager", help="the compiler's backend: inductor, or eager for none at all")
    args = parser.parse_args(argv)
    ours = not distributed.is_initialized()
    if ours:
        distributed.init_process_group("gloo")
    try:
        return run(args)
    finally:
        if ours:
            distributed.destroy_process_group()


def parallelize(model: GPT, mesh: DeviceMesh, backend: str) -> GPT:
    """Checkpoints, compiles and shards block by block, then the rest."""
    for number, block in enumerate(model.blocks):
        kept: Any = checkpoint_wrapper(block, context_fn=fg.checkpoint_context)
        kept.compile(backend=backend)
        model.blocks[number] = fully_shard(kept, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def trained(args: argparse.Namespace, windows: Windows, mesh: DeviceMesh | None) -> Run:
    """The training; without a mesh that of one process with all windows."""
    model: GPT = GPT(ModelSize(args.context, args.width, args.layers), seed=0).double()
    if mesh:
        model = parallelize(model, mesh, args.compile)
    params: dict[str, nn.Parameter] = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(params.values(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 3))

    update = updates.clipped(updates.of(optimizer, params)[0], args.max_norm)
    losses = losses_of(model)
    account = sharded.along_path(losses, model, update) if mesh else in_run.along_path(losses, update)
    rank, ranks = (mesh.get_local_rank("samples"), mesh.size()) if mesh else (0, 1)
    validation, before = [share(windows.validation, rank, ranks)], None
    values, rests, changes = list[Tensor](), list[Tensor](), list[Tensor]()
    for batch in windows.training:
        state = updates.of(optimizer, params)[1]  # as the optimizer and the schedule have it now
        out = account(params, share(batch, rank, ranks), state=state, validation=validation, before=before)
        for name, param in params.items():
            param.grad = out.grads[name]
        torch.nn.utils.clip_grad_norm_(params.values(), args.max_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        before = out.after
        for name, param in params.items():
            torch.testing.assert_close(whole(param), whole(out.params[name]), rtol=TOLERANCE, atol=TOLERANCE)
        values.append(joined(out.values, mesh))
        rests.append(out.rest)
        changes.append(out.change)
    known = {name.replace("_checkpoint_wrapped_module.", ""): whole(param) for name, param in params.items()}
    return Run(torch.stack(values), torch.stack(rests), torch.stack(changes), known)


def run(args: argparse.Namespace) -> Run:
    """The training of all processes, and on the first one that of a single process, which it must equal."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),), mesh_dim_names=("samples",))
    windows = drawn(args)
    found = trained(args, windows, mesh)
    if distributed.get_rank() == 0:
        alone = trained(args, windows, None)
        for own, other in zip(found[:3], alone[:3], strict=True):
            torch.testing.assert_close(own, other, rtol=TOLERANCE, atol=TOLERANCE, check_dtype=False)
        for name, param in alone.params.items():
            torch.testing.assert_close(found.params[name], param, rtol=TOLERANCE, atol=TOLERANCE)
        said, change = float(found.values.sum() + found.rests.sum()), float(found.changes.sum())
        print(
            f"{mesh.size()} processes, {args.steps} steps: the validation loss changed by {change:+.4f}; values "
            f"{float(found.values.sum()):+.4f} and rests {float(found.rests.sum()):+.4f} add up to {said:+.4f}."
        )
        assert abs(said - change) < 0.02 * abs(change), "the accounts do not add up"
    distributed.barrier()
    return found


if __name__ == "__main__":
    main()
