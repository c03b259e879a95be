"""A small GPT and its losses, for tests of how the step is run."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcghost as fg

Params = dict[str, Tensor]


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (part.view(b, t, 2, d // 2).transpose(1, 2) for part in self.qkv(self.first(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d)
        x = x + F.dropout(self.out(attended), self.dropout, self.training)
        return x + self.down(F.gelu(self.up(self.second(x))))


class GPT(nn.Module):
    scale: Tensor

    def __init__(
        self, vocabulary: int = 32, width: int = 8, length: int = 12, layers: int = 2, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.register_buffer("scale", torch.ones(width))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x) * self.scale, self.tokens.weight)


def next_token(logits: Tensor, batch: tuple[Tensor]) -> Tensor:
    """The mean loss of each row."""
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), batch[0][:, 1:], reduction="none").mean(1)


def small_gpt(**options: Any) -> tuple[GPT, Any, Params]:
    """The model, its losses and its parameters."""
    model = GPT(**options)
    return model, fg.module_losses(model, next_token), dict(model.named_parameters())


def rows(size: int = 4, length: int = 12, vocabulary: int = 32) -> tuple[Tensor]:
    return (torch.randint(0, vocabulary, (size, length)),)


def like(params: Mapping[str, Tensor]) -> Params:
    """A random direction."""
    return {k: torch.randn_like(p, requires_grad=False) for k, p in params.items()}


class Product(torch.autograd.Function):
    """A product that no mode sees, in forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        gradient = gradient.to(w.dtype)
        return gradient @ w.mT, x.flatten(0, -2).mT @ gradient.flatten(0, -2)
