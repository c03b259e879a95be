"""A step changes what the losses alone change: random numbers, buffers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcghost as fg
from tests.models.world import Params, World, differences, normal, seed_everything
from tests.naive import assert_scores, expected


def test_a_step_changes_what_the_losses_alone_change() -> None:
    # The yardstick of the above: planning, scoring and repeated calls consume and update as the plain losses do.
    world, alone = World(), World()
    alone.model.load_state_dict(world.model.state_dict())
    step = fg.grad_and_reduce(world.losses)
    seed_everything()
    for _ in range(3):
        step(world.params, world.x, fg.dot(world.direction))
    found = world.state()
    seed_everything()
    for _ in range(3):
        alone.losses(alone.params, alone.x)
    assert differences(alone.state(), found) == []


@pytest.mark.parametrize("scoring_only", [False, True])
def test_a_generator_of_the_users_own_is_used_as_the_losses_alone_use_it(scoring_only: bool) -> None:
    # Noise for a diffusion model, a mask of one's own: planning must not draw from it, nor see other numbers each time.
    generator, params, x = torch.Generator(), {"w": normal(3, 4)}, normal(5, 3)

    def losses(params: Params, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        return ((x + noise) @ params["w"]).sin().sum(1)

    transform: Any = fg.reduce if scoring_only else fg.grad_and_reduce
    step = transform(losses)
    for seed in range(2):
        generator.manual_seed(seed)
        out = step(params, x, fg.dot(params))
        after = generator.get_state()
        generator.manual_seed(seed)
        losses(params, x)
        assert torch.equal(generator.get_state(), after)
        generator.manual_seed(seed)
        wanted = expected(losses, params, x, params)
        assert_scores(out if scoring_only else out.reduced, wanted)


class Counting(nn.Module):
    """Buffers written in place and replaced: a count, and a moving average of what passes by."""

    count: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))

    def forward(self, h: Tensor) -> Tensor:
        self.count += 1
        with torch.no_grad():
            self.mean.mul_(0.9).add_(h.mean((0, 2)), alpha=0.1)
        return h - self.mean[:, None]


STATEFUL: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm1d(4).double(),
    "batch norm without scale": lambda: nn.BatchNorm1d(4, affine=False).double(),
    "batch norm, cumulative": lambda: nn.BatchNorm1d(4, momentum=None).double(),
    "instance norm": lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True).double(),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv1d(4, 4, 1).double()),
    "own": Counting,
}


@pytest.mark.parametrize("scoring_only", [False, True])
@pytest.mark.parametrize("stateful", STATEFUL)
def test_buffers_are_updated_as_the_losses_alone_update_them(stateful: str, scoring_only: bool) -> None:
    states: list[dict[str, Tensor]] = []
    for together in (True, False):
        torch.manual_seed(4)
        model = nn.Sequential(nn.Conv1d(3, 4, 1).double(), STATEFUL[stateful](), nn.Conv1d(4, 2, 1).double())
        params: Params = dict(model.named_parameters())
        losses = fg.module_losses(model, lambda output, x: output.sin().sum((1, 2)))
        transform: Any = fg.reduce if scoring_only else fg.grad_and_reduce
        step = transform(losses)
        for seed in range(3):
            x = normal(5, 3, 6, seed=seed)
            # Twice the directions must not be twice the updates.
            step(params, x, [fg.dot(params), fg.dot(params)]) if together else losses(params, x)
        states.append(dict(model.named_buffers()))
    assert states[0].keys() == states[1].keys()
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []


def test_a_step_that_plans_anew_changes_what_the_losses_alone_change() -> None:
    # The plan turns out not to fit only after batch norm has run: its buffers must not be updated twice.
    found: list[Any] = []
    wanted: list[Any] = []
    for together, states in ((True, found), (False, wanted)):
        world = World()
        flags = {"cube": False}

        def losses(params: Params, x: Tensor, world: World = world, flags: dict[str, bool] = flags) -> Tensor:
            values = world.losses(params, x)
            return values**3 if flags["cube"] else values

        torch.manual_seed(1)
        world.model.load_state_dict({k: normal(*v.shape).abs() for k, v in world.model.state_dict().items()})
        step = fg.grad_and_reduce(losses)
        seed_everything()
        for cube in (False, True):
            flags["cube"] = cube
            if together:
                step(world.params, world.x, fg.dot(world.direction))
            else:
                losses(world.params, world.x)
        states.append(world.state())
    assert differences(wanted[0], found[0]) == []
