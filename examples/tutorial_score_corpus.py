"""Score a corpus: every sample of a data set once, onto disk, to be asked later."""

# %% [markdown]
# # Score a corpus
#
# Scores of a whole data set are worth keeping: which samples go with a direction, and which are alike in gradient
# space? `corpus.score` takes every sample once and writes values and projected gradients to a folder of Parquet and
# Arrow files. It can be killed and called again, and runs under `torchrun` as it is.

# %%
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import funcghost as fg
from funcghost import corpus

torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 32))
documents = [torch.randint(32, (12,)) for _ in range(200)]
documents[17] = documents[42].clone()  # a duplicate


def criterion(logits: Tensor, tokens: Tensor) -> Tensor:
    """The mean loss of each document's next tokens."""
    wanted = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    return wanted.mean(1)


losses, params = fg.module_losses(model, criterion), fg.trainable(model)

# %% [markdown]
# What is kept of a sample is what reducers say: the squared norm of its gradient, and 256 numbers whose inner products
# are those of the gradients, in expectation. A `Dataset`, a `DataLoader` or any iterable will do for the data.

# %%
folder = Path(tempfile.mkdtemp()) / "scored"
reducers = {"norm": fg.squared_norm(), "sketch": fg.project(256)}
done = corpus.score(losses, params, documents, reducers, folder, collate=torch.stack, progress=False)
kept = done.corpus
print(f"{done.samples} documents, columns {kept.columns}, projections {kept.projections}")

# %% [markdown]
# Ask for the largest values, or for what lies nearest to a sample: the duplicate comes first, after the sample itself.

# %%
print("largest gradients:", kept.top(3, "norm").ids.tolist())
near = kept.nearest(kept.vector(42), 20, normalised=True)
print("nearest to 42:", near.ids[:5].tolist())
assert set(near.ids[:2].tolist()) == {17, 42}

# %% [markdown]
# Projections only approximate. `rescore` computes the exact inner products for a short list, here with the gradient of
# document 42.

# %%
direction = fg.grad_and_reduce(losses)(params, documents[42][None]).grads
exact = corpus.rescore(losses, params, documents, fg.dot(direction), near, collate=torch.stack)
print("exact, best first:", exact.ids[:5].tolist())
assert set(exact.ids[:2].tolist()) == {17, 42}

# %% [markdown]
# Call it again on a finished folder, and nothing is computed. With other parameters it is refused.

# %%
again = corpus.score(losses, params, documents, reducers, folder, collate=torch.stack, progress=False)
assert again.samples == 0
try:
    moved = {name: value.detach() + 1 for name, value in params.items()}
    corpus.score(losses, moved, documents, reducers, folder, collate=torch.stack, progress=False)
except fg.StoreError as error:
    print("refused:", str(error).splitlines()[0][:100])
else:
    raise AssertionError("a folder with other parameters was added to")

# %% [markdown]
# The same from the shell: `python -m funcghost score mine:factory --out runs/corpus`, then `top`, `nearest`, `verify`
# and `report`.
