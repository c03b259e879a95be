"""Training gradients that are sums of gradients formed sample by sample: those of autograd, for three products."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import funcghost as fg
from funcghost.engine import summing
from funcghost.engine.summing import summed_over_samples
from funcghost.problem import Problem
from funcghost.trees import split_params
from tests.naive import assert_close, assert_trees_close, gradient

Params = dict[str, Tensor]
B, T, D = 3, 12, 4
MATERIALISE = fg.Options(inner_products="materialise")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def linear(p: Params, x: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.linear(x, p["w"], p["b"])), p["v"]).square().sum((1, 2))


def reused(p: Params, x: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.linear(x, p["w"])), p["w"]).square().sum((1, 2))


def tied(p: Params, x: Tensor) -> Tensor:
    index = torch.arange(T).expand(len(x), T) % D
    return F.linear(torch.tanh(x + F.embedding(index, p["w"])), p["w"]).square().sum((1, 2))


def convolved(p: Params, x: Tensor) -> Tensor:
    return F.conv1d(x.transpose(1, 2), p["k"], padding=1).square().sum((1, 2))


def derived(p: Params, x: Tensor) -> Tensor:
    return (torch.tanh(x @ (p["w"] + p["u"] @ p["v"])) @ p["w"]).square().sum((1, 2))


CASES: dict[str, tuple[Callable[[Params, Tensor], Tensor], Params]] = {
    "linear": (linear, {"w": normal(D, D), "b": normal(D), "v": normal(2, D)}),
    "reused": (reused, {"w": normal(D, D)}),
    "tied": (tied, {"w": normal(D, D)}),
    "convolved": (convolved, {"k": normal(2, D, 3)}),
    "derived": (derived, {"w": normal(D, D), "u": normal(D, 1), "v": normal(1, D)}),
}


@pytest.fixture
def of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summing, "LEAST", 0)


def planned(losses: Any, params: Params, x: Tensor, reducers: Any) -> tuple[fg.Plan, set[str]]:
    plan = fg.plan(losses, params, x, reducers, MATERIALISE)
    problem = Problem(losses, split_params(params), x, False)
    return plan, {problem.params.names[number] for number in summed_over_samples(problem, plan)}


@pytest.mark.usefixtures("of_any_size")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_autograd(name: str, reduction: Any) -> None:
    losses, params = CASES[name]
    x, reducers = normal(B, T, D, seed=1), {"norm": fg.squared_norm(), "gram": fg.gram()}
    plan, summed = planned(losses, params, x, reducers)
    assert summed == {key for key, leaf in params.items() if leaf.dim() > 1}
    direction = {key: normal(*value.shape, seed=2) for key, value in params.items()}
    given = {**reducers, "score": fg.dot(direction)}
    out = fg.grad_and_reduce(losses, reduction=reduction, plan=plan, options=MATERIALISE)(params, x, given)
    assert_trees_close(out.grads, gradient(losses, params, x, reduction)[0])
    alone = fg.reduce(losses)(params, x, given)
    for key, value in alone.items():
        assert_close(out.reduced[key], value, 1e-10)


@pytest.mark.usefixtures("of_any_size")
def test_the_gradient_without_the_memory_for_those_of_samples() -> None:
    losses, params = CASES["tied"]
    x, options = normal(B, T, D, seed=1), fg.Options(inner_products="materialise", memory_budget=300)
    plan, summed = planned(losses, params, x, fg.squared_norm())
    assert summed
    out = fg.grad_and_reduce(losses, plan=plan, options=options)(params, x, fg.squared_norm())
    assert_trees_close(out.grads, gradient(losses, params, x)[0])
    assert_close(out.reduced, fg.reduce(losses)(params, x, fg.squared_norm()), 1e-10)


@pytest.mark.usefixtures("of_any_size")
def test_a_parameter_that_is_not_used_in_this_run_has_a_gradient_of_zero() -> None:
    def losses(p: Params, x: Tensor) -> Tensor:
        return F.linear(x, p["w"]).square().sum((1, 2)) + 0 * F.linear(x, p["v"]).detach().sum((1, 2))

    params, x = {"w": normal(2, D), "v": normal(2, D)}, normal(B, T, D, seed=1)
    plan, summed = planned(losses, params, x, fg.squared_norm())
    assert "w" in summed
    out = fg.grad_and_reduce(losses, plan=plan, options=MATERIALISE)(params, x, fg.squared_norm())
    assert_trees_close(out.grads, gradient(losses, params, x)[0])


@pytest.mark.usefixtures("of_any_size")
def test_what_others_have_a_say_in_is_left_to_autograd() -> None:
    losses, params = CASES["linear"]
    x = normal(B, T, D, seed=1)
    hooked = {key: value.clone().requires_grad_() for key, value in params.items()}
    hooked["w"].register_hook(lambda g: 2 * g)
    plan, summed = planned(losses, hooked, x, fg.squared_norm())
    assert summed == {"v"}
    out = fg.grad_and_reduce(losses, plan=plan, options=MATERIALISE)(hooked, x, fg.squared_norm())
    wanted = gradient(losses, params, x)[0]
    assert_trees_close(out.grads, {**wanted, "w": 2 * wanted["w"]})
    single = {key: value.bfloat16() for key, value in params.items()}
    assert not planned(losses, single, x.bfloat16(), fg.squared_norm())[1]
    rows = {"rows": normal(5, 2)}
    assert not planned(lambda p, i: F.embedding(i, p["rows"]).sum((1, 2)), rows, torch.ones(B, T).long(), fg.gram())[1]
    assert not planned(losses, params, x, None)[1]


def test_three_products_in_place_of_four() -> None:
    """As many FLOPs as a plain step, and the norm of what was formed."""
    params, x = {"w": normal(128, 64), "v": normal(64, 128)}, normal(B, 512, 64, seed=1)

    def losses(p: Params, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, p["w"])), p["v"]).square().sum((1, 2))

    step = fg.grad_and_reduce(
        losses, plan=fg.plan(losses, params, x, fg.squared_norm()), options=fg.Options(verify="never")
    )
    with FlopCounterMode(display=False) as ours:
        step(params, x, fg.squared_norm())
    with FlopCounterMode(display=False) as plain:
        gradient(losses, params, x)
    assert ours.get_total_flops() == plain.get_total_flops()


@pytest.mark.parametrize("name", CASES)
def test_many_directions_are_scored_by_the_gradients_of_samples(name: str) -> None:
    losses, params = CASES[name]
    x = normal(B, T, D, seed=1)
    directions = [{key: normal(*value.shape, seed=k) for key, value in params.items()} for k in range(4)]
    directions[1] = {key: torch.zeros_like(value) for key, value in params.items()}
    mixed = [*directions, fg.compress(directions[2], rank=1)]
    score = fg.reduce(losses, plan=fg.plan(losses, params, x))
    found = score(params, x, fg.dot(fg.stack(mixed)))
    for column, direction in zip(found.unbind(1), mixed, strict=True):
        assert_close(column, score(params, x, fg.dot(direction)), 1e-11)


def test_many_directions_cost_one_product() -> None:
    params, x = {"w": normal(64, 64)}, normal(2, 64, 64, seed=1)
    directions = [{"w": normal(64, 64, seed=k)} for k in range(8)]
    score = fg.reduce(lambda p, x: F.linear(x, p["w"]).square().sum((1, 2)))
    counts = []
    for direction in (fg.stack(directions), directions[0]):
        score(params, x, fg.dot(direction))
        with FlopCounterMode(display=False) as count:
            score(params, x, fg.dot(direction))
        counts.append(count.get_total_flops())
    assert counts[0] - counts[1] == 2 * 2 * 8 * 64 * 64  # with each of them, after the gradients of two samples
