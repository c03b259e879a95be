"""Random projections: what they are a function of, and what holds in expectation, with bounds that are computed.

Statistics are of fixed seeds, so a test passes always or never; the bounds say how unlikely it would be for a right
generator to be refused, DELTA for each comparison.
"""

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import funcghost as fg
from funcghost.algebra.factors import Dense, Factor, Lookup, dense, matrix_form
from funcghost.reducers.projections import KINDS, Project, numbers, seed_of
from funcghost.testing import pairs

DELTA = 1e-10
ROOT = Path(__file__).resolve().parents[2]


def hoeffding(count: int, size: float) -> float:
    """What the mean of so many independent numbers in [-size, size] of mean 0 exceeds with probability DELTA.

    Hoeffding: P(|mean| >= e) <= 2 exp(-count e^2 / (2 size^2)).
    """
    return size * math.sqrt(2 * math.log(2 / DELTA) / count)


def chi_square(count: int) -> float:
    """How far the mean of so many squares of independent standard normal numbers is from 1, but for DELTA.

    Laurent and Massart: P(|mean - 1| >= 2 sqrt(x / count) + 2 x / count) <= 2 exp(-x). For signs in place of normal
    numbers it holds as well: the moments of <signs, v>^2 are at most those of <normal, v>^2 (Achlioptas).
    """
    x = math.log(2 / DELTA)
    return 2 * math.sqrt(x / count) + 2 * x / count


def projected(values: Tensor, dim: int, seed: int = 0, kind: Any = "rademacher", name: str = "w") -> Tensor:
    return fg.project(dim, seed, kind).of_parameter(name, [Dense(values)])


# -- a function of seed, name and shape alone -----------------------------------------------------------

PRINT = """
import funcghost as fg, torch
params = {"w": torch.ones(4, 3), "table": torch.ones(5, 4), "b": torch.ones(3)}
def losses(p, x):
    return (torch.nn.functional.embedding(x, p["table"]) @ p["w"] + p["b"]).sum((1, 2))
x = torch.tensor([[0, 1, 4], [2, 2, 3]])
for kind in ("rademacher", "gaussian", "kronecker"):
    print(fg.reduce(losses)(params, x, fg.project(6, seed=5, kind=kind)).tolist())
"""


def test_the_same_in_every_process(capsys: pytest.CaptureFixture[str]) -> None:
    exec(PRINT, {})
    here = capsys.readouterr().out
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", PRINT], check=True, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout == here
    assert len(here.splitlines()) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_function_of_the_name_and_not_of_the_place_in_the_tree(kind: Any) -> None:
    x, value = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)

    def alone(p: Any, x: Tensor) -> Tensor:
        return (x @ p["w"]).sin().sum(1)

    def among(p: Any, x: Tensor) -> Tensor:
        return (x @ p["w"]).sin().sum(1) + 0 * p["a"] + 0 * p["z"]["w"].sum()

    reducer = fg.per_param(fg.project(5, 2, kind))
    found = fg.reduce(alone)({"w": value}, x, reducer)
    zero = torch.zeros((), dtype=torch.float64)
    others = fg.reduce(among)({"a": zero, "w": value, "z": {"w": value.clone()}}, x, reducer)
    assert torch.equal(found["w"], others["w"])
    assert torch.equal(others["z.w"], torch.zeros_like(found["w"]))


@pytest.mark.parametrize("kind", KINDS)
def test_every_name_has_numbers_of_its_own(kind: Any) -> None:
    """Gradients of opposite sign in two parameters do not cancel."""
    value, dim = torch.randn(1, 6, 5, dtype=torch.float64), 4096
    nest: Any = {"u": 0, "w": 0}
    kept = fg.Pairs({"u": (Dense(value),), "w": (Dense(-value),)}, SAME, optree.tree_structure(nest))
    found = fg.apply(fg.project(dim, kind=kind), kept).square().sum()
    assert 0.5 < float(found / fg.apply(fg.squared_norm(), kept).sum()) < 2


SAME = (("u", (6, 5), torch.float64), ("w", (6, 5), torch.float64))


@given(pairs(4, integers=True), st.sampled_from(KINDS), st.integers(1, 40), st.integers(-5, 5))
def test_no_split_of_the_batch_and_no_budget_matters(kept: fg.Pairs, kind: Any, dim: int, seed: int) -> None:
    reducer = fg.project(dim, seed, kind)
    whole = fg.apply(reducer, kept)
    parts = torch.cat([fg.apply(reducer, kept[:1]), fg.apply(reducer, kept[1:])])
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    for budget in (1, 1000):
        sliced = fg.apply(reducer, kept, options=fg.Options(memory_budget=budget))
        torch.testing.assert_close(sliced, whole, rtol=1e-12, atol=1e-12)


@given(pairs(3, integers=True), st.sampled_from(KINDS), st.integers(1, 40))
def test_factors_are_projected_as_the_gradients_they_stand_for(kept: fg.Pairs, kind: Any, dim: int) -> None:
    for name, uses in kept.uses.items():
        reducer = fg.project(dim, 3, kind)
        value = torch.stack([dense(use) for use in uses]).sum(0)
        found = reducer.of_parameter(name, uses)
        torch.testing.assert_close(found, projected(value, dim, 3, kind, name), rtol=1e-12, atol=1e-11)


def sides(reducer: Project, name: str, m: int, n: int) -> tuple[Tensor, Tensor]:
    """P and Q of the two-sided form, [m, left] and [n, right], as its docstring has them."""
    left = max(k for k in range(1, math.isqrt(reducer.dim) + 1) if reducer.dim % k == 0)
    seed, widths = seed_of(reducer.seed, name), (left, reducer.dim // left)
    p, q = (
        numbers("rademacher", seed_of(seed, str(side)), torch.arange(count), width, torch.float64)
        for side, (count, width) in enumerate(zip((m, n), widths, strict=True))
    )
    return p, q


@given(pairs(3, integers=True), st.integers(1, 40))
def test_kronecker_is_the_product_of_two_sides(kept: fg.Pairs, dim: int) -> None:
    for name, uses in kept.uses.items():
        shape = uses[0].shape
        if not shape or matrix_form(shape).blocks[2] == 1:
            continue
        _, m, n = matrix_form(shape).blocks
        reducer = fg.project(dim, 3, "kronecker")
        p, q = sides(reducer, name, m, n)
        rows = torch.stack([dense(use).reshape(3, m * n) for use in uses]).sum(0)
        wanted = rows @ torch.kron(p.contiguous(), q.contiguous()) / math.sqrt(dim)
        torch.testing.assert_close(reducer.of_parameter(name, uses), wanted, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_meta_device(kind: Any) -> None:
    params = {"w": torch.randn(4, 3), "table": torch.randn(5, 4), "b": torch.randn(3)}
    x = torch.tensor([[0, 1, 4], [2, 2, 3]])

    def losses(p: Any, x: Tensor) -> Tensor:
        return (torch.nn.functional.embedding(x, p["table"]) @ p["w"] + p["b"]).sum((1, 2))

    reducer = fg.project(6, kind=kind)
    plan = fg.plan(losses, params, x, reducer)
    away = {name: value.to("meta") for name, value in params.items()}
    found = fg.reduce(losses, plan=plan)(away, x.to("meta"), reducer)
    assert found.is_meta
    assert found.shape == (2, 6)


@pytest.mark.parametrize(
    "wrong", [{"dim": 0}, {"dim": 2.0}, {"dim": True}, {"dim": 3, "seed": 0.5}, {"dim": 3, "kind": "fourier"}]
)
def test_what_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(fg.InputError, match="project:"):
        fg.project(**wrong)


# -- statistics -----------------------------------------------------------------------------------------

COUNT, DIM = 512, 2048


def entries(kind: str, seed: int = 0, name: str = "w", start: int = 0) -> Tensor:
    return numbers(kind, seed_of(seed, name), torch.arange(start, start + COUNT), DIM, torch.float64)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_entries_have_mean_0_and_variance_1(kind: str) -> None:
    value = entries(kind)
    # The mean of N normal numbers has the tail of Hoeffding's bound for signs.
    assert abs(float(value.mean())) <= hoeffding(value.numel(), 1)
    assert abs(float(value.square().mean()) - 1) <= chi_square(value.numel())
    assert float(value.mean(0).abs().max()) <= hoeffding(COUNT, 1)
    assert float(value.mean(1).abs().max()) <= hoeffding(DIM, 1)
    if kind == "rademacher":
        assert set(value.unique().tolist()) == {-1.0, 1.0}
    else:
        # A half are within the quartiles of the normal distribution: a mean of signs.
        inside = (value.abs() < 0.6744897501960817).double() * 2 - 1
        assert abs(float(inside.mean())) <= hoeffding(value.numel(), 1)


OTHERS: dict[str, tuple[int, str, int]] = {
    "next seed": (1, "w", 0),
    "next seed, next place": (1, "w", 1),
    "next seed, place before": (1, "w", -1),
    "seed below, next place": (-1, "w", 1),
    "another parameter": (0, "v", 0),
    "another parameter, next place": (0, "v", 1),
    "next place": (0, "w", 1),
    "far place": (0, "w", COUNT),
}


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("other", OTHERS)
def test_independent_between_parameters_seeds_and_places(kind: str, other: str) -> None:
    one, two = entries(kind), entries(kind, *OTHERS[other])
    # Products of independent signs are signs; of clipped normal numbers they are within 4 x 4.
    product = one.clamp(-4, 4) * two.clamp(-4, 4)
    assert abs(float(product.mean())) <= hoeffding(product.numel(), 1 if kind == "rademacher" else 16)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_independent_between_columns(kind: str) -> None:
    value = entries(kind).clamp(-4, 4)
    size = 1 if kind == "rademacher" else 16
    for shift in (1, 2, 31, 32, 33, 64, DIM // 2):
        product = value * value.roll(shift, 1)
        assert abs(float(product.mean())) <= hoeffding(product.numel(), size), shift
    # All pairs of some columns.
    products = value[:, :64].T @ value[:, :64] / COUNT
    assert float((products - products.diag().diag()).abs().max()) <= hoeffding(COUNT, size)


def some_gradients() -> Tensor:
    return torch.randn(4, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_inner_products_are_kept_in_expectation(kind: Any) -> None:
    # <u, v> = (|u + v|^2 - |u - v|^2) / 4, and each of these norms is a mean over dim independent squares.
    values, dim = some_gradients(), 2**15
    rows = values.flatten(1)
    for seed in range(4):
        found = projected(values, dim, seed, kind)
        off = (found @ found.T - rows @ rows.T).abs()
        norms = rows.norm(dim=1)
        allowed = chi_square(dim) * (norms.square()[:, None] + norms.square()) / 2
        assert bool((off <= allowed).all()), off / allowed


def test_kronecker_keeps_inner_products_in_expectation() -> None:
    # X = <out_i, out_j> = sum over columns a, b of (p_a' G q_b) (p_a' H q_b) / dim, for each seed by itself. With
    # |G| = |H| = 1: |X| <= m n. Products that share no column are uncorrelated, those that share one have
    # E_p[(p' G H' p)^2] - <G, H>^2 <= 2 and each has E[(p' G q)^4] <= 9, so that
    # Var X <= (9 + 3 (left - 1) + 3 (right - 1)) / dim. Bernstein over N seeds:
    # P(|mean| >= e) <= 2 exp(-N e^2 / (2 Var + 4/3 m n e)).
    values = some_gradients()
    rows = values.flatten(1)
    rows = rows / rows.norm(dim=1, keepdim=True)
    left, right, n_seeds, (m, n) = 16, 16, 1500, values.shape[1:]
    variance = (9 + 3 * (left - 1) + 3 * (right - 1)) / (left * right)
    log = math.log(2 / DELTA)
    linear = 4 / 3 * m * n * log
    allowed = (linear + math.sqrt(linear**2 + 8 * n_seeds * variance * log)) / (2 * n_seeds)
    total = torch.zeros(4, 4, dtype=torch.float64)
    for seed in range(n_seeds):
        found = projected(rows.view_as(values), left * right, seed, "kronecker")
        total += found @ found.T / n_seeds
    assert allowed < 0.5
    assert float((total - rows @ rows.T).abs().max()) <= allowed


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_johnson_lindenstrauss(kind: Any) -> None:
    """The dimension that the docstring asks for keeps all distances, but for delta."""
    b, eps, delta = 6, 0.5, 1e-9
    dim = math.ceil(8 * math.log(b / delta) / eps**2)
    # The bound is P <= 2 exp(-dim (eps^2 / 4 - eps^3 / 6)) for each of the b (b - 1) / 2 distances.
    failing = b * (b - 1) * math.exp(-dim * (eps**2 / 4 - eps**3 / 6))
    values = torch.randn(b, 40, 5, dtype=torch.float64)
    rows = values.flatten(1)
    for seed in range(5):
        found = projected(values, dim, seed, kind)
        ratio = torch.pdist(found) / torch.pdist(rows)
        assert bool(((ratio.square() - 1).abs() <= eps).all())
    assert failing < 1e-9


@pytest.mark.parametrize("kind", ["sjlt", "mask"])
def test_sparse_kinds_keep_inner_products_in_expectation(kind: Any) -> None:
    # With |g| = |h| = 1 and p entries, for each seed by itself: a mask is a mean of dim independent terms p g h, each
    # at most p, of variance p sum(g^2 h^2) at most; the products of hashed entries have Var <= (1 + <g, h>^2) / dim
    # and are at most |g|_1 |h|_1 <= p. Bernstein over N seeds: P(|mean| >= e) <= 2 exp(-N e^2 / (2 Var + 4/3 p e)).
    rows = some_gradients().flatten(1)
    rows = rows / rows.norm(dim=1, keepdim=True)
    dim, n_seeds, p = 256, 1500, rows.shape[1]
    variance = 2 / dim if kind == "sjlt" else p * float((rows.square() @ rows.square().T).max()) / dim
    log = math.log(2 / DELTA)
    linear = 4 / 3 * p * log
    allowed = (linear + math.sqrt(linear**2 + 8 * n_seeds * variance * log)) / (2 * n_seeds)
    total = torch.zeros(4, 4, dtype=torch.float64)
    for seed in range(n_seeds):
        found = projected(rows.view(4, 3, 4), dim, seed, kind)
        total += found @ found.T / n_seeds
    assert allowed < 0.5
    assert float((total - rows @ rows.T).abs().max()) <= allowed


def test_sparse_kinds_have_one_entry_for_each_number_or_column() -> None:
    every = torch.eye(12, dtype=torch.float64).view(12, 3, 4)
    hashed, masked = projected(every, 5, 3, "sjlt"), projected(every, 7, 3, "mask")
    assert ((hashed != 0).sum(1) == 1).all()
    assert set(hashed.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert ((masked != 0).sum(0) == 1).all()
    torch.testing.assert_close(masked.abs().amax(0), torch.full((7,), math.sqrt(12 / 7), dtype=torch.float64))


@pytest.mark.parametrize("kind", ["rademacher", "gaussian", "mask"])
@pytest.mark.parametrize("dim", [1, 7, 31, 32, 33, 100])
def test_fewer_columns_are_a_part_of_more(kind: Any, dim: int) -> None:
    """Entry by entry: a column is what it is, however many there are."""
    values = some_gradients()
    long, short = projected(values, 100, kind=kind) * 10, projected(values, dim, kind=kind) * math.sqrt(dim)
    torch.testing.assert_close(short, long[:, :dim])


def test_rows_of_a_table_are_those_of_the_matrix() -> None:
    use: Sequence[Factor] = [Lookup(torch.tensor([[3, 0, 3]]), torch.randn(1, 3, 2), (2**40, 2))]
    small = [Lookup(torch.tensor([[3, 0, 3]]), use[0].tensors[1], (4, 2))]
    reducer = fg.project(6, kind="kronecker")
    assert torch.equal(reducer.of_parameter("w", use), reducer.of_parameter("w", small))
