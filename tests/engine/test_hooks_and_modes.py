"""Hooks and modes of the user."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import funcghost as fg
from tests.models.small import like
from tests.models.wrapped import Mlp, Net, Params, assert_exact, made, normal, squares

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),  # transformers, of itself
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # Dynamo
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:quantized..linear_dynamic. an autograd kernel was not registered:UserWarning"),
]


class Hooked:
    """A model with every kind of hook, which counts how often each of them is called, and changes what it is given."""

    def __init__(self, change: bool) -> None:
        self.model = Net(Mlp()).double()
        self.counts = dict.fromkeys(("pre", "forward", "backward pre", "backward", "tensor"), 0)
        block: Any = self.model.block
        up, down = block.up, block.down

        def hook(name: str, value: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                self.counts[name] += 1
                return value(*args) if change else None

            return call

        up.register_forward_pre_hook(hook("pre", lambda module, args: (args[0] + 1,)))
        up.register_forward_hook(hook("forward", lambda module, args, out: out * 1.5))
        down.register_full_backward_pre_hook(hook("backward pre", lambda module, g: (g[0] * 2,)))
        down.register_full_backward_hook(hook("backward", lambda module, g, _: (g[0] * 3,)))

        def losses(p: Params, x: Tensor) -> Tensor:
            out = functional_call(self.model, p, (x,))
            out.register_hook(hook("tensor", lambda g: g * 5))
            return squares(out)

        self.losses = losses


@pytest.mark.parametrize("change", [False, True])
def test_hooks_are_called_as_often_as_in_a_plain_step(change: bool) -> None:
    hooked, x = Hooked(change), normal(5, 6)
    params: Params = dict(hooked.model.named_parameters())
    assert_exact(hooked.losses, params, x)
    step, score = fg.grad_and_reduce(hooked.losses), fg.reduce(hooked.losses)
    for transform in (step, score):
        transform(params, x, fg.dot(like(params)))  # which plans
        for _ in range(2):
            hooked.counts = dict.fromkeys(hooked.counts, 0)
            transform(params, x, fg.dot(like(params)))
            assert hooked.counts == dict.fromkeys(hooked.counts, 1)


def test_hook_that_is_not_linear_is_refused() -> None:
    def losses(p: Params, x: Tensor) -> Tensor:
        out = x @ p["w"]
        out.register_hook(lambda g: g.clamp(-0.5, 0.5))
        return squares(out)

    params = {"w": normal(6, 3)}
    with pytest.raises(fg.GhostError):
        fg.reduce(losses)(params, normal(5, 6), fg.dot(like(params)))


def test_hook_on_the_gradient_of_a_parameter_is_refused() -> None:
    def losses(p: Params, x: Tensor) -> Tensor:
        p["w"].register_hook(lambda g: g * 2)
        return squares(x @ p["w"])

    params = {"w": normal(6, 3)}
    with pytest.raises(fg.ConservationError, match="'w'"):
        fg.reduce(losses)(params, normal(5, 6), fg.dot(like(params)))


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += op is F.linear
        return op(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += op is torch.ops.aten.addmm.default
        return op(*args, **(kwargs or {}))


class Doubled(TorchFunctionMode):
    def __torch_function__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        return out * 2 if op is F.linear else out


@pytest.mark.parametrize("mode", [Functions, Dispatched])
def test_watching_mode_of_the_user(mode: type[Functions] | type[Dispatched]) -> None:
    _, losses, params = made(Net(Mlp()))
    x, seen = normal(5, 6), []

    def watched(p: Params, x: Tensor) -> Tensor:
        with mode() as inside:
            out = losses(p, x)
        seen.append(inside.count)
        return out

    assert_exact(watched, params, x, truth=losses)
    assert seen[-1] == 4  # once planned
    with mode() as outside:
        assert_exact(losses, params, x)
    assert outside.count


def test_changing_mode_of_the_user() -> None:
    _, losses, params = made(Net(Mlp()))
    x = normal(5, 6)

    def doubled(p: Params, x: Tensor) -> Tensor:
        with Doubled():
            return losses(p, x)

    assert_exact(doubled, params, x)
    with pytest.raises(fg.ConservationError), Doubled():  # J V of a rule would be doubled as well
        fg.reduce(losses)(params, x, fg.dot(like(params)))
