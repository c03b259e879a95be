"""Low-rank directions and pairs as directions, on random programs: they are what their dense form is."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import funcghost as fg
from funcghost.laws.oracle import per_sample_gradients
from tests.depth import fewer
from tests.models.programs import Program, programs
from tests.models.small import rows, small_gpt
from tests.naive import Params, assert_scores, dots, expected


def low_rank(direction: Params, rank: int, seed: int = 0) -> dict[str, Any]:
    """Every leaf of two axes or more in factors, whether that is cheaper or not."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(value: Tensor) -> Any:
        if value.dim() < 2:
            return value
        m, n = value.shape[-2:]
        q = value.numel() // (m * n)
        rows, cols = (torch.randn(q, side, rank, generator=generator, dtype=value.dtype) for side in (m, n))
        return fg.LowRank(rows, cols, tuple(value.shape), value.new_zeros(()))

    return {name: leaf(value) for name, value in direction.items()}


def dense(direction: Mapping[str, Any]) -> Params:
    return {name: leaf.dense() if isinstance(leaf, fg.LowRank) else leaf for name, leaf in direction.items()}


@fewer(3)
@given(program=programs(), rank=st.integers(1, 3))
def test_low_rank_directions_score_as_their_dense_form(program: Program, rank: int) -> None:
    batch, direction = program.batch(), program.direction()
    small = low_rank(direction, rank)
    wanted = expected(program.losses, program.params, batch, dense(small))
    step = fg.grad_and_reduce(program.losses)
    out = step(program.params, batch, fg.dot(small))
    assert_scores(out.reduced, wanted)
    assert_scores(fg.reduce(program.losses)(program.params, batch, fg.dot(small)), wanted)
    plain = step(program.params, batch, fg.dot(direction))
    for name, gradient in plain.grads.items():
        assert torch.equal(out.grads[name], gradient)


@fewer(3)
@given(program=programs(), rank=st.integers(1, 2))
def test_stacked_with_dense_ones_and_by_parameter(program: Program, rank: int) -> None:
    batch, direction = program.batch(), program.direction()
    small = low_rank(direction, rank)
    stack = fg.stack([small, direction, low_rank(direction, 1, seed=5)])
    wanted = [expected(program.losses, program.params, batch, dense(member)) for member in stack.directions]
    reducers = (fg.dot(stack), fg.per_param(fg.dot(stack)), fg.per_param(fg.dot(small)))
    scores, each, alone = fg.reduce(program.losses)(program.params, batch, reducers)
    for k, own in enumerate(wanted):
        assert_scores(scores[:, k], own)
        assert_scores(torch.stack([part[:, k] for part in each.values()]).sum(0), own)
    gradients = per_sample_gradients(program.losses, program.params, batch)
    for name, found in alone.items():
        value = dots({name: gradients[name]}, dense(small))
        assert_scores(found, (value, wanted[0][1]))


@fewer(3)
@given(program=programs(), rank=st.integers(1, 3))
def test_kept_pairs_along_low_rank_directions(program: Program, rank: int) -> None:
    batch, small = program.batch(), low_rank(program.direction(), rank)
    pairs = fg.pairs(program.losses)(program.params, batch)
    found = fg.apply(fg.dot(small), pairs)
    assert_scores(found, expected(program.losses, program.params, batch, dense(small)))


@pytest.mark.parametrize("per_example", [False, True])
def test_by_token_and_by_example(per_example: bool) -> None:
    params = {"w": torch.randn(5, 4, dtype=torch.float64), "u": torch.randn(4, 5, dtype=torch.float64)}
    x = torch.randn(3, 6, 5, dtype=torch.float64)

    def losses(p: Params, x: Tensor) -> Tensor:
        return (torch.tanh(x @ p["w"]) @ p["u"]).square().sum((1, 2))

    small = low_rank(params, 2)
    wanted = expected(losses, params, x, dense(small))
    used: Any = fg.per_example(lambda p, row: losses(p, row[None])[0]) if per_example else losses
    score = fg.reduce(used)
    assert_scores(score(params, x, fg.dot(small)), wanted)
    if not per_example:
        along: list[Any] = [fg.dot(small), fg.dot(dense(small))]
        by_token, plain = (score(params, x, fg.per_token(reducer)) for reducer in along)
        torch.testing.assert_close(by_token, plain, rtol=1e-10, atol=1e-10)
        assert_scores(by_token.sum(1), wanted)


@fewer(3)
@given(program=programs(empty=False), rank=st.integers(1, 2), seed=st.integers(0, 99))
def test_the_error_never_exceeds_the_bound(program: Program, rank: int, seed: int) -> None:
    """Beyond rounding; leaves that are not compressed are exact."""
    batch, direction = program.batch(), program.direction(seed)
    small = fg.compress(direction, rank=rank)
    wanted, size = expected(program.losses, program.params, batch, direction)
    scores, bound = fg.reduce(program.losses)(program.params, batch, fg.dot(small, with_bound=True))
    # Terms may cancel inside an op before they reach the gradient: the batch's largest term bounds those.
    rounding = 1e-10 * (size + size.max())
    assert bool(((scores - wanted).abs() <= bound + rounding).all()), (scores, wanted, bound)
    if not any(isinstance(leaf, fg.LowRank) for leaf in small.values()):
        assert not bool(bound.any())


@fewer(3)
@given(width=st.integers(4, 12), rank=st.integers(1, 3), seed=st.integers(0, 2**16))
def test_the_bound_holds_where_much_is_dropped(width: int, rank: int, seed: int) -> None:
    torch.manual_seed(seed)
    params = {name: torch.randn(width, width, dtype=torch.float64) / width for name in ("a", "b")}
    x, direction = torch.randn(4, 3, width, dtype=torch.float64), {k: torch.randn_like(v) for k, v in params.items()}

    def losses(p: Params, x: Tensor) -> Tensor:
        return (torch.tanh(x @ p["a"]) @ p["b"].T @ p["a"]).square().sum((1, 2))

    small = fg.compress(direction, rank=rank)
    wanted, size = expected(losses, params, x, direction)
    scores, bound = fg.grad_and_reduce(losses)(params, x, fg.dot(small, with_bound=True)).reduced
    assert bool(((scores - wanted).abs() <= bound + 1e-10 * size.max()).all())
    if 2 * rank < width:
        assert bool((bound > 0).all())
        assert float((scores - wanted).abs().max()) > 1e-6 * float(size.max())


@fewer(3)
@given(program=programs(empty=False), seed=st.integers(0, 99))
def test_pairs_are_directions(program: Program, seed: int) -> None:
    batch, other = program.batch(), program.batch(seed=seed + 1)
    pairs = fg.pairs(program.losses)(program.params, other)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(len(pairs), generator=generator, dtype=torch.float64)
    score = fg.reduce(program.losses)
    for own, dense_form in (
        (pairs, fg.combine(pairs, torch.ones(len(pairs), dtype=torch.float64))),
        (pairs.weighted(weights), fg.combine(pairs, weights)),
    ):
        wanted = expected(program.losses, program.params, batch, dense_form)
        for direction in (own, own.as_direction()):
            assert_scores(score(program.params, batch, fg.dot(direction)), wanted)
        assert dense(own.as_direction()).keys() == dense_form.keys()


def test_pairs_of_few_tokens_stay_in_factors() -> None:
    model, losses, params = small_gpt(width=32, vocabulary=32)
    model.double()
    pairs = fg.pairs(losses)(params, rows(2, 3))
    direction = pairs.as_direction()
    small = [name for name, leaf in direction.items() if isinstance(leaf, fg.LowRank)]
    assert len(small) == 8
    assert {direction[name].rank for name in small} == {6}
    assert all(float(direction[name].residual) == 0 for name in small)
    batch, weights = rows(), torch.randn(2, dtype=torch.float64)
    wanted = expected(losses, params, batch, fg.combine(pairs, weights))
    assert_scores(fg.reduce(losses)(params, batch, fg.dot(pairs.weighted(weights))), wanted)
    torch.testing.assert_close(
        fg.apply(fg.dot(pairs), pairs), fg.cross_dots(pairs, pairs).sum(1), rtol=1e-9, atol=1e-12
    )


def test_dense_leaves_that_require_grad_beside_low_rank_ones() -> None:
    _, losses, params = small_gpt(width=32)
    compressed = fg.compress({k: torch.randn_like(p).requires_grad_() for k, p in params.items()}, rank=2)
    dense = {k: v.dense() if isinstance(v, fg.LowRank) else v.detach() for k, v in compressed.items()}
    assert {type(leaf) for leaf in compressed.values()} == {fg.LowRank, Tensor}
    score, tokens = fg.reduce(losses), rows()
    found = score(params, tokens, fg.dot(compressed)).detach()
    torch.testing.assert_close(found, score(params, tokens, fg.dot(dense)), rtol=1e-4, atol=1e-4)
