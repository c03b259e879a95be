"""Many GPUs: the same step on every rank of a torchrun job, with gradients and directions of all samples."""

# %% [markdown]
# # Many GPUs
#
# Every rank holds the whole model and samples of its own. What has to travel are *directions*, not samples: one
# all-reduce for the validation gradient, and one for the training gradient. This script runs as it is in one process,
# and on several with
#
#     torchrun --nproc-per-node 2 examples/tutorial_many_gpus.py

# %%
import os

import torch
from torch import Tensor, distributed, nn

import funcghost as fg
from funcghost.distributed import data_parallel

several = "RANK" in os.environ
gpu = torch.cuda.is_available()
if several:
    distributed.init_process_group("nccl" if gpu else "gloo")
rank, ranks = (distributed.get_rank(), distributed.get_world_size()) if several else (0, 1)
device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")

# %% [markdown]
# All ranks start from the same parameters: here from the same seed, usually by `DistributedDataParallel` or from a
# checkpoint. (Under DDP let the losses call `ddp.module`.)

# %%
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(device)
params = {name: value.detach() for name, value in model.named_parameters()}
everyone = {"x": torch.randn(24, 8), "y": torch.randint(4, (24,))}
held_out = {"x": torch.randn(8, 8), "y": torch.randint(4, (8,))}


def share(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The samples of this rank: every so-manieth."""
    return {name: value[rank::ranks].to(device) for name, value in batch.items()}


def criterion(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """One loss for each sample."""
    return nn.functional.cross_entropy(logits, batch["y"], reduction="none")


losses = fg.module_losses(model, criterion, inputs=lambda batch: batch["x"])

# %% [markdown]
# The two functions of `data_parallel` take the place of those of one process. Scores are those of the rank's own
# samples, along the validation gradient of all; `out.grads` is the gradient of all samples, the same on every rank, so
# that all take the same step. Ranks may have batches of different sizes, or none.

# %%
direction = data_parallel.validation_gradient(losses, params, [share(held_out)])
step = data_parallel.grad_and_reduce(losses)
out = step(params, share(everyone), {"score": fg.dot(direction)})
print(f"rank {rank} of {ranks}: {len(out.losses)} samples, scores {out.reduced['score'][:3].tolist()}")

# %% [markdown]
# It is what one process would get for the samples of all.

# %%
whole = {name: value.to(device) for name, value in everyone.items()}
alone = fg.grad_and_reduce(losses)(params, whole, {"score": fg.dot(direction)})
torch.testing.assert_close(out.grads, alone.grads)
torch.testing.assert_close(out.reduced["score"], alone.reduced["score"][rank::ranks])

# %% [markdown]
# `corpus.score` needs nothing of this: under `torchrun` each rank takes parts of the data set by itself.

# %%
if several:
    distributed.destroy_process_group()
