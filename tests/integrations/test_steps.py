import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcghost as fg
from funcghost.attribution import in_run
from funcghost.integrations.steps import Steps
from funcghost.training import updates

OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1),
}


class World:
    """A network, batches of different sizes that make a step, and a validation set."""

    def __init__(self, kind: str) -> None:
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        self.params = fg.trainable(self.model)
        self.optimizer = OPTIMIZERS[kind](self.model.parameters())
        self.batches = [{"x": torch.randn(n, 3).double(), "y": torch.randint(2, (n,))} for n in (4, 3, 1)]
        self.validation = {"x": torch.randn(9, 3).double(), "y": torch.randint(2, (9,))}

    def losses(self, params: Any, batch: Any) -> Tensor:
        logits = torch.func.functional_call(self.model, params, (batch["x"],))
        return F.cross_entropy(logits, batch["y"], reduction="none") / 8

    def validate(self) -> tuple[Tensor, dict[str, Tensor]]:
        loss = 8 * self.losses(self.params, self.validation).mean()
        found = torch.autograd.grad(loss, list(self.params.values()))
        return loss.detach(), dict(zip(self.params, found, strict=True))

    def steps(self, **arguments: Any) -> Steps:
        return Steps(self.losses, self.params, self.validate, **arguments)

    def step(self, steps: Steps, max_norm: float | None = None) -> Any:
        place = 0
        for batch in self.batches:
            steps.take(batch, torch.arange(place, place := place + len(batch["x"])))
        steps.settle(self.optimizer, max_norm)
        if max_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return steps.settled()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("max_norm", [None, 0.05])
@pytest.mark.parametrize("memory", [None, 0, 2000])
def test_values_are_those_of_along_path_and_the_step_is_the_optimizers(
    kind: str, max_norm: float | None, memory: int | None
) -> None:
    world = World(kind)
    plain = copy.deepcopy(world)
    update, state = updates.of(world.optimizer, world.params)
    made: Any = update if max_norm is None else updates.clipped(update, max_norm)

    def losses(params: Any, batch: Any) -> Tensor:
        return 8 * world.losses(params, batch)

    account = in_run.along_path(world.losses, made, reduction="sum", validation_losses=losses, rule="simpson")
    params: Any = {name: value.detach().clone() for name, value in world.params.items()}
    steps, before = world.steps(rule="simpson", pairs_memory=memory), None
    for _ in range(3):
        loss = world.validate()[0]
        found = world.step(steps, max_norm)
        wanted = account(
            params, in_run.Microbatches(world.batches), state=state, validation=[world.validation], before=before
        )
        params, state, before = wanted.params, wanted.state, wanted.after
        torch.testing.assert_close(found.values, wanted.values)
        torch.testing.assert_close(found.rest, wanted.rest)
        torch.testing.assert_close(found.change, world.validate()[0] - loss)
        assert abs(float(found.values.sum() + found.rest - found.change)) < 1e-4 * float(found.values.abs().sum())
        assert found.ids.tolist() == list(range(8))
        for batch in plain.batches:
            plain.losses(plain.params, batch).sum().backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(plain.model.parameters(), max_norm)
        plain.optimizer.step()
        plain.optimizer.zero_grad()
        for one, other in zip(world.params.values(), plain.params.values(), strict=True):
            torch.testing.assert_close(one, other)


def test_scores_are_along_a_validation_gradient_that_is_renewed() -> None:
    world = World("sgd")
    steps = world.steps(kind="score", renew=2)
    for number in range(3):
        if number != 1:
            direction = world.validate()[1]
        wanted = [fg.reduce(world.losses)(world.params, batch, fg.dot(direction)) for batch in world.batches]
        found = world.step(steps)
        torch.testing.assert_close(found.values, torch.cat(wanted))
        assert found.rest is None


def test_what_no_loss_reaches_is_passed_over_as_by_the_optimizer() -> None:
    world, unused = World("adamw"), nn.Parameter(torch.ones(2, dtype=torch.float64))
    params = {**world.params, "unused": unused}
    world.optimizer.add_param_group({"params": [unused]})

    def losses(_: Any, batch: Any) -> Tensor:
        return world.losses(world.params, batch)

    def validate() -> tuple[Tensor, dict[str, Tensor]]:
        loss, found = world.validate()
        return loss, {**found, "unused": torch.ones(2, dtype=torch.float64)}

    found = world.step(Steps(losses, params, validate))
    assert unused.tolist() == [1.0, 1.0]
    assert abs(float(found.values.sum() + found.rest - found.change)) < 1e-2 * float(found.values.abs().sum())


def test_parameters_that_are_changed_between_steps_are_seen() -> None:
    world = World("sgd")
    steps = world.steps(rule="simpson")
    world.step(steps)
    with torch.no_grad():
        world.params["0.weight"].mul_(1.5)
    loss = world.validate()[0]
    torch.testing.assert_close(world.step(steps).change, world.validate()[0] - loss)


def test_a_step_that_is_another_one_is_refused() -> None:
    world = World("sgd")
    steps = world.steps()
    steps.take(world.batches[0], torch.arange(4))
    steps.settle(world.optimizer)
    for weight in world.params.values():
        assert weight.grad is not None
        weight.grad.mul_(0.9)
    world.optimizer.step()
    with pytest.raises(fg.GhostError, match="is not the one that the values are about"):
        steps.settled()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"kind": "both"}, "kind"), ({"rule": "euler"}, "rule"), ({"renew": 0}, "renew"), ({"pairs_memory": -1}, "pairs")],
)
def test_wrong_arguments_are_told(arguments: Any, message: str) -> None:
    with pytest.raises(fg.InputError, match=message):
        World("sgd").steps(**arguments)


def test_what_is_missing_is_told() -> None:
    world = World("sgd")
    steps = world.steps()
    with pytest.raises(fg.InputError, match="no batch"):
        steps.settle(world.optimizer)
    with pytest.raises(fg.InputError, match="there is no step"):
        steps.settled()


def test_samples_that_are_seen_twice_are_seen_with_the_same_random_numbers() -> None:
    found = []
    for memory in (None, 0):
        torch.manual_seed(5)
        world = World("sgd")
        world.model.insert(2, nn.Dropout(0.5))
        world.params = fg.trainable(world.model)
        found.append((world.step(world.steps(pairs_memory=memory)), torch.rand(())))
    torch.testing.assert_close(found[0][0].values, found[1][0].values)
    assert found[0][1] == found[1][1]
