"""Many directions by the gradients themselves: the numbers of `fg.dot`, for any factors and any budget."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcghost as fg
from funcghost.algebra.cost import means_of
from funcghost.algebra.factors import dense
from funcghost.reducers.many import ManyDots, by_gradients
from funcghost.testing import pairs
from funcghost.trees import split_params
from tests.models.small import like, rows, small_gpt


@given(pairs(3, integers=True), st.integers(1, 5), st.sampled_from([1, 1000, 2**28]))
def test_equals_the_products_with_the_gradients(kept: fg.Pairs, k: int, budget: int) -> None:
    trees = [
        {name: torch.randint(-3, 4, uses[0].shape).to(torch.float64) for name, uses in kept.uses.items()}
        for _ in range(k)
    ]
    reducer = ManyDots({name: torch.stack([tree[name] for tree in trees]) for name in trees[0]})
    for name, uses in kept.uses.items():
        gradient = torch.stack([dense(use) for use in uses]).sum(0).reshape(3, -1).double()
        wanted = gradient @ torch.stack([tree[name].flatten() for tree in trees], 1)
        found = reducer.within(_means(budget)).of_parameter(name, uses)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-12, atol=1e-9)


def _means(budget: int) -> Any:
    return means_of(fg.Options(memory_budget=budget), torch.device("cpu"))


def test_equals_dot_on_a_model() -> None:
    _, losses, params = small_gpt()
    batch, directions = rows(), [like(params) for _ in range(4)]
    wanted = fg.dot(fg.stack(directions))
    many = by_gradients(wanted, split_params(params))
    assert isinstance(many, ManyDots)
    found = fg.reduce(losses)(params, batch, {"many": many, "dot": wanted})
    torch.testing.assert_close(found["many"], found["dot"], rtol=1e-4, atol=1e-4)


def test_few_and_low_rank_directions_stay_as_they_are() -> None:
    _, _, params = small_gpt()
    split = split_params(params)
    for reducer in (
        fg.squared_norm(),
        fg.dot(like(params)),
        fg.dot(fg.stack([like(params)] * 2)),
        fg.dot(fg.stack([fg.compress(like(params), rank=1)] * 4)),
    ):
        assert by_gradients(reducer, split) is reducer
    with pytest.raises(fg.InputError, match="direction 0 of the stack"):
        by_gradients(fg.dot(fg.stack([{"w": torch.ones(2)}] * 4)), split)
