"""Inner products of factored gradients: every route, budget and mix of factors against the gradients themselves."""

import itertools
import re
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import funcghost as fg
from funcghost.algebra.contractions import along, inner_products, squared_norms, weighted_sum
from funcghost.algebra.cost import Means, choose, routes, sketch
from funcghost.algebra.directions import LowRank
from funcghost.algebra.factors import Dense, Factor, Form, Lookup, Outer, dense, matrix_form, samples
from funcghost.testing import assert_matches_naive, pairs

Uses = Sequence[Factor]


def flat(uses: Uses) -> Tensor:
    """The gradients themselves, [b, entries]."""
    total = torch.stack([dense(use) for use in uses]).sum(0)
    return total.reshape(len(total), prod(total.shape[1:]))


def every_means(a: Uses, b: Uses, *, diagonal: bool = False) -> Iterator[Means]:
    """Each route there is, with all memory, with the least, and with tiles between."""
    sizes = samples(a[0]), samples(b[0])
    for route in routes([sketch(u) for u in a], [sketch(u) for u in b], sizes, diagonal, a is b):
        for budget in {2**28, max(1, route.least), 2 * max(1, route.least) + 8, (route.least + route.full) // 2 + 1}:
            yield Means(budget=max(budget, route.least), route=route.name)


def shifted(uses: Uses) -> Uses:
    """Others of the same parameter: the samples the other way round, and one of them left out."""
    return [use.map(lambda value: value.flip(0)[: max(len(value) - 1, 0)]) for use in uses]


@given(pairs(integers=True))
def test_every_route_and_budget_is_exact_on_whole_numbers(kept: fg.Pairs) -> None:
    for uses in kept.uses.values():
        other, rows = shifted(uses), flat(uses)
        more = flat(other)
        for means in every_means(uses, uses, diagonal=True):
            assert torch.equal(squared_norms(uses, means), (rows * rows).sum(1)), means
        for means in every_means(uses, uses):
            assert torch.equal(inner_products(uses, uses, means), rows @ rows.T), means
        for means in every_means(uses, other):
            assert torch.equal(inner_products(uses, other, means), rows @ more.T), means


@given(pairs())
def test_routes_agree_to_rounding_and_are_symmetric_and_positive(kept: fg.Pairs) -> None:
    for uses in kept.uses.values():
        rows = flat(uses)
        parts = torch.stack([dense(use).reshape(rows.shape).abs() for use in uses]).sum(0)
        # Terms may cancel within a gradient: those of the factors bound the rounding.
        size = positional(uses) + parts @ parts.T
        for means in every_means(uses, uses):
            found = inner_products(uses, uses, means)
            assert bool(((found - rows @ rows.T).abs() <= 1e-13 * size).all())
            assert torch.equal(found, found.T)
            if len(found):
                least = float(torch.linalg.eigvalsh(found).min())
                assert least >= -1e-13 * float(size.diagonal().sum())


def positional(uses: Uses) -> Tensor:
    """The inner products of the gradients with all terms positive."""
    return (lambda rows: rows @ rows.T)(
        flat([use.map(lambda v: v.abs() if v.is_floating_point() else v) for use in uses])
    )


@given(pairs(3, integers=True), st.integers(-3, 3), st.integers(-3, 3))
def test_bilinear(kept: fg.Pairs, a: int, b: int) -> None:
    def times(uses: Uses, by: int) -> list[Factor]:
        return [
            Outer(use.rows, use.cols * by, use.form)
            if isinstance(use, Outer)
            else use.map(lambda v: v * by if v.is_floating_point() else v)
            for use in uses
        ]

    for uses in kept.uses.values():
        other = shifted(uses)
        one = [use.map(lambda v: v[: len(v) - 1]) for use in uses]
        for route in ("ghost", "materialise"):
            means = Means(route=route)
            both = inner_products([*times(one, a), *times(other, b)], uses, means)
            apart = a * inner_products(one, uses, means) + b * inner_products(other, uses, means)
            assert torch.equal(both, apart)


@given(pairs(integers=True), st.integers(0, 99))
def test_along_and_weighted_sum(kept: fg.Pairs, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for uses in kept.uses.values():
        b, shape = samples(uses[0]), uses[0].shape
        direction = torch.randint(-3, 4, shape, generator=generator).double()
        weights = torch.randint(-3, 4, (b,), generator=generator).double()
        for use in uses:
            rows = flat([use])
            assert torch.equal(along(use, direction), rows @ direction.flatten())
            assert torch.equal(weighted_sum(use, weights), (weights @ rows).view(shape))


def test_along_a_low_rank_direction_for_every_form() -> None:
    """Also where its blocks have the sizes of the factor's, and are others."""

    def whole(*sizes: int) -> Tensor:
        return torch.randint(-3, 4, sizes).double()

    shape, axes = (2, 2, 2), ((), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2))
    forms = [
        Form(shape, shape, (q, m, n)) for q, m, n in itertools.product(axes, repeat=3) if sorted(q + m + n) == [0, 1, 2]
    ]
    assert len({form.plain for form in forms}) == 2
    leaves = [LowRank(whole(q, m, 2), whole(q, n, 2), shape, torch.zeros(())) for q, m, n in ((1, 2, 4), (2, 2, 2))]
    uses: list[Factor] = [Dense(whole(3, *shape)), Lookup(torch.randint(0, 2, (3, 5)), whole(3, 5, 4), shape)]
    for form in forms:
        q, m, n = form.blocks
        uses.append(Outer(whole(3, 5, q, m), whole(3, 5, q, n), form))
    for use in uses:
        for leaf in leaves:
            assert torch.equal(along(use, leaf), flat([use]) @ leaf.dense().flatten()), use


# -- precision ----------------------------------------------------------------------------------------------

LONG = 4096
"""Positions."""


def long_factors() -> dict[str, Uses]:
    t, m, n = LONG, 6, 5
    rows, cols = torch.randn(2, t, 1, m), torch.randn(2, t, 1, n)
    outer = Outer(rows + 1, cols + 1, matrix_form((m, n)))
    lookup = Lookup(torch.randint(0, m, (2, t)), torch.randn(2, t, n) + 1, (m, n))
    blocks = Outer(torch.randn(2, t, 2, 3), torch.randn(2, t, 2, n), Form((2, 3, n), (2, 3, n), ((0,), (1,), (2,))))
    return {"outer": [outer], "lookup": [lookup], "tied": [outer, lookup], "blocks": [blocks]}


@pytest.mark.parametrize("name", long_factors())
@pytest.mark.parametrize("route", ["ghost", "materialise"])
def test_no_digits_are_lost_over_4096_positions(name: str, route: Any) -> None:
    uses = long_factors()[name]
    exact = [use.map(lambda v: v.double() if v.is_floating_point() else v) for use in uses]
    rows, size = flat(exact), positional(exact)
    for budget in (2**28, 2**20) if name == "outer" else (2**24,):
        means = Means(route=route, budget=budget)
        found = inner_products(uses, uses, means), squared_norms(uses, means)
        assert found[0].dtype == torch.float32
        assert bool(((found[0] - rows @ rows.T).abs() <= 1e-5 * size).all())
        assert bool(((found[1] - rows.square().sum(1)).abs() <= 1e-5 * size.diagonal()).all())


def test_norm_of_a_large_gradient_in_float32() -> None:
    use = Dense(torch.randn(1, 2000, 2000))
    wanted = use.value.double().square().sum()
    assert abs(float(squared_norms([use], Means())) - float(wanted)) <= 1e-5 * float(wanted)


@given(pairs(dtype=torch.bfloat16), st.sampled_from(["ghost", "materialise"]))
def test_bfloat16_is_accumulated_in_float32(kept: fg.Pairs, route: Any) -> None:
    means = Means(route=route)
    for uses in kept.uses.values():
        wide = [use.map(lambda v: v.float() if v.is_floating_point() else v) for use in uses]
        for found, wanted in (
            (inner_products(uses, uses, means), inner_products(wide, wide, means)),
            (squared_norms(uses, means), squared_norms(wide, means)),
        ):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@given(pairs(), st.sampled_from(["ghost", "materialise"]))
def test_compute_dtype_rounds_the_factors_and_nothing_else(kept: fg.Pairs, route: Any) -> None:
    for uses in kept.uses.values():
        rounded = [use.map(lambda v: v.bfloat16() if v.is_floating_point() else v) for use in uses]
        found = inner_products(uses, uses, Means(route=route, dtype=torch.bfloat16))
        torch.testing.assert_close(found, inner_products(rounded, rounded, Means(route=route)), check_dtype=False)


# -- hard cases -----------------------------------------------------------------------------------------------


def test_rows_of_a_table_beyond_int32() -> None:
    big = 2**31
    index = torch.tensor([[big - 1, big, big + 1], [big + 1, big + 1, 3]])
    cols = torch.arange(12.0).view(2, 3, 2)
    use = Lookup(index, cols, (2**33, 2))
    small = Lookup(torch.tensor([[0, 1, 2], [2, 2, 3]]), cols, (4, 2))
    means = Means(route="ghost")
    assert torch.equal(inner_products([use], [use], means), inner_products([small], [small], means))
    assert torch.equal(squared_norms([use], means), squared_norms([small], means))
    _, rejected = choose([sketch(use)], [sketch(use)], (2, 2), Means(), same=True)
    assert [route.name for route in rejected] == ["materialise"]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("route", ["cheapest", "ghost", "materialise"])
def test_tied_table_and_head_with_tokens_of_any_integer(dtype: torch.dtype, route: Any) -> None:
    params, tokens = {"table": torch.randn(7, 3, dtype=torch.float64)}, torch.randint(0, 7, (3, 4), dtype=dtype)

    def losses(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return F.linear(F.embedding(x, p["table"], padding_idx=2).tanh(), p["table"]).sin().sum((1, 2))

    assert_matches_naive(losses, params, tokens, fg.project(3), options=fg.Options(inner_products=route))


@pytest.mark.parametrize("length", [0, 1])
@pytest.mark.parametrize("samples", [0, 1, 3])
@pytest.mark.parametrize("route", ["cheapest", "ghost", "materialise"])
def test_no_positions_and_no_samples(length: int, samples: int, route: Any) -> None:
    params = {"w": torch.randn(3, 2, dtype=torch.float64), "v": torch.randn(2, dtype=torch.float64)}
    x = torch.randn(samples, length, 3, dtype=torch.float64)

    def losses(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return (x @ p["w"] + p["v"]).sin().sum((1, 2))

    if length or not samples:
        assert_matches_naive(losses, params, x, fg.project(3), options=fg.Options(inner_products=route))
        return
    plan = fg.plan(losses, params, torch.randn(2, 3, 3, dtype=torch.float64))
    score = fg.reduce(losses, plan=plan, options=fg.Options(inner_products=route))
    norms, products = score(params, x, (fg.squared_norm(), fg.gram()))
    assert torch.equal(norms, torch.zeros(samples, dtype=torch.float64))
    assert torch.equal(products, torch.zeros(samples, samples, dtype=torch.float64))


# -- budget ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["cheapest", "ghost", "materialise"])
@pytest.mark.parametrize("name", ["squared_norm", "gram", "cross"])
def test_memory_budget_error_names_a_remedy_that_works(route: Any, name: str) -> None:
    params = {"w": torch.randn(20, 30, dtype=torch.float64)}
    x = torch.randn(4, 5, 20, dtype=torch.float64)
    reducer = {"squared_norm": fg.squared_norm(), "gram": fg.gram(), "cross": fg.cross(2)}[name]

    def losses(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return (x @ p["w"]).sin().sum((1, 2))

    wanted = fg.reduce(losses)(params, x, reducer)
    with pytest.raises(fg.MemoryBudgetError, match=r"'w'.*found\s+Options\.memory_budget=16") as caught:
        fg.reduce(losses, options=fg.Options(memory_budget=16, inner_products=route))(params, x, reducer)
    found = re.search(r"Raise it to (\d+) or more", str(caught.value))
    assert found is not None
    need = int(found[1])
    enough = fg.reduce(losses, options=fg.Options(memory_budget=need, inner_products=route))(params, x, reducer)
    torch.testing.assert_close(enough, wanted, rtol=1e-12, atol=1e-12)
    with pytest.raises(fg.MemoryBudgetError):
        fg.reduce(losses, options=fg.Options(memory_budget=need - 1, inner_products=route))(params, x, reducer)


def test_a_route_is_forced() -> None:
    params, x = {"w": torch.randn(3, 4)}, torch.randn(2, 5, 3)

    def losses(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return (x @ p["w"]).sum((1, 2))

    for route in ("ghost", "materialise"):
        plan = fg.plan(losses, params, x, [fg.gram(), fg.squared_norm()], fg.Options(inner_products=route))
        assert [row.route for row in plan.contractions] == [route, route]


@pytest.mark.parametrize(
    ("wrong", "phrase"),
    [
        ({"verify": "sometimes"}, "verify"),
        ({"route": "ghost"}, "route"),
        ({"inner_products": "backward"}, "inner_products"),
        ({"compute_dtype": torch.float8_e4m3fn}, "compute_dtype"),
        ({"memory_budget": 0}, "memory_budget"),
        ({"memory_budget": 1.5}, "memory_budget"),
        ({"rates": (1.0,)}, "rates"),
        ({"rates": (1.0, 0.0)}, "rates"),
        ({"compute_dtype": torch.int64}, "compute_dtype"),
        ({"compute_dtype": "bfloat16"}, "compute_dtype"),
        ({"rates": 3.0}, "rates"),
    ],
)
def test_options_are_checked(wrong: dict[str, Any], phrase: str) -> None:
    with pytest.raises(fg.InputError, match=rf"Options\.{phrase} must be"):
        fg.Options(**wrong)


@given(pairs(3))
def test_flops_are_those_predicted(kept: fg.Pairs) -> None:
    for uses in kept.uses.values():
        sketches = [sketch(use) for use in uses]
        for diagonal in (True, False):
            for route in routes(sketches, sketches, (3, 3), diagonal, True):
                means = Means(route=route.name)
                with FlopCounterMode(display=False) as counter:
                    _ = squared_norms(uses, means) if diagonal else inner_products(uses, uses, means)
                assert counter.get_total_flops() == route.flops, (route, sketches)
