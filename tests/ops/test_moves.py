"""Samples that ops move by the values of data: followed in every run, one plan for all routes, nothing carried."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import funcghost as fg
from funcghost.ops.call import flatten_call
from funcghost.ops.layout import Layout, Rows
from funcghost.ops.moves import MOVES, Move, resolve
from tests.depth import fewer
from tests.naive import assert_scores, expected

Params = dict[str, Tensor]
Experts = Callable[[Params, Tensor, Tensor, Tensor], Tensor]
BATCH, LENGTH, WIDTH, EXPERTS = 4, 3, 5, 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def expert(p: Params, rows: Tensor, chosen: Tensor) -> Tensor:
    """Each row through the two weights of its expert."""
    up = torch.einsum("nd,ndp->np", rows, p["up"][chosen])
    return torch.einsum("nd,ndp->np", torch.tanh(up), p["down"][chosen])


def sorted_and_back(p: Params, rows: Tensor, chosen: Tensor, gate: Tensor) -> Tensor:
    order = chosen.argsort(stable=True)
    found = expert(p, rows[order], chosen[order]) * gate[order].unsqueeze(1)
    return found[order.argsort()]


def sorted_and_added(p: Params, rows: Tensor, chosen: Tensor, gate: Tensor) -> Tensor:
    order = chosen.argsort(stable=True)
    found = expert(p, rows.index_select(0, order), chosen[order]) * gate.index_select(0, order).unsqueeze(1)
    return torch.zeros_like(rows).index_add(0, order, found)


def sorted_and_written(p: Params, rows: Tensor, chosen: Tensor, gate: Tensor) -> Tensor:
    order = chosen.argsort(stable=True)
    out = torch.zeros_like(rows)
    out[order] = expert(p, rows[order], chosen[order]) * gate[order, None]
    return out


def scattered(p: Params, rows: Tensor, chosen: Tensor, gate: Tensor) -> Tensor:
    order = chosen.argsort(stable=True)
    wide = order.unsqueeze(1).expand(-1, rows.shape[1])
    found = expert(p, rows.gather(0, wide), chosen[order]) * gate.gather(0, order).unsqueeze(1)
    return torch.zeros_like(rows).scatter_add(0, wide, found)


def twice(p: Params, rows: Tensor, chosen: Tensor, gate: Tensor) -> Tensor:
    """Every row goes to two experts."""
    both = torch.stack([chosen, (chosen + 1) % EXPERTS], 1).flatten()
    order = both.argsort(stable=True)
    found = expert(p, rows[order // 2], both[order])
    return found[order.argsort()].view(-1, 2, rows.shape[1]).sum(1) * gate.unsqueeze(1)


def cut_and_joined(p: Params, rows: Tensor, chosen: Tensor, gate: Tensor) -> Tensor:
    """The rows of each expert as a tensor of its own; some have none."""
    order = chosen.argsort(stable=True)
    parts = rows[order].split(chosen.bincount(minlength=EXPERTS).tolist())
    found = torch.cat([torch.tanh(part @ p["up"][e]) @ p["down"][e] for e, part in enumerate(parts)])
    return torch.empty_like(rows).index_copy(0, order, found) * gate.unsqueeze(1)


def masked(p: Params, rows: Tensor, chosen: Tensor, gate: Tensor) -> Tensor:
    out = torch.zeros_like(rows)
    for e in range(EXPERTS):
        mine = (chosen == e).nonzero().flatten()
        out.index_add_(0, mine, torch.tanh(rows[mine] @ p["up"][e]) @ p["down"][e] * gate[mine, None])
    return out


def with_capacity(p: Params, rows: Tensor, chosen: Tensor, gate: Tensor) -> Tensor:
    """Each expert takes its first rows, in slots; the others are dropped."""
    hot = torch.nn.functional.one_hot(chosen, EXPERTS)
    place = (hot.cumsum(0) * hot).sum(1) - 1
    kept, slot = place < 6, (chosen * 6 + place).clamp_max(EXPERTS * 6)
    slot = torch.where(kept, slot, EXPERTS * 6)
    slots = torch.zeros(EXPERTS * 6 + 1, rows.shape[1], dtype=rows.dtype).index_copy(0, slot[kept], rows[kept])
    hidden = torch.tanh(torch.bmm(slots[:-1].view(EXPERTS, 6, -1), p["up"]))
    found = torch.bmm(hidden, p["down"]).flatten(0, 1)
    return torch.where(kept[:, None], found[slot.clamp_max(EXPERTS * 6 - 1)], rows) * gate.unsqueeze(1)


LASTING: list[Experts] = [sorted_and_back, sorted_and_added, sorted_and_written, scattered, twice]
"""The ops and sizes are the same for any route."""
CHANGING: list[Experts] = [cut_and_joined, masked, with_capacity]


def mixture(experts: Experts) -> tuple[Callable[[Params, Tensor], Tensor], Params]:
    """Two layers of experts with weights before, between and after them."""

    def losses(p: Params, x: Tensor) -> Tensor:
        h = x @ p["inputs"]
        for layer in range(2):
            rows = torch.tanh(h).flatten(0, 1)
            gate, chosen = (rows @ p["router"][layer]).softmax(-1).max(-1)
            h = h + experts(p, rows, chosen, gate).view_as(h)
        return (h * p["scale"]).square().mean((1, 2))

    shapes = {"inputs": (WIDTH, WIDTH), "router": (2, WIDTH, EXPERTS), "scale": (WIDTH,)}
    weights = {"up": (EXPERTS, WIDTH, WIDTH), "down": (EXPERTS, WIDTH, WIDTH)}
    return losses, {k: normal(*shape, seed=i) for i, (k, shape) in enumerate({**shapes, **weights}.items())}


def check(experts: Experts, seeds: list[int]) -> list[fg.Plan]:
    losses, params = mixture(experts)
    direction = {k: normal(*p.shape, seed=100 + i) for i, (k, p) in enumerate(params.items())}
    step = fg.grad_and_reduce(losses)
    for seed in seeds:
        x = normal(BATCH, LENGTH, WIDTH, seed=seed)
        out = step(params, x, fg.dot(direction))
        assert_scores(out.reduced, expected(losses, params, x, direction))
    plans: list[fg.Plan] = step.__self__.plans  # type: ignore[attr-defined]
    return plans


@pytest.mark.parametrize("experts", LASTING, ids=lambda f: f.__name__)
@fewer(5)
@given(seeds=st.lists(st.integers(0, 10**6), min_size=1, max_size=2))
def test_one_plan_serves_every_route(experts: Experts, seeds: list[int]) -> None:
    [plan] = check(experts, [0, *seeds])  # with 0 the samples lie in no regular order, as they may by chance
    assert any(isinstance(layout, Rows) for site in plan.sites for layout in site.layouts)
    assert not any(site.action == "carry" and "inputs" in site.parameters for site in plan.sites)


@pytest.mark.parametrize("experts", CHANGING, ids=lambda f: f.__name__)
@fewer(5)
@given(seeds=st.lists(st.integers(0, 10**6), min_size=2, max_size=2))
def test_routes_with_other_sizes_are_exact(experts: Experts, seeds: list[int]) -> None:
    check(experts, seeds)


def test_rows_that_do_not_come_back_are_planned_anew(caplog: pytest.LogCaptureFixture) -> None:
    def losses(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, order = batch
        return (x @ p["w"])[order].tanh().sum(1)

    params, direction = {"w": normal(WIDTH, 2)}, {"w": normal(WIDTH, 2, seed=1)}
    score = fg.reduce(losses)
    with caplog.at_level(logging.INFO, "funcghost"):
        for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 0, 2], [0, 1, 2, 3]):
            batch = normal(4, WIDTH, seed=2), torch.tensor(order)
            assert_scores(score(params, batch, fg.dot(direction)), expected(losses, params, batch, direction))
    assert "moved to other places" in caplog.text


def test_samples_added_up_are_not_taken_for_one() -> None:
    def losses(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, segment = batch
        return torch.zeros(4, 2, dtype=x.dtype).index_add(0, segment, (x @ p["w"]).tanh()).square().sum(1)

    params, direction = {"w": normal(WIDTH, 2)}, {"w": normal(WIDTH, 2, seed=1)}
    score = fg.reduce(losses)
    for segment in ([0, 1, 2, 3], [0, 0, 1, 2], [3, 1, 1, 1]):
        batch = normal(4, WIDTH, seed=2), torch.tensor(segment)
        assert_scores(score(params, batch, fg.dot(direction)), expected(losses, params, batch, direction))


class Gate(torch.autograd.Function):
    """A product that no mode sees."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(value, gate)
        return value * gate

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        value, gate = ctx.saved_tensors
        return gradient * gate, (gradient * value).sum(1, keepdim=True)


GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": torch.mul,
    "in place": lambda value, gate: value.mul_(gate),
    "out of sight": Gate.apply,
}


@pytest.mark.parametrize("how", GATES)
def test_a_gate_that_starts_at_zero_hides_nothing(how: str) -> None:
    def losses(p: Params, x: Tensor) -> Tensor:
        h = x @ p["a"]
        mixed = h @ p["b"]
        return h.add(GATES[how](mixed - mixed.mean(0), x[:, :1] * p["gate"])).square().sum(1)

    params = {"a": normal(WIDTH, 4), "b": normal(4, 4, seed=1), "gate": torch.zeros((), dtype=torch.float64)}
    direction, x = {k: normal(*p.shape, seed=2) for k, p in params.items()}, normal(6, WIDTH, seed=3)
    score = fg.reduce(losses)
    for gate in (0.0, 1.0):
        params = {**params, "gate": torch.tensor(gate, dtype=torch.float64)}
        assert_scores(score(params, x, fg.dot(direction)), expected(losses, params, x, direction))


def call(op: Callable[..., object], *args: object, slots: tuple[int, ...] = (0,)) -> Move:
    leaves, spec = flatten_call(args, {})
    assert op in MOVES
    return Move(op, tuple(leaves), spec, slots)


def resolved(move: Move) -> list[object] | None:
    moved = resolve(move, 0, "op", [Layout(0)] * len(move.slots), [True], {}, 3)
    return None if moved is None else list(moved.outputs)


def test_where_rows_go() -> None:
    x = torch.zeros(3, 2)
    assert resolved(call(Tensor.__getitem__, x, torch.tensor([2, 0, 0, 1]))) == [Rows(0, 0)]
    assert resolved(call(Tensor.__getitem__, x, torch.tensor([0, 1, 2]))) == [Layout(0)]
    assert resolved(call(Tensor.t, x)) == [Layout(1)]
    assert resolved(call(torch.index_add, x, 0, torch.tensor([0, 1, 2]), x, slots=(0, 3))) == [Layout(0)]
    assert resolved(call(torch.index_add, x, 0, torch.tensor([1, 1, 2]), x, slots=(0, 3))) is None
    assert resolved(call(torch.gather, x, 0, torch.tensor([[0, 1], [1, 0], [2, 2]]))) is None


def test_what_depends_on_the_order_of_values_is_not_followed() -> None:
    assert resolved(call(torch.msort, torch.zeros(3, 2))) is None
    product = call(
        torch.scatter_reduce, torch.zeros(3), 0, torch.tensor([0, 0, 0]), torch.ones(3), "prod", slots=(0, 3)
    )
    assert resolved(product) is None
