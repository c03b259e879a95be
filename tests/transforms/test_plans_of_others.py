"""Plans that do not fit, with and without a compiler; losses that change from call to call."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

import funcghost as fg
from tests.models.world import Params, by_linear, exact, normal, plan_params, says
from tests.naive import assert_scores, expected
from tests.versions import compiles, unwrapped


def by_matmul(params: Params, x: Tensor) -> Tensor:
    return (x @ params["w"].T + params["b"]).sin().sum(1)


def test_plan_of_another_model_is_replaced_in_eager_mode() -> None:
    params, x = plan_params(), normal(4, 3)
    exact(by_linear, params, x, plan=fg.plan(by_matmul, params, x))


@pytest.mark.parametrize("scoring_only", [False, True])
@pytest.mark.parametrize("planned", [False, True])
@compiles
def test_compile_of_a_batch_that_is_made_in_the_graph(planned: bool, scoring_only: bool) -> None:
    """Its values are not known while it is traced: so it takes a plan, and one for these very losses and sizes."""
    torch._dynamo.reset()
    params, x = plan_params(), normal(4, 3)
    transform: Any = fg.reduce if scoring_only else fg.grad_and_reduce
    step = transform(by_linear, plan=fg.plan(by_matmul, params, x) if planned else None)
    compiled = torch.compile(lambda x: step(params, 2 * x, fg.dot(params)), fullgraph=True, backend="aot_eager")
    says_why = "found torch.nn.functional.linear.*the plan has torch.Tensor.T" if planned else "plan = fg.plan(...)"
    with pytest.raises(fg.PlanError, match=says(says_why)), unwrapped():
        compiled(x)
    step(params, 2 * x, fg.dot(params))  # as the message says
    out = compiled(x)
    assert_scores(out if scoring_only else out.reduced, expected(by_linear, params, 2 * x, params))


@pytest.mark.parametrize("planned", [False, True])
def test_tracing_by_make_fx_without_the_right_plan(planned: bool) -> None:
    params, x = plan_params(), normal(4, 3)
    plan = fg.plan(by_matmul, params, x) if planned else None

    def scores(params: Params, x: Tensor) -> Tensor:
        return fg.reduce(by_linear, plan=plan)(params, x, fg.dot(params))

    with pytest.raises(fg.PlanError, match=says("linear.*the plan has torch.Tensor.T") if planned else r"fg\.plan"):
        make_fx(scores)(params, x)


def test_meta_device_needs_a_plan_that_fits() -> None:
    params, x = plan_params(), normal(4, 3)
    ghosts = {name: value.to("meta") for name, value in params.items()}
    with pytest.raises(fg.PlanError, match=says("meta device have no values to measure. Plan on a real device")):
        fg.reduce(by_linear)(ghosts, x.to("meta"), fg.dot(ghosts))
    with pytest.raises(fg.PlanError, match="meta device"):
        fg.plan(by_linear, ghosts, x.to("meta"))
    # Who passed a plan must hear why it was not taken.
    with pytest.raises(fg.PlanError, match="linear") as caught:
        fg.reduce(by_linear, plan=fg.plan(by_matmul, params, x))(ghosts, x.to("meta"), fg.dot(ghosts))
    assert "pass the plan" not in str(caught.value).split("linear")[0]
    score_there = fg.reduce(by_linear, plan=fg.plan(by_linear, params, x))
    assert score_there(ghosts, x.to("meta"), fg.dot(ghosts)).shape == (4,)


def test_losses_that_never_repeat_themselves_are_refused() -> None:
    calls: list[int] = []

    def losses(params: Params, x: Tensor) -> Tensor:
        calls.append(1)
        h = x @ params["w"].T
        return (h.sin() if len(calls) % 2 else h.cos()).sum(1)

    params = {"w": normal(2, 3)}
    with pytest.raises(fg.PlanError, match="do something else each time they run"):
        fg.reduce(losses)(params, normal(4, 3), fg.dot(params))


def test_output_that_was_not_used_when_planned_is_planned_anew() -> None:
    # The ops are the same, only another output of the LSTM is read: the plan has no layout for it.
    model = nn.LSTM(3, 2, batch_first=True).double()
    params: Params = dict(model.named_parameters())
    x, which = normal(4, 3, 3), [0]

    def losses(params: Params, x: Tensor) -> Tensor:
        _, states = functional_call(model, params, (x,))
        return states[which[0]].sum((0, 2))

    direction = {name: normal(*value.shape) for name, value in params.items()}
    score_both = fg.reduce(losses)
    for which[0] in (0, 1, 0):
        found = score_both(params, x, fg.dot(direction))
        assert_scores(found, expected(losses, params, x, direction))
