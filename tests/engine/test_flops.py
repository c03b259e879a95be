"""What a step costs, counted: FLOP counts are deterministic, so every assertion is an equality."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import funcghost as fg

hf: Any = transformers  # typed for literal arguments, not for sizes handed on from one place
hf.logging.set_verbosity_error()

Params = dict[str, Tensor]
Losses = Callable[[Params, Any], Tensor]

PRODUCTS = ("aten.mm", "aten.addmm", "aten.convolution")
"""What uses of weights come down to; attention is in bmm or in fused kernels of its own."""

LAYERS, HEADS, WIDTH, VOCABULARY = 2, 2, 8, 19


class TinyGPT(nn.Module):
    """Learned positions, SDPA, a head tied to the embedding, and biases and norms throughout."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(torch.randn(length, WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 * LAYERS + 1))
        self.inputs = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(LAYERS))
        self.outputs = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.expand = nn.ModuleList(nn.Linear(WIDTH, 4 * WIDTH) for _ in range(LAYERS))
        self.contract = nn.ModuleList(nn.Linear(4 * WIDTH, WIDTH) for _ in range(LAYERS))

    def attend(self, layer: int, x: Tensor) -> Tensor:
        query, key, value = self.inputs[layer](x).unflatten(-1, (3, HEADS, -1)).movedim(2, 0).transpose(2, 3)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.outputs[layer](mixed.transpose(1, 2).flatten(2))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        for layer in range(LAYERS):
            x = x + self.attend(layer, self.norms[2 * layer](x))
            x = x + self.contract[layer](F.gelu(self.expand[layer](self.norms[2 * layer + 1](x))))
        return F.linear(self.norms[-1](x), self.tokens.weight)


def convolutional(groups: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, groups=groups, dilation=2, padding="same"),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(8, 4, 2, stride=2),
        nn.ReLU(),
        nn.Conv2d(4, 4, 1, bias=False),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


def perceptron(*widths: int) -> nn.Sequential:
    layers = [nn.Sequential(nn.Linear(d, p), nn.Tanh()) for d, p in pairwise(widths)]
    return nn.Sequential(*layers)


def gpt2() -> nn.Module:
    size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**size, attn_implementation="sdpa")).eval()


def llama() -> nn.Module:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**size, **heads, attn_implementation="sdpa"))


def squared(output: Any, batch: Any) -> Tensor:
    value = output if isinstance(output, Tensor) else output.logits
    return value.flatten(1).square().sum(1)


def tokens(batch: int = 3, length: int = 5) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length))


def counted(function: Callable[..., Any], *arguments: Any) -> dict[str, int]:
    """FLOPs by op of a call."""
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return {str(op): flops for op, flops in counter.get_flop_counts().get("Global", {}).items()}


def flops(function: Callable[..., Any], *arguments: Any) -> int:
    return sum(counted(function, *arguments).values())


def weight_products(losses: Losses, params: Params, batch: Any) -> int:
    """FLOPs of the forward's products with weights."""
    found = counted(losses, params, batch)
    return sum(count for op, count in found.items() if op in PRODUCTS)


def plain_step(losses: Losses) -> Callable[[Params, Any], Any]:
    """A training step without funcghost."""

    def step(params: Params, batch: Any) -> Any:
        leaves = {name: parameter.detach().requires_grad_() for name, parameter in params.items()}
        return torch.autograd.grad(losses(leaves, batch).mean(), list(leaves.values()))

    return step


def drawn(params: Params) -> Params:
    return {name: torch.randn_like(parameter) for name, parameter in params.items()}


def problem(model: nn.Module) -> tuple[Losses, Params]:
    return fg.module_losses(model, squared), dict(model.named_parameters())


Maker = tuple[Callable[[], nn.Module], Callable[[], Any]]

MODELS: dict[str, Maker] = {
    "perceptron": (lambda: perceptron(7, 6, 5, 4), lambda: torch.randn(3, 7)),
    "gpt": (lambda: TinyGPT(5), tokens),
    "convolutions": (convolutional, lambda: torch.randn(3, 3, 8, 8)),
    "gpt2": (gpt2, lambda: {"input_ids": tokens()}),
    "llama": (llama, lambda: {"input_ids": tokens()}),
    "torch's transformer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True),
        lambda: torch.randn(3, 5, 8),
    ),
}


# Left out where weight gradients are counted: torch counts that of a grouped convolution `groups` times.
GROUPED: dict[str, Maker] = {"grouped_convolutions": (lambda: convolutional(2), lambda: torch.randn(3, 3, 8, 8))}


@pytest.mark.parametrize("name", MODELS | GROUPED)
def test_a_step_adds_one_product_per_use_of_a_weight(name: str) -> None:
    build, draw = (MODELS | GROUPED)[name]
    (losses, params), batch = problem(build()), draw()
    plan = fg.plan(losses, params, batch)
    step = fg.grad_and_reduce(losses, plan=plan)
    plain, products = flops(plain_step(losses), params, batch), weight_products(losses, params, batch)
    for count in (1, 2, 5):
        direction = fg.stack([drawn(params) for _ in range(count)])
        extra = flops(step, params, batch, fg.dot(direction)) - plain
        assert products == plan.flops
        # Many are scored by the gradients of samples, where these have several positions: one product, and small ones.
        assert extra == count * products or (count == 5 and products < extra < count * products)
    assert products > 0


@pytest.mark.parametrize("name", MODELS)
def test_scores_alone_cost_no_weight_gradient(name: str) -> None:
    """A weight gradient costs as much as the use's forward: scores have `J V` in its place, once per direction."""
    build, draw = MODELS[name]
    (losses, params), batch = problem(build()), draw()
    plan = fg.plan(losses, params, batch)
    score = fg.reduce(losses, plan=plan)
    plain, products = flops(plain_step(losses), params, batch), weight_products(losses, params, batch)
    for count in (1, 3):
        direction = fg.stack([drawn(params) for _ in range(count)])
        found, each = flops(score, params, batch, fg.dot(direction)), plain - products + count * products
        assert found == each or (count > 2 and plain < found < each)  # many are scored by the gradients of samples


def test_a_perceptron_by_its_shapes() -> None:
    B, widths = 3, (7, 6, 5, 4)
    uses = [2 * B * d * p for d, p in pairwise(widths)]
    losses, params = problem(perceptron(*widths))
    batch, v = torch.randn(B, widths[0]), drawn(params)
    plan = fg.plan(losses, params, batch)
    assert flops(losses, params, batch) == sum(uses)
    # The input of the first layer has no gradient: not in training, not with scores, not for scores alone.
    assert flops(plain_step(losses), params, batch) == 3 * sum(uses) - uses[0]
    assert flops(fg.grad_and_reduce(losses, plan=plan), params, batch, fg.dot(v)) == 4 * sum(uses) - uses[0]
    assert flops(fg.reduce(losses, plan=plan), params, batch, fg.dot(v)) == 3 * sum(uses) - uses[0]


def test_the_forward_route_of_a_perceptron_by_its_shapes() -> None:
    """Two products per layer on top of the forward, `x V` and `u W`, with no `u` at the first; no backward."""
    B, widths = 3, (7, 6, 5, 4)
    uses = [2 * B * d * p for d, p in pairwise(widths)]
    losses, params = problem(perceptron(*widths))
    batch, options = torch.randn(B, widths[0]), fg.Options(route="forward")
    plan = fg.plan(losses, params, batch, options=options)
    assert plan.flops == 2 * sum(uses) - uses[0]
    score = fg.reduce(losses, plan=plan, options=options)
    assert flops(score, params, batch, fg.dot(drawn(params))) == 3 * sum(uses) - uses[0]


def test_a_gpt_by_its_shapes() -> None:
    B, T, d = 3, 5, WIDTH
    layer = 3 * d * d + d * d + 4 * d * d + 4 * d * d
    products = 2 * B * T * (LAYERS * layer + d * VOCABULARY)
    losses, params = problem(TinyGPT(T))
    batch, v = tokens(B, T), drawn(params)
    plan = fg.plan(losses, params, batch)
    assert weight_products(losses, params, batch) == products
    # The embedding comes first and has a gradient, so no product saves that of its input.
    plain = 3 * products + LAYERS * attention_flops(B, T)
    assert flops(plain_step(losses), params, batch) == plain
    assert flops(fg.grad_and_reduce(losses, plan=plan), params, batch, fg.dot(v)) == plain + products
    assert flops(fg.reduce(losses, plan=plan), params, batch, fg.dot(v)) == plain


def attention_flops(B: int, T: int) -> int:
    """What the counter sees of one attention's forward and backward: it depends on the kernel of the device."""
    heads = {name: torch.randn(B, HEADS, T, WIDTH // HEADS) for name in "qkv"}

    def losses(heads: Params, _: None) -> Tensor:
        mixed = F.scaled_dot_product_attention(heads["q"], heads["k"], heads["v"], is_causal=True)
        return mixed.flatten(1).sum(1)

    return flops(plain_step(losses), heads, None)


def test_a_weight_used_again_costs_again() -> None:
    B, d, uses = 3, 4, 3

    def losses(params: Params, x: Tensor) -> Tensor:
        for _ in range(uses):
            x = F.linear(x, params["w"]).tanh()
        return x.sum(1)

    params, batch = {"w": torch.randn(d, d)}, torch.randn(B, d)
    plan = fg.plan(losses, params, batch)
    step = fg.grad_and_reduce(losses, plan=plan)
    extra = flops(step, params, batch, fg.dot(drawn(params))) - flops(plain_step(losses), params, batch)
    assert extra == plan.flops == uses * 2 * B * d * d


def test_a_plan_serves_other_batch_sizes_and_lengths() -> None:
    losses, params = problem(TinyGPT(9))
    v = drawn(params)
    plan, unverified = fg.plan(losses, params, tokens(2, 3)), fg.Options(verify="never")
    step = fg.grad_and_reduce(losses, plan=plan, options=unverified)
    for B, T in ((2, 3), (5, 3), (3, 9)):
        batch = tokens(B, T)
        extra = flops(step, params, batch, fg.dot(v)) - flops(plain_step(losses), params, batch)
        assert extra == weight_products(losses, params, batch)


def test_embeddings_norms_biases_and_scales_cost_nothing() -> None:
    def losses(params: Params, tokens: Tensor) -> Tensor:
        x = F.embedding(tokens, params["rows"]) + params["positions"][: tokens.shape[1]]
        x = F.layer_norm(x, (4,), params["scale"], params["shift"]) * params["gain"]
        x = F.rms_norm(x, (4,), params["gain"]) + params["shift"]
        x = F.group_norm(x.transpose(1, 2), 2, params["scale"], params["shift"])
        return x.tanh().flatten(1).sum(1)

    params = {name: torch.randn(4) for name in ("scale", "shift", "gain")}
    params |= {"rows": torch.randn(VOCABULARY, 4), "positions": torch.randn(5, 4)}
    batch = tokens()
    plan = fg.plan(losses, params, batch)
    assert plan.flops == 0
    assert flops(fg.grad_and_reduce(losses, plan=plan), params, batch, fg.dot(drawn(params))) == 0


def test_biases_and_norms_in_a_model_add_nothing() -> None:
    """The step costs what it costs when the weights alone are parameters."""
    losses, params = problem(TinyGPT(5))
    batch, v = tokens(), drawn(params)
    matrices = {name for name, parameter in params.items() if parameter.dim() == 2 and name != "positions"}

    def of_weights(weights: Params, batch: Tensor) -> Tensor:
        return losses({**constants, **weights}, batch)

    constants = {name: parameter.detach() for name, parameter in params.items()}
    weights, w = ({name: tree[name] for name in matrices} for tree in (params, v))
    whole = fg.grad_and_reduce(losses, plan=fg.plan(losses, params, batch))
    part = fg.grad_and_reduce(of_weights, plan=fg.plan(of_weights, weights, batch))
    assert flops(whole, params, batch, fg.dot(v)) == flops(part, weights, batch, fg.dot(w))


@pytest.mark.parametrize("route", ["cheapest", "ghost", "materialise"])
@pytest.mark.parametrize("name", ["perceptron", "gpt", "convolutions", "gpt2"])
def test_the_plan_predicts_the_products_of_contractions(name: str, route: Any) -> None:
    build, draw = MODELS[name]
    (losses, params), batch, options = problem(build()), draw(), fg.Options(inner_products=route)
    for reducer in (fg.squared_norm(), fg.gram(), fg.cross(1)):
        plan = fg.plan(losses, params, batch, reducer, options)
        alone = flops(fg.pairs(losses, plan=plan, options=options), params, batch)
        reduced = flops(fg.reduce(losses, plan=plan, options=options), params, batch, reducer)
        assert reduced - alone == sum(row.flops for row in plan.contractions)
