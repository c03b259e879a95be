"""The models that several benchmarks share, in forms that hooks on modules see as well.

Every parameter is used by the module that owns it, on an input with the samples in front, which is what libraries of
hooks ask for.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Params = dict[str, Tensor]
Losses = Callable[[Params, Any], Tensor]


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.expand_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inputs, self.outputs = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        together = self.inputs(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = together.movedim(-3, 0).transpose(2, 3)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.outputs(mixed.transpose(1, 2).flatten(2))
        return x + self.contract(F.gelu(self.expand(self.expand_norm(x))))


class GPT(nn.Module):
    """A decoder with learned positions and a head tied to the embedding."""

    def __init__(self, vocabulary: int, length: int, width: int, layers: int, heads: int, *, tied: bool = True) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        logits: Tensor = self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions(places))))
        return logits


class Residual(nn.Module):
    """Two convolutions with group norm, and a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.second = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.first_norm, self.second_norm = nn.GroupNorm(8, after), nn.GroupNorm(8, after)
        self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.second_norm(self.second(self.first_norm(self.first(x)).relu()))
        out: Tensor = (inner + self.shortcut(x)).relu()
        return out


def resnet(widths: Sequence[int] = (32, 64, 128), classes: int = 10) -> nn.Module:
    """A small residual network with group norm for images of 32 x 32."""
    stem = [nn.Conv2d(3, widths[0], 3, padding=1, bias=False), nn.GroupNorm(8, widths[0]), nn.ReLU()]
    sizes = pairwise([widths[0], *widths])
    stages = [Residual(before, after, 2 if i else 1) for i, (before, after) in enumerate(sizes)]
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))


def perceptron(widths: Sequence[int]) -> nn.Module:
    """Linear layers with tanh between."""
    layers = [(nn.Linear(d, p), nn.Tanh()) for d, p in pairwise(widths)]
    return nn.Sequential(*(module for layer in layers for module in layer))


def next_token(logits: Tensor, tokens: Tensor) -> Tensor:
    """The mean cross-entropy of each row's next tokens."""
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


def half_square(output: Tensor, batch: Any) -> Tensor:
    """Half the squared size of each output."""
    return output.square().flatten(1).sum(1) / 2


def first_class(output: Tensor, batch: Any) -> Tensor:
    """The cross-entropy with the first class."""
    return output.log_softmax(1)[:, 0].neg()
