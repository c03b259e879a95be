"""Directions that are tracked: one subspace iteration from the one before, from any form of the new one."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import funcghost as fg
from funcghost.algebra.compression import certified_bound
from funcghost.algebra.factors import Dense, Lookup, Outer, matrix_form
from funcghost.algebra.pairs import Pairs
from tests.algebra.test_directions import dense, low_rank
from tests.depth import fewer
from tests.models.programs import Program, programs
from tests.models.small import like, rows, small_gpt
from tests.naive import Params


def projected(value: Tensor, before: fg.LowRank) -> Tensor:
    """The leaf by the equation, block by block."""
    q, m, n = len(before.rows), before.rows.shape[1], before.cols.shape[1]
    found = []
    for block, rows_of, cols in zip(value.reshape(q, m, n), before.rows, before.cols, strict=True):
        own, start = (block, cols) if m <= n else (block.mT, rows_of)
        basis = torch.linalg.qr(own @ start).Q
        kept = basis @ (basis.mT @ own)
        found.append(kept if m <= n else kept.mT)
    return torch.stack(found).reshape(value.shape)


def precise(leaf: fg.LowRank) -> fg.LowRank:
    return fg.LowRank(leaf.rows.double(), leaf.cols.double(), leaf.shape, leaf.residual)


def assert_tracked(found: Any, wanted: Params, before: Any, atol: float = 1e-11) -> None:
    assert list(found) == list(before)
    for name, leaf in before.items():
        size = float(wanted[name].abs().max()) if wanted[name].numel() else 0.0
        if not isinstance(leaf, fg.LowRank):
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-10, atol=atol * size)
            continue
        own = found[name]
        assert (own.shape, own.dtype, own.residual) == (leaf.shape, leaf.dtype, math.inf)
        assert own.rank == min(leaf.rank, leaf.rows.shape[1], leaf.cols.shape[1])
        torch.testing.assert_close(own.dense(), projected(wanted[name], leaf), rtol=1e-9, atol=atol * size * leaf.rank)


@fewer(3)
@given(program=programs(empty=False), rank=st.integers(1, 3), seed=st.integers(0, 99))
def test_pairs_and_their_sum_are_tracked_by_the_equation(program: Program, rank: int, seed: int) -> None:
    pairs = fg.pairs(program.losses)(program.params, program.batch(seed=seed))
    summed = fg.combine(pairs, torch.ones(len(pairs), dtype=torch.float64))
    before = low_rank(program.direction(seed), rank, seed)
    for direction in (pairs, summed):
        assert_tracked(fg.track(direction, before), summed, before)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def pairs_of(*uses: Any) -> Pairs:
    """Pairs of one parameter with these uses."""
    model = fg.pairs(lambda p, x: (p["w"] * x).flatten(1).sum(1))({"w": torch.zeros(2)}, torch.ones(1, 2))
    return Pairs({"w": uses}, (("w", tuple(uses[0].shape), torch.float64),), model.spec)


USES: dict[str, Any] = {
    "outer": lambda m, n: Outer(drawn(3, 4, 1, m), drawn(3, 4, 1, n), matrix_form((m, n))),
    "lookup": lambda m, n: Lookup(torch.randint(0, m, (3, 5)), drawn(3, 5, n), (m, n)),
    "dense": lambda m, n: Dense(drawn(3, m, n)),
}


@pytest.mark.parametrize("kinds", [("outer",), ("lookup",), ("dense",), ("outer", "lookup"), tuple(USES)])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_every_form_and_all_uses_together(kinds: tuple[str, ...], shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    pairs = pairs_of(*(USES[kind](*shape) for kind in kinds))
    wanted = {"w": fg.materialize(pairs)["w"].sum(0)}
    before = low_rank(wanted, 2)
    assert_tracked(fg.track(pairs, before), wanted, before)


def test_blocks_are_tracked_each() -> None:
    experts = {"w": drawn(4, 7, 5)}
    before = low_rank(experts, 2)
    assert before["w"].rows.shape == (4, 7, 2)
    moved = {"w": experts["w"] + 0.1 * drawn(4, 7, 5)}
    assert_tracked(fg.track(moved, before), moved, before)
    assert_tracked(fg.track(fg.stack([moved, experts]), fg.stack([before, before])).directions[1], experts, before)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_tracked_again_a_direction_gets_to_its_best_approximation(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(drawn(side, 20)).Q for side in shape)
    values = 0.7 ** torch.arange(20, dtype=torch.float64)
    direction = {"w": (left * values) @ right.mT}
    best = float(values[4:].norm())
    found, errors = low_rank(direction, 4), list[float]()
    for _ in range(30):
        found = fg.track(direction, found)
        errors.append(float((found["w"].dense() - direction["w"]).norm()) / best - 1)
    assert errors[0] > 0.01
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(errors))
    # Frobenius errors are second order in the angle of the subspace, which falls by 0.7^2 each time.
    assert errors[-1] < 0.7**100
    low = low_rank(direction, 4)
    exact = fg.track(dense(low), low)
    torch.testing.assert_close(exact["w"].dense(), low["w"].dense())


def test_a_direction_of_zeros_is_left_again() -> None:
    """Columns that were lost come back: validation gradients may vanish at a step, or have few tokens."""
    direction = {"w": drawn(20, 30)}
    nothing = fg.track({"w": torch.zeros_like(direction["w"])}, fg.compress(direction, rank=4))
    assert not bool(nothing["w"].dense().any())
    one = fg.track({"w": torch.outer(drawn(20), drawn(30))}, nothing)
    found = one
    for _ in range(200):
        found = fg.track(direction, found)
    best = torch.linalg.svdvals(direction["w"])[4:].norm()
    assert float((found["w"].dense() - direction["w"]).norm() / best) < 1.001


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_sizes_far_from_one(scale: float) -> None:
    direction = {"w": (drawn(20, 30) * scale).float()}
    before = fg.compress(direction, rank=3)
    found = fg.track(direction, before)["w"].dense().double()
    wanted = projected(direction["w"].double(), precise(before["w"]))
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision_and_numbers_that_are_none(dtype: torch.dtype) -> None:
    model, losses, params = small_gpt(width=32, vocabulary=64)
    model.to(dtype)
    pairs = fg.pairs(losses)(params, rows(4, 8))
    exact = {name: leaf.double() for name, leaf in fg.combine(pairs, torch.ones(4)).items()}
    before = low_rank({name: leaf.to(dtype) for name, leaf in exact.items()}, 4)
    found = fg.track(pairs, before)
    for name, leaf in found.items():
        if isinstance(leaf, fg.LowRank):
            old = before[name]
            wanted = projected(exact[name], precise(old))
            error = float((leaf.dense().double() - wanted).norm() / exact[name].norm())
            assert error < 8 * torch.finfo(dtype).eps * old.rank, (name, error)
    broken = pairs.map(lambda value: value * math.nan if value.is_floating_point() else value)
    assert all(bool(leaf.rows.isnan().all()) for leaf in fg.track(broken, before).values() if hasattr(leaf, "rows"))


def test_no_bound_is_claimed() -> None:
    direction = {"w": torch.randn(8, 8)}
    tracked = fg.track(direction, fg.compress(direction, rank=2))
    bound = certified_bound(tracked, {"w": torch.tensor([0.0, 2.0, math.nan])})
    assert bound.tolist()[:2] == [0.0, math.inf]
    assert math.isnan(bound[2])

    def losses(p: Params, x: Tensor) -> Tensor:
        return (x @ p["w"]).square().sum(1)

    x = torch.randn(3, 8)
    x[1] = 0
    _, bound = fg.reduce(losses)(direction, x, fg.dot(tracked, with_bound=True))
    assert bound.tolist() == [math.inf, 0.0, math.inf]


def test_of_pairs_the_products_are_skinny() -> None:
    """4 r (m + n) FLOPs for each position, of the columns alone where it is looked up; 4 r m n of what is dense."""
    _, losses, params = small_gpt(width=64, vocabulary=256)
    batch = rows(4, 8)
    pairs, before = fg.pairs(losses)(params, batch), fg.compress(like(params), rank=2)
    with FlopCounterMode(display=False) as counter:
        fg.track(pairs, before)
    low = {name: leaf.rank for name, leaf in before.items() if isinstance(leaf, fg.LowRank)}

    def products(use: Any) -> int:
        if isinstance(use, Dense):
            return math.prod(use.shape)
        return 4 * use.positions * (use.cols.shape[-1] + (use.rows.shape[-1] if isinstance(use, Outer) else 0))

    assert len(low) == 10
    assert counter.get_total_flops() == 4 * sum(
        r * products(use) for name, r in low.items() for use in pairs.uses[name]
    )


def test_within_autocast_products_have_the_dtype_of_their_factors() -> None:
    _, losses, params = small_gpt(width=32, vocabulary=64)
    pairs, before = fg.pairs(losses)(params, rows(4, 8)), low_rank(like(params), 2)
    before["tokens.weight"] = dense(before)["tokens.weight"]
    wanted = dense(fg.track(pairs, before))
    with torch.autocast("cpu", torch.bfloat16):
        found = fg.track(pairs, before)
    assert all(torch.equal(dense(found)[name], value) for name, value in wanted.items())
    assert fg.track({}, {}) == {}


def test_errors_say_what_does_not_fit() -> None:
    v = {"a": torch.randn(8, 8), "b": torch.randn(3)}
    small = fg.compress(v, rank=2)
    with pytest.raises(
        fg.InputError, match=r"previous: must be a tree like params; missing leaves \[\], unexpected leaves \['b'\]"
    ):
        fg.track({"a": v["a"]}, small)
    with pytest.raises(fg.InputError, match=r"previous\['b'\]: shape must be that of the parameter"):
        fg.track({"a": v["a"], "b": torch.randn(4)}, small)
    with pytest.raises(fg.InputError, match=r"previous\['a'\]: dtype must be that of the parameter"):
        fg.track({"a": v["a"].double(), "b": v["b"]}, small)
    with pytest.raises(fg.InputError, match=r"direction\['a'\] is compressed already"):
        fg.track(small, small)
    with pytest.raises(fg.InputError, match=r"previous\['b'\] must be a tensor, found int"):
        fg.track(v, {"a": small["a"], "b": 3})
    with pytest.raises(fg.InputError, match="2 directions cannot follow one of 1"):
        fg.track(fg.stack([v, v]), fg.stack([small]))
    with pytest.raises(fg.InputError, match="either both or none"):
        fg.track(fg.stack([v]), small)
