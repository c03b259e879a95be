"""Models with compiled parts are seen through."""

import copy
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcghost as fg
from tests.depth import thinned
from tests.models.small import like
from tests.models.wrapped import Mlp, Net, Params, assert_exact, made, normal, squares
from tests.naive import assert_scores, assert_trees_close, expected, gradient
from tests.versions import compiles

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),  # transformers, of itself
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # Dynamo
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:quantized..linear_dynamic. an autograd kernel was not registered:UserWarning"),
]
BACKENDS = thinned(
    ["eager", "aot_eager", "inductor"], ["eager", "aot_eager"]
)  # seen through alike; the last takes half a minute


class Disguised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w.T) @ torch.cat([self.w[1:], self.b[None]]).t()


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) * torch.softmax(x, -1)


class Counting:
    """A backend that counts the graphs it compiled and the calls of them."""

    def __init__(self) -> None:
        self.compiled = self.called = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.compiled += 1

        def call(*args: Any) -> Any:
            self.called += 1
            return graph.forward(*args)

        return call


def wrapped_block(net: Net, backend: Any) -> None:
    net.block = torch.compile(net.block, backend=backend)  # type: ignore[assignment]


def own_compile(net: Net, backend: Any) -> None:
    net.block.compile(backend=backend)


def fullgraph(net: Net, backend: Any) -> None:
    net.block.compile(backend=backend, fullgraph=True)


def dynamic(net: Net, backend: Any) -> None:
    net.block.compile(backend=backend, dynamic=True)


def whole_model(net: Net, backend: Any) -> None:
    net.compile(backend=backend)


WAYS = [*product([wrapped_block, own_compile, fullgraph, dynamic, whole_model], [Mlp, Disguised, Gate], [False, True])]
EACH = [case for case in WAYS if case[0] is wrapped_block or case[1:] == (Disguised, True)]


@pytest.mark.parametrize(("wrap", "block", "warm"), thinned(WAYS, EACH))
def test_compiled_parts_are_seen_through_and_stay_compiled(
    wrap: Callable[[Net, Any], None], block: Callable[[], nn.Module], warm: bool
) -> None:
    torch._dynamo.reset()
    net = Net(block()).double()
    plain, backend = fg.module_losses(copy.deepcopy(net), squares), Counting()
    wrap(net, backend)
    if warm:
        net(normal(4, 6))
    losses, params = fg.module_losses(net, squares), dict(net.named_parameters())
    own = {name: name.replace("_orig_mod.", "") for name in params}
    step, score = fg.grad_and_reduce(losses), fg.reduce(losses)
    already = backend.compiled
    for size in (4, 7):
        x, direction = normal(size, 6), like(params)
        named = {own[k]: p for k, p in params.items()}
        wanted = expected(plain, named, x, {own[k]: v for k, v in direction.items()})
        out = step(params, x, fg.dot(direction))
        assert_scores(out.reduced, wanted)
        assert_scores(score(params, x, fg.dot(direction)), wanted)
        assert_trees_close({own[k]: g for k, g in out.grads.items()}, gradient(plain, named, x)[0])
    assert backend.compiled == already
    before = backend.called
    net(normal(4, 6))
    assert backend.called > before


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_losses_and_functions_are_seen_through(backend: str) -> None:
    torch._dynamo.reset()
    _, losses, params = made(Net(Mlp()))
    x = normal(5, 6)
    compiled = torch.compile(losses, backend=backend)
    compiled(params, x)
    assert_exact(compiled, params, x, truth=losses)
    act = torch.compile(lambda h: F.gelu(h) * torch.sigmoid(h), backend=backend, fullgraph=True)
    act(x)

    def activated(p: Params, x: Tensor) -> Tensor:
        return squares(act(x @ p["last.weight"].T) * p["last.bias"])

    last = {k: p for k, p in params.items() if "last" in k}
    assert_exact(activated, last, x, truth=lambda p, x: squares(plain_act(x @ p["last.weight"].T) * p["last.bias"]))


def plain_act(h: Tensor) -> Tensor:
    return F.gelu(h) * torch.sigmoid(h)


@compiles
def test_compiled_step_of_a_model_with_compiled_parts() -> None:
    torch._dynamo.reset()
    net = Net(Disguised()).double()
    plain = fg.module_losses(copy.deepcopy(net), squares)
    backend = Counting()
    own_compile(net, backend)
    losses, params, x = fg.module_losses(net, squares), dict(net.named_parameters()), normal(5, 6)
    direction = like(params)
    step = torch.compile(fg.grad_and_reduce(losses, plan=fg.plan(losses, params, x)), fullgraph=True, backend="eager")
    assert_scores(step(params, x, fg.dot(direction)).reduced, expected(plain, params, x, direction))
    assert backend.compiled == 0  # it is part of the one graph
