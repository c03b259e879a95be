"""Autocast and gradient scaling: scores are those of what autocast runs."""

from typing import Any

import pytest
import torch
from torch import Tensor

import funcghost as fg
from tests.models.small import like, rows, small_gpt
from tests.models.wrapped import Losses, Params
from tests.naive import assert_close, assert_scores, assert_trees_close, expected, gradient

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),  # transformers, of itself
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # Dynamo
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:quantized..linear_dynamic. an autograd kernel was not registered:UserWarning"),
]


def mixed_gpt(dtype: torch.dtype) -> tuple[Losses, Losses, Params]:
    """The losses under autocast, and without."""
    _, losses, params = small_gpt(width=32)

    def cast(p: Params, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype):
            return losses(p, batch).float()

    return cast, losses, params


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_scores_are_those_of_autocast(dtype: torch.dtype) -> None:
    cast, losses, params = mixed_gpt(dtype)
    batch, direction = rows(8), like(params)
    wanted, exact = expected(cast, params, batch, direction), expected(losses, params, batch, direction)
    out = fg.grad_and_reduce(cast)(params, batch, fg.dot(direction))
    assert out.reduced.dtype == torch.float32
    # Activations and output gradients are the same numbers on both sides. What is rounded to half precision on top of
    # them is V and J V with us, the gradient of each weight with autograd: half an eps each, and half in reserve.
    assert_scores(out.reduced, wanted, 2 * torch.finfo(dtype).eps)
    assert float((wanted[0] - exact[0]).norm()) > float((out.reduced - wanted[0]).norm()) > 0
    assert_trees_close(out.grads, gradient(cast, params, batch)[0], 1e-6)


def test_grad_scaler_recipe() -> None:
    cast, _, params = mixed_gpt(torch.float16)
    batch, direction = rows(8), like(params)
    theirs = {k: p.detach().clone().requires_grad_() for k, p in params.items()}
    plain, plain_scaler = torch.optim.SGD(theirs.values(), lr=0.1), torch.amp.GradScaler("cpu", growth_interval=2)
    ours, scaler = torch.optim.SGD(params.values(), lr=0.1), torch.amp.GradScaler("cpu", growth_interval=2)
    step = fg.grad_and_reduce(lambda p, b: scaler.scale(cast(p, b)))
    unscaled = fg.reduce(cast)
    for _ in range(5):
        plain_scaler.scale(cast(theirs, batch).mean()).backward()
        before = {k: p.detach().clone() for k, p in params.items()}
        out, scale = step(params, batch, fg.dot(direction)), scaler.get_scale()
        for name, param in params.items():
            param.grad = out.grads[name]
        scaler.step(ours)
        scaler.update()
        # The scale is a power of two: it leaves the scores alone to the bit, but for what it saves from underflow.
        assert_close(out.reduced / scale, unscaled(before, batch, fg.dot(direction)), 1e-2)
        plain_scaler.step(plain)
        plain_scaler.update()
        plain.zero_grad()
        assert scaler.get_scale() == plain_scaler.get_scale()
        assert_trees_close({k: p.detach() for k, p in params.items()}, {k: p.detach() for k, p in theirs.items()}, 1e-6)
    assert scaler.get_scale() > 2.0**16


def test_grad_scaler_backs_off_when_the_scaled_losses_overflow() -> None:
    cast, _, params = mixed_gpt(torch.float16)
    batch, direction = rows(8), like(params)
    optimizer, scaler = torch.optim.SGD(params.values(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0**40)
    step = fg.grad_and_reduce(lambda p, b: scaler.scale(cast(p, b)))
    before = {k: p.detach().clone() for k, p in params.items()}
    for skipped in [True] * 3:
        out, scale = step(params, batch, fg.dot(direction)), scaler.get_scale()
        for name, param in params.items():
            param.grad = out.grads[name]
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == scale / 2
        assert bool(out.reduced.isfinite().all()) != skipped
    assert all(torch.equal(before[k], p) for k, p in params.items())


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)])
def test_gradients_in_another_dtype_than_their_parameters(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    own, given = dtypes
    params = {"w": torch.randn(4, 3, dtype=own).requires_grad_(), "b": torch.randn(3, dtype=own).requires_grad_()}
    batch, direction = torch.randn(5, 4, dtype=own), {name: torch.randn_like(p) for name, p in params.items()}
    losses = lambda p, x: (x @ p["w"] + p["b"]).tanh().square().sum(1)  # noqa: E731
    asked = {"norm": fg.squared_norm(), "dot": fg.dot(direction), "gram": fg.gram()}
    wanted = fg.grad_and_reduce(losses)(params, batch, asked)
    for param in params.values():
        param.grad_dtype = given
    found = fg.grad_and_reduce(losses)(params, batch, asked)
    assert_trees_close(found.reduced, wanted.reduced, 0)
    assert {gradient.dtype for gradient in found.grads.values()} == {given}
