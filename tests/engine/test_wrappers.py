"""What people wrap models in: microbatches, LoRA, attention kernels, ops of their own, quantized layers."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

import funcghost as fg
from funcghost.laws.oracle import per_sample_gradients
from tests.depth import thinned
from tests.models.small import like, next_token
from tests.models.wrapped import KEPT, Losses, Params, assert_exact, huggingface, made, normal, squares
from tests.naive import assert_close, dots, gradient

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),  # transformers, of itself
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # Dynamo
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:quantized..linear_dynamic. an autograd kernel was not registered:UserWarning"),
]


def integer_losses(p: Params, x: Tensor) -> Tensor:
    return (torch.relu(x @ p["w"] + p["b"]) @ p["v"]).square().sum(1)


def integers(*shape: int) -> Tensor:
    return torch.randint(-3, 4, shape).double()


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6), seed=st.integers(0, 1000))
def test_any_split_into_microbatches_is_the_whole_batch(sizes: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    params = {"w": integers(3, 4), "b": integers(4), "v": integers(4, 2)}
    direction, x = {k: integers(*p.shape) for k, p in params.items()}, integers(sum(sizes), 3)
    plan = fg.plan(integer_losses, params, integers(3, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("funcghost.transforms.steps.make_plan", unwanted)
        step = fg.grad_and_reduce(integer_losses, reduction="sum", plan=plan)
        whole = step(params, x, fg.dot(direction))
        parts = [step(params, part, fg.dot(direction)) for part in x.split(sizes)]
        mean = fg.grad_and_reduce(integer_losses, plan=plan)
        means = [mean(params, part, fg.dot(direction)) for part in x.split(sizes)]
        mean_of_whole = mean(params, x, fg.dot(direction))
    assert torch.equal(whole.reduced, dots(per_sample_gradients(integer_losses, params, x), direction))
    assert torch.equal(torch.cat([part.reduced for part in parts]), whole.reduced)
    assert torch.equal(torch.cat([part.losses for part in parts]), whole.losses)
    for name in params:  # integers: the sums are exact in any order
        assert torch.equal(sum(part.grads[name] for part in parts), whole.grads[name])
        weighted: Any = sum(n / sum(sizes) * part.grads[name] for n, part in zip(sizes, means, strict=True))
        assert_close(weighted, mean_of_whole.grads[name], 1e-13)
    assert_close(torch.cat([part.reduced for part in means]), whole.reduced, 1e-13)


def unwanted(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a plan was made")


LORA = [("gpt2", False), ("gpt2", True), ("llama", False), ("llama", True)]


@pytest.mark.parametrize(("name", "dora"), thinned(LORA, [("gpt2", True), ("llama", False)]))
def test_lora_by_peft(name: str, dora: bool) -> None:
    base, _, _, batch = huggingface(name)
    targets = ["c_attn", "c_fc"] if name == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    config = LoraConfig(
        r=2,
        target_modules=targets,
        fan_in_fan_out=name == "gpt2",
        init_lora_weights=False,
        use_dora=dora,
        lora_dropout=0.1,
    )
    model = get_peft_model(base, config).double().train()
    losses = fg.module_losses(model, lambda out, batch: next_token(out.logits, (batch["input_ids"],)))
    adapters: Params = dict(fg.trainable(model))
    params: Params = {k: p if p.requires_grad else p.detach() for k, p in model.named_parameters()}
    assert adapters
    assert all("lora" in k for k in adapters)
    assert_exact(losses, adapters, batch)
    assert_exact(losses, params, batch)
    model.merge_adapter()
    assert_exact(losses, {k: p for k, p in params.items() if "lora" not in k}, batch)
    with pytest.raises(fg.InputError, match="do not depend on params"):
        fg.reduce(losses)(adapters, batch, fg.dot(like(adapters)))
    model.unmerge_adapter()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=KEPT)
    assert_exact(losses, adapters, batch)


class Attention(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 6)
        self.bias = nn.Parameter(torch.randn(2, 4, 4)) if bias else None

    def heads(self, x: Tensor) -> list[Tensor]:
        return [part.unflatten(-1, (2, 3)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)]

    def forward(self, x: Tensor) -> Tensor:
        mask = None if self.bias is None else self.bias.expand(len(x), -1, -1, -1)
        q, k, v = self.heads(x)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out(attended.transpose(1, 2).flatten(-2))


# On the CPU torch has no other kernel for a mask that has a gradient, and no memory-efficient one at all.
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(
    ("backend", "bias"), [(SDPBackend.MATH, True), (SDPBackend.MATH, False), (SDPBackend.FLASH_ATTENTION, False)]
)
def test_chosen_attention_kernel(backend: SDPBackend, bias: bool, inside: bool) -> None:
    _, losses, params = made(Attention(bias))

    def chosen(p: Params, x: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return losses(p, x)

    with nullcontext() if inside else sdpa_kernel(backend):
        assert_exact(chosen if inside else losses, params, normal(3, 4, 6))


@pytest.mark.parametrize("upstream", [True, False])
def test_flex_attention_says_what_torch_says_on_the_cpu(upstream: bool) -> None:
    bias = normal(2, 4, 4).float()
    attention = Attention(bias=False)
    params = {"bias": bias} | (dict(attention.named_parameters()) if upstream else {})

    def losses(p: Params, x: Tensor) -> Tensor:
        def score(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + p["bias"][h, i, j]

        q, k, v = functional_heads(attention, p, x) if upstream else attention.heads(x)
        return squares(flex_attention(q, k, v, score_mod=score))

    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        gradient(losses, params, torch.randn(3, 4, 6))
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        fg.reduce(losses)(params, torch.randn(3, 4, 6), fg.dot(like(params)))


def functional_heads(attention: Attention, p: Params, x: Tensor) -> list[Tensor]:
    qkv = functional_call(attention.qkv, {"weight": p["qkv.weight"], "bias": p["qkv.bias"]}, (x,))
    return [part.unflatten(-1, (2, 3)).transpose(1, 2) for part in qkv.chunk(3, -1)]


@torch.library.custom_op("funcghost_tests::affine", mutates_args=())
def affine(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x @ w + b


@affine.register_fake
def _(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], w.shape[1])


def affine_backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, w = ctx.saved_tensors
    return g @ w.T, x.flatten(0, -2).T @ g.flatten(0, -2), g.flatten(0, -2).sum(0)


def affine_setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


affine.register_autograd(affine_backward, setup_context=affine_setup)


class Affine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        affine_setup(ctx, (x, w, b), x)
        return x @ w + b

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return affine_backward(ctx, g)


class TransformableAffine(torch.autograd.Function):
    setup_context = staticmethod(affine_setup)
    backward = staticmethod(affine_backward)

    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return x @ w + b


@torch.overrides.wrap_torch_function(lambda *args: args)
def shown(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    out: Tensor = Affine.apply(x, w, b)
    return out


@torch.overrides.wrap_torch_function(lambda *args: args)
def transformable(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    out: Tensor = TransformableAffine.apply(x, w, b)
    return out


def with_op(op: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[Losses, Params, Tensor]:
    def losses(p: Params, x: Tensor) -> Tensor:
        return squares(torch.tanh(op(torch.tanh(x @ p["u"]), p["w"], p["b"])) @ p["v"])

    return losses, {"u": normal(6, 5), "w": normal(5, 6), "b": normal(6), "v": normal(6, 3)}, normal(5, 4, 6)


CUSTOM_OPS: dict[str, tuple[Any, Any]] = {
    "by its handle": (affine, torch.ops.funcghost_tests.affine.default),
    "by name": (torch.ops.funcghost_tests.affine, torch.ops.funcghost_tests.affine),
    "by overload": (torch.ops.funcghost_tests.affine.default, torch.ops.funcghost_tests.affine.default),
    "custom function": (shown, shown),
}


@pytest.mark.parametrize("called", CUSTOM_OPS)
def test_custom_op_is_followed_by_its_backward_and_faster_by_a_rule(called: str) -> None:
    call, op = CUSTOM_OPS[called]
    losses, params, x = with_op(call)
    assert [site.way for site in fg.plan(losses, params, x).sites] == ["rule", "transpose", "rule"]
    assert_exact(losses, params, x)
    fg.register_rule(op, linear=[["w", "b"], ["x", "b"]], arguments=["x", "w", "b"])
    assert [site.way for site in fg.plan(losses, params, x).sites] == ["rule"] * 3
    assert_exact(losses, params, x)


def test_custom_op_without_a_second_derivative_goes_by_sample_or_by_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Affine, "backward", torch.autograd.function.once_differentiable(Affine.backward))
    losses, params, x = with_op(shown)
    assert_exact(losses, params, x)
    fg.register_rule(shown, linear=[["w", "b"], ["x", "b"]], arguments=["x", "w", "b"])
    assert_exact(losses, params, x)


def test_custom_function_is_shown_to_modes_by_wrap_torch_function_or_seen_in_the_graph() -> None:
    for hidden in (Affine.apply, TransformableAffine.apply):
        losses, params, x = with_op(hidden)
        assert_exact(losses, params, x)
        without = {k: p for k, p in params.items() if k == "v"}
        assert_exact(lambda p, x, of=losses, rest=params: of(rest | p, x), without, x)  # type: ignore[misc]
    losses, params, x = with_op(transformable)  # has its derivatives from its backward
    assert_exact(losses, params, x)


class Quantized(nn.Module):
    """A float layer before or after dynamically quantized ones, which have no parameters and no backward."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layers = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
            self.quantized = torch.ao.quantization.quantize_dynamic(layers, {nn.Linear}, dtype=torch.qint8)
        self.layer, self.first = nn.Linear(6, 6), first

    def forward(self, x: Tensor) -> Tensor:
        return self.quantized(torch.tanh(self.layer(x))) if self.first else self.layer(self.quantized(x))


@pytest.mark.parametrize("first", [True, False])
def test_dynamically_quantized_layers(first: bool) -> None:
    model, x = Quantized(first), torch.randn(5, 6)
    params: Params = dict(model.named_parameters())
    assert len(params) == 2
    losses = fg.module_losses(model, squares)
    if first:  # autograd gives no gradient through them: it is zero with and without us
        out = fg.grad_and_reduce(losses)(params, x, fg.dot(like(params)))
        assert not any(g.any() for g in (out.reduced, *out.grads.values(), *gradient(losses, params, x)[0].values()))
    else:
        assert_exact(losses, params, x, tolerance=1e-5)
