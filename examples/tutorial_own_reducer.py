"""Write your own reducer: what to make of per-sample gradients is a value that you can define."""

# %% [markdown]
# # Write your own reducer
#
# A reducer says what is wanted of the per-sample gradients of a batch. It does not know how these come about, and goes
# wherever `fg.dot` goes: into a step, over kept pairs, into a dict of others. There are two kinds:
#
# - `fg.Directional` makes something of scores along directions, and costs what `fg.dot` costs,
# - `fg.Additive` makes something of whole gradients, parameter by parameter, in factored form.
#
# Anything else is made of parts of these kinds. Here is one of parts: the *influence per norm* of each sample,
# `<grad_i, v> / |grad_i|`, which does not favour samples just because their gradients are large.

# %%
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import funcghost as fg
from funcghost.testing import assert_matches_naive
from funcghost.trees import Tree


@dataclass(frozen=True, eq=False)
class PerNorm(fg.Reducer):
    """`<grad_i, v> / |grad_i|`, [b]; zero where the gradient is zero."""

    direction: Tree

    def parts(self) -> tuple[fg.Reducer, ...]:
        """What is asked for: a score and a squared norm, from the same forward and backward."""
        return fg.dot(self.direction), fg.squared_norm()

    def joined(self, results: Sequence[Any]) -> Tensor:
        """What is made of the answers, in the same order."""
        scores, squares = results
        return torch.where(squares > 0, scores / squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt(), 0.0)


# %% [markdown]
# Use it like any other.

# %%
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
losses = fg.module_losses(model, lambda output, batch: output.square().sum(1))
params = {name: value.detach() for name, value in model.named_parameters()}
batch = torch.randn(5, 6, dtype=torch.float64)
direction = {name: torch.randn_like(value) for name, value in params.items()}

found = fg.reduce(losses)(params, batch, {"mine": PerNorm(direction), "score": fg.dot(direction)})
print("per norm:", [round(value, 3) for value in found["mine"].tolist()])

# %% [markdown]
# Hold it to gradients by one backward for each sample before you rely on it. `funcghost.testing.assert_reducer_laws`
# draws models and checks every law of reducers.

# %%
assert_matches_naive(losses, params, batch, {"mine": PerNorm(direction)})
rows = torch.cat([leaf.flatten(1) for leaf in fg.materialize(fg.pairs(losses)(params, batch)).values()], 1)
v = torch.cat([leaf.flatten() for leaf in direction.values()])
torch.testing.assert_close(found["mine"], rows @ v / rows.norm(dim=1))

# %% [markdown]
# `examples/write_your_own_reducer.py` derives one of each kind: a contrast of two validation sets, the distances
# between gradients, and the cosine to a direction.
