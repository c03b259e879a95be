"""A small GPT over bytes, and its losses as a pure function of parameters and batch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

VOCABULARY = 256
HEADS = 4

Tree = dict[str, Tensor]


class Batch(NamedTuple):
    """Windows of text: `tokens` [b, t + 1] are bytes; without a `dropout_seed` nothing is dropped."""

    tokens: Tensor
    dropout_seed: Tensor | None = None


@dataclass(frozen=True)
class ModelSize:
    """The shape of a `GPT`; `width` is a multiple of `HEADS`."""

    context: int
    width: int
    layers: int
    dropout: float = 0.0


class Dropout(nn.Module):
    """Dropout whose masks come from a generator that the caller hands in.

    The loss is thereby a function of its arguments: a second pass over the batch sees the same masks.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, source: torch.Generator | None) -> Tensor:
        """`x` masked and rescaled, or as it is where there is no source."""
        if source is None:
            return x
        kept = torch.rand(x.shape, generator=source, device=x.device) >= self.rate
        return x * kept / (1.0 - self.rate)


class Attention(nn.Module):
    """Causal self-attention, by torch's fused kernel: values of any order take first derivatives alone."""

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        self.inputs = nn.Linear(size.width, 3 * size.width)
        self.output = nn.Linear(size.width, size.width)

    def forward(self, x: Tensor) -> Tensor:
        """[b, t, d] to [b, t, d]."""
        b, t, d = x.shape
        query, key, value = self.inputs(x).view(b, t, 3, HEADS, d // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        mixed: Tensor = self.output(attended.transpose(1, 2).reshape(b, t, d))
        return mixed


class Block(nn.Module):
    """One transformer block, normalised before each part."""

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(size.width)
        self.attention = Attention(size)
        self.perceptron_norm = nn.LayerNorm(size.width)
        self.expand = nn.Linear(size.width, 4 * size.width)
        self.contract = nn.Linear(4 * size.width, size.width)
        self.dropout = Dropout(size.dropout)

    def forward(self, x: Tensor, source: torch.Generator | None) -> Tensor:
        """[b, t, d] to [b, t, d]."""
        x = x + self.dropout(self.attention(self.attention_norm(x)), source)
        return x + self.dropout(self.contract(F.gelu(self.expand(self.perceptron_norm(x)))), source)


class GPT(nn.Module):
    """A decoder over bytes with learned positions and a head tied to the embedding; its weights follow from a seed."""

    def __init__(self, size: ModelSize, seed: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, size.width)
        self.positions = nn.Embedding(size.context, size.width)
        self.dropout = Dropout(size.dropout)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self._draw(torch.Generator().manual_seed(seed), size.layers)

    def _draw(self, source: torch.Generator, layers: int) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                into_residual = name.endswith(("output.weight", "contract.weight"))
                nn.init.normal_(parameter, 0.0, 0.02 / math.sqrt(2 * layers if into_residual else 1), generator=source)

    def forward(self, tokens: Tensor, source: torch.Generator | None = None) -> Tensor:
        """Bytes [b, t] to logits [b, t, 256] of the byte after each."""
        x = self.dropout(self.tokens(tokens) + self.positions.weight[: tokens.shape[1]], source)
        for block in self.blocks:
            x = block(x, source)
        return F.linear(self.norm(x), self.tokens.weight)


class WindowLosses:
    """`losses(params, batch) -> [b]`: for every window the mean cross-entropy of its next bytes, in nats.

    The batch says whether dropout is on: training and validation go through the same function.
    """

    def __init__(self, model: GPT) -> None:
        self.model = model

    def __call__(self, params: Tree, batch: Batch) -> Tensor:
        """One loss per window."""
        source = None
        if batch.dropout_seed is not None:
            source = torch.Generator(batch.tokens.device).manual_seed(int(batch.dropout_seed))
        logits = functional_call(self.model, params, (batch.tokens[:, :-1], source))
        targets = batch.tokens[:, 1:]
        surprise = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return surprise.view(targets.shape).mean(1)


def initial_params(model: GPT) -> Tree:
    """The model's parameters as a tree of its own."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def mean_loss(losses: WindowLosses, params: Tree, batches: Sequence[Batch]) -> float:
    """The mean loss over all windows of the batches, in float64: it is for differences of two of them."""
    precise = {name: value.double() for name, value in params.items()}
    with torch.no_grad():
        return torch.cat([losses(precise, batch) for batch in batches]).mean().item()
