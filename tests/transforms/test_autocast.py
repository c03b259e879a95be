"""Autocast of the caller: the losses run in it, nothing else does."""

from typing import Any

import pytest
import torch
from torch import Tensor

import funcghost as fg
from funcghost.trees import Tree
from tests.models.small import Product


def case() -> tuple[Any, dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = {
        "w": torch.randn(6, 8, generator=generator),
        "k": torch.randn(5, 4, 3, generator=generator),
        "g": torch.randn(6, generator=generator),
        "o": torch.randn(3, 7, generator=generator),
        "table": torch.randn(9, 6, generator=generator),
    }

    def losses(p: Tree, x: Tensor) -> Tensor:
        h = torch.nn.functional.linear(x, p["w"].tanh())  # a parameter in disguise
        h = torch.nn.functional.layer_norm(h, (6,), p["g"]) + p["table"][torch.arange(4)]
        h = torch.nn.functional.conv1d(h, p["k"], padding=1).tanh()  # [b, 5, 6]
        h = torch.einsum("bij,kjl->bikl", h, p["o"].view(1, 3, 7)[..., :6].mT[:, :, :2])
        return h.float().square().sum((1, 2, 3))

    return losses, params, torch.randn(5, 4, 8, generator=generator)


def everything(direction: Tree) -> dict[str, Any]:
    return {
        "dot": fg.dot(direction),
        "norm": fg.squared_norm(),
        "gram": fg.gram(),
        "cross": fg.cross(2),
        "project": fg.project(8),
        "kronecker": fg.project(8, kind="kronecker"),
        "low": fg.dot(fg.compress(direction, rank=1)),
    }


@pytest.mark.parametrize("route", ["ghost", "materialise", "cheapest"])
def test_a_step_in_autocast_contracts_as_outside(route: Any) -> None:
    """The losses of both are in bfloat16, and the rest is the same to the bit."""
    losses, params, x = case()
    options = fg.Options(inner_products=route)
    reducers = everything({k: torch.ones_like(v) for k, v in params.items()})

    def within(p: Tree, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return losses(p, x)

    wanted = fg.grad_and_reduce(within, options=options)(params, x, reducers)
    with torch.autocast("cpu", torch.bfloat16):
        found = fg.grad_and_reduce(losses, options=options)(params, x, reducers)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_what_is_made_of_pairs_in_autocast_is_what_is_made_outside() -> None:
    losses, params, x = case()
    reducers = everything({k: torch.ones_like(v) for k, v in params.items()})
    kept = fg.pairs(losses)(params, x)

    def made() -> tuple[Any, ...]:
        return (
            fg.apply(reducers, kept),
            fg.cross_dots(kept, kept),
            fg.cosine(kept, kept[:2]),
            fg.combine(kept, torch.linspace(-1, 1, 5)),
            fg.materialize(kept),
            fg.apply(fg.dot(kept), kept),
        )

    wanted = made()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(made(), wanted, rtol=0, atol=0)


def test_losses_that_leave_the_callers_autocast_are_in_float32_all_along() -> None:
    losses, params, x = case()
    reducers = everything({k: torch.ones_like(v) for k, v in params.items()})

    def plain(p: Tree, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return losses(p, x)

    wanted = fg.grad_and_reduce(losses)(params, x, reducers)
    with torch.autocast("cpu", torch.bfloat16):
        found = fg.grad_and_reduce(plain)(params, x, reducers)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("carried", [False, True])
def test_the_backward_of_what_is_not_seen_is_taken_outside(carried: bool) -> None:
    """As autograd takes it: what the op itself does in the forward is the user's."""
    generator = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(8, 6, generator=generator), "v": torch.randn(6, 5, generator=generator)}
    x = torch.randn(5, 4, 8, generator=generator)

    def losses(p: Tree, x: Tensor) -> Tensor:
        h: Any = Product.apply(x, p["w"].sin() if carried else p["w"])
        mean = h.mean(0, keepdim=True) if carried else 0.0  # samples mix: the tangent is carried
        with torch.autocast("cpu", enabled=False):
            return ((h - mean).float() @ p["v"]).square().sum((1, 2))

    def within(p: Tree, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return losses(p, x)

    direction = {k: torch.ones_like(v) for k, v in params.items()}
    for reducer in (fg.dot(direction), fg.squared_norm()):
        wanted = fg.reduce(within)(params, x, reducer)
        with torch.autocast("cpu", torch.bfloat16):
            found = fg.reduce(losses)(params, x, reducer)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    own = {k: v.clone().requires_grad_() for k, v in params.items()}
    with torch.autocast("cpu", torch.bfloat16):
        values = losses(own, x)
    truth = []
    for value in values.unbind():
        grads = torch.autograd.grad(value, list(own.values()), retain_graph=True)
        truth.append(sum(float(g.double().sum()) for g in grads))
    found = fg.reduce(within)(params, x, fg.dot(direction)).double()
    off = (found - torch.tensor(truth, dtype=torch.float64)).abs().max()
    assert float(off) < torch.finfo(torch.bfloat16).eps * max(map(abs, truth))  # h and `J V` are in bfloat16
