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


class Layer(nn.Module):
    """One layer of a `Decoder`: rotary attention with grouped keys and values, and a gated perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        shared = self.size * max(heads // 4, 1)
        self.attention_norm, self.gate_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query, self.key = nn.Linear(width, width, bias=False), nn.Linear(width, shared, bias=False)
        self.value, self.outputs = nn.Linear(width, shared, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.expand = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, 3 * width, bias=False)
        self.contract = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        inner = self.attention_norm(x)
        parts = (part(inner).unflatten(-1, (-1, self.size)).transpose(1, 2) for part in (self.query, self.key))
        query, key = (self._turned(part, turns) for part in parts)
        value = self.value(inner).unflatten(-1, (-1, self.size)).transpose(1, 2)
        repeats = self.heads // key.shape[1]
        key, value = (part.repeat_interleave(repeats, 1) for part in (key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.outputs(mixed.transpose(1, 2).flatten(2))
        inner = self.gate_norm(x)
        return x + self.contract(F.silu(self.gate(inner)) * self.expand(inner))

    def _turned(self, part: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        first, second = part.chunk(2, -1)
        cosines, sines = turns
        return torch.cat([first * cosines - second * sines, second * cosines + first * sines], -1)


class Decoder(nn.Module):
    """A decoder as Llama's: rotary positions, grouped attention, gated perceptrons, a head of its own."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.turned = width // heads // 2
        self.tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        places = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.float32)
        rates = 10000.0 ** (-torch.arange(self.turned, device=tokens.device, dtype=torch.float32) / self.turned)
        angles = places.unsqueeze(1) * rates
        turns = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, turns)
        logits: Tensor = self.head(self.norm(x))
        return logits


LARGE = {
    "llama1024": {"vocabulary": 32000, "width": 2048, "layers": 8, "heads": 16, "length": 1024, "batch": 8},
    "llama4096": {"vocabulary": 32000, "width": 2048, "layers": 8, "heads": 16, "length": 4096, "batch": 2},
    "llama-tiny": {"vocabulary": 64, "width": 32, "layers": 1, "heads": 4, "length": 16, "batch": 4},
}
"""Sizes of a `Decoder` that fill a GPU, and one that shows whether a script runs."""


def decoder(name: str) -> Decoder:
    """The `Decoder` of a size of `LARGE`."""
    size = LARGE[name]
    return Decoder(size["vocabulary"], size["width"], size["layers"], size["heads"])


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
