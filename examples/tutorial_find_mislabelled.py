"""Find mislabelled data: samples whose labels are wrong stand out by their values."""

# %% [markdown]
# # Find mislabelled data
#
# A model that has learnt the rest finds a wrong label hard: the gradient of that sample stays large when the others
# have become small. Its squared norm, summed over some checkpoints, is the sample's *self-influence*
# ([TracIn](https://arxiv.org/abs/2002.08484)). It needs no validation set.

# %%
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcghost as fg
from digits import Digits, load
from funcghost import evaluation, plots
from funcghost.attribution import gradient

torch.manual_seed(0)
generator = torch.Generator().manual_seed(0)
clean, validation = load(300, generator)
wrong = torch.rand(len(clean.labels), generator=generator) < 0.1
shift = torch.randint(1, 10, wrong.shape, generator=generator)
train = Digits(clean.images, torch.where(wrong, (clean.labels + shift) % 10, clean.labels))
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def criterion(logits: Tensor, batch: Digits) -> Tensor:
    """One loss for each sample."""
    return F.cross_entropy(logits, batch.labels, reduction="none")


losses = fg.module_losses(model, criterion, inputs=lambda batch: batch.images)

# %% [markdown]
# Train as you always do, and keep a checkpoint now and then. (`gradient.checkpoints` reads those that are on disk.)

# %%
optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
params, checkpoints = fg.trainable(model), []
for _ in range(6):
    for rows in torch.randperm(len(train.labels), generator=generator).split(64):
        optimizer.zero_grad()
        losses(params, train.take(rows)).mean().backward()
        optimizer.step()
    checkpoints.append({name: value.detach().clone() for name, value in params.items()})

# %% [markdown]
# Norms of all samples take one forward and one backward for each batch. The area under the ROC curve is the chance
# that, of a random pair, the wrong label has the larger number.

# %%
suspicion = gradient.self_influence(losses)(checkpoints[-2:], [train])
found = evaluation.detection(suspicion, wrong)
print(f"AUROC {found.auroc:.3f}, average precision {found.average_precision:.3f}")
assert found.auroc > 0.95

# %% [markdown]
# Look at the worst ones before you believe it.

# %%
captions = [f"{int(given)}, is {int(true)}" for given, true in zip(train.labels, clean.labels, strict=True)]
sheet = plots.contact_sheet(train.images, suspicion, captions, count=16)
worst = suspicion.topk(16).indices
print(f"{int(wrong[worst].sum())} of the 16 most suspicious have a wrong label")

# %% [markdown]
# Where you have a validation set, values in the run tell more: also which samples are right and hurt nevertheless. See
# the tutorial on them, and `examples/mislabelled_digits.py`, which finds flipped labels by them.
