"""Drawn values: what the derivative of an op is taken at while a plan is made, and what that is for."""

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import funcghost as fg
from funcghost.laws.draws import PERIOD
from funcghost.ops.call import Call, Outputs, flatten_call
from funcghost.ops.meter import Clock
from funcghost.planning.drawn import DRAWN, FEW, TRUE, Generic
from tests.depth import fewer
from tests.naive import assert_scores, expected

Params = dict[str, Tensor]
Op = Callable[..., Any]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def call_of(op: Op, *args: Any, **kwargs: Any) -> Call:
    leaves, spec = flatten_call(args, kwargs)
    tracked = (slot for slot, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad)
    return Call(op, tuple(leaves), spec, tuple(tracked))


def generic(op: Op, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """What an op gives, and what it gives with the derivative at drawn values."""
    call = call_of(op, *args, **kwargs)
    [found] = call.evaluate(call.leaves)
    [drawn] = Generic(Clock()).outputs(call, (found,))
    return found, drawn


def drawn_for(value: Tensor) -> Tensor:
    """What an op gets in place of a value."""
    taken: list[Tensor] = []

    def op(x: Tensor, given: Tensor) -> Tensor:
        taken.append(given.detach())
        return x.square()

    generic(op, torch.ones(3, requires_grad=True), value)
    return taken[1]  # the first is the value itself


# What is drawn


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(), (0,), (1,), (5,), (3, 0, 2), (4, 7), (2, 3, 5), (300, 2, 250)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["zero", "positive", "negative", "mixed", "inf", "nan"])
def test_size_and_sign_of_what_is_drawn(dtype: torch.dtype, shape: tuple[int, ...], kind: str) -> None:
    value = normal(*shape).abs() * 30 + 1
    if kind == "zero":
        value = torch.zeros_like(value)
    elif kind == "negative":
        value = -value
    elif kind == "mixed":
        value = value * (torch.arange(value.numel()).view(shape) % 2 * 2 - 1)
    elif kind in ("inf", "nan"):
        value = torch.where(torch.arange(value.numel()).view(shape) % 3 == 1, -float(kind), value)
    value = value.to(dtype)
    drawn = drawn_for(value)
    assert (drawn.shape, drawn.dtype, drawn.device) == (value.shape, value.dtype, value.device)
    assert bool(drawn.isfinite().all())
    if not drawn.numel():
        return
    assert not torch.equal(drawn, value)
    finite = value[value.isfinite()].double()
    size = float(finite.abs().mean()) * 1.25 if kind != "zero" else 0.02
    assert float(drawn.abs().max()) <= 6 * size
    if kind in ("positive", "inf", "nan") and not bool((value[value.isfinite()] < 0).any()):
        assert bool((drawn >= 0).all())
        assert float(drawn.max()) <= float(finite.max())
    if drawn.numel() > 30:
        assert 0.5 * size < float(drawn.double().abs().mean()) < size
    if drawn.numel() > 30 and kind in ("zero", "negative", "mixed"):
        assert bool((drawn > 0).any())
        assert bool((drawn < 0).any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_largest_numbers_have_their_size(dtype: torch.dtype) -> None:
    value = torch.full((7, 9), torch.finfo(dtype).min, dtype=dtype)  # as masks of attention are filled
    drawn = drawn_for(value)
    assert bool(drawn.isfinite().all())
    assert float(drawn.double().abs().max()) > 0.5 * torch.finfo(dtype).max


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_values_have_their_size(dtype: torch.dtype) -> None:
    value = torch.complex(normal(9, 9), 40 * normal(9, 9, seed=1)).to(dtype)
    drawn = drawn_for(value)
    assert (drawn.shape, drawn.dtype) == (value.shape, dtype)
    assert 0.3 < float(drawn.abs().mean() / value.abs().mean()) < 3
    assert float(drawn_for(torch.zeros(5, dtype=dtype)).abs().max()) > 0


@pytest.mark.parametrize("value", [torch.ones(8, 8) > 0, torch.zeros(8, 8) > 0, torch.eye(8) > 0])
def test_masks_are_of_either_kind(value: Tensor) -> None:
    drawn = drawn_for(value)
    assert (drawn.shape, drawn.dtype) == (value.shape, torch.bool)
    assert 8 < int(drawn.sum()) < 56


def test_integers_are_as_they_are() -> None:
    index = torch.tensor([2, 0, 1])
    assert drawn_for(index) is index or torch.equal(drawn_for(index), index)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state")
def test_a_sparse_tensor_has_its_zeros_anywhere(layout: torch.layout) -> None:
    value = torch.eye(6, dtype=torch.float64).to_sparse(layout=layout)
    drawn = drawn_for(value)
    assert (drawn.shape, drawn.dtype, drawn.layout) == (value.shape, value.dtype, layout)
    assert int((drawn.to_dense() != 0).sum()) > 30


def test_rows_of_a_large_tensor_are_not_alike() -> None:
    drawn = drawn_for(normal(64, PERIOD // 8))
    assert torch.unique(drawn, dim=0).shape == drawn.shape
    assert int(torch.linalg.matrix_rank(drawn)) == 64


def test_every_tensor_is_drawn_apart() -> None:
    taken: list[Tensor] = []

    def op(a: Tensor, b: Tensor) -> Tensor:
        taken.extend((a.detach(), b.detach()))
        return a * b

    maker, x = Generic(Clock()), normal(9).requires_grad_()
    for _ in range(2):
        call = call_of(op, x, x.detach())
        maker.outputs(call, call.evaluate(call.leaves))
    assert len(taken) == 16  # the values themselves and three draws, twice
    draws = [*taken[2:8], *taken[10:]]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


def test_the_same_in_every_run() -> None:
    assert torch.equal(drawn_for(normal(5)), drawn_for(normal(5)))


# What the outputs then are


X, Y = normal(4, 3), normal(4, 3, seed=1)
OPS: dict[str, tuple[Op, Tensor, tuple[Any, ...]]] = {
    "relu that is off": (torch.relu, -X.abs() - 1, ()),
    "product by the identity": (lambda h, m: m @ h, X, (torch.eye(4, dtype=X.dtype),)),
    "product with zero": (torch.mul, X, (torch.zeros(4, 3, dtype=X.dtype),)),
    "where": (lambda h, m: torch.where(m, h, h.flip(0)), X, (torch.ones(4, 3) > 0,)),
    "softmax behind -inf": (lambda h, m: (h + m).softmax(0), X, (torch.eye(4, 3).log().to(X.dtype),)),
    "attention": (
        lambda h, m: F.scaled_dot_product_attention(h[None], h[None], h[None], attn_mask=m),
        X,
        (torch.eye(4) > 0,),
    ),
    "sum of squares": (lambda h: h.square().sum(), X, ()),
    "no entries": (lambda h: h[:0].exp(), X, ()),
    "bfloat16": (torch.tanh, X.bfloat16(), ()),
    "float16": (torch.tanh, X.half(), ()),
    "complex": (lambda h: torch.fft.fft(h).square(), X, ()),
    "huge": (torch.tanh, normal(3, PERIOD), ()),
    "sparse": (lambda h, m: torch.sparse.mm(m, h), X, (torch.eye(4, dtype=X.dtype).to_sparse(),)),
}


@pytest.mark.parametrize("name", OPS)
def test_true_values_with_another_derivative(name: str) -> None:
    op, value, others = OPS[name]
    value = value.clone().requires_grad_()
    found, drawn = generic(op, value, *others)
    assert drawn is not found
    assert (drawn.shape, drawn.dtype, drawn.requires_grad) == (found.shape, found.dtype, True)
    assert torch.equal(drawn, found)
    along = normal(*found.shape, seed=5).to(found.dtype)  # ones are what a softmax has no slope along
    slopes = [torch.autograd.grad(out, value, along, retain_graph=True)[0] for out in (found, drawn)]
    assert slopes[1].shape == value.shape
    assert bool(slopes[1].isfinite().all())
    if found.numel():
        assert not torch.equal(*slopes)


def test_outputs_without_a_derivative_are_the_same_objects() -> None:
    value = normal(4, 3).requires_grad_()
    call = call_of(lambda x: (x.square(), x.detach().exp()), value)
    found = call.evaluate(call.leaves)
    drawn = Generic(Clock()).outputs(call, found)
    assert drawn[0] is not found[0]
    assert drawn[1] is found[1]


def test_gradients_go_to_where_they_go() -> None:
    a, b = normal(4, 3).requires_grad_(), normal(3, 2, seed=1).requires_grad_()
    found, drawn = generic(torch.matmul, a, b)
    for value in (a, b):
        [slope] = torch.autograd.grad(drawn.sum(), value, retain_graph=True)
        [true] = torch.autograd.grad(found.sum(), value, retain_graph=True)
        assert slope.shape == true.shape
        assert not torch.allclose(slope, true)


def flat_elsewhere(value: Tensor) -> Op:
    """The identity where it is called with the value, a constant elsewhere."""
    return lambda x: x * float(torch.equal(x, value))


@pytest.mark.parametrize(("size", "slope"), [(FEW, TRUE / (TRUE + sum(DRAWN))), (FEW + 1, 0.0)])
def test_few_entries_use_both_derivatives(size: int, slope: float) -> None:
    value = normal(size).requires_grad_()
    _, drawn = generic(flat_elsewhere(value.detach()), value)
    [gradient] = torch.autograd.grad(drawn.sum(), value)
    assert torch.equal(gradient, torch.full_like(gradient, slope))


ROWS, OTHERS = torch.arange(4), normal(4, 3, seed=2)
OVERWRITING: dict[str, tuple[Op, tuple[Any, ...]]] = {
    "index_copy": (torch.index_copy, (0, ROWS, OTHERS)),
    "index_fill": (Tensor.index_fill, (0, ROWS, 0.0)),
    "index_put": (torch.index_put, ((ROWS,), OTHERS)),
    "masked_scatter": (Tensor.masked_scatter, (torch.ones(4, 1) > 0, OTHERS)),
    "scatter": (torch.scatter, (0, ROWS[:, None].expand(4, 3), OTHERS)),
    "scatter of a number": (Tensor.scatter, (0, ROWS[:, None].expand(4, 3), 1.0)),
}


@pytest.mark.parametrize("name", OVERWRITING)
def test_what_is_overwritten_keeps_a_derivative(name: str) -> None:
    op, others = OVERWRITING[name]
    value = normal(4, 3).requires_grad_()
    found, drawn = generic(op, value, *others)
    assert torch.equal(drawn, found)
    slopes = [torch.autograd.grad(out.sum(), value, retain_graph=True)[0] for out in (found, drawn)]
    assert not bool(slopes[0].any())
    assert torch.equal(slopes[1], torch.full_like(value, 1 / (TRUE + 1)))


# Ops that refuse drawn values


def test_an_op_that_takes_near_values_alone() -> None:
    value = normal(6).requires_grad_()
    taken: list[Tensor] = []

    def op(x: Tensor) -> Tensor:
        if float((x - value).detach().abs().max()) > 0.3 * float(value.detach().abs().max()):
            raise ValueError("too far")
        taken.append(x.detach())
        return x.square()

    found, drawn = generic(op, value)
    assert torch.equal(found, drawn)
    assert len(taken) == 2
    off = (taken[1] / value.detach() - 1).abs()
    assert float(off.max()) <= 0.25 + 1e-12
    assert float(off.min()) > 0
    [gradient] = torch.autograd.grad(drawn.sum(), value)
    mean = (2 * taken[1] + TRUE * 2 * value.detach()) / (1 + TRUE)
    torch.testing.assert_close(gradient, mean, rtol=1e-12, atol=0)


@pytest.mark.parametrize("error", [RuntimeError, ValueError, IndexError, TypeError])
def test_an_op_that_takes_no_other_values(error: type[Exception]) -> None:
    value = normal(6).requires_grad_()

    def op(x: Tensor) -> Tensor:
        if not torch.equal(x, value):
            raise error("not these")
        return x.square()

    found, drawn = generic(op, value)
    assert drawn is found


REFUSING: dict[str, tuple[Op, Tensor, tuple[Any, ...]]] = {
    "cholesky": (torch.linalg.cholesky, 9 * torch.eye(4, dtype=X.dtype) + 0.1 * (X @ X.T), ()),
    "a root that is NaN elsewhere": (torch.acos, torch.tensor([0.7, -0.7, 0.7, -0.7], dtype=X.dtype), ()),
    "cross-entropy of what is a probability": (
        F.binary_cross_entropy,
        torch.tensor([0.0, 0.0, 0.0], dtype=X.dtype),
        (torch.zeros(3, dtype=X.dtype),),
    ),
}


@pytest.mark.parametrize("name", REFUSING)
def test_ops_of_torch_that_refuse(name: str) -> None:
    op, value, others = REFUSING[name]
    value = value.clone().requires_grad_()
    found, drawn = generic(op, value, *others)
    assert torch.equal(found, drawn)
    [slope] = torch.autograd.grad(drawn.sum(), value)
    assert bool(slope.isfinite().all())


def test_where_no_derivative_is_to_be_had_the_true_one_stays() -> None:
    value = torch.zeros(3, dtype=torch.float64, requires_grad=True)  # the root of what is drawn is NaN
    found, drawn = generic(lambda x: (x - 1e-9).abs().neg().add(1e-9).sqrt(), value)
    assert drawn is found
    many = torch.tensor([1.0, -3.0], dtype=torch.float64).repeat(20).requires_grad_()
    found, drawn = generic(torch.log, many)  # NaN at the true values as well
    assert drawn is found


def test_values_of_one_sign_keep_it() -> None:
    found, drawn = generic(torch.log, (normal(50).abs() + 0.1).requires_grad_())
    assert drawn is not found
    assert torch.equal(drawn, found)


# What is left alone


def test_what_moves_or_is_linear_is_untouched() -> None:
    x, y = normal(4, 3).requires_grad_(), normal(4, 3, seed=1).requires_grad_()
    index = torch.tensor([2, 0, 1, 1])
    same: list[tuple[Op, tuple[Any, ...]]] = [
        *((torch.cat, ([x, y],)), (Tensor.__getitem__, (x, index)), (torch.index_add, (x, 0, index, y))),
        *((torch.flip, (x, (0,))), (F.embedding, (index, x)), (torch.gather, (x, 0, index[:, None]))),
        *((torch.add, (x, y)), (torch.sum, (x, 1)), (torch.mean, (x,)), (Tensor.expand_as, (x, y))),
        (torch.mul, (x, 2.0)),
    ]
    other: list[tuple[Op, tuple[Any, ...]]] = [
        *((torch.mul, (x, y)), (F.linear, (x, y)), (torch.div, (x, y)), (torch.square, (x,))),
    ]
    for untouched, calls in ((True, same), (False, other)):
        for op, args in calls:
            found, drawn = generic(op, *args)
            assert (drawn is found) is untouched, op


def test_nothing_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op that keeps its output for its backward must not keep itself by it."""
    alive: list[weakref.ref[Tensor]] = []
    evaluate = Call.evaluate

    def noted(self: Call, leaves: Sequence[Any]) -> Outputs:
        drawn = evaluate(self, leaves)
        alive.extend(map(weakref.ref, drawn))
        return drawn

    monkeypatch.setattr(Call, "evaluate", noted)
    fg.plan(lambda p, x: (x @ p["w"]).exp().softmax(1).square().sum(1), {"w": normal(3, 2)}, normal(4, 3))
    gc.collect()
    assert len(alive) > 9
    assert all(reference() is None for reference in alive)


def test_samples_of_a_vmap_are_untouched() -> None:
    same, maker = list[bool](), Generic(Clock())

    def one(x: Tensor) -> Tensor:
        call = call_of(torch.square, x)
        found = call.evaluate(call.leaves)
        same.append(maker.outputs(call, found) is found)
        return found[0]

    torch.func.vmap(one)(normal(4, 3).requires_grad_())
    assert same == [True]


def seen_while_planned(losses: Callable[[Params, Any], Tensor], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops that come to be drawn."""
    names: list[str] = []
    outputs = Generic.outputs

    def noted(self: Generic, call: Call, found: Outputs) -> Outputs:
        names.append(call.op.__name__)
        return outputs(self, call, found)

    monkeypatch.setattr(Generic, "outputs", noted)
    fg.plan(losses, {"w": normal(3, 2), "v": normal(2)}, normal(4, 3))
    return names


def test_views_and_what_is_of_parameters_alone_are_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    def losses(p: Params, x: Tensor) -> Tensor:
        h = x @ (p["w"] * p["w"]).exp()
        h.mul_(p["v"])
        h[:, 0] = h[:, 1] * 2
        return h.view(-1, 2).t().tanh().square().sum(0)

    names = seen_while_planned(losses, monkeypatch)
    assert names == ["matmul", "mul_", "mul", "__setitem__", "tanh", "square", "sum"]


def test_what_the_losses_draw_is_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Tensor] = []

    def losses(p: Params, x: Tensor) -> Tensor:
        h = F.dropout(x @ p["w"], 0.5)
        taken.append(h.detach().clone())
        h = F.rrelu(h, training=True)
        h = h + torch.randn_like(h) + F.gumbel_softmax(h)
        taken.append(h.detach().clone())
        return F.dropout(h, 0.3).square().sum(1)

    params, x = {"w": normal(3, 2)}, normal(4, 3)
    state = torch.get_rng_state()
    losses({"w": params["w"].clone().requires_grad_()}, x)
    after = torch.get_rng_state()
    plain = list(taken)
    for _ in range(2):
        taken.clear()
        torch.set_rng_state(state)
        fg.plan(losses, params, x)
        assert torch.equal(torch.get_rng_state(), state)
        for i, value in enumerate(taken):
            assert torch.equal(value, plain[i % 2])
    step = fg.grad_and_reduce(losses)
    step(params, x, fg.dot(params))
    assert torch.equal(torch.get_rng_state(), after)


def test_the_losses_see_true_values_while_a_plan_is_made() -> None:
    taken: list[Tensor] = []

    def losses(p: Params, x: Tensor) -> Tensor:
        h = torch.relu(x @ p["w"])
        taken.append(h.detach().clone())
        if bool((h == 0).all()):
            raise AssertionError("unreachable")
        return h.square().sum(1)

    fg.plan(losses, {"w": normal(3, 2)}, normal(4, 3))
    assert all(torch.equal(value, taken[0]) for value in taken)


# What it is for: samples that happen to be apart when the plan is made


BATCH, WIDTH = 4, 3
Coupling = Callable[[Tensor, Any], Tensor]


def dense(mask: Tensor) -> Tensor:
    return torch.where(mask > 0, 0.0, -torch.inf).to(mask.dtype)


MATRIX: dict[str, Coupling] = {
    "matmul": lambda h, m: m @ h,
    "einsum": lambda h, m: torch.einsum("ij,jd->id", m, h),
    "product and sum": lambda h, m: (m[:, :, None] * h[None]).sum(1),
    "linear": lambda h, m: F.linear(h.T.tanh(), m).T,
    "bmm": lambda h, m: torch.bmm(m[None], h[None])[0],
    "addmm": lambda h, m: torch.addmm(h, m, h),
    "tensordot": lambda h, m: torch.tensordot(m, h, 1),
    "convolution": lambda h, m: F.conv1d(h[None].tanh(), m[:, :, None])[0],
    "kronecker": lambda h, m: (torch.kron(m, torch.eye(WIDTH, dtype=m.dtype)) @ h.flatten()).view_as(h),
    "solve": lambda h, m: torch.linalg.solve(m + 2 * torch.eye(BATCH, dtype=m.dtype), h),
    "sparse": lambda h, m: torch.sparse.mm(m.to_sparse(), h),
    "attention by a mask": lambda h, m: F.scaled_dot_product_attention(h, h, h, attn_mask=m > 0),
    "attention by a bias": lambda h, m: F.scaled_dot_product_attention(h, h, h, attn_mask=dense(m)),
    "softmax behind a mask": lambda h, m: (h @ h.T).masked_fill(m <= 0, -torch.inf).softmax(1) @ h,
    "softmax behind -1e9": lambda h, m: (h @ h.T + (m.clamp(max=1) - 1) * 1e9).softmax(1) @ h,
    "contrast behind a mask": lambda h, m: h + (h @ h.T).masked_fill(m <= 0, -torch.inf).logsumexp(1, keepdim=True),
    "maximum behind a mask": lambda h, m: torch.where(m[:, :, None] > 0, h[None], -torch.inf).amax(1),
    "product of chosen": lambda h, m: torch.where(m[:, :, None] > 0, h[None], 1.0).prod(1),
    "one-hot": lambda h, m: F.one_hot(m.argmax(1), BATCH).to(h.dtype) @ h,
    "index": lambda h, m: h[m.argmax(1)],
    "index as a list": lambda h, m: h[m.argmax(1).tolist()],
    "gathered": lambda h, m: torch.take_along_dim(h, m.argmax(1, keepdim=True).expand(-1, WIDTH), 0),
    "scattered": lambda h, m: torch.zeros_like(h).scatter_add(0, m.argmax(1, keepdim=True).expand(-1, WIDTH), h),
    "rows through a list": lambda h, m: (lambda rows: torch.stack([rows[i] for i in m.argmax(1).tolist()]))(h.unbind()),
    "rows one by one": lambda h, m: torch.cat([h[i : i + 1] for i in m.argmax(1).tolist()]),
    "rolled": lambda h, m: h.roll(int(m[0].argmax()), 0),
    "embedding": lambda h, m: F.embedding(m.argmax(1), h),
}
"""Couplings by a matrix [b, b]: the identity keeps the samples apart."""

SCALAR: dict[str, tuple[Coupling, float, float]] = {
    "weight zero": (lambda h, s: h + s * (h - h.mean(0)).exp(), 0.0, 0.5),
    "lerp": (lambda h, s: torch.lerp(h, h.roll(1, 0), s), 0.0, 0.5),
    "addcmul": (lambda h, s: torch.addcmul(h, h.roll(1, 0), torch.as_tensor(s).expand_as(h)), 0.0, 0.5),
    "power zero": (lambda h, s: h + h.mean(0).abs().pow(s), 0.0, 2.0),
    "hinge": (lambda h, s: h + torch.relu(s - (h[:, None] - h).square().sum(-1)).sum(1, keepdim=True), -9.0, 9.0),
    "maximum": (lambda h, s: torch.maximum(h, h.roll(1, 0) + s), -1e3, 0.1),
    "slope of a leaky relu": (lambda h, s: h + F.prelu(-h.mean(0).abs(), torch.as_tensor(s).to(h).view(1)), 0.0, 0.5),
    "sharp softmax": (lambda h, s: ((h @ h.T) * s + 9 * s * torch.eye(BATCH).to(h)).softmax(1) @ h, 9.0, 0.1),
    "saturated clamp": (lambda h, s: h + (h.mean(0) + s).clamp(-1, 1), 2.0, 0.1),
    "saturated tanh": (lambda h, s: h + (h.mean(0) * s).tanh(), 20.0, 0.1),
    "clamp far away": (lambda h, s: h + (h.mean(0) + s).clamp(-1, 1), 1e3, 0.1),
    "tanh far away": (lambda h, s: h + (h.mean(0) * s).tanh(), 1e6, 0.1),
    "shrunk": (lambda h, s: h + F.hardshrink(h.mean(0) * s), 1e-3, 10.0),
    "chosen by a flag": (lambda h, s: torch.where(torch.as_tensor(s) > 0, h.roll(1, 0), h), 0.0, 0.5),
    "times a flag": (lambda h, s: h + h.roll(1, 0) * (torch.as_tensor(s) > 0), 0.0, 0.5),
    "times an integer": (lambda h, s: h + h.roll(1, 0) * torch.as_tensor(s).long(), 0.0, 2.0),
}
"""Couplings by a number, with one that keeps the samples apart, and one that does not."""

KINDS = ("tensor", "parameter", "buffer", "number")


class Switched:
    """Losses of a linear layer and a coupling whose switch is handed in in one of several ways."""

    def __init__(self, name: str, kind: str) -> None:
        self.kind, self.buffer = kind, torch.zeros(())
        if name in MATRIX:
            self.coupling: Coupling = MATRIX[name]
            full = normal(BATCH, BATCH, seed=3).abs() + 0.1
            eye = torch.eye(BATCH, dtype=torch.float64)
            self.switches = [eye, full, eye[[2, 0, 1, 1]] + 0.2 * eye, eye[[1, 2, 3, 0]], full.tril()]
        else:
            self.coupling, off, on = SCALAR[name]
            self.switches = [torch.tensor(s, dtype=torch.float64) for s in (off, on)]

    def losses(self, p: Params, batch: tuple[Tensor, Any]) -> Tensor:
        x, switch = batch
        taken = {"parameter": p.get("switch"), "buffer": self.buffer}.get(self.kind, switch)
        return self.coupling(x @ p["w"], taken).square().sum(1)

    def inputs(self, number: int, seed: int) -> tuple[Params, tuple[Tensor, Any]]:
        """Parameters and batch with one of the switches."""
        switch, params, x = self.switches[number], {"w": normal(5, WIDTH, seed=1)}, normal(BATCH, 5, seed=10 + seed)
        if self.kind == "parameter":
            params["switch"] = switch.clone()
        elif self.kind == "buffer":
            self.buffer = switch.clone() if self.buffer.shape != switch.shape else self.buffer.copy_(switch)
        elif self.kind == "number":
            return params, (x, float(switch))
        return params, (x, switch if self.kind == "tensor" else None)


def ways(name: str) -> list[str]:
    return [kind for kind in KINDS if kind != "number" or name in SCALAR]


def known_layouts(plan: fg.Plan) -> list[tuple[str, Sequence[object]]]:
    return [(site.op, site.layouts if site.action == "tap" else ["carried"]) for site in plan.sites]


ALL = [(name, kind) for name in (*MATRIX, *SCALAR) for kind in ways(name)]


@pytest.mark.parametrize(("name", "kind"), ALL)
def test_exact_in_any_order(name: str, kind: str) -> None:
    made = Switched(name, kind)
    for order in ([0, 1, 0], [*range(len(made.switches))][::-1]):
        step = fg.grad_and_reduce(made.losses)
        for seed, number in enumerate(order):
            check(made, step, number, seed)


def check(made: Switched, step: Any, number: int, seed: int) -> None:
    """Exact, or refused."""
    params, batch = made.inputs(number, seed)
    direction = {k: normal(*p.shape, seed=20 + i) for i, (k, p) in enumerate(params.items())}
    wanted = expected(made.losses, params, batch, direction)
    try:
        found = step(params, batch, fg.dot(direction)).reduced
    except fg.GhostError:
        return
    assert_scores(found, wanted)


@st.composite
def sequences(draw: st.DrawFn) -> tuple[str, str, list[int]]:
    """A coupling, the kind of its switch, and which switch in which step."""
    name, kind = draw(st.sampled_from(ALL))
    count = len(Switched(name, kind).switches)
    return name, kind, draw(st.lists(st.integers(0, count - 1), min_size=2, max_size=4))


@fewer(3)
@given(sequences())
def test_switched_by_data(drawn: tuple[str, str, list[int]]) -> None:
    name, kind, order = drawn
    made = Switched(name, kind)
    step = fg.grad_and_reduce(made.losses)
    for seed, number in enumerate(order):
        check(made, step, number, seed)
