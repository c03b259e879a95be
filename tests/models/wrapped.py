"""Small networks that tests of wrappers share, and what their steps are held to."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import funcghost as fg
from tests.models.small import like, next_token
from tests.naive import assert_close, assert_scores, assert_trees_close, expected, gradient

Params = dict[str, Tensor]


Losses = Callable[[Params, Any], Tensor]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def squares(out: Tensor, batch: Any = None) -> Tensor:
    return out.flatten(1).square().sum(1)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(6, 6), block, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(self.first(x)))


def made(model: nn.Module) -> tuple[Any, Losses, Params]:
    model.double()
    return model, fg.module_losses(model, squares), dict(model.named_parameters())


def assert_exact(
    losses: Losses, params: Params, batch: Any, truth: Losses | None = None, tolerance: float = 1e-10
) -> None:
    """Step and score agree with naive gradients (of `truth`, where the wrapper is in their way), twice each."""
    direction, state = like(params), torch.get_rng_state()
    wanted = expected(truth or losses, params, batch, direction)
    torch.set_rng_state(state)
    grads, values = gradient(truth or losses, params, batch)
    step, score = fg.grad_and_reduce(losses), fg.reduce(losses)
    for _ in range(2):
        torch.set_rng_state(state)
        out = step(params, batch, fg.dot(direction))
        assert_scores(out.reduced, wanted, tolerance)
        assert_trees_close(out.grads, grads, max(1e-12, tolerance / 100))
        assert_close(out.losses, values, max(1e-12, tolerance / 100))
        torch.set_rng_state(state)
        assert_scores(score(params, batch, fg.dot(direction)), wanted, tolerance)


KEPT: dict[str, Any] = {"use_reentrant": False, "context_fn": fg.checkpoint_context}


def huggingface(name: str) -> tuple[Any, Losses, Params, Any]:
    torch.manual_seed(0)
    if name == "gpt2":
        config = GPT2Config(vocab_size=31, n_embd=8, n_layer=2, n_head=2, n_positions=16, use_cache=False)
        model: Any = GPT2LMHeadModel(config)  # with its dropout of 0.1
    else:
        sizes: Any = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=31, num_key_value_heads=1, use_cache=False, **sizes))
    model.double().train()
    losses = fg.module_losses(model, lambda out, batch: next_token(out.logits, (batch["input_ids"],)))
    return model, losses, dict(model.named_parameters()), {"input_ids": torch.randint(0, 31, (4, 9))}


def ours(losses: Callable[[Params, Tensor], Tensor], params: Params, x: Tensor, direction: Params) -> Tensor:
    return fg.reduce(losses)(params, x, fg.dot(direction))
