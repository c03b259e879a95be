"""Ranks are given to leaves so that a budget is met at little cost."""

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from funcghost.algebra.allocation import Option, allocate

curves = st.lists(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 40)).map(lambda pair: Option(*pair)), min_size=1, max_size=5),
    min_size=1,
    max_size=4,
)


def brute(menu: list[list[Option]], budget: float) -> int | None:
    sums = [(sum(o.cost for o in pick), sum(o.residual for o in pick)) for pick in itertools.product(*menu)]
    return min((price for price, residual in sums if residual <= budget), default=None)


@given(curves, st.integers(0, 100), st.integers(0, 100))
def test_allocation_meets_the_budget_at_little_cost(menu: list[list[Option]], budget: int, more: int) -> None:
    names = [str(k) for k in range(len(menu))]
    picks = allocate(menu, budget, names)
    chosen = [curve[k] for curve, k in zip(menu, picks, strict=True)]
    best = brute(menu, budget)
    if best is None:
        assert all(
            option.residual == min(o.residual for o in curve) for option, curve in zip(chosen, menu, strict=True)
        )
        return
    assert sum(option.residual for option in chosen) <= budget
    step = max(max(o.cost for o in curve) - min(o.cost for o in curve) for curve in menu)
    assert best <= sum(option.cost for option in chosen) <= best + step
    for option, k, curve in zip(chosen, allocate(menu, budget + more, names), menu, strict=True):
        assert curve[k].cost <= option.cost


@given(st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=5), min_size=1, max_size=4), st.integers(0, 300))
def test_allocation_is_optimal_where_costs_are_uniform(values: list[list[int]], budget: int) -> None:
    menu = []
    for squares in values:
        falling = sorted(squares, reverse=True)
        menu.append([Option(7 * k + 7, float(sum(falling[k:]))) for k in range(len(falling) + 1)])
    picks = allocate(menu, budget, [str(k) for k in range(len(menu))])
    assert sum(curve[k].cost for curve, k in zip(menu, picks, strict=True)) == brute(menu, budget)


@given(curves, st.integers(0, 100), st.randoms(use_true_random=False))
def test_allocation_does_not_depend_on_the_order_of_items(
    menu: list[list[Option]], budget: int, source: random.Random
) -> None:
    names = [str(k) for k in range(len(menu))]
    order = source.sample(range(len(menu)), len(menu))
    mixed = allocate([menu[k] for k in order], budget, [names[k] for k in order])
    assert [allocate(menu, budget, names)[k] for k in order] == mixed


def test_allocation_goes_along_the_hull_and_ends_on_the_cheapest_option_that_will_do() -> None:
    assert allocate([[Option(1, 10.0), Option(3, 6.0), Option(4, 0.0)]], 6.0, ["a"]) == [1]
    late = [Option(1, 10.0), Option(2, 9.9), Option(3, 0.0)]
    assert allocate([late, [Option(1, 5.0), Option(2, 3.0)]], 5.0, ["a", "b"]) == [2, 0]
    # Of two equal steps one will do: the name says which.
    twin = [Option(1, 1.0), Option(2, 0.0)]
    assert allocate([twin, twin], 1.0, ["a", "b"]) == allocate([twin, twin], 1.0, ["b", "a"])[::-1] != [1, 1]
