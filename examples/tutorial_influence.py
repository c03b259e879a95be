"""Influence of documents: which training documents are behind what a language model says?"""

# %% [markdown]
# # Influence of documents
#
# How would the model's loss on a query change if a document were left out of training? To first order, by the inner
# product of the document's gradient with the query's, after the inverse of a curvature matrix: influence functions,
# here by EK-FAC ([2308.03296](https://arxiv.org/abs/2308.03296)).
#
# The corpus is a toy one in which the answer is known: documents of one family go through the same tokens in the same
# order, now and then with a jump. All families share their tokens.

# %%
import torch
from torch import Tensor, nn

import funcghost as fg
from funcghost.attribution import curvature, gradient
from funcghost.attribution.against import against

torch.manual_seed(0)
FAMILIES, EACH, LENGTH, TOKENS = 4, 12, 16, 12
orders = [torch.randperm(TOKENS) for _ in range(FAMILIES)]


def document(family: int) -> Tensor:
    """From a random place on along the family's order, with a jump at one token in eight."""
    place, tokens = torch.randint(TOKENS, ()), []
    for _ in range(LENGTH):
        tokens.append(orders[family][place % TOKENS])
        place = torch.randint(TOKENS, ()) if torch.rand(()) < 1 / 8 else place + 1
    return torch.stack(tokens)


family_of = torch.arange(FAMILIES).repeat_interleave(EACH)
documents = torch.stack([document(int(family)) for family in family_of])
queries = torch.stack([document(family) for family in range(FAMILIES)])
model = nn.Sequential(nn.Embedding(TOKENS, 16), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, TOKENS))


def criterion(logits: Tensor, tokens: Tensor) -> Tensor:
    """The mean loss of each document's next tokens."""
    return nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


losses, params = fg.module_losses(model, criterion), fg.trainable(model)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(60):
    optimizer.zero_grad()
    losses(params, documents).mean().backward()
    optimizer.step()

# %% [markdown]
# The curvature is estimated once, from a pass over the corpus. `damped(fraction=...)` makes a function that multiplies
# a direction by its inverse. It acts on the few queries; the many documents are only scored, along all queries at once.

# %%
precondition = curvature.ekfac(losses, params, [documents]).damped(fraction=0.1)
directions = precondition(gradient.query_gradients(losses)(params, queries))
influence = against(losses)(params, [documents], directions)  # [documents, queries]
print(f"influence of {len(documents)} documents on {len(queries)} queries: {list(influence.shape)}")

# %% [markdown]
# A positive number says that training on the document lowers the query's loss. The documents of the query's own family
# should come first.

# %%
top = influence.topk(EACH, dim=0).indices
share = (family_of[top] == torch.arange(FAMILIES)).float().mean()
print(f"of the {EACH} most influential documents, {share:.0%} are of the query's family; by chance {1 / FAMILIES:.0%}")
assert share > 0.8

# %% [markdown]
# On a large corpus keep a projection of every document on disk (`corpus.score`), find candidates there, and score these
# exactly: `examples/corpus_topk.py`. `funcghost.evaluation` holds methods to retraining.
