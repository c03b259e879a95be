"""Compressed directions: what they cost, what they drop, and that what they say about it holds."""

import itertools
import math
import random
from collections import OrderedDict
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import optree
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

import funcghost as fg
from funcghost.algebra import ranks
from funcghost.algebra.compression import certified_bound
from funcghost.algebra.directions import Stack
from funcghost.algebra.sketch import SMALL, leading_factors
from funcghost.laws.oracle import per_sample_gradients
from tests.models.small import like, rows, small_gpt
from tests.naive import dots

Direction = dict[str, Any]

SPECTRA: dict[str, Callable[[int], list[float]]] = {
    "zero": lambda k: [0.0] * k,
    "flat": lambda k: [1.0] * k,
    "one": lambda k: [1.0] + [0.0] * (k - 1),
    "two and dust": lambda k: [1.0, 0.5] + [1e-9] * (k - 2),
    "step": lambda k: [1.0] * (k // 2) + [1e-3] * (k - k // 2),
    "geometric": lambda k: [0.5**j for j in range(k)],
    "steep": lambda k: [10.0 ** (-3 * j) for j in range(k)],
    "slow": lambda k: [1 / (j + 1) for j in range(k)],
    "beyond squares": lambda k: [10.0 ** (-20 * j) for j in range(k)],
}
SHAPES = [(7, 9), (12, 5), (30, 4), (16, 16), (6, 3, 5), (4, 8, 8), (8, 3, 3, 3), (2, 2), (1, 6), (5,), ()]
# Binary exponents of the whole leaf, as far as the dtype goes.
EXPONENTS = {torch.float64: 1000, torch.float32: 120, torch.bfloat16: 110, torch.float16: 8}


def made(
    shape: tuple[int, ...], spectrum: str, dtype: torch.dtype = torch.float64, exponent: int = 0, seed: int = 0
) -> Tensor:
    """A leaf with these singular values (as a matrix [p, rest]) times 2^exponent."""
    source = torch.Generator().manual_seed(seed)
    if len(shape) < 2:
        return torch.randn(shape, generator=source, dtype=torch.float64).mul(2.0**exponent).to(dtype)
    m, n = shape[0], math.prod(shape[1:])
    k = min(m, n)
    left, right = (torch.linalg.qr(torch.randn(side, k, generator=source, dtype=torch.float64)).Q for side in (m, n))
    values = torch.tensor(SPECTRA[spectrum](k)[:k], dtype=torch.float64)
    return ((left * values) @ right.mT * 2.0**exponent).to(dtype).reshape(shape)


@st.composite
def leaves(draw: st.DrawFn, dtypes: Any = tuple(EXPONENTS), scaled: bool = True) -> Tensor:
    dtype = draw(st.sampled_from(dtypes))
    most = EXPONENTS[dtype] if scaled else 0
    exponent = draw(st.sampled_from([0, 0, -most, most]) | st.integers(-most, most))
    return made(
        draw(st.sampled_from(SHAPES)), draw(st.sampled_from(sorted(SPECTRA))), dtype, exponent, draw(st.integers(0, 99))
    )


@st.composite
def trees(draw: st.DrawFn, scaled: bool = True) -> Direction:
    return {f"p{k}": leaf for k, leaf in enumerate(draw(st.lists(leaves(scaled=scaled), min_size=1, max_size=5)))}


tolerances = st.sampled_from([0.9, 0.5, 0.1, 0.01, 1e-3, 1e-5, 1e-9, 0.0]) | st.floats(0, 2)


def fractions(tensor: Tensor) -> Any:
    return (
        torch.tensor(0).new_empty(0)
        if tensor.numel() == 0
        else [Fraction(x) for x in tensor.double().flatten().tolist()]
    )


def dropped(leaf: Tensor, small: fg.LowRank) -> Fraction:
    """The square of what was dropped, in rational numbers: there is nothing to round."""
    (q, m, r), n = small.rows.shape, small.cols.shape[1]
    value, left, right = fractions(leaf), fractions(small.rows), fractions(small.cols)
    total = Fraction(0)
    for k, i, j in itertools.product(range(q), range(m), range(n)):
        product = sum((left[(k * m + i) * r + s] * right[(k * n + j) * r + s] for s in range(r)), Fraction(0))
        total += (value[(k * m + i) * n + j] - product) ** 2
    return total


def size(tree: Direction) -> float:
    """The Frobenius norm, without squares that leave the range of numbers."""
    return math.hypot(*(x for leaf in tree.values() for x in leaf.double().flatten().tolist()))


def residuals(tree: Direction) -> list[float]:
    return [float(leaf.residual) for leaf in tree.values() if isinstance(leaf, fg.LowRank)]


def cost(leaf: Any) -> int:
    return leaf.cost if isinstance(leaf, fg.LowRank) else leaf.numel()


def compressed(leaf: Tensor, **options: Any) -> fg.LowRank:
    found = fg.compress({"w": leaf}, **options)["w"]
    assert isinstance(found, fg.LowRank)
    return found


# -- the residual ------------------------------------------------------------------------------------------------------


@given(leaves(), st.integers(1, 3))
@example(made((7, 9), "flat", torch.float32, -120), 1)
@example(made((12, 5), "beyond squares", torch.float64, 1000), 2)
@example(made((7, 9), "flat", torch.float64, -1060), 2)
@example(made((7, 9), "flat", torch.float32, -140), 2)
def test_residual_bounds_what_was_dropped(leaf: Tensor, rank: int) -> None:
    small = fg.compress({"w": leaf}, rank=rank)["w"]
    assume(isinstance(small, fg.LowRank))
    truth, bound = dropped(leaf, small), Fraction(float(small.residual))
    assert truth <= bound**2
    # And it is no excuse: what is added to the truth is rounding. Subnormal numbers round by a fixed amount.
    tiny = Fraction(torch.finfo(small.residual.dtype).tiny)
    slack = Fraction(2 * torch.finfo(small.residual.dtype).eps + (leaf.numel() + 20) * 2.0**-52)
    allowance = Fraction(size({"w": leaf}) * 1e-14)
    assert bound**2 <= (1 + slack) ** 2 * truth + (allowance + tiny) * (2 * bound + allowance + tiny)


@given(leaves(dtypes=(torch.float64, torch.float32)), st.integers(1, 3), st.integers(0, 99))
def test_error_of_any_inner_product_is_below_the_bound(leaf: Tensor, rank: int, seed: int) -> None:
    small = fg.compress({"w": leaf}, rank=rank)["w"]
    assume(isinstance(small, fg.LowRank))
    # Powers of two: the bound is homogeneous, and here no square may leave the range of numbers.
    exponent = math.frexp(float(leaf.abs().max()))[1]
    scale = [2.0 ** (-exponent // 2), 2.0 ** (-exponent - (-exponent // 2))]
    change = (leaf.double() * scale[0] - small.dense().double() * scale[0]) * scale[1]
    noise = torch.randn(change.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    bound = float(small.residual) * scale[0] * scale[1]
    # dense() is rounded once more, in the dtype of the leaf.
    rounding = 16 * torch.finfo(leaf.dtype).eps * float((leaf.double() * scale[0] * scale[1]).norm())
    for gradient in (noise, change, change.sign()):
        assert abs(float((change * gradient).sum())) <= (bound + rounding) * float(gradient.norm()) * (1 + 1e-12)


@pytest.mark.parametrize("dtype", EXPONENTS)
def test_factors_in_low_precision_pay_for_their_rounding(dtype: torch.dtype) -> None:
    # Of rank 2 before it is rounded to the dtype; the factors are rounded to it as well.
    leaf = made((24, 20), "two and dust", dtype)
    small = compressed(leaf, rank=2)
    assert small.rows.dtype == small.cols.dtype == small.dtype == dtype
    assert small.residual.dtype == torch.promote_types(dtype, torch.float32)
    eps = torch.finfo(dtype).eps
    assert eps / 20 < float(small.residual) < 4 * eps or dtype is torch.float64
    assert dropped(leaf, small) <= Fraction(float(small.residual)) ** 2


@pytest.mark.parametrize(("shape", "rank"), [((30, 20), 3), ((400, 300), 5), ((300, 500), 5), ((6, 40, 30), 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_where_the_rank_suffices(shape: tuple[int, ...], rank: int, dtype: torch.dtype) -> None:
    source = torch.Generator().manual_seed(1)
    *blocks, m, n = shape
    left = torch.randn((*blocks, m, rank), generator=source, dtype=torch.float64)
    leaf = (left @ torch.randn((*blocks, rank, n), generator=source, dtype=torch.float64)).to(dtype)
    small = compressed(leaf, rank=rank)
    assert small.rank == rank
    norm, eps = float(leaf.double().norm()), torch.finfo(dtype).eps
    assert float(small.residual) <= 20 * eps * norm
    assert float((small.dense() - leaf).double().norm()) <= 40 * eps * norm
    assert fg.compress({"w": leaf}, rtol=1e-4)["w"].rank == rank


@pytest.mark.parametrize("spectrum", ["slow", "geometric", "step", "flat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sketches_are_nearly_as_good_as_the_best_of_their_rank(spectrum: str, dtype: torch.dtype) -> None:
    shape, rank = (260, 340), 20
    leaf = made(shape, spectrum, dtype)
    assert not leading_factors(leaf[None], rank, 0).complete
    best = math.hypot(*torch.linalg.svdvals(leaf.double())[rank:].tolist())
    assert float(compressed(leaf, rank=rank).residual) <= 1.02 * best + 8 * torch.finfo(dtype).eps * float(leaf.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 300, 260), (1, 260, 300), (2, 5, 40), (2, 40, 5)])
def test_factors_are_a_truncated_decomposition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    matrix = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(2)) * 0.8 ** torch.arange(shape[2])
    found = leading_factors(matrix.to(dtype), 4, 7)
    eps = torch.finfo(dtype).eps
    assert found.complete == (min(shape[1:]) <= SMALL)
    for side in (found.left, found.right):
        assert float((side.mT @ side - torch.eye(side.shape[2], dtype=dtype)).abs().max()) < 200 * eps
    values = torch.linalg.svdvals(matrix)
    assert torch.allclose(found.values[:, :4], values[:, :4], rtol=1e-4)
    left_out = matrix - (found.left * found.values[:, None]) @ found.right.mT
    assert abs(float(left_out.norm()) - found.rest(matrix)) <= 50 * eps * float(matrix.norm())


# -- the tolerance -----------------------------------------------------------------------------------------------------


@given(trees(), tolerances)
@example({"p0": made((16, 16), "steep", torch.float32), "p1": made((16, 16), "flat", torch.float32, -100)}, 1e-6)
@example({"p0": made((16, 16), "slow", torch.float64, 1000), "p1": made((5,), "flat", torch.float64, 1000)}, 0.3)
def test_tolerance_is_met_over_the_whole_tree_and_never_costs_more(tree: Direction, rtol: float) -> None:
    small = fg.compress(tree, rtol=rtol)
    assert small.keys() == tree.keys()
    assert math.hypot(*residuals(small)) <= rtol * size(tree)
    for name, leaf in tree.items():
        if isinstance(small[name], fg.LowRank):
            assert small[name].cost < leaf.numel()
            assert small[name].cost == sum(f.numel() for f in (small[name].rows, small[name].cols))
            assert (small[name].dtype, small[name].shape) == (leaf.dtype, tuple(leaf.shape))
        else:
            assert small[name] is leaf


@given(trees(scaled=False), st.lists(tolerances, min_size=2, max_size=2))
def test_less_tolerance_never_costs_less(tree: Direction, pair: list[float]) -> None:
    fine, coarse = (fg.compress(tree, rtol=rtol) for rtol in sorted(pair))
    for name in tree:
        assert cost(coarse[name]) <= cost(fine[name])
        both = [leaf for leaf in (coarse[name], fine[name]) if isinstance(leaf, fg.LowRank)]
        if len(both) == 2 and both[0].rows.shape[0] == both[1].rows.shape[0]:
            assert both[0].rank <= both[1].rank


@given(trees(scaled=False), tolerances, st.integers(1, 4))
def test_rank_caps_the_tolerance(tree: Direction, rtol: float, rank: int) -> None:
    capped, full = fg.compress(tree, rank=rank, rtol=rtol), fg.compress(tree, rank=rank)
    for name, leaf in tree.items():
        assert cost(capped[name]) <= leaf.numel()
        assert not isinstance(capped[name], fg.LowRank) or capped[name].rank <= rank
        assert not isinstance(full[name], fg.LowRank) or full[name].rank == rank
        assert isinstance(capped[name], fg.LowRank) or not isinstance(full[name], fg.LowRank)
    # Where the cap forbids to meet the tolerance, as little is dropped as the cap allows, up to rounding.
    rounding = 8 * max(torch.finfo(leaf.dtype).eps for leaf in tree.values()) * size(tree)
    assert math.hypot(*residuals(capped)) <= max(rtol * size(tree), math.hypot(*residuals(full)) + rounding)


def test_rtol_is_for_the_tree_and_not_for_each_leaf() -> None:
    tree = {"large": made((40, 40), "slow"), "small": made((40, 40), "slow", exponent=-12)}
    small = fg.compress(tree, rtol=0.3)
    assert small["small"].rank == 1
    assert small["large"].rank > 1


def test_dense_leaves_count_in_the_norm_of_the_tree() -> None:
    w = made((40, 40), "geometric")
    alone = fg.compress({"w": w}, rtol=0.01)
    beside = fg.compress({"w": w, "b": torch.full((10,), 30.0, dtype=torch.float64)}, rtol=0.01)
    assert beside["w"].rank == 1 < alone["w"].rank


def test_large_leaves_are_sketched_until_the_tolerance_is_met() -> None:
    tree = {"w": made((300, 320), "slow", torch.float32), "v": made((300, 320), "geometric", torch.float32)}
    for rtol, sketched in ((0.3, True), (0.05, False)):
        small = fg.compress(tree, rtol=rtol)
        assert math.hypot(*residuals(small)) <= rtol * size(tree)
        values = [torch.linalg.svdvals(leaf.double()) for leaf in tree.values()]
        # All steps cost the same: the largest singular values of both are kept, and no more than are needed.
        merged = torch.cat(values).sort(descending=True).values.square()
        tail = merged.flip(0).cumsum(0).flip(0)
        needed = int((tail > (rtol * size(tree)) ** 2).sum())
        assert needed <= sum(leaf.rank for leaf in small.values()) <= needed + 1
        assert (small["w"].rank < ranks.FIRST_SKETCH) == sketched


# -- what results depend on --------------------------------------------------------------------------------------------


def same(a: Any, b: Any) -> bool:
    if isinstance(a, fg.LowRank):
        return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("rows", "cols", "residual"))
    return torch.equal(a, b)


def large() -> Direction:
    return {name: made((280, 300), "slow", torch.float32, seed=k) for k, name in enumerate("bca")}


@pytest.mark.parametrize("options", [{"rank": 3}, {"rtol": 0.4}, {"rank": 3, "rtol": 0.1}])
def test_results_depend_on_the_direction_alone(options: dict[str, Any]) -> None:
    tree = large()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = fg.compress(tree, **options)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    for other in (tree, dict(sorted(tree.items())), OrderedDict(reversed(tree.items()))):
        again = fg.compress(other, **options)
        assert all(same(first[name], again[name]) for name in tree)


@given(trees(scaled=False), tolerances, st.randoms(use_true_random=False))
@example({"p0": made((16, 16), "step"), "p1": made((16, 16), "step")}, 0.6, random.Random(1))
def test_order_of_keys_does_not_matter(tree: Direction, rtol: float, source: random.Random) -> None:
    names = source.sample(sorted(tree), len(tree))
    found = fg.compress(tree, rtol=rtol)
    mixed = fg.compress(OrderedDict((name, tree[name]) for name in names), rtol=rtol)
    assert all(same(found[name], mixed[name]) for name in tree)


def test_scaling_by_a_power_of_two_scales_factors_and_residual() -> None:
    tree = {"w": made((20, 30), "geometric"), "v": made((9, 8), "geometric")}
    found, scaled = (fg.compress(t, rtol=0.2) for t in (tree, {k: v * 2.0**-40 for k, v in tree.items()}))
    for name in tree:
        assert torch.equal(found[name].rows * 2.0**-20, scaled[name].rows)
        assert math.isclose(float(found[name].residual) * 2.0**-40, float(scaled[name].residual), rel_tol=1e-15)


def test_ambient_modes_of_the_user_change_nothing() -> None:
    tree = {"w": made((40, 30), "slow", torch.float32)}
    plain = fg.compress(tree, rank=4)
    parameter = {"w": torch.nn.Parameter(tree["w"].clone())}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = fg.compress(parameter, rank=4)
        multiplied = cast["w"].dense()
    assert torch.equal(multiplied, plain["w"].dense())
    assert same(cast["w"], plain["w"])
    assert not cast["w"].rows.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = fg.compress(large(), rank=4)
    assert all(same(leaf, cast[name]) for name, leaf in fg.compress(large(), rank=4).items())
    for options in ({"rank": 3}, {"rtol": 0.4}):
        here = large() | tree
        with torch.device("meta"):
            moved = fg.compress(here, **options)
        assert all(same(leaf, moved[name]) for name, leaf in fg.compress(here, **options).items())


def test_the_direction_is_left_as_it_was() -> None:
    tree = {"w": made((40, 30), "slow", torch.float32), "b": torch.ones(3)}
    kept = {name: leaf.clone() for name, leaf in tree.items()}
    found = fg.compress(tree, rtol=0.1)
    assert all(torch.equal(tree[name], kept[name]) for name in tree)
    assert found["b"] is tree["b"]


# -- blocks and shapes -------------------------------------------------------------------------------------------------


def test_experts_are_cut_expert_by_expert() -> None:
    source = torch.Generator().manual_seed(0)
    leaf = torch.randn(6, 32, 2, generator=source) @ torch.randn(6, 2, 24, generator=source)
    for options in ({"rank": 2}, {"rtol": 1e-3}):
        small = compressed(leaf, **options)
        assert (small.rows.shape, small.cols.shape) == ((6, 32, 2), (6, 24, 2))
        assert torch.allclose(small.dense(), leaf, atol=1e-4)


def test_a_kernel_of_one_axis_is_one_matrix_where_that_is_cheaper() -> None:
    leaf = made((16, 16, 5), "geometric", torch.float32)
    for options in ({"rank": 2}, {"rtol": 0.1}):
        small = compressed(leaf, **options)
        assert small.rows.shape[:2] == (1, 16)
        assert small.cols.shape[:2] == (1, 80)
        assert small.dense().shape == leaf.shape


@given(leaves(), st.integers(1, 4))
def test_blocks_are_those_of_the_definition(leaf: Tensor, rank: int) -> None:
    small = fg.compress([leaf], rank=rank)[0]
    assume(isinstance(small, fg.LowRank))
    (q, m, r), n = small.rows.shape, small.cols.shape[1]
    assert (q * m * n, small.cols.shape) == (leaf.numel(), (q, n, r))
    assert (small.rank, small.cost, small.nbytes) == (r, q * r * (m + n), q * r * (m + n) * leaf.element_size())
    wide = torch.promote_types(leaf.dtype, torch.float32)
    blocks = [(a @ b.mT).to(leaf.dtype) for a, b in zip(small.rows.to(wide), small.cols.to(wide), strict=True)]
    found = small.dense()
    assert (found.shape, found.dtype, found.device) == (leaf.shape, leaf.dtype, leaf.device)
    assert torch.allclose(found.reshape(q, m, n), torch.stack(blocks), rtol=1e-2 if leaf.element_size() == 2 else 1e-5)


def test_leaves_that_stay() -> None:
    spoilt = made((12, 12), "flat")
    spoilt[3, 4] = math.nan
    endless = made((12, 12), "flat")
    endless[0, 0] = -math.inf
    tree = {
        "scalar": torch.ones(()),
        "bias": torch.ones(100),
        "tiny": torch.ones(2, 2),
        "empty": torch.ones(0, 12),
        "nan": spoilt,
        "inf": endless,
        "float8": torch.ones(12, 12).to(torch.float8_e4m3fn),
        "square": made((12, 12), "flat"),
    }
    for options in ({"rank": 1}, {"rtol": 0.5}, {"rank": 2, "rtol": 0.5}):
        small = fg.compress(tree, **options)
        assert all(small[name] is tree[name] for name in tree if name != "square")
    assert compressed(tree["square"], rank=5).rank == 5
    assert fg.compress({"w": tree["square"]}, rank=6)["w"] is tree["square"]
    assert compressed(torch.zeros(8, 8), rtol=0.0).rank == 1
    assert compressed(torch.zeros(8, 8), rank=2).residual == 0


def test_nests_stacks_and_bare_tensors() -> None:
    v = made((20, 30), "geometric")
    nest = {"a": [v, torch.ones(3)], "b": (v.mT, {"c": v})}
    found = fg.compress(nest, rank=2)
    assert isinstance(found["a"][0], fg.LowRank)
    assert isinstance(found["b"][0], fg.LowRank)
    assert found["b"][1]["c"].rows.shape == (1, 20, 2)
    assert torch.equal(fg.compress(v, rank=2).rows, compressed(v, rank=2).rows)
    stacked = fg.compress(fg.stack([{"w": v}, {"w": 2 * v}]), rank=2)
    assert isinstance(stacked, Stack)
    for member, scale in zip(stacked.directions, (1, 2), strict=True):
        assert same(member["w"], compressed(scale * v, rank=2))


# -- trees of others ---------------------------------------------------------------------------------------------------


def test_a_leaf_for_optree_and_a_node_for_torch() -> None:
    small = fg.compress({"w": made((20, 30), "slow"), "b": torch.ones(2)}, rank=2)
    assert optree.tree_leaves(small) == [small["b"], small["w"]]
    pytree = torch.utils._pytree
    found, spec = pytree.tree_flatten(small)
    assert len(found) == 4
    loaded = pytree.treespec_loads(pytree.treespec_dumps(spec))
    assert loaded == spec
    again = pytree.tree_unflatten(found, loaded)
    assert same(small["w"], again["w"])
    assert again["w"].shape == (20, 30)
    doubled = pytree.tree_map(lambda leaf: leaf.float(), small)
    assert (doubled["w"].dtype, doubled["w"].shape) == (torch.float32, (20, 30))
    assert repr(small["w"]) == "LowRank(shape=(20, 30), rank=2, dtype=torch.float64)"


def test_meta_device_gives_shapes() -> None:
    tree = {"w": made((20, 30), "slow", torch.bfloat16), "e": made((6, 32, 24), "slow"), "b": torch.ones(3)}
    shadow = {name: leaf.to("meta") for name, leaf in tree.items()}
    real, meta = (fg.compress(t, rank=3) for t in (tree, shadow))
    assert meta["b"] is shadow["b"]
    for name in ("w", "e"):
        for part in ("rows", "cols", "residual"):
            a, b = getattr(real[name], part), getattr(meta[name], part)
            assert (a.shape, a.dtype, b.device.type) == (b.shape, b.dtype, "meta")
        assert meta[name].dense().shape == tree[name].shape
    norms = {name: torch.ones(5, device="meta") for name in tree}
    assert certified_bound(meta, norms).shape == (5,)
    with pytest.raises(fg.InputError, match=r"meta device.*Pass rank="):
        fg.compress(shadow, rtol=0.1)


@pytest.mark.cuda
def test_cuda_gives_the_same_ranks_and_a_true_bound() -> None:
    tree = large() | {"h": made((16, 16), "slow", torch.bfloat16)}
    moved = {name: leaf.cuda() for name, leaf in tree.items()}
    here, there = (fg.compress(t, rtol=0.3) for t in (tree, moved))
    for name in tree:
        assert (here[name].rank, there[name].device.type) == (there[name].rank, "cuda")
        assert there[name].dense().device == moved[name].device
        assert math.isclose(float(here[name].residual), float(there[name].residual), rel_tol=1e-2)
    assert dropped(tree["h"], there["h"]) <= Fraction(float(there["h"].residual)) ** 2


# -- the bound on scores -----------------------------------------------------------------------------------------------


def squared_norms(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: g.double().flatten(1).square().sum(1) for name, g in gradients.items()}


@pytest.mark.parametrize("options", [{"rank": 1}, {"rank": 2}, {"rtol": 0.3}, {"rtol": 1e-3}])
def test_scores_are_off_by_no_more_than_the_bound(options: dict[str, Any]) -> None:
    model, losses, params = small_gpt()
    model.double()
    batch, direction = rows(), like(params)
    small = fg.compress(direction, **options)
    dense = {name: leaf.dense() if isinstance(leaf, fg.LowRank) else leaf for name, leaf in small.items()}
    gradients = per_sample_gradients(losses, params, batch)
    found = fg.reduce(losses)(params, batch, fg.dot(dense))
    bound = certified_bound(small, squared_norms(gradients))
    error = (found - dots(gradients, direction)).abs()
    assert bound.shape == (4,)
    assert bool((error <= bound + 1e-12).all())
    # The worst gradient there is: what was dropped.
    worst = {name: (direction[name] - dense[name])[None] for name in direction}
    wanted = dots(worst, direction) - dots(worst, dense)
    assert torch.allclose(wanted, dots(worst, worst))
    assert bool((wanted <= certified_bound(small, squared_norms(worst)) * (1 + 1e-9)).all())


def test_bound_is_the_sum_over_low_rank_leaves() -> None:
    tree = {"w": made((20, 30), "slow"), "v": made((9, 8), "slow"), "b": torch.ones(2, dtype=torch.float64)}
    small = fg.compress(tree, rank=1)
    norms = {"w": torch.tensor([4.0, 0.0]), "v": torch.tensor([9.0, 1.0]), "other": torch.tensor([7.0, 7.0])}
    w, v = float(small["w"].residual), float(small["v"].residual)
    bound = certified_bound(small, norms)
    assert bound.dtype is torch.float32
    assert torch.allclose(bound, torch.tensor([2 * w + 3 * v, v]))
    assert bound.double().tolist() >= [2 * w + 3 * v, v]
    half = {name: value.bfloat16() for name, value in norms.items()}
    assert torch.equal(certified_bound(small, half), bound)
    both = certified_bound(fg.stack([small, {"w": small["w"]}]), norms)
    assert torch.equal(both[:, 0], bound)
    assert torch.allclose(both[:, 1], torch.tensor([2 * w, 0.0]))
    assert certified_bound(tree, norms).tolist() == [0.0, 0.0]


@given(
    st.lists(st.floats(1e-40, 1e18), min_size=1, max_size=6), st.lists(st.floats(1e-38, 1e30), min_size=6, max_size=6)
)
def test_bound_is_rounded_up(residual: list[float], squares: list[float]) -> None:
    norms = {str(k): torch.tensor([squares[k]]) for k in range(6)}
    empty = torch.empty(1, 1, 0)
    small = {str(k): fg.LowRank(empty, empty, (1, 1), torch.tensor(r)) for k, r in enumerate(residual)}
    bound = Fraction(float(certified_bound(small, norms)))
    terms = [Fraction(float(small[k].residual)) ** 2 * Fraction(float(norms[k])) for k in small]
    # (sum of roots)^2 is compared by way of roots in rational numbers, to 200 bits from below.
    exact = sum(Fraction(math.isqrt(int(term * 2**800)), 2**400) for term in terms)
    assert exact <= bound <= exact * (1 + Fraction(1, 2**21)) + Fraction(2, 10**45)


def test_gradients_beyond_the_range_of_numbers_are_no_error_where_nothing_was_dropped() -> None:
    small = fg.compress({"w": torch.zeros(8, 8), "v": made((9, 8), "slow", torch.float32)}, rank=1)
    norms = {"w": torch.tensor([math.inf, 1.0]), "v": torch.tensor([4.0, math.inf])}
    bound = certified_bound(small, norms)
    assert bound.isfinite().tolist() == [True, False]


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "pass rank=.*or rtol="),
        ({"rank": 0}, "rank must be a whole number of at least 1, found 0"),
        ({"rank": True}, "rank must be a whole number"),
        ({"rank": 2.0}, "rank must be a whole number"),
        ({"rtol": -0.1}, "rtol must be a number of at least 0, found -0.1"),
        ({"rtol": math.nan}, "rtol must be a number"),
        ({"rtol": "0.1"}, "rtol must be a number"),
    ],
)
def test_rank_and_tolerance_are_checked(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(fg.InputError, match=complaint):
        fg.compress({"w": torch.ones(8, 8)}, **options)


def test_leaves_are_checked() -> None:
    with pytest.raises(fg.InputError, match=r"direction\['a\.0'\] must be a tensor, found float"):
        fg.compress({"a": [1.0]}, rank=1)
    with pytest.raises(fg.InputError, match=r"direction\['w'\] must be a dense tensor of real.*torch\.int64"):
        fg.compress({"w": torch.ones(8, 8).long()}, rank=1)
    with pytest.raises(fg.InputError, match=r"layout torch\.sparse_coo"):
        fg.compress({"w": torch.ones(8, 8).to_sparse()}, rank=1)
    small = fg.compress({"w": torch.ones(8, 8)}, rank=1)
    with pytest.raises(fg.InputError, match=r"direction\['w'\] is compressed already"):
        fg.compress(small, rank=1)
    with pytest.raises(fg.InputError, match="at least one parameter"):
        certified_bound(small, {})
    with pytest.raises(fg.InputError, match="norms must hold those of 'w'"):
        certified_bound(small, {"b": torch.ones(3)})
