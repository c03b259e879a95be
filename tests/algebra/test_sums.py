"""Long sums in float32, against float64: every product of factors by every route, with few rows and columns or many."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import funcghost as fg
from funcghost.algebra.contractions import along, inner_products, squared_norms, weighted_sum
from funcghost.algebra.cost import Means, routes, sketch
from funcghost.algebra.directions import LowRank
from funcghost.algebra.factors import Dense, Factor, Lookup, Outer, blocks, matrix_form, samples
from funcghost.algebra.sums import product, squares, total
from funcghost.reducers.projections import Kind

ALLOWED = 1e-6
"""Relative to the size of the terms, which are all positive here, so that rounding has nothing to cancel with."""


def drawn(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(shape)))


def outer(b: int, t: int, m: int, n: int) -> Factor:
    return Outer(drawn(b, t, 1, m), drawn(b, t, 1, n), matrix_form((m, n)))


def lookup(b: int, t: int, m: int, n: int) -> Factor:
    return Lookup(torch.arange(b * t).view(b, t) % m, drawn(b, t, n), (m, n))


def whole(b: int, t: int, m: int, n: int) -> Factor:
    return Dense(drawn(b, m, n))


MANY = {
    "positions, a vector": outer(1, 1500, 1, 3),
    "positions, few rows": outer(2, 800, 2, 20),
    "positions, a matrix": outer(2, 600, 24, 20),
    "columns": outer(2, 1, 2, 60_000),
    "rows": outer(2, 3, 50_000, 1),
    "a row that is looked up": lookup(2, 1000, 1, 4),
    "rows that are looked up": lookup(2, 1200, 3, 2),
    "a table": lookup(2, 4, 50_000, 3),
    "entries": whole(2, 1, 3, 100_000),
    "entries of many samples": whole(40, 1, 30, 2000),
    "a vector": whole(1, 1, 300_000, 1),
}


def off(found: Tensor, wanted: Tensor) -> float:
    return float(((found.double() - wanted).abs() / wanted.clamp_min(1e-30)).max())


def in_double(use: Factor) -> Factor:
    return use.map(lambda value: value.double() if value.is_floating_point() else value)


@pytest.mark.parametrize("name", MANY)
def test_every_product_holds_to_float64(name: str) -> None:
    use = MANY[name]
    exact, b = in_double(use), samples(use)
    other = use.map(lambda value: value.flip(0)[: max(1, b - 1)])
    exact_other = in_double(other)
    for route in routes([sketch(use)], [sketch(use)], (b, b), False, False):
        for budget in (2**28, max(route.least, 2**22)):
            means = Means(budget, route.name)
            assert off(squared_norms([use], means), squared_norms([exact], means)) < ALLOWED
            assert off(squared_norms([use, use], means), 4 * squared_norms([exact], means)) < ALLOWED
            assert off(inner_products([use], [use], means), inner_products([exact], [exact], means)) < ALLOWED
            found = inner_products([use], [other], means)
            assert off(found, inner_products([exact], [exact_other], means)) < ALLOWED
    direction = drawn(*use.shape)
    assert off(along(use, direction), along(exact, direction.double())) < ALLOWED
    rows, cols = drawn(1, use.shape[0], 2), drawn(1, use.shape[1], 2)
    residual = torch.zeros(())
    low, exact_low = (LowRank(r, c, use.shape, residual) for r, c in ((rows, cols), (rows.double(), cols.double())))
    assert off(along(use, low), along(exact, exact_low)) < ALLOWED
    weights = drawn(b)
    assert off(weighted_sum(use, weights), weighted_sum(exact, weights.double())) < ALLOWED


@pytest.mark.parametrize("kind", ["rademacher", "gaussian", "kronecker"])
@pytest.mark.parametrize("name", ["positions, few rows", "rows that are looked up", "a table", "entries"])
def test_projections_hold_to_float64(name: str, kind: Kind) -> None:
    use, reducer = MANY[name], fg.project(4, kind=kind)
    wanted = reducer.of_parameter("w", [in_double(use)])
    # Numbers of size 1, and of size 5 at most.
    size = (1 if kind != "gaussian" else 5) * blocks(in_double(use), matrix_form(use.shape)).flatten(1).sum(1) / 2
    assert float(((reducer.of_parameter("w", [use]).double() - wanted) / size[:, None]).abs().max()) < ALLOWED


SKINNY = [(1, 1), (1, 64), (2, 2), (12, 12), (64, 1), (15, 17), (64, 64)]


@pytest.mark.parametrize(("m", "n"), SKINNY)
@pytest.mark.parametrize("k", [257, 8192, 20_001])
def test_products_of_any_shape_hold_to_float64(m: int, n: int, k: int) -> None:
    for one, other in itertools.product((drawn(m, k), drawn(k, m).T), (drawn(k, n), drawn(n, k).T)):
        assert off(product(one, other), one.double() @ other.double()) < ALLOWED
    batched = drawn(3, m, k)
    assert off(product(batched, other), batched.double() @ other.double()) < ALLOWED


def test_millions_of_terms_hold_to_float64() -> None:
    one, other = drawn(2, 4_000_019), drawn(4_000_019).flip(0).unsqueeze(1)
    assert off(product(one, other), one.double() @ other.double()) < ALLOWED
    assert off(squares(one), one.double().square().sum(1)) < ALLOWED
    assert off(one @ other, one.double() @ other.double()) > 2 * ALLOWED  # as long as this is so, pieces are needed


def test_many_terms_are_added_in_pairs() -> None:
    terms = [torch.full((), 0.1) for _ in range(5001)]
    assert off(total(terms), torch.tensor(0.1).double() * 5001) < ALLOWED
    assert off(sum(terms[1:], terms[0]), torch.tensor(0.1).double() * 5001) > ALLOWED


@pytest.mark.parametrize("shape", [(1, 9, 224, 3), (3, 8, 112, 3), (2, 4, 150, 1)])
def test_convolutions_over_many_positions_hold_to_float64(shape: tuple[int, ...]) -> None:
    c, p, side, kernel = shape
    x, w = drawn(2, c, side, side), drawn(p, c, kernel, kernel)

    def losses(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x, params["w"], padding=kernel // 2).flatten(1).mean(1)

    found = fg.materialize(fg.pairs(losses)({"w": w}, x))["w"]
    assert off(found, fg.materialize(fg.pairs(losses)({"w": w.double()}, x.double()))["w"]) < ALLOWED


def test_scores_over_many_inputs_hold_to_float64() -> None:
    x, w = drawn(4, 200_000), drawn(2, 200_000) / 200_000

    def losses(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, params["w"]).sum(1)

    found = fg.reduce(losses)({"w": w}, x, fg.dot({"w": w}))
    assert off(found, fg.reduce(losses)({"w": w.double()}, x.double(), fg.dot({"w": w.double()}))) < ALLOWED


class Largest(TorchDispatchMode):
    """The bytes of the largest memory that ops give."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor):
            self.bytes = max(self.bytes, found.untyped_storage().nbytes())
        return found


@pytest.mark.parametrize("k", [64, 4096])
@pytest.mark.parametrize("lead", [(), (1,), (1, 1)])
def test_a_matrix_that_all_samples_share_is_not_copied_for_each(lead: tuple[int, ...], k: int) -> None:
    one, other = torch.randn(8, 1, 1, k), torch.randn(*lead, 32, k).mT
    with Largest() as largest:
        found = product(one, other)
    assert largest.bytes == 4 * 32 * k  # its own
    torch.testing.assert_close(found.double(), one.double() @ other.double(), rtol=1e-5, atol=1e-4)


def test_a_shared_matrix_meets_no_sample() -> None:
    assert product(torch.ones(0, 1, 3), torch.ones(1, 3, 2)).shape == (0, 1, 2)
    assert product(torch.ones(4, 1, 0), torch.ones(1, 0, 2)).tolist() == [[[0.0, 0.0]]] * 4
