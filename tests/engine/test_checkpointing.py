"""Activation checkpointing: by Hugging Face, nested, with dropout."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import funcghost as fg
from tests.models.small import like
from tests.models.wrapped import KEPT, assert_exact, huggingface, made, normal, squares

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),  # transformers, of itself
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # Dynamo
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:quantized..linear_dynamic. an autograd kernel was not registered:UserWarning"),
]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("only", ["", "1."])
def test_huggingface_gradient_checkpointing(name: str, only: str) -> None:
    _, plain, _, _ = huggingface(name)
    model, losses, params, batch = huggingface(name)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=KEPT)
    chosen = {k: p for k, p in params.items() if only in k}
    with counted_recomputations() as count:
        assert_exact(losses, chosen, batch, truth=plain)
    assert count[0] > 0


@contextmanager
def counted_recomputations() -> Iterator[list[int]]:
    """Counts how often a checkpointed region runs again, by its frames."""
    count, frame = [0], torch.utils.checkpoint._CheckpointFrame
    original = frame.__init__

    def counting(self: Any, recompute: Any, *args: Any) -> None:
        def again(*inputs: Any) -> Any:
            count[0] += 1
            return recompute(*inputs)

        original(self, again, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frame, "__init__", counting)
        yield count


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("keywords", "remedy"),
    [({"use_reentrant": False}, "context_fn=fg.checkpoint_context"), ({"use_reentrant": True}, "use_reentrant=False")],
)
def test_huggingface_checkpointing_names_its_remedy(name: str, keywords: dict[str, Any], remedy: str) -> None:
    model, losses, params, batch = huggingface(name)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=keywords)
    with pytest.raises(fg.UnsupportedOpError, match=remedy):
        fg.grad_and_reduce(losses)(params, batch, fg.dot(like(params)))


def test_huggingface_checkpointing_needs_the_own_tensors_of_the_model() -> None:
    model, losses, params, batch = huggingface("gpt2")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=KEPT)
    copies = {k: p.detach().clone() for k, p in params.items()}
    with pytest.raises(fg.UnsupportedOpError, match=r"dict\(model.named_parameters\(\)\)"):
        fg.reduce(losses)(copies, batch, fg.dot(like(params)))


class Nested(nn.Module):
    def __init__(self, outer: dict[str, Any] | None, inner: dict[str, Any] | None) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.outer, self.inner = outer, inner

    def part(self, x: Tensor) -> Tensor:
        return F.dropout(torch.tanh(self.second(x)), 0.3)

    def whole(self, x: Tensor) -> Tensor:
        x = F.dropout(self.first(x), 0.2)
        return self.third(self.part(x) if self.inner is None else checkpoint(self.part, x, **self.inner))

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(x) if self.outer is None else checkpoint(self.whole, x, **self.outer)


def test_nested_checkpoints_with_dropout() -> None:
    x = normal(5, 6)
    model, losses, params = made(Nested(KEPT, KEPT))
    plain = copy.copy(model)
    plain.outer = plain.inner = None
    assert_exact(losses, params, x, truth=fg.module_losses(plain, squares))
    for outer, inner in ((KEPT, {"use_reentrant": False}), ({"use_reentrant": False}, KEPT)):
        _, losses, params = made(Nested(outer, inner))
        with pytest.raises(fg.UnsupportedOpError, match=r"context_fn=fg\.checkpoint_context"):
            fg.reduce(losses)(params, x, fg.dot(like(params)))


class Gated(nn.Module):
    """Its gates are computed before the checkpoint and die before the recomputation, where their ids come again."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.layer = nn.Parameter(torch.randn(6)), nn.Linear(6, 6)

    def region(self, x: Tensor) -> Tensor:
        return self.layer(torch.stack([torch.tanh(x * k) for k in range(40)]).sum(0))

    def forward(self, x: Tensor) -> Tensor:
        gates = [self.gate * k for k in range(40)]
        return checkpoint(self.region, x * torch.stack(gates).sum(0), **KEPT)


def test_recomputation_takes_no_new_tensor_for_a_dead_one() -> None:
    _, losses, params = made(Gated())
    assert_exact(losses, params, normal(5, 6))


class Product(torch.autograd.Function):
    """`x @ w.T`, unseen by a mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w, g.flatten(0, -2).T @ x.flatten(0, -2)


def test_a_function_of_ones_own_beside_a_checkpoint() -> None:
    layer, w = nn.Linear(4, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    params = {"w": w, **dict(layer.named_parameters())}

    def losses(params: dict[str, Tensor], x: Tensor) -> Tensor:
        inner = checkpoint(lambda x: torch.tanh(layer(x)), x, **KEPT)
        return Product.apply(inner, w).square().sum((1, 2))

    def plain(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return (torch.tanh(F.linear(x, params["weight"], params["bias"])) @ params["w"].T).square().sum((1, 2))

    assert_exact(losses, params, torch.randn(3, 5, 4, dtype=torch.float64), truth=plain)
