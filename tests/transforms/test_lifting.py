"""The step under torch.func: vmap over directions, one derivative of scores, what is refused."""

from collections.abc import Callable, Sequence
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import funcghost as fg
from tests.models.small import like
from tests.models.wrapped import Params, normal, ours, squares
from tests.naive import assert_close, assert_scores, assert_trees_close, expected, gradient

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),  # transformers, of itself
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # Dynamo
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:quantized..linear_dynamic. an autograd kernel was not registered:UserWarning"),
]


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
