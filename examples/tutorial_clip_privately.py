"""Clip privately: differentially private SGD without a backward for each sample."""

# %% [markdown]
# # Clip privately
#
# DP-SGD ([1607.00133](https://arxiv.org/abs/1607.00133)) clips the gradient of every sample to a norm, adds them up,
# and adds noise. funcghost computes the sum of clipped gradients in one forward and one backward; nothing is ever as
# large as a gradient for each sample. Noise and accounting stay yours: they are two lines, and a library made for it.

# %%
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcghost as fg
from digits import Digits, load
from funcghost.training import clipping

generator = torch.Generator().manual_seed(0)
train, test = load(400, generator)
torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def criterion(logits: Tensor, batch: Digits) -> Tensor:
    """One loss for each sample."""
    return F.cross_entropy(logits, batch.labels, reduction="none")


losses = fg.module_losses(model, criterion, inputs=lambda batch: batch.images)

# %% [markdown]
# Losses must not mix samples (no batch norm in training mode), or one sample enters the gradients of others and the sum
# is not private. `fg.check` says whether they do.

# %%
params = {name: value.detach() for name, value in model.named_parameters()}
report = fg.check(losses, params, train.take(torch.arange(8)))
report.raise_if_failed()
print(report)

# %% [markdown]
# Each sample is drawn with probability `rate`, so batches differ in size; the sum is divided by the expected size.

# %%
max_norm, noise, rate, learning_rate = 1.0, 1.0, 0.08, 1.0
clipped = clipping.clipped_gradient(losses)
shares = []
for _ in range(60):
    rows = (torch.rand(len(train.labels), generator=generator) < rate).nonzero().squeeze(1)
    out = clipped(params, train.take(rows), max_norm)
    shares.append(float((out.norms["all"] > max_norm).float().mean()))
    for name, total in out.grads.items():
        noisy = total + noise * max_norm * torch.randn(total.shape, generator=generator)
        params[name] = params[name] - learning_rate * noisy / (rate * len(train.labels))

# %%
logits = torch.func.functional_call(model, params, (test.images,))
accuracy = float((logits.argmax(1) == test.labels).float().mean())
print(f"{sum(shares) / len(shares):.0%} of the gradients were clipped; test accuracy {accuracy:.3f}")
assert accuracy > 0.8

# %% [markdown]
# `clipped_gradient(losses, groups=clipping.by_layer)` clips each layer by itself, and `max_norm` may then be a dict.
# Sums of micro-batches add up: add noise once, at the end.
