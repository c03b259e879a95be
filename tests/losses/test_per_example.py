"""`fg.per_example`: the losses of a batch from the loss of one example, with attention as one op on all of them."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import funcghost as fg
from funcghost.laws.oracle import per_sample_gradients
from funcghost.testing import assert_matches_naive
from tests.models.small import like, next_token, rows, small_gpt
from tests.naive import assert_close, assert_scores, assert_trees_close, dots, expected, gradient
from tests.versions import compiles

hf: Any = transformers  # typed for literal arguments, not for sizes handed on from one place
hf.logging.set_verbosity_error()

Params = dict[str, Tensor]
B, T, D, H = 3, 5, 2, 4


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def one_by_one(loss: Any, params: Params, batch: dict[str, Tensor], axes: dict[str, int | None]) -> Tensor:
    """The losses by a loop, without vmap."""
    examples = next(batch[k].shape[axis] for k, axis in axes.items() if axis is not None)
    picked = [
        {k: v if axes[k] is None else v.select(axes[k] or 0, i) for k, v in batch.items()} for i in range(examples)
    ]
    return torch.stack([loss(params, example) for example in picked])


def small(**options: Any) -> tuple[Any, Any, Params]:
    """The losses of the small GPT batched and by example, and its parameters."""
    model, losses, params = small_gpt(**options)
    model.double()

    def loss(p: Params, example: tuple[Tensor]) -> Tensor:
        one = (example[0][None],)
        return next_token(functional_call(model, p, one), one)[0]

    return losses, loss, params


# -- attention -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attention:
    """One call: the leading axes in one example of query, key and value and of the mask, and who has examples."""

    leading: tuple[int, ...]
    mask: tuple[int, ...] | None
    boolean: bool
    learned: bool
    axes: dict[str, int | None]
    causal: bool
    scale: float | None
    grouped: bool


@st.composite
def attentions(draw: st.DrawFn) -> Attention:
    leading = draw(st.sampled_from([(), (H,), (1, H), (2, H), (2, 1, H)]))
    grouped = draw(st.booleans()) and bool(leading)
    causal = draw(st.booleans())
    broadcast = [(T, T), (1, T), *[(*([1] * k), T, T) for k in range(1, len(leading) + 1)], (*leading, T, T)]
    mask = None if causal else draw(st.none() | st.sampled_from(broadcast))
    axis = st.sampled_from([0, 1, None])
    axes = {k: draw(axis) for k in ("q", "k", "v")} | ({} if mask is None else {"m": draw(axis)})
    if all(found is None for found in axes.values()):
        axes["q"] = 0
    learned = mask is not None and draw(st.booleans())
    boolean = not learned and draw(st.booleans())
    return Attention(leading, mask, boolean, learned, axes, causal, draw(st.none() | st.just(0.3)), grouped)


def attend(case: Attention) -> tuple[Any, Params, dict[str, Tensor]]:
    """A loss with projections and a bias of the attention that is learned, and its batch."""
    few = (*case.leading[:-1], 2) if case.grouped else case.leading
    shapes = {"q": (*case.leading, T, D), "k": (*few, T, D), "v": (*few, T, D)}
    if case.mask is not None:
        shapes["m"] = case.mask
    batch = {}
    for name, shape in shapes.items():
        axis = case.axes[name]
        batch[name] = normal(*shape) if axis is None else normal(*shape[:axis], B, *shape[axis:])
    if case.boolean and "m" in batch:
        batch["m"] = (batch["m"] > 0) | (torch.arange(T) == 0)  # every query sees a key
    params = {name: normal(D, D) for name in "qkv"} | {"bias": normal(T, T)}

    def loss(p: Params, example: dict[str, Tensor]) -> Tensor:
        q, k, v = (example[name] @ p[name] for name in "qkv")
        mask = example.get("m")
        if mask is not None and case.learned:
            mask = mask + torch.tanh(p["bias"])[None] if mask.dim() > 2 else mask + torch.tanh(p["bias"])
        out = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=case.causal, scale=case.scale, enable_gqa=case.grouped
        )
        return torch.sin(out).sum() + out.square().mean()

    return loss, params, batch


@given(attentions())
def test_attention_is_that_of_each_example(case: Attention) -> None:
    loss, params, batch = attend(case)
    wanted = one_by_one(loss, params, batch, case.axes)
    leaves = {k: p.requires_grad_() for k, p in params.items()}
    losses = fg.per_example(loss, in_dims=(axes := {k: case.axes[k] for k in batch}))
    assert_close(losses(params, batch).detach(), wanted.detach(), 1e-12)
    naive = per_sample_gradients(lambda p, b: one_by_one(loss, p, b, axes), leaves, batch)
    found = per_sample_gradients(losses, leaves, batch)
    assert_trees_close(found, naive, 1e-11)


@given(attentions(), st.sampled_from(["backward", "forward"]))
def test_scores_through_attention(case: Attention, route: Any) -> None:
    loss, params, batch = attend(case)
    direction = like(params)
    wanted = expected(lambda p, b: one_by_one(loss, p, b, {k: case.axes[k] for k in batch}), params, batch, direction)
    losses = fg.per_example(loss, in_dims={k: case.axes[k] for k in batch})
    score = fg.reduce(losses, options=fg.Options(route=route))
    assert_scores(score(params, batch, fg.dot(direction)), wanted)


HARD: dict[str, Callable[[Attention], bool]] = {
    "no heads": lambda case: not case.leading,
    "one leading axis": lambda case: len(case.leading) == 1,
    "two leading axes": lambda case: len(case.leading) == 2,
    "three leading axes": lambda case: len(case.leading) == 3,
    "learned": lambda case: case.learned,
    "boolean": lambda case: case.boolean and case.mask is not None,
    "mask shared": lambda case: case.axes.get("m", 0) is None,
    "mask alone has examples": lambda case: case.axes.get("m") is not None and case.axes["q"] is case.axes["k"] is None,
    "query shared": lambda case: case.axes["q"] is None,
    "grouped": lambda case: case.grouped,
    "mask with more axes": lambda case: case.mask is not None and len(case.mask) - 2 == len(case.leading) > 1,
    "causal": lambda case: case.causal,
}


@pytest.mark.parametrize("name", HARD)
def test_cases_that_are_hard_are_drawn(name: str) -> None:
    """Each is one in fifty draws or more: that 2000 miss it has a chance of less than 1e-17, whatever the seed."""
    enough = settings(max_examples=2000, database=None, phases=[Phase.generate])
    find(attentions(), HARD[name], settings=enough)


class Kernels(TorchDispatchMode):
    """Counts the products and the attention kernels that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(word in str(func) for word in ("attention", "bmm")):
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["causal", "boolean", "additive", "grouped"])
def test_attention_runs_the_kernels_of_the_batched_op(kind: str) -> None:
    mask = {"boolean": torch.ones(T, T, dtype=torch.bool).tril(), "additive": normal(T, T)}.get(kind)
    x, few = normal(B, H, T, D).requires_grad_(), normal(B, 2 if kind == "grouped" else H, T, D).requires_grad_()

    def attended(q: Tensor, k: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, k, mask, is_causal=mask is None, enable_gqa=kind == "grouped")

    with Kernels() as batched:
        attended(x, few).square().sum().backward()
    for axes in (0, 1):
        examples = (x.unsqueeze(axes), few.unsqueeze(axes)) if axes else (x, few)
        with Kernels() as ours:
            losses = fg.per_example(lambda p, e: attended(*e).square().sum())
            losses({}, examples).sum().backward()
        assert ours.counts == batched.counts
    assert (
        sum(
            batched.counts[f"aten._scaled_dot_product_flash_attention_for_cpu{end}.default"]
            for end in ("", "_backward")
        )
        == 2
    )


def test_step_has_the_flops_of_the_batched_step() -> None:
    batched, loss, params = small()
    batch, direction = rows(), like(params)
    totals = []
    for losses in (batched, fg.per_example(loss)):
        step = fg.grad_and_reduce(losses, plan=fg.plan(losses, params, batch))
        step(params, batch, fg.dot(direction))
        with FlopCounterMode(display=False) as counter:
            step(params, batch, fg.dot(direction))
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1]


def plain_attention(p: Params, example: Tensor) -> Tensor:
    q, k, v = (example @ p[name] for name in "qkv")
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).square().sum()


def test_nested_vmaps() -> None:
    params, x = {name: normal(D, D) for name in "qkv"}, normal(B, 2, H, T, D)
    nested = fg.per_example(lambda p, rows: fg.per_example(plain_attention)(p, rows).sum())
    assert_close(nested(params, x), torch.stack([plain_attention(params, row) for row in x]), 1e-12)
    outside = vmap(lambda rows: fg.per_example(plain_attention)(params, rows))(x)
    assert_close(outside, torch.stack([plain_attention(params, r) for row in x for r in row]).view(B, 2), 1e-12)
    direction = like(params)
    wanted = expected(lambda p, b: torch.stack([plain_attention(p, row) for row in b]), params, x, direction)
    assert_scores(fg.reduce(nested)(params, x, fg.dot(direction)), wanted)


def test_only_outer_examples_reach_inner_attention() -> None:
    """The operands have no axis of the inner vmap."""
    params, x, y = {name: normal(D, D) for name in "qkv"}, normal(B, H, T, D), normal(B, 2)
    losses = fg.per_example(lambda p, e: fg.per_example(lambda p, s: s * plain_attention(p, e["x"]))(p, e["y"]).sum())
    wanted = torch.stack([plain_attention(params, row) for row in x]) * y.sum(1)
    assert_close(losses(params, {"x": x, "y": y}), wanted, 1e-12)


def test_what_all_examples_share_runs_once() -> None:
    params, batched = {"w": normal(H, T, D)}, []

    def loss(p: Params, s: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(p["w"], p["w"], p["w"])
        batched.append(torch._C._functorch.is_batchedtensor(out))
        return s * out.square().sum()

    assert_close(fg.per_example(loss)(params, torch.arange(B)), torch.arange(B) * loss(params, torch.tensor(1)), 1e-12)
    assert batched == [False, False]


def test_derivatives_of_torch_func_around_and_inside() -> None:
    params, x = {name: normal(D, D) for name in "qkv"}, normal(B, H, T, D)
    losses, tangent = fg.per_example(plain_attention), {k: normal(D, D) for k in "qkv"}
    naive = per_sample_gradients(lambda p, b: torch.stack([plain_attention(p, row) for row in b]), params, x)
    assert_trees_close(grad(lambda p: losses(p, x).sum())(params), {k: g.sum(0) for k, g in naive.items()})
    # The reference itself by the plain form: the fused kernel has no forward derivative.
    found = jvp(lambda p: losses(p, x), (params,), (tangent,))[1]
    assert_close(found, dots(naive, tangent), 1e-11)
    inner = fg.per_example(lambda p, e: grad(lambda z: plain_attention(p, z))(e).square().sum())
    with sdpa_kernel(SDPBackend.MATH):
        slopes = torch.func.vmap(grad(lambda z: plain_attention(params, z)))(x)
    assert_close(inner(params, x), slopes.square().sum((1, 2, 3)), 1e-11)
    by_vmap = vmap(grad(lambda p, e: fg.per_example(plain_attention)(p, e[None])[0]), (None, 0))(params, x)
    assert_trees_close(by_vmap, naive)


@pytest.mark.parametrize("masked", [False, True])
def test_module_attention_out_of_sight(masked: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    params, x = dict(layer.named_parameters()), normal(B, T, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64) if masked else None
    batched = lambda p, b: functional_call(layer, p, (b,), {"src_mask": mask}).square().sum((1, 2))  # noqa: E731
    losses = fg.per_example(lambda p, e: functional_call(layer, p, (e,), {"src_mask": mask}).square().sum())
    direction = like(params)
    assert_scores(fg.reduce(losses)(params, x, fg.dot(direction)), expected(batched, params, x, direction))


def test_autocast_reaches_attention() -> None:
    q, dtypes = torch.randn(B, H, T, D), []

    def seen(p: Params, e: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(e, e, e, is_causal=True)
        dtypes.append(out.dtype)
        return out.float().sum()

    with torch.autocast("cpu", torch.bfloat16):
        wanted = F.scaled_dot_product_attention(q, q, q, is_causal=True).float().sum((1, 2, 3))
        assert torch.equal(fg.per_example(seen)({}, q), wanted)
    assert dtypes == [torch.bfloat16]


# -- random numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["attention", "dropout"])
@pytest.mark.parametrize("shared", [False, True])
def test_randomness(kind: str, shared: bool) -> None:
    row = torch.randn(H, 16, 16, dtype=torch.float64)
    params, batch = {"s": torch.ones((), dtype=torch.float64)}, {"x": row.expand(B, H, 16, 16), "i": normal(B)}

    def loss(p: Params, e: Any) -> Tensor:
        x = row if shared else e["x"]
        x = x * p["s"]
        dropped = F.scaled_dot_product_attention(x, x, x, dropout_p=0.4) if kind == "attention" else F.dropout(x, 0.4)
        return dropped.square().sum() + 0 * e["i"]

    different = fg.per_example(loss, randomness="different")(params, batch)
    assert len(set(different.tolist())) == B
    same = fg.per_example(loss, randomness="same")(params, batch)
    assert torch.allclose(same, same[:1], rtol=1e-12)
    assert not torch.allclose(same, fg.per_example(loss, randomness="same")(params, batch))
    with pytest.raises(fg.InputError, match="randomness='different'"):
        fg.per_example(loss)(params, batch)
    for randomness in () if shared else ("different", "same"):
        losses, direction = fg.per_example(loss, randomness=randomness), like(params)
        state = torch.get_rng_state()
        wanted = expected(losses, params, batch, direction)
        torch.set_rng_state(state)
        assert_scores(fg.reduce(losses)(params, batch, fg.dot(direction)), wanted)


def test_attention_dropout_keeps_what_it_should() -> None:
    q, v = torch.zeros(64, 1, 8, 4), torch.ones(64, 1, 8, 4)
    losses = fg.per_example(
        lambda p, e: F.scaled_dot_product_attention(e["q"], e["q"], e["v"], dropout_p=0.25).mean(),
        randomness="different",
    )
    values = losses({}, {"q": q, "v": v})
    assert abs(float(values.mean()) - 1) < 0.05
    assert float(values.std()) > 0


# -- chunks, axes --------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("route", ["backward", "forward"])
def test_chunks(chunk_size: int, route: Any) -> None:
    batched, loss, params = small(layers=1)
    batch, direction = rows(5), like(params)
    losses = fg.per_example(loss, chunk_size=chunk_size)
    assert_close(losses(params, batch).detach(), batched(params, batch).detach(), 1e-12)
    found = fg.reduce(losses, options=fg.Options(route=route))(params, batch, fg.dot(direction))
    assert_scores(found, expected(batched, params, batch, direction))


def test_chunks_call_the_loss_on_no_more_examples() -> None:
    sizes = []

    def loss(p: Params, x: Tensor) -> Tensor:
        sizes.append(len(torch._C._functorch.get_unwrapped(x)))
        return (x * p["w"]).sum()

    fg.per_example(loss, chunk_size=3)({"w": normal(4)}, normal(7, 4))
    assert sizes == [3, 3, 1]


def test_axes_of_a_tree() -> None:
    params = {"w": normal(4)}
    x, y, z = normal(4, 3), normal(4), normal(3)
    batch = {"x": (x, "text"), "y": y, "z": [z, None]}
    in_dims = {"x": (-1, None), "y": None, "z": 0}

    def loss(p: Params, e: Any) -> Tensor:
        assert e["x"][1] == "text"
        assert e["z"][1] is None
        return (torch.tanh(p["w"] * e["x"][0]) * e["y"]).sum() * e["z"][0]

    wanted = (torch.tanh(params["w"] * x.T) * y).sum(1) * z
    losses = fg.per_example(loss, in_dims=in_dims)
    assert_close(losses(params, batch), wanted, 1e-12)
    direction = like(params)
    batched = lambda p, b: (torch.tanh(p["w"] * b["x"][0].T) * b["y"]).sum(1) * b["z"][0]  # noqa: E731
    assert_scores(fg.reduce(losses)(params, batch, fg.dot(direction)), expected(batched, params, batch, direction))


def test_empty_batch() -> None:
    _, loss, params = small(layers=1)
    out = fg.grad_and_reduce(fg.per_example(loss))(params, rows(0), fg.dot(like(params)))
    assert out.losses.shape == out.reduced.shape == (0,)
    assert not any(g.any() for g in out.grads.values())
    assert fg.per_example(lambda p, e: e["x"] @ p["w"], in_dims=-1)({"w": normal(4)}, {"x": normal(4, 0)}).shape == (0,)


def test_aux_comes_with_the_examples_in_front() -> None:
    params, x = {"w": normal(4)}, normal(5, 4)
    losses = fg.per_example(lambda p, e: ((e * p["w"]).sum(), {"h": e * p["w"]}), chunk_size=2)
    out = fg.grad_and_reduce(losses, has_aux=True)(params, x, fg.dot(params))
    assert_close(out.aux["h"], x * params["w"], 1e-15)
    assert_close(out.reduced, x @ params["w"], 1e-12)


# -- compilers -----------------------------------------------------------------------------------


@compiles
def test_compiled_step() -> None:
    torch._dynamo.reset()
    batched, loss, params = small(layers=1)
    losses, direction, batch = fg.per_example(loss), like(params), rows()
    step = fg.grad_and_reduce(losses, plan=fg.plan(losses, params, batch))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for size in (4, 6):
        batch = rows(size)
        found = compiled(params, batch, fg.dot(direction))
        assert_scores(found.reduced, expected(batched, params, batch, direction))
        grads, values = gradient(batched, params, batch)
        assert_close(found.losses, values, 1e-12)
        assert_trees_close(found.grads, grads)


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_step_traces_with_make_fx(mode: str) -> None:
    batched, loss, params = small(layers=1)
    losses, direction, batch = fg.per_example(loss), like(params), rows()
    step = fg.grad_and_reduce(losses, plan=fg.plan(losses, params, batch))

    def traced(params: Params, tokens: Tensor) -> tuple[Tensor, Params]:
        out = step(params, (tokens,), fg.dot(direction))
        return out.reduced, out.grads

    plain = {k: p.detach() for k, p in params.items()}
    options: dict[str, Any] = {"tracing_mode": mode, "_allow_non_fake_inputs": True} if mode == "fake" else {}
    graph = make_fx(traced, **options)(plain, batch[0])
    other = rows()
    scores, grads = graph(plain, other[0])
    assert_scores(scores, expected(batched, params, other, direction))
    assert_trees_close(grads, gradient(batched, params, other)[0])


# -- values that Python reads, bad input ---------------------------------------------------------


def test_python_may_read_what_all_examples_agree_in() -> None:
    params, x = {"w": normal(4)}, normal(B, 4)

    def loss(p: Params, e: Any) -> Tensor:
        n = int(e["n"])
        return (p["w"][:n] * e["x"][:n]).sum() * (2 if e["n"] > 2 else 3) * e["f"].item()

    losses, direction = fg.per_example(loss), like(params)
    for n, factor in ((2, 3), (3, 2)):
        batch = {"x": x, "n": torch.full((B,), n), "f": torch.full((B,), 0.5)}
        wanted = (x[:, :n] * direction["w"][:n]).sum(1) * factor * 0.5
        assert_close(fg.reduce(losses)(params, batch, fg.dot(direction)), wanted, 1e-12)
    with pytest.raises(fg.InputError, match=r"__int__.*differ: \[1, 2, 3\].*torch\.where"):
        losses(params, {"x": x, "n": torch.tensor([1, 2, 3]), "f": torch.ones(B)})


def never(p: Any, example: Any) -> Tensor:
    raise AssertionError("the loss must not be called")


@pytest.mark.parametrize(
    ("batch", "in_dims", "message"),
    [
        ({"x": torch.ones(3, 2), "y": torch.ones(4)}, 0, r"differ in their number.*3 in batch\['x'\].*4 in batch"),
        ({"x": torch.ones(3), "y": 5}, 0, r"batch\['y'\] is no tensor but of type int.*None for it"),
        ({"x": torch.ones(3)}, {"z": 0}, r"in_dims=\{'z': 0\} is not like the batch"),
        ({"x": torch.ones(3)}, {"x": 1}, r"batch\['x'\] has shape \(3,\), and no axis 1"),
        ({"x": torch.ones(3)}, {"x": "a"}, r"in_dims has 'a' for batch\['x'\]"),
        ({"x": torch.ones(3), "s": torch.tensor(1.0)}, 0, r"shape \(\), and no axis 0"),
        ({"x": torch.ones(3)}, None, "nothing in the batch has an axis"),
        ({}, 0, "nothing in the batch has an axis"),
        (object(), 0, "batch is no tensor but of type object"),
    ],
)
def test_batches_that_do_not_fit(batch: Any, in_dims: Any, message: str) -> None:
    with pytest.raises(fg.InputError, match=message):
        fg.per_example(never, in_dims=in_dims)({"w": torch.ones(2)}, batch)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda x: x, r"must be a scalar tensor, found shape \(2,\)"),
        (lambda x: x.sum()[None], r"found shape \(1,\).*take \[0\]"),
        (lambda x: 3.0, "found float"),
        (lambda x: (x.sum(), {"a": 1}), "aux must be a tree of tensors, found a leaf int"),
    ],
)
def test_losses_that_are_no_scalar(value: Any, message: str) -> None:
    with pytest.raises(fg.InputError, match=message):
        fg.per_example(lambda p, x: value(x))({}, torch.ones(3, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": 3}, "must be a function"),
        ({"randomness": "some"}, "must be 'error', 'different' or 'same', found 'some'"),
        ({"chunk_size": 0}, "must be a positive number of examples, found 0"),
        ({"chunk_size": True}, "found True"),
    ],
)
def test_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(fg.InputError, match=message):
        fg.per_example(**({"loss": never} | arguments))


def test_nothing_stays_active_after_an_error() -> None:
    with pytest.raises(AssertionError):
        fg.per_example(never)({}, torch.ones(3))
    assert torch._C._functorch.maybe_current_level() is None
    assert not torch.overrides._get_current_function_mode_stack()


def test_what_a_parameter_made_may_be_written_to_under_vmap() -> None:
    params, x = {"w": normal(3, 4)}, normal(5, 2, 3)

    def one(p: Params, x: Tensor) -> Tensor:
        h = x @ p["w"]
        h.mul_(2)
        return h.sin_().sum()

    assert_matches_naive(fg.per_example(one), params, x)


def test_a_parameter_written_into_what_is_there_under_vmap() -> None:
    """The tangent is carried on, as by the same op without a vmap; there are no factors then."""
    params, x = {"w": normal(3, 4)}, normal(5, 2, 3)

    def one(p: Params, x: Tensor) -> Tensor:
        h = x @ p["w"]
        h.mul_(2).add_(p["w"][0])
        return h.sin().sum()

    losses, direction = fg.per_example(one), like(params)
    score = fg.reduce(losses)
    for _ in range(2):
        assert_scores(score(params, x, fg.dot(direction)), expected(losses, params, x, direction))
    with pytest.raises(fg.UnsupportedOpError, match="chunk_size"):
        score(params, x, fg.squared_norm())
