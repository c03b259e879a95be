"""What no mode sees is seen in autograd's graph, and the user's own leaves are differentiated: exact, or refused."""

import gc
import re
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

import funcghost as fg
from funcghost import versions
from funcghost.engine.unseen import Stretch, edge_of
from tests.depth import fewer
from tests.models.small import Product

Losses = Callable[[Any, Any], Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def own(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: normal(*shape, seed=i).requires_grad_() for i, (name, shape) in enumerate(shapes.items(), 1)}


def truth(losses: Losses, params: Mapping[str, Tensor], batch: Any) -> tuple[Tensor, list[Tensor]]:
    """Per-sample gradients [b, n], and the gradient of the mean, by autograd on these very tensors."""
    leaves = list(params.values())

    def gradient(value: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, found, strict=True)]

    values = losses(params, batch)
    rows = torch.stack([torch.cat([g.flatten() for g in gradient(value)]) for value in values])
    return rows, gradient(losses(params, batch).mean())


def assert_exact(losses: Losses, params: Mapping[str, Tensor], batch: Any) -> None:
    """Scores, norms, Gram matrices, pairs and training gradients are those of autograd; `.grad` is left alone."""
    rows, gradients = truth(losses, params, batch)
    direction = {name: normal(*p.shape, seed=7) for name, p in params.items()}
    flat = torch.cat([v.flatten() for v in direction.values()])
    step = fg.grad_and_reduce(losses)
    for _ in range(2):
        out = step(params, batch, {"dot": fg.dot(direction), "norm": fg.squared_norm(), "gram": fg.gram()})
        torch.testing.assert_close(out.reduced["dot"], rows @ flat)
        torch.testing.assert_close(out.reduced["norm"], rows.square().sum(1))
        torch.testing.assert_close(out.reduced["gram"], rows @ rows.T)
        for found, wanted in zip(out.grads.values(), gradients, strict=True):
            torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(fg.reduce(losses)(params, batch, fg.dot(direction)), rows @ flat)
    pairs = fg.pairs(losses)(params, batch)
    torch.testing.assert_close(fg.cross_dots(pairs, pairs), rows @ rows.T)
    assert all(p.grad is None for p in params.values())


class Round(torch.autograd.Function):
    """Straight through."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return (w * 4).round() / 4

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Window(torch.autograd.Function):
    """Straight through where it is small: the backward keeps a tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (ctx.saved_tensors[0].abs() <= 1)


class Once(Product):
    """The same, whose backward cannot be differentiated."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return gradient @ b.mT, a.flatten(0, -2).mT @ gradient.flatten(0, -2)


class Split(torch.autograd.Function):
    """Two outputs, one of which may be left."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, x * 3

    @staticmethod
    def backward(ctx: Any, two: Tensor, three: Tensor) -> Tensor:
        return 2 * two + 3 * three


class Reverse(torch.autograd.Function):
    """The identity with the gradient reversed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Doubled(torch.autograd.Function):
    """In place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


@torch.jit.script
def scripted(a: Tensor, b: Tensor) -> Tensor:
    return a * b.sin()


def batch_mixed(h: Tensor) -> Tensor:
    return (h - h.mean(0)) / h.std(0)


PROGRAMS: dict[str, Losses] = {
    "a parameter": lambda p, x: (x @ Round.apply(p["w"])).tanh() @ p["v"],
    "a parameter's view": lambda p, x: (x @ Round.apply(p["w"].T).T).tanh() @ p["v"],
    "a parameter twice": lambda p, x: x @ Round.apply(p["w"]) @ (p["w"] + Round.apply(p["w"])) @ p["v"],
    "one after another": lambda p, x: (x @ Window.apply(Round.apply(p["w"]) * 0.5)) @ p["v"],
    "samples and a parameter": lambda p, x: Product.apply(x, p["w"]).tanh() @ p["v"],
    "activations and a parameter": lambda p, x: Product.apply((x @ p["w"]).tanh(), p["v"]),
    "activations that mix": lambda p, x: batch_mixed(Window.apply(batch_mixed(x @ p["w"]))) @ p["v"],
    "two tensors that mix": lambda p, x: Product.apply(batch_mixed(x @ p["w"]), Round.apply(p["v"])) * p["v"].sum(),
    "one output of two": lambda p, x: Split.apply(batch_mixed(x @ p["w"]))[1] @ p["v"],
    "both outputs": lambda p, x: torch.cat(Split.apply(batch_mixed(x @ p["w"])), 1) @ p["v"].repeat(2, 1),
    "itself": lambda p, x: Reverse.apply(x @ p["w"]) @ Reverse.apply(p["v"]),
    "in place": lambda p, x: Doubled.apply(x @ p["w"]) @ Doubled.apply(p["v"].clone()),
    "scripted": lambda p, x: scripted(x @ p["w"], p["w"].sum(0)) @ p["v"],
    "the end": lambda p, x: Product.apply((x @ p["w"]).tanh(), p["v"]),
    "once": lambda p, x: Once.apply(x, p["w"]).tanh() @ p["v"],
    "once on activations": lambda p, x: Once.apply((x @ p["w"]).tanh(), p["v"]),
    "once, twice": lambda p, x: Once.apply(Once.apply(x, p["w"]).tanh(), p["w"]).cos() @ p["v"],
    "known tensors one behind the other": lambda p, x: (
        (lambda h: Product.apply(h, h.mT @ h.tanh()))(batch_mixed(x @ p["w"])) @ p["v"]
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_unseen_functions_are_exact(name: str) -> None:
    program, params, x = PROGRAMS[name], own(w=(4, 4), v=(4, 3)), normal(5, 4)
    assert_exact(lambda p, x: program(p, x).square().sum(1), params, x)
    constants = {key: value.detach() for key, value in params.items()}
    wanted = truth(lambda p, x: program(p, x).square().sum(1), params, x)[0].square().sum(1)
    found = fg.reduce(lambda p, x: program(p, x).square().sum(1))(constants, x, fg.squared_norm())
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("how", ["zero", "fill", "mul", "add a parameter", "deep"])
def test_views_written_in_place_change_what_they_are_views_of(how: str) -> None:
    def losses(p: Any, x: Tensor) -> Tensor:
        b, h = p["b"].clone(), batch_mixed(x @ p["w"])
        for value in (b, h.T):
            view = value[1:3]
            if how == "zero":
                view.zero_()
            elif how == "fill":
                value.narrow(0, 1, 2).fill_(0.5)
            elif how == "mul":
                view.mul_(2)
            elif how == "deep":
                view[:1].mul_(3)
            else:
                view.add_(p["b"][:2].view(2, *[1] * (view.dim() - 1)))
        return (h + b).square().sum(1)

    assert_exact(losses, own(w=(4, 4), b=(4,)), normal(5, 4))


def test_the_losses_themselves_may_come_from_an_unseen_function() -> None:
    for function in (Product, Once):

        def losses(p: Any, x: Tensor, function: Any = function) -> Tensor:
            return function.apply((x @ p["w"]).tanh(), p["v"]).squeeze(1)

        assert_exact(losses, own(w=(4, 4), v=(4, 1)), normal(5, 4))

    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.size = x.shape
            return x.sum(1)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient[:, None].expand(ctx.size)

    assert_exact(lambda p, x: Sum.apply((x @ p["w"]).tanh()), own(w=(4, 4)), normal(5, 4))
    assert_exact(lambda p, x: Sum.apply(batch_mixed(x @ p["w"])), own(w=(4, 4)), normal(5, 4))


@given(st.data())
def test_programs_of_unseen_functions(data: st.DataObject) -> None:
    """Any chain of seen and unseen ops on parameters and on samples, which mix or not."""
    unary: list[Callable[[Tensor], Tensor]] = [Round.apply, Window.apply, Reverse.apply, torch.tanh, torch.sin]
    on_weights = data.draw(st.lists(st.sampled_from(unary[:3]), max_size=2))
    on_samples = data.draw(st.lists(st.sampled_from([*unary, batch_mixed]), min_size=1, max_size=3))
    product = data.draw(st.sampled_from([torch.matmul, Product.apply]))

    def losses(p: Any, x: Tensor) -> Tensor:
        w, h = p["w"], x
        for op in on_weights:
            w = op(w)
        h = product(h, w)
        for op in on_samples:
            h = op(h) + 0.1 * h
        return product(h, w).square().sum(1)

    params, x = own(w=(3, 3)), normal(data.draw(st.sampled_from([2, 3, 5])), 3, seed=3)
    rows, _ = truth(losses, params, x)
    found = fg.reduce(losses)(params, x, {"dot": fg.dot({"w": torch.ones(3, 3).double()}), "norm": fg.squared_norm()})
    scale = rows.abs().sum(1).max()
    torch.testing.assert_close(found["dot"] / scale, rows.sum(1) / scale, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(found["norm"] / scale**2, rows.square().sum(1) / scale**2, atol=1e-9, rtol=1e-9)


def test_rows_moved_by_data_are_followed_through_unseen_functions() -> None:
    def losses(p: Any, batch: Any) -> Tensor:
        x, order = batch
        h = Window.apply((x @ p["w"])[order] * 0.3)
        return h.new_zeros(h.shape).index_add(0, order, h @ p["v"]).square().sum(1)

    params, score = own(w=(4, 4), v=(4, 4)), None
    direction = {name: normal(*p.shape, seed=7) for name, p in params.items()}
    score = fg.reduce(losses)
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [1, 0, 3, 2]):
        batch = normal(4, 4), torch.tensor(order)
        rows, _ = truth(losses, params, batch)
        flat = torch.cat([v.flatten() for v in direction.values()])
        torch.testing.assert_close(score(params, batch, fg.dot(direction)), rows @ flat)


def test_backward_that_cannot_be_differentiated_is_named_where_samples_mix() -> None:
    params, x = own(w=(4, 4), v=(4, 3)), normal(5, 4)
    with pytest.raises(fg.UnsupportedOpError, match="goes into Once, which no torch function mode sees"):
        fg.reduce(lambda p, x: batch_mixed(Once.apply(x, p["w"])).square().sum(1))(params, x, fg.squared_norm())
    with pytest.raises(fg.UnsupportedOpError, match="per_token"):
        fg.reduce(lambda p, x: (Once.apply(x, p["w"]).tanh() @ p["v"]).square().sum((1, 2)))(
            params, normal(5, 2, 4), fg.per_token(fg.dot(params))
        )


def test_nothing_is_kept_of_a_run() -> None:
    params, x, seen = own(w=(4, 4), v=(4, 3)), normal(5, 4), list[Any]()

    def losses(p: Any, x: Tensor) -> Tensor:
        h = Window.apply(batch_mixed(x @ Round.apply(p["w"]))) @ p["v"]
        seen.append(weakref.ref(h))
        return h.square().sum(1)

    step = fg.grad_and_reduce(losses)
    for _ in range(2):
        step(params, x, fg.squared_norm())
    gc.disable()
    try:
        seen.clear()
        step(params, x, fg.squared_norm())
        assert [ref() for ref in seen] == [None]
    finally:
        gc.enable()


def test_stretch_is_cut_at_its_ends() -> None:
    w = normal(3).requires_grad_()
    inner = w.sin()
    value = inner * w.cos()
    stretch = Stretch(value, (edge_of(inner), edge_of(w)), (), ())
    at_inner, at_w = stretch.pull(torch.ones(3).double())
    assert at_inner is not None
    assert at_w is not None
    torch.testing.assert_close(at_inner, w.cos())
    torch.testing.assert_close(at_w, -inner * w.sin())  # and nothing by way of the other end
    torch.testing.assert_close(stretch.push([torch.ones(3).double(), None]), w.cos().detach())
    assert torch.autograd.grad(value.sum(), w)[0].any()  # what was cut is whole again


# The user's own leaves.


class Rerun(torch.autograd.Function):
    """Runs a module again in its backward, as adjoint and invertible methods do."""

    @staticmethod
    def forward(ctx: Any, module: nn.Module, x: Tensor, *params: Tensor) -> Tensor:
        ctx.module, ctx.x, ctx.params = module, x.detach(), params
        with torch.no_grad():
            found: Tensor = module(x)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        with torch.enable_grad():
            x = ctx.x.requires_grad_()
            found = torch.autograd.grad(ctx.module(x), (x, *ctx.params), gradient)
        return None, *found


class Adjoint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(
            Rerun.apply(self.body, Rerun.apply(self.body, x, *self.body.parameters()), *self.body.parameters())
        )


class Keeps(nn.Module):
    """Holds a parameter a second time."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(normal(4, 4)), nn.Parameter(normal(4, 2))
        self.table = {"w": self.w}

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.table["w"]) @ self.v


class Curved(nn.Parameter):
    """Carries an attribute."""

    c: float

    def __new__(cls, data: Tensor, c: float = 1.0) -> "Curved":
        made = nn.Parameter.__new__(cls, data)
        made.c = c
        return made


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = Curved(normal(4, 3), c=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w) * self.w.c


def squared(output: Tensor, batch: Any) -> Tensor:
    return output.square().sum(1)


@pytest.mark.parametrize("make", [Adjoint, Keeps, Layer])
@pytest.mark.parametrize("zero", [False, True])
def test_parameters_reached_by_another_way(make: Callable[[], nn.Module], zero: bool) -> None:
    torch.manual_seed(0)
    model, x = make().double(), normal(5, 4)
    if zero:  # a plan is made at other values, and the user's are back afterwards
        with torch.no_grad():
            next(model.parameters()).zero_()
    params = dict(model.named_parameters())
    before = {name: (p.clone(), p.data_ptr()) for name, p in params.items()}
    assert_exact(fg.module_losses(model, squared), params, x)
    assert fg.check(fg.module_losses(model, squared), params, x).ok
    for name, p in params.items():
        assert torch.equal(p, before[name][0])
        assert p.data_ptr() == before[name][1]


def test_losses_that_call_the_model_and_not_params() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double(), normal(5, 4)

    def losses(p: Any, x: Tensor) -> Tensor:
        found: Tensor = model(x)
        return squared(found, x)

    params = dict(model.named_parameters())
    assert_exact(losses, params, x)
    assert fg.check(losses, params, x).facts["unused"] == []
    constants = {name: p.detach() for name, p in params.items()}
    refused = r"another tensor than params\['0.weight'\] on its memory"
    with pytest.raises(fg.UnsupportedOpError, match=refused):
        fg.plan(losses, constants, x)
    assert re.search(refused, str(fg.check(losses, constants, x)))
    assert_exact(losses, {"0.bias": params["0.bias"]}, x)  # those of others are constants


def hooked_losses(p: Any, x: Tensor) -> Tensor:
    return squared((x @ p["w"]).tanh() @ p["w"].T + x @ p["v"] @ p["v"].T, x)


MASK = (normal(4, 4, seed=9) > 0).double()


@pytest.mark.parametrize(
    "hook",
    [lambda g: g * MASK, lambda g: g.mul_(MASK), lambda g: None, lambda g: MASK @ g @ MASK.T],
    ids=["mask", "in place", "looks on", "both sides"],
)
def test_hooks_of_parameters_have_a_say(hook: Callable[[Tensor], Tensor | None]) -> None:
    params, x = own(w=(4, 4), v=(4, 4)), normal(5, 4)
    params["w"].register_hook(hook)
    assert_exact(hooked_losses, params, x)
    assert_exact(lambda p, x: hooked_losses({**p, "w": Round.apply(p["w"])}, x), params, x)
    assert_exact(lambda p, x: batch_mixed(x @ p["w"]).square().sum(1), params, x)
    assert_exact(lambda p, x: Once.apply(x, p["w"]).square().sum(1), params, x)
    assert fg.check(hooked_losses, params, x).ok


def test_hooks_that_cannot_be_followed_are_refused() -> None:
    params, x = own(w=(4, 4), v=(4, 4)), normal(5, 4)
    handle = params["w"].register_hook(lambda g: g / g.norm())
    with pytest.raises(fg.ConservationError, match=r"backward of the losses is not linear.*A hook changes gradients"):
        fg.reduce(hooked_losses)(params, x, fg.dot(params))
    handle.remove()
    params["w"].register_hook(lambda g: torch.from_numpy(g.detach().numpy() * MASK.numpy()))
    with pytest.raises(fg.UnsupportedOpError, match=r"parameter 'w' has a hook"):
        fg.reduce(hooked_losses)(params, x, fg.dot(params))


class Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.w = nn.Parameter(normal(4)), nn.Parameter(normal(4, 4))
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.cache:
            self.cache["bias"] = self.table[torch.arange(4)]
        return x @ self.w + self.cache["bias"]


@pytest.mark.parametrize("detached", [False, True])
def test_what_an_earlier_call_kept_is_refused(detached: bool) -> None:
    model, x = Cached(), normal(5, 4)
    params = {name: p.detach() if detached else p for name, p in model.named_parameters()}
    losses = fg.module_losses(model, squared)
    with pytest.raises(fg.UnsupportedOpError, match=r"earlier call"):
        fg.reduce(losses)(params, x, fg.dot(params))

    def emptied(p: Any, x: Tensor) -> Tensor:
        model.cache.clear()
        return losses(p, x)

    assert_exact(emptied, {k: p if p.requires_grad else p.clone().requires_grad_() for k, p in params.items()}, x)
    outside = params["w"] * 2
    if not detached:
        with pytest.raises(fg.UnsupportedOpError, match=r"computed outside"):
            fg.reduce(lambda p, x: squared(x @ outside, x))(params, x, fg.dot(params))
        other = outside.detach()
        assert_exact(lambda p, x: squared(x @ (other + p["w"]), x), {"w": params["w"]}, x)


# Frozen parameters.


def test_frozen_parameters_are_refused_and_closed_over() -> None:
    model = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Tanh(), nn.Linear(4, 2)).double()
    losses, x = fg.module_losses(model, squared), normal(5, 4)
    with pytest.raises(fg.InputError, match=r"params\['0.bias'\] is a frozen parameter.*fg.trainable"):
        fg.reduce(losses)(dict(model.named_parameters()), x, fg.squared_norm())
    assert list(fg.trainable(model)) == ["2.weight", "2.bias"]
    assert_exact(losses, fg.trainable(model), x)
    meant = {name: p.detach() for name, p in model.named_parameters()}
    as_leaves = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    wanted, _ = truth(lambda p, x: squared(functional_call(model, p, (x,)), x), as_leaves, x)
    torch.testing.assert_close(fg.reduce(losses)(meant, x, fg.squared_norm()), wanted.square().sum(1))
    with pytest.raises(fg.InputError, match="no parameter of Linear requires gradients"):
        fg.trainable(model[0])
    with pytest.raises(fg.InputError, match=r"takes a torch\.nn\.Module"):
        fg.trainable(dict(model.named_parameters()))  # type: ignore[arg-type]


# Ops that a mode sees, without a forward or a second derivative.


@pytest.mark.parametrize("p_norm", [2.0, 1.0])
def test_distances_to_learned_points(p_norm: float) -> None:
    params, x = own(w=(4, 4), c=(3, 4)), normal(5, 4)
    assert_exact(lambda p, x: torch.cdist(x @ p["w"], p["c"], p_norm).logsumexp(1), params, x)
    assert_exact(lambda p, x: torch.cdist(batch_mixed(x @ p["w"]), p["c"], p_norm).logsumexp(1), params, x)


def test_op_that_has_neither_is_scored_by_a_backward_for_each_sample() -> None:
    shown = torch.overrides.wrap_torch_function(lambda *args: args)(Once.apply)
    params, x = own(w=(4, 4), v=(4, 3)), normal(5, 4)
    losses = lambda p, x: shown(shown(x, p["w"]).tanh(), p["v"]).square().sum(1)  # noqa: E731
    assert {site.way for site in fg.plan(losses, params, x).sites} == {"each"}
    assert_exact(losses, params, x)
    with pytest.raises(fg.UnsupportedOpError, match="whose derivative cannot be had"):
        fg.reduce(lambda p, x: batch_mixed(shown(x, p["w"])).square().sum(1))(params, x, fg.dot(params))
    with pytest.raises(fg.UnsupportedOpError, match="per_token"):
        fg.reduce(lambda p, x: shown(x, p["w"]).square().sum((1, 2)))(
            params, normal(5, 2, 4), fg.per_token(fg.dot(params))
        )


@pytest.mark.skipif(versions.LINEAR_CROSS_ENTROPY is None, reason="this torch has no head in chunks")
@pytest.mark.parametrize("folded", [False, True])
def test_torch_own_head_in_chunks(folded: bool) -> None:
    params = {name: p.detach().float().requires_grad_() for name, p in own(w=(11, 4), h=(4, 4)).items()}
    x, classes = normal(5, 3, 4).float(), torch.arange(15).view(5, 3) % 11

    def losses(p: Any, x: Tensor, options: Any) -> Tensor:
        h, y = (x @ p["h"]).tanh(), classes
        if not folded:
            h, y = h[:, 0], y[:, 0]
        each = F.linear_cross_entropy(h.reshape(-1, 4), p["w"], y.flatten(), reduction="none", options=options)
        return each.view(5, -1).sum(1)

    rows, gradients = truth(lambda p, x: losses(p, x, None), params, x)
    out = fg.grad_and_reduce(lambda p, x: losses(p, x, nn.LinearCrossEntropyOptions()))(
        params, x, {"dot": fg.dot(params), "norm": fg.squared_norm(), "gram": fg.gram()}
    )
    flat = torch.cat([p.detach().flatten() for p in params.values()])
    torch.testing.assert_close(out.reduced["dot"], rows @ flat, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.reduced["norm"], rows.square().sum(1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.reduced["gram"], rows @ rows.T, atol=1e-4, rtol=1e-4)
    for found, wanted in zip(out.grads.values(), gradients, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_expanded_parameter_in_an_op_without_a_rule() -> None:
    def losses(p: Any, x: Tensor) -> Tensor:
        h = F.layer_norm(p["q"].expand(1, 3, 4), (4,), p["g"]) @ p["w"]
        return (h[0][:, None] * x).sum(-1).square().sum(1)

    assert_exact(losses, own(q=(4,), g=(4,), w=(4, 4)), normal(3, 5, 4))


@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_derivative_by_backward_inside_the_losses() -> None:
    def losses(p: Any, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        value = (x @ p["w"]).tanh() @ p["v"]
        value.sum().backward(inputs=[x], create_graph=True)
        assert x.grad is not None
        return value + (x.grad.norm(dim=1) - 1).square()

    assert_exact(losses, own(w=(4, 3), v=(3,)), normal(3, 4))


def by_autograd(potential: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at if at.requires_grad else at.detach().requires_grad_()
    found: Tensor = torch.autograd.grad(potential(at).sum(), at, create_graph=True)[0]
    return found


def by_func(potential: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    found: Tensor = torch.func.grad(lambda at: potential(at).sum())(at)
    return found


def by_jvp(potential: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    found: Any = torch.func.jvp(potential, (at,), (torch.ones_like(at),))
    along: Tensor = found[1]
    return along[:, None] * at.cos()


# Autograd itself is not to be called within a transform of torch.func.
WAYS = [(by_autograd, None), (by_autograd, by_autograd)]
WAYS += [(first, second) for first in (by_func, by_jvp) for second in (None, by_autograd, by_func, by_jvp)]


@fewer(5)
@given(
    ways=st.sampled_from(WAYS),
    at=st.sampled_from(["batch", "activation"]),
    mixes=st.booleans(),
    samples=st.integers(1, 4),
)
def test_derivatives_inside_the_losses(ways: tuple[Any, Any], at: str, mixes: bool, samples: int) -> None:
    first, second = ways
    params, x = own(w=(4, 3), u=(3, 4), v=(4,)), normal(samples, 4)

    def losses(p: Any, x: Tensor) -> Tensor:
        def potential(z: Tensor) -> Tensor:
            h = (z @ p["w"]).tanh()
            if mixes:
                h = h - h.mean(0)
            return (h @ p["u"]).sin() @ p["v"]

        def slope(z: Tensor) -> Tensor:
            found: Tensor = first(potential, z)
            return found

        start = x if at == "batch" else (x @ p["w"] @ p["u"]).sin()
        found = slope(start) if second is None else second(lambda z: slope(z) @ p["v"], start)
        return found.square().sum(1) + potential(start)

    if not mixes or first is by_autograd:
        assert_exact(losses, params, x)
        return
    rows, _ = truth(losses, params, x)
    flat = torch.cat([p.detach().flatten() for p in params.values()])
    torch.testing.assert_close(fg.reduce(losses)(params, x, fg.dot(params)), rows @ flat)
    try:
        assert_exact(losses, params, x)
    except fg.UnsupportedOpError as error:
        assert "torch.autograd.grad" in str(error)  # noqa: PT017
