"""What others' programs do: containers that are written to, operators that take functions, checkpoints, subclasses.

Each is exact, or an error whose remedy is followed here.
"""

import functools
from collections import UserDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops import associative_scan, scan, while_loop
from torch._higher_order_ops import map as map_rows
from torch.func import functional_call
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import funcghost as fg
from funcghost.testing import assert_matches_naive
from funcghost.trees import Tree

DOUBLE = torch.float64


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed + len(shape)))


def popping(params: Tree, batch: Any) -> Tensor:
    labels = batch.pop("y")
    return F.cross_entropy(batch["x"] @ params["w"], labels, reduction="none")


def writing(params: Tree, batch: Any) -> Tensor:
    batch["x"] = batch["x"] * 2
    return (batch["x"] @ params["w"]).square().sum(1)


@pytest.mark.parametrize("kind", [dict, UserDict])
@pytest.mark.parametrize("losses", [popping, writing])
def test_losses_may_write_to_the_containers_of_the_batch(losses: Any, kind: Callable[..., Any]) -> None:
    params, batch = {"w": drawn(6, 3)}, kind(x=drawn(4, 6), y=torch.tensor([0, 1, 2, 0]))
    kept = batch["x"].clone()
    found = fg.reduce(losses)(params, batch, fg.squared_norm())
    assert set(batch) == {"x", "y"}
    assert torch.equal(batch["x"], kept)
    torch.testing.assert_close(fg.reduce(losses)(params, batch, fg.squared_norm()), found)


def test_losses_may_write_to_the_attributes_of_a_namespace() -> None:
    batch = SimpleNamespace(x=drawn(4, 6))

    def losses(params: Tree, batch: Any) -> Tensor:
        batch.x = batch.x * 2
        return (batch.x @ params["w"]).square().sum(1)

    fg.reduce(losses)({"w": drawn(6, 3)}, batch, fg.squared_norm())
    assert torch.equal(batch.x, drawn(4, 6))


def test_an_iterator_is_no_batch() -> None:
    loader = iter([drawn(4, 6)])
    losses = lambda params, x: (x @ params["w"]).sum(1)  # noqa: E731
    with pytest.raises(fg.InputError, match="next"):
        fg.reduce(losses)({"w": drawn(6, 3)}, loader, fg.squared_norm())
    fg.reduce(losses)({"w": drawn(6, 3)}, next(loader), fg.squared_norm())


def by_cond(p: Tree, x: Tensor) -> Tensor:
    taken = torch.cond(x.sum() > 0, lambda h: (h @ p["u"]).sin(), lambda h: h.cos() @ p["u"], (x @ p["w"],))
    return taken.square().sum((1, 2))


def by_scan(p: Tree, x: Tensor) -> Tensor:
    def step(h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        new = torch.tanh(h @ p["u"] + t @ p["w"])
        return new, new.clone()

    return scan(step, x.new_zeros(len(x), 3), x.transpose(0, 1))[1].square().sum((0, 2))


def by_associative_scan(p: Tree, x: Tensor) -> Tensor:
    found = associative_scan(lambda a, b: a * p["u"][0] + b, x @ p["w"], dim=1, combine_mode="generic")
    return found.square().sum((1, 2))


def by_map(p: Tree, x: Tensor) -> Tensor:
    rows: Any = map_rows
    return rows(lambda row: (row @ p["w"]).sin() @ p["u"], x).square().sum((1, 2))


def by_while_loop(p: Tree, x: Tensor) -> Tensor:
    start = torch.tensor(0), x @ p["w"]
    return while_loop(lambda i, _: i < 3, lambda i, h: (i + 1, (h @ p["u"]).tanh()), start)[1].square().sum((1, 2))


@torch.compiler.nested_compile_region
def region(h: Tensor, u: Tensor) -> Tensor:
    return (h @ u).tanh()


def by_region(p: Tree, x: Tensor) -> Tensor:
    return region(x @ p["w"], p["u"]).square().sum((1, 2))


@pytest.mark.parametrize("losses", [by_cond, by_scan, by_associative_scan, by_map, by_while_loop, by_region])
def test_operators_that_take_functions_are_the_python_they_stand_for(losses: Any) -> None:
    assert_matches_naive(losses, {"w": drawn(4, 3), "u": drawn(3, 3)}, drawn(3, 3, 4))


def test_a_mask_that_is_a_tensor_by_descent_keeps_what_it_is_made_of() -> None:
    ready = causal_lower_right(5, 5)

    def losses(p: Tree, x: Tensor) -> Tensor:
        q, k, v = (x @ p["qkv"])[:, None].chunk(3, -1)
        return (F.scaled_dot_product_attention(q, k, v, attn_mask=ready)[:, 0] @ p["o"]).square().sum((1, 2))

    params = {"qkv": drawn(6, 12), "o": drawn(4, 2)}
    assert_matches_naive(losses, params, drawn(3, 5, 6))

    def inside(p: Tree, x: Tensor) -> Tensor:
        return losses(p, x) * len(causal_lower_right(5, 5).shape)

    with pytest.raises(fg.UnsupportedOpError, match="outside of the losses"):
        fg.reduce(inside)(params, drawn(3, 5, 6), fg.squared_norm())


def test_ragged_samples_are_packed_instead_of_nested() -> None:
    parts = [drawn(n, 6) for n in (3, 1, 4)]

    def nested(p: Tree, parts: list[Tensor]) -> Tensor:
        ragged = torch.nested.nested_tensor(parts, layout=torch.jagged)
        return torch.stack([h.square().sum() for h in F.linear(ragged, p["w"]).unbind()])

    def packed(p: Tree, parts: list[Tensor]) -> Tensor:
        ragged = torch.nested.nested_tensor(parts, layout=torch.jagged)
        h = F.linear(ragged.values(), p["w"])
        return torch.stack([part.square().sum() for part in h.split([len(part) for part in parts])])

    with pytest.raises(fg.UnsupportedOpError, match=r"nested\.values"):
        fg.reduce(nested)({"w": drawn(4, 6)}, parts, fg.squared_norm())
    assert_matches_naive(packed, {"w": drawn(4, 6)}, parts)


def test_an_expanded_parameter_in_an_op_without_a_rule() -> None:
    def losses(p: Tree, x: Tensor) -> Tensor:
        h = F.layer_norm(p["q"].expand(1, 3, 4), (4,), p["g"]) @ p["w"]
        return (h[0][:, None] * x).sum(-1).square().sum(1)

    assert_matches_naive(losses, {"q": drawn(4), "g": drawn(4), "w": drawn(4, 4)}, drawn(3, 5, 4))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # said until torch 2.12
@pytest.mark.parametrize("apart", [False, True])
def test_a_sparse_tensor_whose_rows_are_moved(apart: bool) -> None:
    index = torch.tensor([[0, 0, 1, 2, 2], [0, 1, 1, 0, 2]])

    def losses(p: Tree, x: Tensor) -> Tensor:
        h = x @ p["w"]
        entries = (h.detach() if apart else h)[index[0], index[1]]
        made = torch.sparse_coo_tensor(index, entries, (3, 3), check_invariants=False) * 2.0
        weight = made.index_select(0, torch.tensor([0, 1, 2])).coalesce().values().detach()[:3]
        return (h * weight[:, None]).square().sum(1)

    x, leaf = drawn(3, 4), drawn(4, 3).requires_grad_()
    wanted = [
        float((torch.autograd.grad(v, leaf, retain_graph=True)[0] * leaf.detach()).sum())
        for v in losses({"w": leaf}, x).unbind()
    ]
    score, direction = fg.reduce(losses), fg.dot({"w": leaf.detach()})
    if not apart:  # torch knows neither a forward nor a second derivative of what makes a sparse tensor
        with pytest.raises(fg.UnsupportedOpError, match=r"sparse_coo_tensor.*write the op with others"):
            score({"w": leaf}, x, direction)
        return
    torch.testing.assert_close(score({"w": leaf}, x, direction), torch.tensor(wanted, dtype=DOUBLE))


class Region(nn.Module):
    """A table that is gathered from inside a checkpointed region."""

    def __init__(self, context: Any) -> None:
        super().__init__()
        self.table, self.w = nn.Parameter(drawn(7, 2)), nn.Parameter(drawn(4, 4))
        self.context = context

    def inner(self, x: Tensor) -> Tensor:
        bias = self.table[torch.arange(16) % 7].tanh().view(4, 4, 2).permute(2, 0, 1)
        h = torch.addmm(x.new_zeros(4), x.flatten(0, 1), self.w).view(x.shape)
        return (((h[:, None] @ h.mT[:, None]) + bias).softmax(-1) @ h[:, None]).sum(1)

    def forward(self, x: Tensor) -> Tensor:
        if self.context is None:
            return self.inner(x)
        found: Tensor = checkpoint(self.inner, x, use_reentrant=False, context_fn=self.context)
        return found


def norms(context: Any) -> Tensor:
    model = Region(context)
    losses = fg.module_losses(model, lambda out, _: out.square().sum((1, 2)))
    found: Tensor = fg.reduce(losses)(dict(model.named_parameters()), drawn(3, 4, 4), fg.squared_norm())
    return found


def test_norms_where_a_parameter_is_gathered_inside_a_checkpoint() -> None:
    torch.testing.assert_close(norms(fg.checkpoint_context), norms(None))


def test_selective_checkpoints_are_refused_with_a_remedy() -> None:
    selective = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
    with pytest.raises(fg.UnsupportedOpError, match=r"context_fn=fg\.checkpoint_context"):
        norms(selective)


def written(p: Tree, x: Tensor) -> Tensor:
    out = torch.zeros(5, 3, dtype=DOUBLE)
    out[:] = x @ p["w"]
    return out.square().sum()


def masked(p: Tree, x: Tensor) -> Tensor:
    return (x[x[:, 0] > 0] @ p["w"]).square().sum()


@pytest.mark.parametrize("loss", [written, masked])
def test_what_vmap_refuses_is_taken_one_by_one(loss: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert_matches_naive(fg.per_example(loss), {"w": drawn(6, 3)}, drawn(4, 5, 6))
    assert any("one example at a time" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("train", [True, False])
def test_modules_that_vmap_refuses_are_taken_one_by_one(train: bool) -> None:
    model = nn.Sequential(nn.Conv1d(5, 4, 3), nn.BatchNorm1d(4)).double().train(train)
    loss = lambda p, x: functional_call(model, p, (x[None],)).tanh().square().sum()  # noqa: E731
    assert_matches_naive(fg.per_example(loss), dict(model.named_parameters()), drawn(4, 5, 6))


def test_random_numbers_of_examples_taken_one_by_one_are_asked_for() -> None:
    def loss(p: Tree, x: Tensor) -> Tensor:
        return F.dropout(x[x[:, 0] > 0] @ p["w"], 0.5).square().sum()

    params, x = {"w": drawn(6, 3)}, drawn(4, 5, 6)
    with pytest.raises(fg.InputError, match="randomness='different'"):
        fg.reduce(fg.per_example(loss))(params, x, fg.squared_norm())
    fg.reduce(fg.per_example(loss, randomness="different"))(params, x, fg.squared_norm())


def test_a_gradient_that_is_zero_but_for_rounding_is_no_fault() -> None:
    model = nn.Sequential(nn.Conv1d(5, 4, 3), nn.BatchNorm1d(4))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(drawn(*parameter.shape, seed=number))
    losses = fg.per_example(lambda p, x: functional_call(model, p, (x[None],)).square().sum())
    x = drawn(4, 5, 6).float()
    found = fg.reduce(losses)(dict(model.named_parameters()), x, fg.squared_norm())
    exact = fg.reduce(losses)(dict(model.double().named_parameters()), x.double(), fg.squared_norm())
    torch.testing.assert_close(found, exact.float(), rtol=1e-4, atol=1e-4)


def test_pairs_of_a_loader_are_taken_apart() -> None:
    model = nn.Linear(6, 3).double()
    x, y = drawn(4, 6), torch.tensor([0, 1, 2, 0])
    criterion = lambda out, batch: F.cross_entropy(out, batch[1], reduction="none")  # noqa: E731
    with pytest.raises(fg.InputError, match="inputs="):
        fg.module_losses(model, criterion)(dict(model.named_parameters()), (x, y))
    losses = fg.module_losses(model, criterion, inputs=lambda batch: batch[0])
    assert_matches_naive(losses, dict(model.named_parameters()), (x, y))
    with pytest.raises(fg.InputError, match="dict"):
        losses(list(model.parameters()), (x, y))


def test_params_that_are_not_made_a_dict_and_complex_ones() -> None:
    model = nn.Linear(6, 3)
    losses = lambda p, x: (x.cdouble() @ torch.view_as_complex(p["w"])).abs().square().sum(1)  # noqa: E731
    for params in (model, model.named_parameters(), list(model.named_parameters())):
        with pytest.raises(fg.InputError, match="dict"):
            fg.reduce(losses)(params, drawn(4, 6), fg.squared_norm())
    w = torch.complex(drawn(6, 3), drawn(6, 3, seed=1))
    with pytest.raises(fg.InputError, match="view_as_real"):
        fg.reduce(losses)({"w": w}, drawn(4, 6), fg.squared_norm())
    assert_matches_naive(losses, {"w": torch.view_as_real(w)}, drawn(4, 6))


def test_a_backward_that_is_not_linear_is_named() -> None:
    def losses(p: Tree, x: Tensor) -> Tensor:
        h = torch.tanh(x @ p["w"])
        h.register_hook(lambda g: g.clamp(-0.1, 0.1))
        return (h @ p["v"]).square().sum(1)

    with pytest.raises(fg.ConservationError, match="not linear"):
        fg.reduce(losses)({"w": drawn(6, 4), "v": drawn(4, 3)}, drawn(5, 6), fg.squared_norm())


def test_reducers_are_none_by_default_and_steps_are_short_to_read() -> None:
    losses = lambda p, x: (x @ p["w"]).sum(1)  # noqa: E731
    out = fg.grad_and_reduce(losses)({"w": drawn(6, 3)}, drawn(4, 6))
    assert out.reduced is None
    assert repr(out) == "Step(grads={'w': float64[6, 3]}, losses=float64[4], reduced=None, aux=None)"


def test_a_mask_of_samples_is_a_weight() -> None:
    kept = fg.pairs(lambda p, x: (x @ p["w"]).sum(1))({"w": drawn(6, 3)}, drawn(4, 6))
    mask = torch.tensor([True, False, True, False])
    assert torch.equal(fg.combine(kept, mask)["w"], fg.combine(kept, mask.double())["w"])
