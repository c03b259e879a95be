"""Under the wrappers people use: the scores are those of the plain losses, or a remedy is named that works."""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.utils import parametrizations, stateless
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import funcghost as fg
from funcghost.laws.oracle import per_sample_gradients
from tests.models.small import like, next_token, rows, small_gpt
from tests.naive import assert_close, assert_scores, assert_trees_close, dots, expected, gradient

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),  # transformers, of itself
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # Dynamo
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:quantized..linear_dynamic. an autograd kernel was not registered:UserWarning"),
]

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


class Disguised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w.T) @ torch.cat([self.w[1:], self.b[None]]).t()


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) * torch.softmax(x, -1)


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


# Mixed precision.


def mixed_gpt(dtype: torch.dtype) -> tuple[Losses, Losses, Params]:
    """The losses under autocast, and without."""
    _, losses, params = small_gpt(width=32)

    def cast(p: Params, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype):
            return losses(p, batch).float()

    return cast, losses, params


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_scores_are_those_of_autocast(dtype: torch.dtype) -> None:
    cast, losses, params = mixed_gpt(dtype)
    batch, direction = rows(8), like(params)
    wanted, exact = expected(cast, params, batch, direction), expected(losses, params, batch, direction)
    out = fg.grad_and_reduce(cast)(params, batch, fg.dot(direction))
    assert out.reduced.dtype == torch.float32
    # Activations and output gradients are the same numbers on both sides. What is rounded to half precision on top of
    # them is V and J V with us, the gradient of each weight with autograd: half an eps each, and half in reserve.
    assert_scores(out.reduced, wanted, 2 * torch.finfo(dtype).eps)
    assert float((wanted[0] - exact[0]).norm()) > float((out.reduced - wanted[0]).norm()) > 0
    assert_trees_close(out.grads, gradient(cast, params, batch)[0], 1e-6)


def test_grad_scaler_recipe() -> None:
    cast, _, params = mixed_gpt(torch.float16)
    batch, direction = rows(8), like(params)
    theirs = {k: p.detach().clone().requires_grad_() for k, p in params.items()}
    plain, plain_scaler = torch.optim.SGD(theirs.values(), lr=0.1), torch.amp.GradScaler("cpu", growth_interval=2)
    ours, scaler = torch.optim.SGD(params.values(), lr=0.1), torch.amp.GradScaler("cpu", growth_interval=2)
    step = fg.grad_and_reduce(lambda p, b: scaler.scale(cast(p, b)))
    unscaled = fg.reduce(cast)
    for _ in range(5):
        plain_scaler.scale(cast(theirs, batch).mean()).backward()
        before = {k: p.detach().clone() for k, p in params.items()}
        out, scale = step(params, batch, fg.dot(direction)), scaler.get_scale()
        for name, param in params.items():
            param.grad = out.grads[name]
        scaler.step(ours)
        scaler.update()
        # The scale is a power of two: it leaves the scores alone to the bit, but for what it saves from underflow.
        assert_close(out.reduced / scale, unscaled(before, batch, fg.dot(direction)), 1e-2)
        plain_scaler.step(plain)
        plain_scaler.update()
        plain.zero_grad()
        assert scaler.get_scale() == plain_scaler.get_scale()
        assert_trees_close({k: p.detach() for k, p in params.items()}, {k: p.detach() for k, p in theirs.items()}, 1e-6)
    assert scaler.get_scale() > 2.0**16


def test_grad_scaler_backs_off_when_the_scaled_losses_overflow() -> None:
    cast, _, params = mixed_gpt(torch.float16)
    batch, direction = rows(8), like(params)
    optimizer, scaler = torch.optim.SGD(params.values(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0**40)
    step = fg.grad_and_reduce(lambda p, b: scaler.scale(cast(p, b)))
    before = {k: p.detach().clone() for k, p in params.items()}
    for skipped in [True] * 3:
        out, scale = step(params, batch, fg.dot(direction)), scaler.get_scale()
        for name, param in params.items():
            param.grad = out.grads[name]
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == scale / 2
        assert bool(out.reduced.isfinite().all()) != skipped
    assert all(torch.equal(before[k], p) for k, p in params.items())


# Activation checkpointing.

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


# torch.compile inside the losses.


class Counting:
    """A backend that counts the graphs it compiled and the calls of them."""

    def __init__(self) -> None:
        self.compiled = self.called = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.compiled += 1

        def call(*args: Any) -> Any:
            self.called += 1
            return graph.forward(*args)

        return call


def wrapped_block(net: Net, backend: Any) -> None:
    net.block = torch.compile(net.block, backend=backend)  # type: ignore[assignment]


def own_compile(net: Net, backend: Any) -> None:
    net.block.compile(backend=backend)


def fullgraph(net: Net, backend: Any) -> None:
    net.block.compile(backend=backend, fullgraph=True)


def dynamic(net: Net, backend: Any) -> None:
    net.block.compile(backend=backend, dynamic=True)


def whole_model(net: Net, backend: Any) -> None:
    net.compile(backend=backend)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("block", [Mlp, Disguised, Gate])
@pytest.mark.parametrize("wrap", [wrapped_block, own_compile, fullgraph, dynamic, whole_model])
def test_compiled_parts_are_seen_through_and_stay_compiled(
    wrap: Callable[[Net, Any], None], block: Callable[[], nn.Module], warm: bool
) -> None:
    torch._dynamo.reset()
    net = Net(block()).double()
    plain, backend = fg.module_losses(copy.deepcopy(net), squares), Counting()
    wrap(net, backend)
    if warm:
        net(normal(4, 6))
    losses, params = fg.module_losses(net, squares), dict(net.named_parameters())
    own = {name: name.replace("_orig_mod.", "") for name in params}
    step, score = fg.grad_and_reduce(losses), fg.reduce(losses)
    already = backend.compiled
    for size in (4, 7):
        x, direction = normal(size, 6), like(params)
        named = {own[k]: p for k, p in params.items()}
        wanted = expected(plain, named, x, {own[k]: v for k, v in direction.items()})
        out = step(params, x, fg.dot(direction))
        assert_scores(out.reduced, wanted)
        assert_scores(score(params, x, fg.dot(direction)), wanted)
        assert_trees_close({own[k]: g for k, g in out.grads.items()}, gradient(plain, named, x)[0])
    assert backend.compiled == already
    before = backend.called
    net(normal(4, 6))
    assert backend.called > before


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_losses_and_functions_are_seen_through(backend: str) -> None:
    torch._dynamo.reset()
    _, losses, params = made(Net(Mlp()))
    x = normal(5, 6)
    compiled = torch.compile(losses, backend=backend)
    compiled(params, x)
    assert_exact(compiled, params, x, truth=losses)
    act = torch.compile(lambda h: F.gelu(h) * torch.sigmoid(h), backend=backend, fullgraph=True)
    act(x)

    def activated(p: Params, x: Tensor) -> Tensor:
        return squares(act(x @ p["last.weight"].T) * p["last.bias"])

    last = {k: p for k, p in params.items() if "last" in k}
    assert_exact(activated, last, x, truth=lambda p, x: squares(plain_act(x @ p["last.weight"].T) * p["last.bias"]))


def plain_act(h: Tensor) -> Tensor:
    return F.gelu(h) * torch.sigmoid(h)


def test_compiled_step_of_a_model_with_compiled_parts() -> None:
    torch._dynamo.reset()
    net = Net(Disguised()).double()
    plain = fg.module_losses(copy.deepcopy(net), squares)
    backend = Counting()
    own_compile(net, backend)
    losses, params, x = fg.module_losses(net, squares), dict(net.named_parameters()), normal(5, 6)
    direction = like(params)
    step = torch.compile(fg.grad_and_reduce(losses, plan=fg.plan(losses, params, x)), fullgraph=True, backend="eager")
    assert_scores(step(params, x, fg.dot(direction)).reduced, expected(plain, params, x, direction))
    assert backend.compiled == 0  # it is part of the one graph


# Gradient accumulation.


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


# Adapters.


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
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
    params: Params = dict(model.named_parameters())
    adapters: Params = {k: p for k, p in params.items() if p.requires_grad}
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


# Attention kernels.


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


# Ops of the user's own.


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


def test_custom_op_without_a_second_derivative_needs_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Affine, "backward", torch.autograd.function.once_differentiable(Affine.backward))
    losses, params, x = with_op(shown)
    with pytest.raises(fg.GhostError, match=r"'b', 'w'.*fg\.register_rule"):
        fg.reduce(losses)(params, x, fg.dot(like(params)))
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


# torch.func around the step.


class Bilinear:
    """Losses of two parameters, and the truth about their scores."""

    def __init__(self) -> None:
        self.params, self.x = {"w": normal(6, 3), "b": normal(3)}, normal(4, 6)
        self.direction, self.cotangent = like(self.params), normal(4, 4)

    def losses(self, p: Params, x: Tensor) -> Tensor:
        return (x @ p["w"] + p["b"]).tanh().square().sum(1)

    def scores(self, w: Tensor, b: Tensor) -> Tensor:
        return fg.reduce(self.losses)(self.params, self.x, fg.dot({"w": w, "b": b}))

    def truth(self, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return expected(self.losses, self.params, self.x, {"w": w, "b": b})


def stacked(truths: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([value for value, _ in truths]), torch.stack([size for _, size in truths])


@pytest.fixture
def bilinear() -> Bilinear:
    return Bilinear()


def test_vmap_over_directions(bilinear: Bilinear) -> None:
    ws, bs = normal(3, 6, 3), normal(2, 3)
    wanted = stacked([bilinear.truth(w, bs[0]) for w in ws])
    assert_scores(vmap(bilinear.scores, (0, None))(ws, bs[0]), wanted)
    assert_scores(vmap(bilinear.scores, (2, None), 1)(ws.movedim(0, 2), bs[0]).T, wanted)
    nested = vmap(vmap(bilinear.scores, (None, 0)), (0, None))(ws, bs)
    assert_scores(nested, stacked([stacked([bilinear.truth(w, b) for b in bs]) for w in ws]))
    assert vmap(bilinear.scores, (0, None))(ws[:0], bs[0]).shape == (0, 4)


def test_vmap_over_directions_of_a_step_with_other_reducers(bilinear: Bilinear) -> None:
    ws, b, other = normal(3, 6, 3), normal(3), like(bilinear.params)
    runs = []

    def losses(p: Params, x: Tensor) -> Tensor:
        runs.append(1)
        return bilinear.losses(p, x)

    step = fg.grad_and_reduce(losses, plan=fg.plan(losses, bilinear.params, bilinear.x))
    runs.clear()

    def members(w: Tensor) -> Any:
        two = fg.stack([{"w": w, "b": b}, {"w": w * 2, "b": b * 0}])
        return step(bilinear.params, bilinear.x, {"two": fg.dot(two), "other": fg.dot(other)})[:3]

    grads, values, reduced = vmap(members)(ws)
    assert len(runs) == 1
    assert_scores(reduced["two"][:, :, 0], stacked([bilinear.truth(w, b) for w in ws]))
    assert_scores(reduced["two"][:, :, 1], stacked([bilinear.truth(w * 2, b * 0) for w in ws]))
    assert_scores(reduced["other"], stacked([bilinear.truth(other["w"], other["b"])] * 3))
    plain, plain_values = gradient(bilinear.losses, bilinear.params, bilinear.x)
    for k in range(3):
        assert_trees_close({name: g[k] for name, g in grads.items()}, plain)
        assert_close(values[k], plain_values, 1e-12)


def test_vmap_over_directions_draws_once() -> None:
    params, x, vs = {"w": normal(6, 3)}, normal(4, 6), normal(2, 6, 3)

    def losses(p: Params, x: Tensor) -> Tensor:
        return squares(F.dropout(x @ p["w"], 0.5))

    state = torch.get_rng_state()
    wanted = stacked([expected(losses, params, x, {"w": v}) for v in vs])  # which leave the random state alone
    score = fg.reduce(losses)
    assert_scores(vmap(lambda v: score(params, x, fg.dot({"w": v})))(vs), wanted)
    losses(params, x)
    assert not torch.equal(torch.get_rng_state(), state)


Score = Callable[[Callable[[Params, Tensor], Tensor], Params, Tensor, Params], Tensor]


def ours(losses: Callable[[Params, Tensor], Tensor], params: Params, x: Tensor, direction: Params) -> Tensor:
    return fg.reduce(losses)(params, x, fg.dot(direction))


def naive(losses: Callable[[Params, Tensor], Tensor], params: Params, x: Tensor, direction: Params) -> Tensor:
    own = [grad(lambda p, i=i: losses(p, x)[i])(params) for i in range(len(x))]
    return torch.stack([sum((g[k] * direction[k]).sum() for k in params) for g in own])


def under_forward_ad(scores: Callable[..., Tensor], value: Tensor) -> Callable[[], Any]:
    def call() -> Any:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(scores(forward_ad.make_dual(value, torch.ones_like(value)))).tangent

    return call


def transformed(case: Bilinear, score: Score) -> dict[str, Callable[[], Any]]:
    """What is done to scores."""
    direction, b = case.direction, case.params["b"]

    def of_w(w: Tensor) -> Tensor:
        return score(case.losses, {"w": w, "b": b}, case.x, direction)

    def of_x(x: Tensor) -> Tensor:
        return score(case.losses, case.params, x, direction)

    def of_v(v: Tensor) -> Tensor:
        return score(case.losses, case.params, case.x, {"w": v, "b": b})

    def of_all(w: Tensor, x: Tensor, v: Tensor) -> Tensor:
        return score(case.losses, {"w": w, "b": b}, x, {"w": v, "b": b})

    def scaled(a: Tensor, v: Tensor = direction["w"]) -> Tensor:
        return score(lambda p, x: a * case.losses(p, x), case.params, case.x, {"w": v, "b": b})

    def examples(a: Tensor, v: Tensor) -> Tensor:
        losses = fg.per_example(lambda p, x: a * (x * p["w"].sum(1)).tanh().sum())
        return score(losses, {"w": case.params["w"]}, case.x, {"w": v})

    def back(v: Tensor) -> Tensor:
        leaf = v.clone().requires_grad_()
        (of_v(leaf) * torch.arange(1.0, 5.0, dtype=torch.float64)).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    def back_through_vmap(vs: Tensor) -> Tensor:
        leaf = vs.clone().requires_grad_()
        (vmap(of_v)(leaf) * case.cotangent).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    w, x, v, one = case.params["w"], case.x, direction["w"], torch.ones((), dtype=torch.float64)
    vs, ones = torch.stack([v, 2 * v, v.sin(), w]), torch.arange(1.0, 5.0, dtype=torch.float64)
    return {
        "vmap over params": lambda: vmap(of_w)(vs),
        "vmap over batches": lambda: vmap(of_x)(torch.stack([x, 2 * x])),
        "vmap over params and directions": lambda: vmap(lambda w, v: of_all(w, x, v))(vs, vs.flip(0)),
        "vmap over batches and directions": lambda: vmap(lambda x, v: of_all(w, x, v))(torch.stack([x] * 4), vs),
        "vmap over nothing": lambda: vmap(lambda a: a * of_x(x))(ones),
        "vmap over a scale": lambda: vmap(scaled)(ones, vs),
        "vmap over a scale of examples": lambda: vmap(examples)(ones, vs),
        "grad in params": lambda: grad(lambda w: of_w(w).square().sum())(w),
        "grad of grad in params": lambda: grad(lambda w: grad(lambda w: of_w(w).square().sum())(w).square().sum())(w),
        "grad in the batch": lambda: grad(lambda x: of_x(x).sum())(x),
        "grad in a scale": lambda: grad(lambda a: scaled(a).sum())(one),
        "grad in a scale over vmap": lambda: grad(lambda a: vmap(lambda v: scaled(a, v))(vs).sum())(one),
        "jvp in params": lambda: jvp(of_w, (w,), (v,)),
        "forward AD in params": under_forward_ad(of_w, w),
        "forward AD in the batch": under_forward_ad(of_x, x),
        "forward AD in the direction": under_forward_ad(of_v, v),
        "jvp in the direction": lambda: jvp(of_v, (v,), (w,)),
        "grad in the direction": lambda: grad(lambda v: of_v(v).square().sum())(v),
        "vmap of grad in the direction": lambda: vmap(grad(lambda v: of_v(v).sin().sum()))(vs),
        "vmap of grad in params": lambda: vmap(grad(lambda w: of_w(w).sin().sum()))(vs),
        "gradients in all": lambda: grad(lambda w, x, v: of_all(w, x, v).sin().sum(), (0, 1, 2))(w, x, v),
        "vjp in all": lambda: torch.func.vjp(of_all, w, x, v)[1](ones),
        "backward to the direction": lambda: back(v),
        "backward to the directions of a vmap": lambda: back_through_vmap(vs),
    }


EXACT = {
    *("grad in params", "grad in the batch", "grad in the direction", "gradients in all", "vjp in all"),
    *("backward to the direction", "backward to the directions of a vmap"),
}


@pytest.mark.parametrize("what", transformed(Bilinear(), naive))
def test_scores_under_transforms(bilinear: Bilinear, what: str) -> None:
    call = transformed(bilinear, ours)[what]
    if what not in EXACT:
        with pytest.raises(fg.InputError, match="Call the step in a loop"):
            call()
        return
    wanted = transformed(bilinear, naive)[what]()
    for one, other in zip(optree.tree_leaves(call()), optree.tree_leaves(wanted), strict=True):
        assert_close(one, other, 1e-12)


def test_a_step_under_transforms(bilinear: Bilinear) -> None:
    """All it gives beside scores has no graph."""
    params, x, direction = bilinear.params, bilinear.x, like(bilinear.params)
    step = fg.grad_and_reduce(lambda p, x: (bilinear.losses(p, x), p["w"].sum()), has_aux=True)

    def total(w: Tensor) -> tuple[Tensor, Any]:
        out = step({**params, "w": w}, x, {"one": fg.dot(direction), "two": fg.per_param(fg.dot(direction))})
        return out.reduced["one"].sum() + out.losses.sum() + sum(g.sum() for g in out.grads.values()), out

    def alone(w: Tensor) -> Tensor:
        return naive(bilinear.losses, {**params, "w": w}, x, direction).sum()

    derivative, out = grad(total, has_aux=True)(params["w"])
    assert_close(derivative, grad(alone)(params["w"]), 1e-12)
    plain, values = gradient(bilinear.losses, params, x)
    assert_trees_close(out.grads, plain)
    assert_close(out.losses, values, 1e-12)
    assert_close(out.aux, params["w"].sum(), 1e-12)
    assert_close(sum(out.reduced["two"].values()), out.reduced["one"], 1e-12)


def test_attention_and_dropout_under_transforms() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.25, batch_first=True).double()
    params = {k: p.detach() for k, p in model.named_parameters()}
    x, direction = normal(3, 5, 8), like(params)

    def losses(p: Params, x: Tensor) -> Tensor:
        return squares(functional_call(model, p, (x,)).sin())

    leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
    state = torch.get_rng_state()
    with sdpa_kernel(SDPBackend.MATH):
        first = torch.autograd.grad(losses(leaves, x).sum(), list(leaves.values()), create_graph=True)
        along = torch.stack([(g * direction[k]).sum() for k, g in zip(leaves, first, strict=True)]).sum()
        second = torch.autograd.grad(along, list(leaves.values()))
    torch.set_rng_state(state)
    found = grad(lambda p: fg.reduce(losses)(p, x, fg.dot(direction)).sum())(params)
    assert_trees_close(found, dict(zip(leaves, second, strict=True)))
    # A backward to the direction draws as the forward did.
    leaf = {k: v.clone().requires_grad_() for k, v in direction.items()}
    torch.set_rng_state(state)
    fg.reduce(losses)(params, x, fg.dot(leaf)).sum().backward()
    found = {k: v.grad for k, v in leaf.items() if v.grad is not None}
    assert_trees_close(found, {k: g.detach() for k, g in zip(leaves, first, strict=True)})


def test_more_than_scores_is_refused_under_transforms(bilinear: Bilinear) -> None:
    losses, params, x = bilinear.losses, bilinear.params, bilinear.x

    def norm(w: Tensor) -> Tensor:
        return fg.reduce(losses)({**params, "w": w}, x, {"a": fg.squared_norm(), "b": fg.dot(params)})["a"].sum()

    def kept(w: Tensor) -> Tensor:
        return fg.pairs(losses)({**params, "w": w}, x).uses["b"][0].tensors[0]

    for call in (lambda: grad(norm)(params["w"]), lambda: vmap(kept)(normal(2, 6, 3))):
        with pytest.raises(fg.InputError, match="Call the step in a loop"):
            call()


def test_a_direction_is_differentiated_beside_one_of_low_rank() -> None:
    params, x = {"w": torch.randn(12, 6, dtype=torch.float64)}, torch.randn(5, 12, dtype=torch.float64)

    def losses(p: Params, x: Tensor) -> Tensor:
        return (x @ p["w"]).sin().sum(1)

    v = torch.randn(12, 6, dtype=torch.float64, requires_grad=True)
    low = fg.compress({"w": torch.randn(12, 6, dtype=torch.float64)}, rank=1)
    scores = fg.reduce(losses)(params, x, fg.dot(fg.stack([{"w": v}, low])))
    (found,) = torch.autograd.grad(scores[:, 0].sum(), v)
    assert_close(found, grad(lambda p: losses(p, x).sum())(params)["w"], 1e-12)


def test_direction_of_parameters_that_require_grad_is_scored(bilinear: Bilinear) -> None:
    direction = {k: p.clone().requires_grad_() for k, p in bilinear.params.items()}
    found = bilinear.scores(direction["w"], direction["b"])
    assert found.requires_grad
    assert_scores(found.detach(), bilinear.truth(bilinear.params["w"], bilinear.params["b"]))
    with torch.no_grad():
        assert not bilinear.scores(direction["w"], direction["b"]).requires_grad


# Contexts and flags of torch.


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def anomaly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            yield


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "another default device": lambda: torch.device("meta"),
    "another default dtype": default_dtype,
    "deterministic algorithms": deterministic,
    "anomaly detection": anomaly,
    "no saved tensor hooks": lambda: torch.autograd.graph.disable_saved_tensors_hooks("not here"),
    "saved on the CPU": torch.autograd.graph.save_on_cpu,
    "saved as copies": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t),
    "saved tensors may be written to": torch.autograd.graph.allow_mutation_on_saved_tensors,
}
OUTSIDE_ONLY = {"no_grad", "inference mode", "another default device", "saved tensors may be written to"}


@pytest.mark.parametrize("name", CONTEXTS)
def test_context_around_the_step(name: str) -> None:
    _, losses, params = made(nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.3), nn.Tanh(), nn.Linear(4, 2)))
    x, direction, state = normal(5, 6), like(params), torch.get_rng_state()
    wanted, (grads, _) = expected(losses, params, x, direction), gradient(losses, params, x)
    for transform in (fg.grad_and_reduce, fg.reduce):
        torch.set_rng_state(state)
        with CONTEXTS[name]():
            out = transform(losses)(params, x, fg.dot(direction))
        assert_scores(out if isinstance(out, Tensor) else out.reduced, wanted)
    torch.set_rng_state(state)
    with CONTEXTS[name]():
        assert_trees_close(fg.grad_and_reduce(losses)(params, x, fg.dot(direction)).grads, grads)


@pytest.mark.parametrize("name", sorted(CONTEXTS.keys() - OUTSIDE_ONLY))
def test_context_inside_the_losses(name: str) -> None:
    _, losses, params = made(nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.3), nn.Tanh(), nn.Linear(4, 2)))

    def wrapped(p: Params, x: Tensor) -> Tensor:
        with CONTEXTS[name]():
            return losses(p, x)

    assert_exact(wrapped, params, normal(5, 6), truth=losses)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_frozen_encoder(mode: Callable[[], AbstractContextManager[Any]]) -> None:
    encoder, head = Mlp().double(), nn.Linear(6, 3).double()
    of_head: Params = dict(head.named_parameters())
    params: Params = {**of_head, **{f"encoder.{k}": p for k, p in encoder.named_parameters()}}

    def losses(p: Params, x: Tensor) -> Tensor:
        with mode():
            features = functional_call(encoder, {k[8:]: v for k, v in p.items() if k.startswith("encoder.")}, (x,))
        return squares(F.linear(features.clone(), p["weight"], p["bias"]))

    assert_exact(losses, params, normal(5, 6))
    with torch.inference_mode():
        features = encoder(normal(5, 6))
    assert_exact(lambda p, x: squares(F.linear(x.clone(), p["weight"], p["bias"])), of_head, features)


def test_parametrized_and_stateless_modules() -> None:
    x = normal(5, 6)
    for parametrize in (parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal):
        model, losses, params = made(nn.Sequential(parametrize(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 3)))
        model.eval()
        assert_exact(losses, params, x)
    outer, losses, params = made(Net(Mlp()))

    def nested(p: Params, x: Tensor) -> Tensor:
        scaled = {k: v * 2 for k, v in p.items() if k.startswith("block.")}
        return squares(functional_call(outer, p | scaled, (x,))) + losses(p, x)

    def swapped(p: Params, x: Tensor) -> Tensor:
        with stateless._reparametrize_module(outer, p):
            return squares(outer(x))

    assert_exact(nested, params, x)
    assert_exact(swapped, params, x, truth=losses)


def test_spectral_norm_in_training_moves_its_buffers_as_a_plain_step_does() -> None:
    x, direction = normal(5, 6), None
    ours, losses, params = made(nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 6)), nn.Tanh()))
    plain = copy.deepcopy(ours)
    plain_losses, step = fg.module_losses(plain, squares), fg.grad_and_reduce(losses)
    for _ in range(3):
        direction = like(params)
        wanted = expected(plain_losses, dict(plain.named_parameters()), x, direction)  # which puts buffers back
        assert_scores(step(params, x, fg.dot(direction)).reduced, wanted)
        plain_losses(dict(plain.named_parameters()), x)
        for name, buffer in plain.named_buffers():
            assert torch.equal(dict(ours.named_buffers())[name], buffer)


# Hooks and modes of the user.


class Hooked:
    """A model with every kind of hook, which counts how often each of them is called, and changes what it is given."""

    def __init__(self, change: bool) -> None:
        self.model = Net(Mlp()).double()
        self.counts = dict.fromkeys(("pre", "forward", "backward pre", "backward", "tensor"), 0)
        block: Any = self.model.block
        up, down = block.up, block.down

        def hook(name: str, value: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                self.counts[name] += 1
                return value(*args) if change else None

            return call

        up.register_forward_pre_hook(hook("pre", lambda module, args: (args[0] + 1,)))
        up.register_forward_hook(hook("forward", lambda module, args, out: out * 1.5))
        down.register_full_backward_pre_hook(hook("backward pre", lambda module, g: (g[0] * 2,)))
        down.register_full_backward_hook(hook("backward", lambda module, g, _: (g[0] * 3,)))

        def losses(p: Params, x: Tensor) -> Tensor:
            out = functional_call(self.model, p, (x,))
            out.register_hook(hook("tensor", lambda g: g * 5))
            return squares(out)

        self.losses = losses


@pytest.mark.parametrize("change", [False, True])
def test_hooks_are_called_as_often_as_in_a_plain_step(change: bool) -> None:
    hooked, x = Hooked(change), normal(5, 6)
    params: Params = dict(hooked.model.named_parameters())
    assert_exact(hooked.losses, params, x)
    step, score = fg.grad_and_reduce(hooked.losses), fg.reduce(hooked.losses)
    for transform in (step, score):
        transform(params, x, fg.dot(like(params)))  # which plans
        for _ in range(2):
            hooked.counts = dict.fromkeys(hooked.counts, 0)
            transform(params, x, fg.dot(like(params)))
            assert hooked.counts == dict.fromkeys(hooked.counts, 1)


def test_hook_that_is_not_linear_is_refused() -> None:
    def losses(p: Params, x: Tensor) -> Tensor:
        out = x @ p["w"]
        out.register_hook(lambda g: g.clamp(-0.5, 0.5))
        return squares(out)

    params = {"w": normal(6, 3)}
    with pytest.raises(fg.GhostError):
        fg.reduce(losses)(params, normal(5, 6), fg.dot(like(params)))


def test_hook_on_the_gradient_of_a_parameter_is_refused() -> None:
    def losses(p: Params, x: Tensor) -> Tensor:
        p["w"].register_hook(lambda g: g * 2)
        return squares(x @ p["w"])

    params = {"w": normal(6, 3)}
    with pytest.raises(fg.ConservationError, match="'w'"):
        fg.reduce(losses)(params, normal(5, 6), fg.dot(like(params)))


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += op is F.linear
        return op(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += op is torch.ops.aten.addmm.default
        return op(*args, **(kwargs or {}))


class Doubled(TorchFunctionMode):
    def __torch_function__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        return out * 2 if op is F.linear else out


@pytest.mark.parametrize("mode", [Functions, Dispatched])
def test_watching_mode_of_the_user(mode: type[Functions] | type[Dispatched]) -> None:
    _, losses, params = made(Net(Mlp()))
    x, seen = normal(5, 6), []

    def watched(p: Params, x: Tensor) -> Tensor:
        with mode() as inside:
            out = losses(p, x)
        seen.append(inside.count)
        return out

    assert_exact(watched, params, x, truth=losses)
    assert seen[-1] == 4  # once planned
    with mode() as outside:
        assert_exact(losses, params, x)
    assert outside.count


def test_changing_mode_of_the_user() -> None:
    _, losses, params = made(Net(Mlp()))
    x = normal(5, 6)

    def doubled(p: Params, x: Tensor) -> Tensor:
        with Doubled():
            return losses(p, x)

    assert_exact(doubled, params, x)
    with pytest.raises(fg.ConservationError), Doubled():  # J V of a rule would be doubled as well
        fg.reduce(losses)(params, x, fg.dot(like(params)))
