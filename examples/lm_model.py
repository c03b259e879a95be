"""A small GPT over bytes as a plain function of its parameters, and the optimizer whose step the values describe."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

VOCABULARY = 256

Tree = dict[str, Tensor]


class Batch(NamedTuple):
    """Windows of text: `tokens` is [b, t + 1] bytes; `dropout_seed` None evaluates without dropout."""

    tokens: Tensor
    dropout_seed: Tensor | None = None


@dataclass(frozen=True)
class ModelSize:
    """The shape of a `GPT`."""

    context: int
    width: int = 64
    layers: int = 2
    heads: int = 4
    dropout: float = 0.0


class Dropout(nn.Module):
    """Dropout with its masks drawn from a generator that the caller hands in.

    So the loss is a pure function of parameters and batch: a second pass over the batch sees the same masks.
    """

    def __init__(self, rate: float) -> None:
        """Store the rate at which entries are zeroed."""
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, source: torch.Generator | None) -> Tensor:
        """Return `x` as it is where `source` is None, else masked and rescaled."""
        if source is None or self.rate == 0.0:
            return x
        kept = torch.rand(x.shape, generator=source, device=x.device) >= self.rate
        return x * kept / (1.0 - self.rate)


class Attention(nn.Module):
    """Causal self-attention, written out so that it has every derivative the values need."""

    def __init__(self, size: ModelSize) -> None:
        """Build the projections for `size.heads` heads."""
        super().__init__()
        self.heads = size.heads
        self.inputs = nn.Linear(size.width, 3 * size.width)
        self.output = nn.Linear(size.width, size.width)
        self.register_buffer("future", torch.ones(size.context, size.context, dtype=torch.bool).triu(1), False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, t, d] to [b, t, d]."""
        b, t, d = x.shape
        query, key, value = self.inputs(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        weights = query @ key.transpose(-1, -2) / math.sqrt(d // self.heads)
        weights = weights.masked_fill(self.future[:t, :t], -math.inf).softmax(-1)
        return self.output((weights @ value).transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, size: ModelSize) -> None:
        """Build attention, the two-layer perceptron and their norms."""
        super().__init__()
        self.attention_norm = nn.LayerNorm(size.width)
        self.attention = Attention(size)
        self.expand_norm = nn.LayerNorm(size.width)
        self.expand = nn.Linear(size.width, 4 * size.width)
        self.contract = nn.Linear(4 * size.width, size.width)
        self.dropout = Dropout(size.dropout)

    def forward(self, x: Tensor, source: torch.Generator | None) -> Tensor:
        """Map [b, t, d] to [b, t, d]."""
        x = x + self.dropout(self.attention(self.attention_norm(x)), source)
        return x + self.dropout(self.contract(F.gelu(self.expand(self.expand_norm(x)))), source)


class GPT(nn.Module):
    """A decoder over bytes with learned positions and a head tied to the embedding."""

    def __init__(self, size: ModelSize, seed: int) -> None:
        """Build the blocks and draw their weights from `seed`."""
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, size.width)
        self.positions = nn.Embedding(size.context, size.width)
        self.dropout = Dropout(size.dropout)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self._draw(torch.Generator().manual_seed(seed), size.layers)

    def _draw(self, generator: torch.Generator, layers: int) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                residual = name.endswith(("output.weight", "contract.weight"))
                deviation = 0.02 / math.sqrt(2 * layers) if residual else 0.02
                nn.init.normal_(parameter, 0.0, deviation, generator=generator)

    def forward(self, tokens: Tensor, source: torch.Generator | None = None) -> Tensor:
        """Map [b, t] bytes to [b, t, 256] logits."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        x = self.dropout(x, source)
        for block in self.blocks:
            x = block(x, source)
        return F.linear(self.norm(x), self.tokens.weight)


def initial_params(model: GPT) -> Tree:
    """Return the model's parameters as a tree of its own tensors."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


class WindowLosses:
    """`losses(params, batch)` -> [b]: the mean cross-entropy of every window's next byte, in nats.

    The batch says whether dropout is on, so that training and validation batches go through one function.
    """

    def __init__(self, model: GPT) -> None:
        """Store the model whose computation is used; its own parameters are not."""
        self.model = model

    def __call__(self, params: Tree, batch: Batch) -> Tensor:
        """Return one loss per window."""
        source = None
        if batch.dropout_seed is not None:
            source = torch.Generator(batch.tokens.device).manual_seed(int(batch.dropout_seed))
        logits = functional_call(self.model, params, (batch.tokens[:, :-1], source))
        targets = batch.tokens[:, 1:]
        surprise = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return surprise.view(targets.shape).mean(1)


def mean_loss(losses: WindowLosses, params: Tree, batches: list[Batch]) -> float:
    """Return the mean loss over all windows of `batches`, summed in float64."""
    with torch.no_grad():
        return torch.cat([losses(params, batch) for batch in batches]).double().mean().item()


@dataclass(frozen=True)
class HeldRMS:
    """RMSprop without momentum whose scale is that of the state before the step.

    With the second moment `s` of the steps before, the step is `w - lr * P * g` with `P = 1 / (sqrt(s) + eps)`.
    `P` does not depend on this step's gradient `g`, so the change of the parameters is linear in it and the
    in-run values with the preconditioner `P` describe exactly this step.
    """

    lr: float
    decay: float = 0.99
    eps: float = 1e-3

    def scale(self, second_moment: Tree) -> Tree:
        """Return `P` for the coming step."""
        return {name: 1.0 / (moment.sqrt() + self.eps) for name, moment in second_moment.items()}

    def move(self, params: Tree, scale: Tree, grads: Tree, lr: float) -> Tree:
        """Return the parameters after the step."""
        return {name: value - lr * scale[name] * grads[name] for name, value in params.items()}

    def observe(self, second_moment: Tree, grads: Tree) -> Tree:
        """Return the second moment with this step's gradient taken in."""
        return {
            name: self.decay * moment + (1.0 - self.decay) * grads[name].square()
            for name, moment in second_moment.items()
        }
