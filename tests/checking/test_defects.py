"""Defects are found, and nothing else is named."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import funcghost as fg
from funcghost.checking import compare
from funcghost.ops.layout import Layout
from funcghost.options import Options
from funcghost.transforms.steps import grad_and_reduce
from tests.models.checked import Params, all_but_the_first, named, net, normal


def wrong(report: fg.Report) -> set[str]:
    return {row["name"] for row in report.rows if not row["ok"] and row["kind"] == "parameter"}


# -- defects -------------------------------------------------------------------------------------


def double(a: Any) -> Tensor:
    return torch.tensor(2.0, dtype=torch.float64)


def slightly(a: Any) -> Tensor:
    return torch.tensor(1 + 1e-8, dtype=torch.float64)


WRONG_RULES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "twice": ({"linear": [["weight", "bias"]], "factor": double}, {"0.weight", "0.bias", "2.weight", "2.bias"}),
    "a hundred millionth": (
        {"linear": [["weight", "bias"]], "factor": slightly},
        {"0.weight", "0.bias", "2.weight", "2.bias"},
    ),
    "one sample": (
        {"linear": [["weight", "bias"]], "factor": all_but_the_first},
        {"0.weight", "0.bias", "2.weight", "2.bias"},
    ),
    "each by itself": ({"linear": [["weight"], ["bias"]]}, {"0.weight", "0.bias", "2.weight", "2.bias"}),
}


@pytest.mark.parametrize("options", [None, Options(verify="never")], ids=["planned", "unverified"])
@pytest.mark.parametrize("name", WRONG_RULES)
def test_a_wrong_rule_is_found(name: str, options: Options | None) -> None:
    rule, culprits = WRONG_RULES[name]
    losses, params, batch = net()
    assert fg.check(losses, params, batch, options=options).ok
    fg.register_rule(F.linear, arguments=["input", "weight", "bias"], **rule)
    report = fg.check(losses, params, batch, options=options)
    assert not report.ok
    assert wrong(report) == culprits
    assert not named(report)["all parameters"]["ok"]
    assert all(row["note"] == "dots" for row in report.rows)
    assert all(row["grads"] <= report.facts["tolerance"] for row in report.rows[:4])
    with pytest.raises(fg.CheckError, match=r"disagree for 0\.bias.*fg\.register_rule"):
        report.raise_if_failed()
    assert ("ConservationError" in report.failures[0]) == (options is None and name != "a hundred millionth")


def test_only_what_is_wrong_is_named() -> None:
    def losses(p: Params, x: Tensor) -> Tensor:
        return (torch.tanh(x @ p["right"]) * p["wrong"]).square().sum(1)

    params, x = {"right": normal(6, 5), "wrong": normal(5)}, normal(4, 6)
    fg.register_rule(Tensor.mul, linear="each", factor=lambda a: torch.tensor(0.5, dtype=torch.float64))
    report = fg.check(losses, params, x)
    assert wrong(report) == {"wrong"}
    assert named(report)["right"]["ok"]
    assert "wrong" in str(report).splitlines()[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_rule_is_found_in_lower_precision(dtype: torch.dtype) -> None:
    fg.register_rule(
        F.linear,
        linear=[["weight", "bias"]],
        arguments=["input", "weight", "bias"],
        factor=lambda a: torch.tensor(0.7, dtype=dtype),
    )
    report = fg.check(*net(dtype), options=Options(verify="never"))
    assert wrong(report) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_a_plan_with_wrong_layouts_is_found() -> None:
    def losses(p: Params, x: Tensor) -> Tensor:
        return (x.flatten(0, 1) @ p["w"]).tanh().unflatten(0, (4, 3)).square().sum((1, 2))

    params, x = {"w": normal(6, 5)}, normal(4, 3, 6)
    plan = fg.plan(losses, params, x)
    sites = tuple(
        replace(site, layouts=(Layout(0, "low"),)) if site.layouts == (Layout(0, "high"),) else site
        for site in plan.sites
    )
    assert sites != plan.sites
    assert fg.check(losses, params, x, plan=plan).ok
    assert wrong(fg.check(losses, params, x, plan=replace(plan, sites=sites))) == {"w"}


def test_a_plan_of_another_model_is_a_failure() -> None:
    losses, params, batch = net()
    report = fg.check(losses, params, batch, plan=fg.plan(lambda p, x: (x @ p["0.weight"].T).sum(1), params, batch))
    assert not report.ok
    assert "The step raises MismatchError" in report.failures[0]
    assert {row["note"] for row in report.rows} == {"not compared"}


@pytest.mark.parametrize("which", ["grads", "losses", "scores"])
def test_a_wrong_step_is_found(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        step = grad_and_reduce(*args, **options)

        def changed(*given: Any) -> Any:
            out = step(*given)
            if which == "grads":
                return out._replace(grads=out.grads | {"2.bias": 1.001 * out.grads["2.bias"]})
            if which == "losses":
                return out._replace(losses=out.losses + 0.01)
            return out._replace(reduced=(1.001 * out.reduced[0], out.reduced[1]))

        return changed

    monkeypatch.setattr(compare, "grad_and_reduce", broken)
    report = fg.check(*net())
    assert not report.ok
    failing = {row["name"]: row["note"] for row in report.rows if not row["ok"]}
    assert failing == {"grads": {"2.bias": "grads"}, "losses": {}, "scores": {"all parameters": "dots"}}[which]
    [said] = report.failures
    assert ("other losses" if which == "losses" else f"disagree for {next(iter(failing))}") in said


def test_losses_that_do_not_repeat_are_found() -> None:
    own, count = random.Random(0), iter(range(10**6))
    noises: list[Callable[[], float]] = [own.random, lambda: float(next(count))]
    for noise in noises:
        losses, params, batch = net()

        def noisy(p: Params, x: Tensor, losses: Any = losses, noise: Callable[[], float] = noise) -> Any:
            return losses(p, x) * (1 + noise())

        report = fg.check(noisy, params, batch)
        assert not report.ok
        assert not report.facts["deterministic"]
        assert report.facts["mixing"] == "unknown"
        assert any("differ from call to call" in failure for failure in report.failures)
        assert "NOT the same" in str(report)


def test_losses_that_repeat_from_the_default_streams_are_right() -> None:
    losses, params, batch = net()

    def noisy(p: Params, x: Tensor) -> Tensor:
        return losses(p, x + 0.1 * torch.randn_like(x)) * random.random()

    assert fg.check(noisy, params, batch).ok


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_fails(value: float) -> None:
    losses, params, batch = net()
    batch[2] = float("nan")  # autograd says that all gradients are nan
    report = fg.check(losses, params, batch)
    assert report.facts["not_finite"] == [2]
    assert wrong(report) == set(params)
    assert all(row["note"] == "gradient is not finite" for row in report.rows)
    assert any("samples 2 are not finite" in failure for failure in report.failures)
    assert json.loads(report.to_json())["ok"] is False
    losses, params, batch = net()
    offset = torch.tensor([0.0, 0.0, value, 0.0])
    report = fg.check(lambda p, x: losses(p, x) + offset, params, batch)
    assert all(row["ok"] for row in report.rows)
    assert not report.ok  # nothing was verified of the losses as they are


def test_finite_gradients_beside_others_are_compared() -> None:
    """The gradient of sample 1 is too large for a number, and a rule is wrong for all."""
    x, factor = normal(4, 3), torch.tensor([1.0, 1e150, 1.0, 1.0], dtype=torch.float64)
    x[1] = 1e200

    def losses(p: Params, x: Tensor) -> Tensor:
        return (x * p["w"]).sum(1) * factor

    never = Options(verify="never")
    for note in ("", "dots, "):
        report = fg.check(losses, {"w": 1e-100 * normal(3)}, x, options=never)
        assert not report.facts["not_finite"]
        assert {row["note"] for row in report.rows} == {note + "gradient is not finite"}
        fg.register_rule(Tensor.mul, linear="each", factor=double)


def test_a_gradient_that_is_not_finite_fails() -> None:
    params, x = {"w": normal(3, 2), "v": normal(2)}, normal(4, 3)
    x[1] = 0

    def losses(p: Params, x: Tensor) -> Tensor:
        return (x @ p["w"]).norm(dim=1).sqrt() + (p["v"] * x[:, :2]).sum(1)

    report = fg.check(losses, params, x)
    assert not report.facts["not_finite"]
    assert wrong(report) == {"w"}
    assert named(report)["v"]["ok"]
