"""Meters: one wrong entry among many is seen, however the gradient lies in memory."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import funcghost as fg
from funcghost.ops.layout import Layout
from funcghost.ops.meter import PIECE, Clock, Meter, codes
from funcghost.planning.drawn import MANY

BATCH = 3


def measured(gradient: Tensor, scaled: Callable[[Tensor], Tensor]) -> Layout | str | None:
    """What a meter says of a gradient, and of what a code makes of it."""
    clock = Clock(BATCH)
    meter = Meter(clock)
    [code] = codes(BATCH, gradient)
    for _ in range(2):  # once more, where something is not finite
        clock.code = None
        meter.see(gradient)
        clock.code = code
        meter.see(scaled(code))
        clock.keep = clock.overflow
    return meter.layout


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_wrong_entry_of_many_is_seen(order: tuple[int, ...], dtype: torch.dtype) -> None:
    shape = (BATCH, 7, PIECE // 16)
    lying = [shape[axis] for axis in order]
    gradient = torch.randn(lying, dtype=dtype).permute([order.index(axis) for axis in range(3)])
    assert gradient.shape == shape

    def right(code: Tensor) -> Tensor:
        return gradient * code.view(-1, 1, 1)

    def wrong(code: Tensor) -> Tensor:
        found = right(code)
        found[1, 2, 3] = gradient[1, 2, 3] * code[0]
        return found

    gradient[1, 2, 3] = 2.0
    assert measured(gradient, right) == Layout(0)
    assert measured(gradient, wrong) is None


def test_errors_that_cancel_are_seen() -> None:
    # Samples that mix so that sums along an axis, or over an antisymmetric matrix, are right.
    gradient = torch.randn(BATCH, 4, 4, dtype=torch.float64)
    moved = torch.randn(4, 4, dtype=torch.float64)
    for error in (moved - moved.T, moved - moved.mean(0), moved - moved.mean(1, keepdim=True)):

        def wrong(code: Tensor, error: Tensor = error) -> Tensor:
            return gradient * code.view(-1, 1, 1) + error

        assert measured(gradient, wrong) is None


def test_what_is_expanded_is_as_if_it_were_not() -> None:
    rows = torch.randn(BATCH, 1, dtype=torch.float64)
    assert measured(rows.expand(BATCH, 5), lambda code: (rows * code.view(-1, 1)).expand(BATCH, 5)) == Layout(0)
    whole = torch.ones((), dtype=torch.float64).expand(BATCH, 5)
    assert measured(whole, lambda code: whole * code[0]) is None


def test_what_is_not_finite_says_nothing() -> None:
    gradient = torch.randn(BATCH, 4)
    gradient[0, 0], gradient[1, 1] = torch.inf, torch.nan
    assert measured(gradient, lambda code: gradient * code.view(-1, 1)) == Layout(0)


def test_what_overflows_in_one_of_two_passes_says_nothing() -> None:
    # On the way to a gradient that is small itself, a larger cotangent overflows: all of a sample may be NaN then.
    gradient = torch.randn(BATCH, 4)

    def overflown(code: Tensor) -> Tensor:
        return (gradient * code.view(-1, 1)).masked_fill(torch.tensor([[True], [False], [False]]), torch.nan)

    assert measured(gradient, overflown) == Layout(0)
    assert measured(gradient, lambda code: overflown(code).flip(1)) is None


@pytest.mark.parametrize("autocast", [False, True])
def test_ops_of_many_entries_draw_the_same_once_more(autocast: bool) -> None:
    width = 2 * MANY // BATCH
    x, params = torch.randn(BATCH, width), {"w": torch.randn(width)}

    def losses(params: dict[str, Tensor], x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            h = F.layer_norm(F.dropout(torch.tanh(x * params["w"]), 0.5), (width,))
        return h.exp().mean(1)

    plan = fg.plan(losses, params, x)
    assert [site.layouts for site in plan.sites] == [(Layout(0),)]
    assert plan.verified
