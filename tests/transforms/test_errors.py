"""Errors of the conservation law leave no trace; numbers that are not finite."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcghost as fg
from tests.models.world import World, by_linear, differences, hidden_losses, hidden_params, normal, plan_params, score
from tests.naive import assert_scores, expected, gradient


def test_every_error_class_is_reached_and_is_a_ghost_error() -> None:
    # Each is raised above; here that they are told apart, and caught as what users expect.
    assert issubclass(fg.InputError, ValueError)
    for kind in (
        *(fg.UnsupportedOpError, fg.ConservationError, fg.PlanError, fg.CheckError),
        *(fg.MemoryBudgetError, fg.SampleAxisError),  # in tests of contractions and positions
        *(fg.StoreError, fg.ReplayError),  # in tests of stores and of unrolled trainings
        *(fg.VersionError, fg.RankError),  # on an older torch; in tests of distributed faults
    ):
        assert issubclass(kind, RuntimeError)
        assert issubclass(kind, fg.GhostError)
        assert not issubclass(kind, fg.InputError)
    named = {name for name in dir(fg) if name.endswith("Error")}
    kinds = {"UnsupportedOpError", "ConservationError", "PlanError", "CheckError"}
    kinds |= {"MemoryBudgetError", "SampleAxisError", "StoreError", "ReplayError", "VersionError", "RankError"}
    assert named == {"GhostError", "InputError"} | kinds


def break_linear() -> None:
    sets, arguments = [["weight", "bias"], ["input", "bias"]], ["input", "weight", "bias"]
    fg.register_rule(F.linear, linear=sets, arguments=arguments, factor=lambda a: torch.tensor(2.0))


@pytest.mark.parametrize("verify", ["first", "always"])
def test_conservation_error_leaves_no_trace(world: World, verify: Any) -> None:
    break_linear()
    before = world.state()
    with pytest.raises(fg.ConservationError, match=r"'0\.weight', .*'4\.weight'"):
        score(world, options=fg.Options(verify=verify))
    assert differences(before, world.state()) == []


def test_conservation_error_of_a_later_call_leaves_no_trace(world: World) -> None:
    step = fg.grad_and_reduce(world.losses, options=fg.Options(verify="always"))
    step(world.params, world.x, fg.dot(world.direction))
    before = world.state()
    break_linear()
    with pytest.raises(fg.ConservationError, match=r"'0\.weight', .*'4\.weight'"):
        step(world.params, world.x, fg.dot(world.direction))
    assert differences(before, world.state()) == []


def small_model() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 2)).double()


NAN_CASES: dict[str, tuple[nn.Module, Callable[[Any, Any], Tensor], Tensor]] = {
    "rows": (small_model(), lambda out, x: out.square().sum(1), normal(5, 3)),
    "tokens": (small_model(), lambda out, x: out.square().sum((1, 2)), normal(5, 4, 3)),
    "sequence first": (small_model(), lambda out, x: out.square().sum((0, 2)), normal(5, 5, 3)),
    "images": (
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU()).double(),
        lambda out, x: out.square().sum((1, 2, 3)),
        normal(5, 3, 4, 4),
    ),
    "lstm": (
        nn.LSTM(3, 2, batch_first=True).double(),
        lambda out, x: out[0].square().sum((1, 2)),
        normal(5, 4, 3),
    ),
}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("case", NAN_CASES)
def test_one_bad_sample_spoils_its_own_score_alone(case: str, bad: float, caplog: pytest.LogCaptureFixture) -> None:
    model, criterion, x = NAN_CASES[case]
    axis = 1 if case == "sequence first" else 0
    params = {name: value.detach() for name, value in model.named_parameters()}
    direction = {name: normal(*value.shape) for name, value in params.items()}
    losses = fg.module_losses(model, criterion)
    wanted = expected(losses, params, x, direction)
    sick = x.clone()
    sick.select(axis, 2).fill_(bad)
    step = fg.grad_and_reduce(losses)
    out = step(params, sick, fg.dot(direction))
    healthy = torch.tensor([0, 1, 3, 4])
    assert not bool(out.reduced[2].isfinite())
    assert_scores(out.reduced[healthy], (wanted[0][healthy], wanted[1][healthy]))
    assert not bool(out.losses[2].isfinite())
    assert "nothing can be checked on this batch. The plan will be checked on the next one" in caplog.text
    # The training gradient is what autograd says, NaN and all.
    grads, _ = gradient(losses, params, sick)
    assert all(torch.equal(out.grads[k].isnan(), grads[k].isnan()) for k in grads)
    # And the next batch is right.
    assert_scores(step(params, x, fg.dot(direction)).reduced, wanted)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_first_finite_batch_is_verified(bad: float) -> None:
    # A parameter that is hidden goes unnoticed while the data are not finite, and no longer.
    params, x = hidden_params(), normal(5, 3)
    sick = x.clone()
    sick[1] = bad
    step = fg.reduce(hidden_losses)
    for _ in range(2):
        step(params, sick, fg.dot(params))
    assert not fg.plan(hidden_losses, params, sick).verified
    with pytest.raises(fg.ConservationError, match=re.escape("['hidden']")):
        step(params, x, fg.dot(params))
    verified = fg.plan(lambda p, x: hidden_losses(p, x, torch.matmul), params, x)
    assert verified.verified


def test_whole_batch_of_nan_passes_through() -> None:
    params, x = plan_params(), torch.full((4, 3), float("nan"), dtype=torch.float64)
    out = fg.grad_and_reduce(by_linear)(params, x, fg.dot(params))
    assert bool(out.reduced.isnan().all())
    assert bool(out.losses.isnan().all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_direction_passes_through(bad: float) -> None:
    # Only the scores that it enters: a second direction in the same pass is untouched.
    params, x = plan_params(), normal(4, 3)
    spoilt = {"w": params["w"].clone(), "b": torch.full_like(params["b"], bad)}
    both = fg.reduce(by_linear)(params, x, fg.dot(fg.stack([spoilt, params])))
    assert not bool(both[:, 0].isfinite().any())
    assert_scores(both[:, 1], expected(by_linear, params, x, params))
