"""A user's model with everything that a step must not change, and what is held to autograd."""

import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import funcghost as fg
from tests.models.awkward import Hidden
from tests.naive import assert_scores, expected

Params = dict[str, Tensor]


Losses = Callable[[Params, Any], Any]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(losses: Losses, params: Params, batch: Any, **given: Any) -> None:
    """Following the remedy works: the scores are right."""
    direction = {name: normal(*value.shape, seed=9).to(value) for name, value in params.items()}
    found = fg.reduce(losses, **given)(params, batch, fg.dot(direction))
    assert_scores(found, expected(losses, params, batch, direction))


class Hook(nn.Module):
    """Calls the world back between two layers."""

    def __init__(self, between: Callable[[], None]) -> None:
        super().__init__()
        self.between = between

    def forward(self, h: Tensor) -> Tensor:
        self.between()
        return h


class World:
    """A model with everything that a call might change, and a count of how often its losses run."""

    def __init__(self) -> None:
        first, last = nn.Linear(3, 4), nn.Linear(4, 2)
        layers = (first, nn.BatchNorm1d(4), nn.Dropout(0.5), Hook(self.between), last, nn.BatchNorm1d(2))
        self.model = nn.Sequential(*layers).double()
        last.weight.grad = torch.ones_like(last.weight)
        self.params: Params = dict(self.model.named_parameters())
        self.direction = {name: normal(*value.shape) for name, value in self.params.items()}
        self.x = normal(5, 3)
        self.calls = 0
        self.fail_at = 0
        self.score = fg.reduce(self.losses)

    def between(self) -> None:
        if self.calls == self.fail_at:
            raise ZeroDivisionError("of the user")

    def losses(self, params: Params, x: Tensor) -> Tensor:
        """Draws from every random stream and updates buffers; raises between two layers at the call `fail_at`."""
        self.calls += 1
        noise = random.random() + np.random.rand()
        out: Tensor = functional_call(self.model, params, (x + noise,))
        return out.sin().sum(1)

    def state(self) -> dict[str, Any]:
        model = self.model
        return {
            "params": {k: v.detach().clone() for k, v in self.params.items()},
            "direction": {k: v.clone() for k, v in self.direction.items()},
            "batch": self.x.clone(),
            "requires_grad": {k: v.requires_grad for k, v in self.params.items()},
            "grad": {k: None if v.grad is None else v.grad.clone() for k, v in self.params.items()},
            "grad_fn": {k: v.grad_fn for k, v in self.params.items()},
            "buffers": {k: v.clone() for k, v in model.named_buffers()},
            "training": [m.training for m in model.modules()],
            "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
            "tensor hooks": {k: bool(v._backward_hooks) for k, v in self.params.items()},
            "attributes": {k: sorted(vars(v)) for k, v in self.params.items()},
            "torch": torch.get_rng_state(),
            "numpy": str(np.random.get_state()),
            "python": random.getstate(),
            "grad mode": torch.is_grad_enabled(),
        }


def made_world() -> World:
    random.seed(0)
    np.random.seed(0)
    return World()


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [key for key in before if not _equal(before[key], after[key])]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return bool(a == b)


def score(world: World, params: Any = None, direction: Any = None, reducers: Any = None, **given: Any) -> Any:
    params = world.params if params is None else params
    reducers = fg.dot(world.direction if direction is None else direction) if reducers is None else reducers
    return (fg.reduce(world.losses, **given) if given else world.score)(params, world.x, reducers)


def says(message: str) -> str:
    """A pattern in which only `.*` and `(a|b)` are special."""
    parts = re.split(r"(\.\*|\(layout\|dense\))", message)
    return "(?s)" + "".join(part if i % 2 else re.escape(part) for i, part in enumerate(parts))


def seed_everything() -> None:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)


def hidden_params() -> Params:
    return {"first": normal(3, 4), "hidden": normal(4, 4), "bias": normal(4), "last": normal(4, 2)}


def hidden_losses(params: Params, x: Tensor, multiply: Any = Hidden.apply) -> Tensor:
    h = multiply((x @ params["first"]).sin(), params["hidden"]) + params["bias"]
    return (h.sin() @ params["last"]).sum(1)


def by_linear(params: Params, x: Tensor) -> Tensor:
    return F.linear(x, params["w"], params["b"]).sin().sum(1)


def plan_params() -> Params:
    return {"w": normal(2, 3), "b": normal(2)}
