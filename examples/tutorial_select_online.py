"""Select online: train on the better half of every batch, at one forward and one backward."""

# %% [markdown]
# # Select online
#
# Not every sample of a batch helps. Here every batch is scored against the gradient of a small validation set, and
# the model takes the mean gradient of the better half. Scores and gradient come from the same forward and backward.
#
# The training set is poor on purpose: half of its labels are wrong.

# %%
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcghost as fg
from digits import Digits, load
from funcghost.attribution import in_run
from funcghost.training import selection, weighting

generator = torch.Generator().manual_seed(0)
clean, held_out = load(600, generator)
validation, test = held_out.take(torch.arange(100)), held_out.take(torch.arange(100, 600))
wrong = torch.rand(len(clean.labels), generator=generator) < 0.5
noise = torch.randint(10, clean.labels.shape, generator=generator)
train = Digits(clean.images, torch.where(wrong, noise, clean.labels))

torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
start = {name: value.detach().clone() for name, value in model.named_parameters()}


def criterion(logits: Tensor, batch: Digits) -> Tensor:
    """One loss for each sample."""
    return F.cross_entropy(logits, batch.labels, reduction="none")


losses = fg.module_losses(model, criterion, inputs=lambda batch: batch.images)

# %% [markdown]
# A *policy* makes weights of scores: `selection.quantile(0.5)` gives the better half equal weights and the others none.
# `top_k`, `threshold`, `greedy` (which avoids what is redundant) and `boltzmann` (which draws) are others, and any
# function from scores [b] to weights [b] is one.

# %%
select = weighting.weighted_gradient(losses, selection.quantile(0.5))
plain = weighting.weighted_gradient(losses, lambda scores: torch.full_like(scores, 1 / len(scores)))


def accuracy(step: Callable[..., weighting.Weighted]) -> float:
    """On the test set, of a model that took some steps of this kind."""
    params = dict(start)
    for rows in torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(1)).repeat(3).split(64):
        direction = in_run.validation_gradient(losses, params, [validation])
        grads = step(params, train.take(rows), fg.dot(direction)).grads
        params = {name: value - 0.1 * grads[name] for name, value in params.items()}
    logits = torch.func.functional_call(model, params, (test.images,))
    return float((logits.argmax(1) == test.labels).float().mean())


# %% [markdown]
# The direction is renewed in every step here. `fg.track` renews a low-rank one for a few percent of a step, and one
# that is some steps old serves nearly as well: `make run` reports what that costs in scores.

# %%
selected, everything = accuracy(select), accuracy(plain)
print(f"test accuracy: all samples {everything:.3f}, the better half of every batch {selected:.3f}")
assert selected > everything
