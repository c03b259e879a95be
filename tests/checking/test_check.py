"""`fg.check` and the command line: models that are right pass, each known defect is found and named."""

import importlib.util
import io
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcghost as fg
from funcghost import progress
from funcghost.algebra import contractions as contract
from funcghost.checking import compare
from funcghost.checking.checker import lowest_precision
from funcghost.engine.run import run
from funcghost.ops.known import _KNOWN
from funcghost.ops.layout import Layout
from funcghost.ops.products import Product
from funcghost.options import Options
from funcghost.shell.main import main
from funcghost.transforms.functions import grad_and_reduce
from tests.models.awkward import CASES
from tests.models.small import like, rows, small_gpt

Params = dict[str, Tensor]
Made = tuple[Any, Params, Any]


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def of_module(module: nn.Module, batch: Tensor) -> Made:
    return (
        fg.module_losses(module, lambda out, _: out.square().flatten(1).sum(1)),
        dict(module.named_parameters()),
        batch,
    )


def net(dtype: torch.dtype = torch.float64) -> Made:
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    return of_module(module, normal(4, 6, dtype=dtype))


def named(report: fg.Report) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in report.rows}


def wrong(report: fg.Report) -> set[str]:
    return {row["name"] for row in report.rows if not row["ok"] and row["kind"] == "parameter"}


# -- what is right, and what is refused ----------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_ok_exactly_where_the_scores_are(name: str) -> None:
    made = CASES[name]()
    if made.outcome is not None and issubclass(made.outcome, fg.InputError):
        with pytest.raises(fg.InputError):
            fg.check(made.losses, made.params, made.batch)
        return
    report = fg.check(made.losses, made.params, made.batch)
    assert report.ok == (made.outcome is None), str(report)
    assert all(row["ok"] for row in report.rows) == report.ok
    if not report.ok:
        assert type(made.outcome) is type
        assert "Planning raises" in report.failures[0]
        assert "Error: " in report.failures[0]
    json.loads(report.to_json())


@pytest.mark.parametrize(
    "precision", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:]
)
def test_tolerance_goes_with_the_precision(precision: torch.dtype) -> None:
    report = fg.check(*net(precision))
    assert report.ok
    assert report.facts["precision"] == str(precision)[6:]
    assert report.facts["tolerance"] == pytest.approx(torch.finfo(precision).eps ** (2 / 3))
    found = [row["dots"] for row in report.rows]
    assert 0 < max(found) < report.facts["tolerance"] / 10  # room for deep models


def test_the_precision_is_that_of_autocast() -> None:
    losses, params, batch = net(torch.float32)

    def lowered(p: Params, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return losses(p, x).float()

    report = fg.check(lowered, params, batch)
    assert report.ok
    assert report.facts["precision"] == "bfloat16"


def test_terms_that_cancel_are_rounding() -> None:
    """Of what the two uses of the weight bring, one part in a hundred thousand is left: the order of sums shows."""

    def losses(p: Params, x: Tensor) -> Tensor:
        return (1e5 * (x @ p["w"]) + 1).square().sum(1) - (1e5 * (x @ p["w"])).square().sum(1)

    params, x = {"w": torch.randn(6, 3)}, torch.randn(4, 6)
    report = fg.check(losses, params, x, options=Options(inner_products="materialise"))
    assert report.ok, str(report)
    row = named(report)["w"]
    assert row["dots"] > report.facts["tolerance"]
    assert row["note"] == "rounding"
    # Products of the positions of one use with those of the other lose what is left of the norm.
    report = fg.check(losses, params, x, options=Options(inner_products="ghost"))
    assert named(report)["w"]["note"] == "norms"
    assert "Options(inner_products='materialise')" in report.failures[0]
    fg.register_rule(Tensor.matmul, linear="each", factor=lambda a: torch.tensor(1.5))
    assert not fg.check(losses, {"w": torch.randn(6, 3)}, torch.randn(4, 6)).ok


@pytest.mark.parametrize(
    ("module", "matmul", "device", "wanted"),
    [
        (nn.Linear(6, 3), "none", "cuda", "float32"),
        (nn.Linear(6, 3), "tf32", "cuda", "tf32"),
        (nn.Linear(6, 3), "tf32", "cpu", "float32"),
        (nn.Linear(6, 3).double(), "tf32", "cuda", "float64"),
        (nn.Conv1d(4, 2, 3), "none", "cuda", "tf32"),
    ],
    ids=str,
)
def test_products_in_tf32_have_their_own_tolerance(module: nn.Module, matmul: str, device: str, wanted: str) -> None:
    x = torch.randn(4, 6, dtype=next(module.parameters()).dtype)
    plan = fg.plan(*of_module(module, x[None].expand(5, 4, 6)))
    products: Any = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, matmul
    try:
        name, eps = lowest_precision(plan, torch.float32, [torch.device(device)])
    finally:
        products.fp32_precision = before
    assert name == wanted
    assert eps == (2**-10 if wanted == "tf32" else torch.finfo(getattr(torch, wanted)).eps)


def test_a_gpt_with_dropout_in_every_column() -> None:
    _, losses, params = small_gpt(dropout=0.2)
    report = fg.check(losses, params, rows())
    assert report.ok
    assert report.facts["deterministic"]
    assert report.facts["mixing"] == "no"
    row = named(report)["tokens.weight"]
    assert (row["uses"], row["shape"], row["way"]) == (2, [32, 8], "rule")
    assert row["layout"] == "axis 0"
    assert named(report)["positions.weight"]["layout"] == "carried, axis 0"


@pytest.mark.parametrize("options", [Options(), Options(route="forward"), Options(verify="never")], ids=str)
def test_options_aux_and_plans(options: Options) -> None:
    losses, params, batch = net()
    report = fg.check(lambda p, x: (losses(p, x), {"seen": x}), params, batch, has_aux=True, options=options)
    assert report.ok
    assert all((row["grads"] is None) == (options.route == "forward") for row in report.rows[:4])
    plan = fg.Plan.from_json(fg.plan(losses, params, batch, options=options).to_json())
    assert fg.check(losses, params, batch, options=options, plan=plan).ok


def test_directions_of_reducers_are_checked() -> None:
    losses, params, batch = net()
    reducers = {"one": fg.dot(like(params)), "two": [fg.dot(fg.stack([like(params), like(params)]))]}
    report = fg.check(losses, params, batch, reducers)
    assert report.ok
    found = [row["name"] for row in report.rows if row["kind"] == "reducer"]
    assert found == ["reducer one", "reducer two.0[:, 0]", "reducer two.0[:, 1]"]
    assert [row["name"] for row in fg.check(losses, params, batch, fg.dot(like(params))).rows][-1] == "reducer Dot"


REDUCERS: dict[str, Callable[[], fg.Reducer]] = {
    "norm": fg.squared_norm,
    "gram": fg.gram,
    "by parameter": lambda: fg.per_param(fg.gram()),
    "cross": lambda: fg.cross(1),
    "rademacher": lambda: fg.project(7, 3, "rademacher"),
    "gaussian": lambda: fg.project(7, 3, "gaussian"),
    "kronecker": lambda: fg.project(7, 3, "kronecker"),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_reducers_of_whole_gradients_are_checked(dtype: torch.dtype) -> None:
    reducers = {name: make() for name, make in REDUCERS.items()}
    made = net(dtype)
    report = fg.check(*made, [reducers, fg.dot(like(made[1]))])
    assert report.ok, str(report)
    found = {name: row for name, row in named(report).items() if row["kind"] == "reducer"}
    assert found.keys() == {"reducer 1", *(f"reducer 0.{name}" for name in REDUCERS)}
    for name, row in found.items():
        assert (row["norms"] is None) == (name == "reducer 1") == (row["dots"] is not None)
        assert row["grads"] is None


def test_norms_of_every_parameter_are_compared() -> None:
    _, losses, params = small_gpt(dropout=0.2)
    report = fg.check(losses, params, rows())
    assert report.ok
    assert report.facts["norms"] == "yes"
    assert all(row["norms"] is not None and row["norms"] < report.facts["tolerance"] for row in report.rows)
    assert any(row["norms"] > 0 for row in report.rows)


@pytest.mark.parametrize("samples", [None, 2, 3])
def test_what_samples_compared_determine_of_a_reducer(samples: int | None) -> None:
    """The others enter numbers that are left out."""
    losses, params, _ = net()
    reducers = {"gram": fg.gram(), "project": fg.project(5), "cross": fg.cross(10)}
    report = fg.check(losses, params, normal(20, 6), reducers, samples=samples, seed=1)
    assert report.ok, str(report)
    report = fg.check(losses, params, normal(20, 6), {"last": fg.cross(1)}, samples=1)
    assert named(report)["reducer last"]["note"] == "not compared"
    assert report.failures == ["No number of reducer last is of samples compared alone. Compare all, with samples=."]


WRONG_PRODUCTS: dict[str, tuple[Callable[[Product], Product | None], str]] = {
    "larger": (lambda product: replace(product, scale=1.01), "norms, factors"),
    "opposite": (lambda product: replace(product, scale=-1.0), "factors"),
    "unknown": (lambda product: None, ""),  # then autograd gives the factor
}


@pytest.mark.parametrize("options", [None, Options(verify="never")], ids=["planned", "unverified"])
@pytest.mark.parametrize("name", WRONG_PRODUCTS)
def test_a_wrong_description_of_a_product_is_found(
    name: str, options: Options | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, note = WRONG_PRODUCTS[name]
    known = _KNOWN[F.linear]
    describe: Any = known.product

    def changed(*given: Any) -> Any:
        product = describe(*given)
        return change(product) if isinstance(product, Product) else product

    monkeypatch.setitem(_KNOWN, F.linear, known._replace(product=changed))
    report = fg.check(*net(), {"gram": fg.gram()}, options=options)
    assert report.ok == (not note)
    assert {row["note"] for row in report.rows if row["kind"] != "reducer"} == {note}
    assert named(report)["reducer gram"]["ok"] == (name != "larger")
    assert all(row["dots"] <= report.facts["tolerance"] for row in report.rows[:5])
    if note:
        [said] = report.failures
        assert said.startswith("Scores are right, but what is made of factored gradients is wrong for 0.bias, 0.weight")


def test_a_wrong_reducer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it makes of factors is not what it makes of the gradients themselves."""
    ghost = contract._ghost_matrix
    monkeypatch.setattr(contract, "_ghost_matrix", lambda *given: 1.001 * ghost(*given))
    report = fg.check(*net(), [fg.gram(), fg.squared_norm()], options=Options(inner_products="ghost"))
    assert {row["name"] for row in report.rows if not row["ok"]} == {"reducer 0"}
    assert "wrong for reducer 0. " in report.failures[0]


def in_chunks() -> Made:
    """A tangent is carried through `vmap`, which has no graph for one sample."""
    loss: Any = fg.per_example(
        lambda p, x: (x @ torch.cat([p["w"], x.mean() * p["w"]], 1)).square().sum(), chunk_size=2
    )
    return loss, {"w": normal(6, 3)}, normal(4, 6)


NOT_TO_BE_HAD: dict[str, tuple[Callable[[], Made], Options | None, str]] = {
    "vmap in chunks": (in_chunks, None, "UnsupportedOpError: .*leave chunk_size out"),
    "no memory": (net, Options(memory_budget=1), "MemoryBudgetError: "),
}


@pytest.mark.parametrize("name", NOT_TO_BE_HAD)
def test_norms_that_are_not_to_be_had_are_a_fact(name: str) -> None:
    make, options, note = NOT_TO_BE_HAD[name]
    report = fg.check(*make(), options=options)
    assert report.ok, str(report)
    assert report.facts["norms"] == "no"
    assert re.match(note, report.facts["norms_note"])
    assert f"norms were not compared: {report.facts['norms_note']}" in str(report)
    assert all(row["norms"] is None and row["dots"] is not None for row in report.rows)
    report = fg.check(*make(), {"gram": fg.gram()}, options=options)
    assert not report.ok
    assert named(report)["reducer gram"]["note"] == "not compared"
    assert report.failures == [f"For reducer gram the step raises {report.facts['norms_note']}"]


def test_the_tolerance_of_norms_is_that_of_the_dtype_to_contract_in() -> None:
    report = fg.check(*net(torch.float32), fg.gram(), options=Options(compute_dtype=torch.bfloat16))
    assert report.ok, str(report)
    assert report.facts["precision"] == "bfloat16"
    assert max(row["norms"] for row in report.rows) > torch.finfo(torch.float32).eps ** (2 / 3)


def test_directions_of_low_rank_are_checked_with_the_norms_of_their_bounds() -> None:
    losses, params, batch = net()
    bounded = fg.dot(fg.compress(like(params), rank=1), with_bound=True)
    report = fg.check(losses, params, batch, [bounded, fg.dot(like(params), with_bound=True)])
    assert report.ok, str(report)
    found = [(row["name"], row["dots"] is None) for row in report.rows if row["kind"] == "reducer"]
    names = [("reducer 0", False), ("reducer 1", False), ("reducer 0, norms", True), ("reducer 1, norms", True)]
    assert found == names


# -- defects -------------------------------------------------------------------------------------


def double(a: Any) -> Tensor:
    return torch.tensor(2.0, dtype=torch.float64)


def slightly(a: Any) -> Tensor:
    return torch.tensor(1 + 1e-8, dtype=torch.float64)


def all_but_the_first(a: Any) -> Tensor:
    return (torch.arange(4) > 0).double().unsqueeze(1)


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


# -- facts ---------------------------------------------------------------------------------------


def batch_norm(training: bool) -> Made:
    module = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).double().train(training)
    return of_module(module, normal(4, 6))


def by_rows(losses: Callable[[Params, Any], Tensor], batch: Any) -> Made:
    return losses, {"w": normal(6, 3)}, batch


def score(p: Params, x: Tensor) -> Tensor:
    return torch.tanh(x @ p["w"]).square().flatten(1).sum(1)


MIXING: dict[str, tuple[Callable[[], Made], str]] = {
    "batch norm in training": (lambda: batch_norm(True), "yes"),
    "batch norm in evaluation": (lambda: batch_norm(False), "no"),
    "minus the mean": (lambda: by_rows(lambda p, x: score(p, x) - score(p, x).mean(), normal(5, 6)), "yes"),
    "minus the mean of three precisions": (
        lambda: (lambda p, x: score(p, x) - score(p, x).mean(), {"w": torch.randn(6, 3)}, torch.randn(5, 6)),
        "yes",
    ),
    "an odd number": (lambda: by_rows(score, normal(5, 6)), "no"),
    "two": (lambda: by_rows(score, normal(2, 6)), "no"),
    "the neighbour alone": (lambda: by_rows(lambda p, x: score(p, x) + score(p, x).roll(1), normal(7, 6)), "yes"),
    "two apart": (lambda: by_rows(lambda p, x: score(p, x) + score(p, x).roll(2), normal(7, 6)), "yes"),
    "the first alone": (lambda: by_rows(lambda p, x: score(p, x) + score(p, x)[0], normal(9, 6)), "yes"),
    "one pair alone": (
        lambda: by_rows(lambda p, x: score(p, x) + score(p, x)[3] * (torch.arange(9) == 5), normal(9, 6)),
        "yes",
    ),
    "dropout": (lambda: by_rows(lambda p, x: score(p, F.dropout(x)), normal(4, 6)), "no"),
    "dropout and the mean": (lambda: by_rows(lambda p, x: score(p, F.dropout(x)) + x.mean(), normal(4, 6)), "yes"),
    "as many numbers as the data say": (
        lambda: by_rows(lambda p, x: score(p, x) * torch.rand(8 + int(x[0, 0] * 8))[0], normal(4, 6).sigmoid()),
        "unknown",
    ),
    "one sample": (lambda: by_rows(score, normal(1, 6)), "no"),
    "samples on axis 1": (lambda: by_rows(lambda p, x: score(p, x.transpose(0, 1)), normal(3, 4, 6)), "no"),
    "samples on axis 1 of as many": (lambda: by_rows(lambda p, x: score(p, x.transpose(0, 1)), normal(4, 4, 6)), "no"),
    "as many features as samples": (lambda: by_rows(score, normal(6, 6)), "no"),
    "mixed, as many features": (
        lambda: by_rows(lambda p, x: score(p, x) - score(p, x).mean(), normal(6, 6)),
        "unknown",
    ),
    "folded rows": (lambda: by_rows(lambda p, x: score(p, x).unflatten(0, (4, 3)).sum(1), normal(12, 6)), "unknown"),
    "a mask for all": (lambda: by_rows(lambda p, b: score(p, b[0] * b[1]), (normal(4, 6), normal(6))), "no"),
    "mixed, with rows in another tensor": (
        lambda: by_rows(
            lambda p, b: score(p, b[0]).unflatten(0, (3, 3)).sum(1) * b[1].mean(), (normal(9, 6), normal(3))
        ),
        "unknown",
    ),
    "no tensor": (lambda: by_rows(lambda p, b: score(p, b.x), SimpleNamespace(x=normal(4, 6))), "unknown"),
    "alike": (lambda: by_rows(score, torch.ones(4, 6, dtype=torch.float64)), "unknown"),
}


@pytest.mark.parametrize("name", MIXING)
def test_whether_samples_mix(name: str) -> None:
    make, wanted = MIXING[name]
    report = fg.check(*make())
    assert report.ok, str(report)
    assert report.facts["mixing"] == wanted, report.facts["mixing_note"]
    assert f"samples mix: {wanted} (" in str(report)


def test_why_it_is_unknown_whether_samples_mix() -> None:
    notes = {
        "mixed, as many features": "a tensor in the batch has several axes of 6",
        "mixed, with rows in another tensor": "a tensor in the batch has no axis of 3",
        "folded rows": "no tensor in the batch has an axis of 4",
        "alike": "no loss changes when samples are exchanged",
        "as many numbers as the data say": "how many random numbers are drawn depends on the samples",
    }
    for name, note in notes.items():
        assert fg.check(*MIXING[name][0]()).facts["mixing_note"] == note


def test_losses_that_refuse_exchanged_samples_are_unknown() -> None:
    def losses(p: Params, x: Tensor) -> Tensor:
        if not bool((x[1:, 0] > x[:-1, 0]).all()):
            raise ValueError("not sorted")
        return score(p, x)

    report = fg.check(losses, {"w": normal(6, 3)}, torch.arange(24, dtype=torch.float64).view(4, 6) / 24)
    assert report.ok
    assert report.facts["mixing_note"] == "the losses raise ValueError when samples are exchanged"


def test_parameters_that_do_nothing_are_facts() -> None:
    def losses(p: Params, x: Tensor) -> Tensor:
        (x @ p["dead end"]).sum()
        return score(p, x) + (x @ p["zero"]).sum(1) * 0

    params = {
        "w": normal(6, 3),
        "dead end": normal(6, 2),
        "zero": normal(6, 2),
        "never": normal(2),
        "none": normal(0, 3),
    }
    report = fg.check(losses, params, normal(4, 6))
    assert report.ok
    assert report.facts["unused"] == ["dead end", "never", "none"]
    assert report.facts["zero_gradient"] == ["zero"]
    assert "never used by the losses: dead end, never, none" in str(report)
    assert named(report)["never"]["uses"] == 0


# -- samples, seeds, state -----------------------------------------------------------------------


def test_samples_are_drawn() -> None:
    losses, params, _ = net()
    assert fg.check(losses, params, normal(20, 6)).facts["samples"] == 16
    assert fg.check(losses, params, normal(20, 6), samples=3).facts["samples"] == 3
    assert fg.check(losses, params, normal(20, 6), samples=30).facts["samples"] == 20
    x = normal(20, 6)
    assert fg.check(losses, params, x, seed=5) == fg.check(losses, params, x, seed=5)
    assert fg.check(losses, params, x, seed=5).rows != fg.check(losses, params, x, seed=6).rows


def test_a_defect_of_one_sample_is_found_if_it_is_drawn() -> None:
    losses, params, batch = net()
    fg.register_rule(
        F.linear, linear=[["weight", "bias"]], arguments=["input", "weight", "bias"], factor=all_but_the_first
    )
    never = Options(verify="never")
    found = {fg.check(losses, params, batch, samples=1, seed=seed, options=never).ok for seed in range(12)}
    assert found == {True, False}


def test_parameters_with_taps_share_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []

    def counted(problem: Any, plan: Any, directions: Any, **options: Any) -> Any:
        passes.append(len(directions))
        return run(problem, plan, directions, **options)

    monkeypatch.setattr(compare, "run", counted)
    assert fg.check(*net()).ok
    assert passes == [4]
    losses, params, batch = net()
    assert fg.check(losses, params, batch, options=Options(route="forward")).ok
    assert passes == [4, 4]


def test_nothing_is_left_behind() -> None:
    module = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.2), nn.Linear(5, 2)).double()
    losses, params, x = of_module(module, normal(4, 6))
    params["0.weight"].grad = torch.ones_like(params["0.weight"])
    params["3.bias"] = params["3.bias"].detach()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    states = torch.get_rng_state(), random.getstate()
    fg.register_rule(F.linear, linear=[["weight"], ["bias"]], arguments=["input", "weight", "bias"])
    for reversed_rule in (False, True):
        assert fg.check(losses, params, x).ok == reversed_rule
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]
        for name, value in module.state_dict().items():
            assert torch.equal(value, before[name])
        fg.register_rule(F.linear, linear=[["weight", "bias"]], arguments=["input", "weight", "bias"])
    assert torch.equal(params["0.weight"].grad, torch.ones_like(params["0.weight"]))
    assert all(p.grad is None for name, p in params.items() if name != "0.weight")
    assert not params["3.bias"].requires_grad


@pytest.mark.cuda
@pytest.mark.parametrize("default", [None, "cuda"])
def test_cuda(default: str | None) -> None:
    module = nn.Sequential(nn.Conv1d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 2)).cuda()
    torch.set_default_device(default)
    try:
        report = fg.check(*of_module(module, torch.randn(5, 3, 6, device="cuda")))
    finally:
        torch.set_default_device(None)
    assert report.ok, str(report)
    assert report.facts["mixing"] == "no"


BAD_ARGUMENTS: dict[str, tuple[Callable[[Made], Any], str]] = {
    "losses": (lambda m: fg.check(3, m[1], m[2]), "losses: must be a function"),  # type: ignore[arg-type]
    "params": (lambda m: fg.check(m[0], {}, m[2]), "params"),
    "integers": (lambda m: fg.check(m[0], {"w": torch.arange(3)}, m[2]), "floating-point"),
    "reducers": (lambda m: fg.check(m[0], m[1], m[2], m[1]), "fg.dot"),
    "direction": (lambda m: fg.check(m[0], m[1], m[2], fg.dot({})), "direction"),
    "no samples": (lambda m: fg.check(m[0], m[1], m[2], samples=0), "samples must be"),
    "samples by a float": (lambda m: fg.check(m[0], m[1], m[2], samples=2.0), "samples must be"),  # type: ignore[arg-type]
    "samples by a boolean": (lambda m: fg.check(m[0], m[1], m[2], samples=True), "samples must be"),
    "seed": (lambda m: fg.check(m[0], m[1], m[2], seed=-1), "seed must be"),
    "options": (lambda m: fg.check(m[0], m[1], m[2], options="first"), "options"),  # type: ignore[arg-type]
    "plan": (lambda m: fg.check(m[0], m[1], m[2], plan="{}"), "fg.plan"),  # type: ignore[arg-type]
    "losses of no samples": (lambda m: fg.check(m[0], m[1], m[2][:0]), "no samples"),
    "a mean": (lambda m: fg.check(lambda p, x: m[0](p, x).mean(), m[1], m[2]), "one number per sample"),
    "detached": (lambda m: fg.check(lambda p, x: m[0](p, x).detach(), m[1], m[2]), "do not depend on params"),
    "meta": (lambda m: fg.check(m[0], {k: p.to("meta") for k, p in m[1].items()}, m[2]), "meta device"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_wrong_arguments_raise_at_once(name: str) -> None:
    call, message = BAD_ARGUMENTS[name]
    with pytest.raises(fg.InputError, match=message):
        call(net())


# -- the report ----------------------------------------------------------------------------------


def test_the_report_is_a_table_and_plain_values() -> None:
    report = fg.check(*net())
    head, *lines = str(report).splitlines()
    assert head.split() == ["parameter", "shape", "uses", "layout", "J", "V", "by", "grads", "dots", "norms"]
    column = head.index("dots")
    assert {line[column - 2 : column] for line in lines[:5]} == {"  "}
    assert all(line[column:].split()[2] == "ok" for line in lines[:5])
    assert lines[-1] == "ok: everything agrees"
    whole = json.loads(report.to_json())
    assert whole == {"ok": True, "facts": report.facts, "rows": report.rows, "failures": []}
    assert report.raise_if_failed() is None  # type: ignore[func-returns-value]
    assert issubclass(fg.CheckError, fg.GhostError)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """What is shown from here on; not a fixture, as pytest sets stderr anew before it calls the test."""
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    return shown


def test_a_plain_bar_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = terminal(monkeypatch)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    times: Iterator[int] = iter(range(100))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))  # type: ignore[attr-defined]
    assert list(progress.progress("abcd", "letters")) == list("abcd")
    assert "\rletters: 2/4\rletters: 3/4" in shown.getvalue()
    assert "0/4" not in shown.getvalue()
    assert shown.getvalue().endswith(" \r")


@pytest.mark.skipif(importlib.util.find_spec("tqdm") is None, reason="needs tqdm")
def test_a_bar_by_tqdm_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = terminal(monkeypatch)
    assert list(progress.progress("abcd", "letters")) == list("abcd")
    assert not shown.getvalue().strip()
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    assert list(progress.progress("abcd", "letters")) == list("abcd")
    assert "letters" in shown.getvalue()


def test_no_bar_where_nobody_looks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    assert fg.check(*net()).ok
    assert capsys.readouterr() == ("", "")


# -- the command line ----------------------------------------------------------------------------

MODULE = """
import torch, funcghost as fg
from typing import Any, NamedTuple

class Given(NamedTuple):
    losses: Any
    params: Any
    batch: Any

def small():
    model = torch.nn.Linear(8, 4)
    losses = fg.module_losses(model, lambda output, batch: output.square().sum(1))
    return losses, dict(model.named_parameters()), torch.randn(6, 8)

def by_name():
    return dict(zip(("losses", "params", "batch"), small()))

def by_tuple():
    return Given(*small())

def with_aux():
    losses, params, batch = small()
    return {"losses": lambda p, x: (losses(p, x), x), "params": params, "batch": batch, "has_aux": True}

def hidden():
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x)
            return x * w
        @staticmethod
        def backward(ctx, g):
            return None, (g * ctx.saved_tensors[0]).sum(0)
    return lambda p, x: Hidden.apply(x, p["w"]).square().sum(1), {"w": torch.ones(3)}, torch.randn(4, 3)

def a_mean():
    losses, params, batch = small()
    return lambda p, x: losses(p, x).mean(), params, batch

def failing():
    losses, params, batch = small()
    return losses, params, torch.randn(6, 9)

def number(): return 3
def pair(): return 1, 2
def lacking(): return {"losses": 1}
def raising(): raise KeyError("mine")
def needing(argument): return small()
constant = 3

class Nested:
    small = staticmethod(small)
"""


class Ran(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    (tmp_path / "my_models.py").write_text(MODULE)
    (tmp_path / "my_broken.py").write_text("import not_there_at_all")
    (tmp_path / "my_syntax.py").write_text("def")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Ran:
        try:
            status = main(arguments)
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        return Ran(status, *capsys.readouterr())

    yield run
    for name in ("my_models", "my_broken", "my_syntax"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["small", "by_name", "by_tuple", "with_aux", "Nested.small"])
def test_commands_take_what_a_factory_gives(command: Any, name: str) -> None:
    checked = command("check", f"my_models:{name}")
    assert (checked.status, checked.err) == (0, "")
    assert "6 of 6 samples" in checked.out
    assert checked.out.rstrip().endswith("ok: everything agrees")
    planned = command("plan", f"my_models:{name}")
    assert (planned.status, planned.err) == (0, "")
    assert "1 sites tapped" in planned.out


def test_check_by_command_as_json(command: Any) -> None:
    ran = command("check", "my_models:small", "--samples", "2", "--seed", "3", "--json")
    whole = json.loads(ran.out)
    assert (ran.status, whole["ok"], whole["facts"]["samples"]) == (0, True, 2)
    assert command("check", "my_models:small", "--samples", "2", "--seed", "3", "--json") == ran
    assert command("check", "my_models:small", "--samples", "2", "--seed", "4", "--json") != ran


def test_plan_by_command_as_json(command: Any) -> None:
    ran = command("plan", "my_models:small", "--json", "plan.json")
    plan = fg.Plan.from_json(Path("plan.json").read_text())
    assert ran.out.rstrip() == str(plan)
    alone = command("plan", "my_models:small", "--json", "-")
    assert fg.Plan.from_json(alone.out) == plan
    failed = command("plan", "my_models:small", "--json", "no/such/folder/plan.json")
    assert failed.status == 2
    assert failed.err.startswith("funcghost plan: cannot write no/such/folder/plan.json")


def test_failed_commands(command: Any) -> None:
    ran = command("check", "my_models:hidden")
    assert (ran.status, ran.err) == (1, "")
    assert "FAILED: Planning raises ConservationError" in ran.out
    assert json.loads(command("check", "my_models:hidden", "--json").out)["failures"]
    ran = command("plan", "my_models:hidden")
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.startswith("funcghost plan: ConservationError: ")


USAGE = {
    "my_models": "must be package.module:factory",
    ":small": "must be package.module:factory",
    "my_models:": "must be package.module:factory",
    "not_there:small": "there is no module 'not_there'",
    "my_models.not_there:small": "there is no module 'my_models",
    "my_broken:small": "importing my_broken raises ModuleNotFoundError: No module named 'not_there_at_all'",
    "my_syntax:small": "importing my_syntax raises SyntaxError",
    "my_models:other": "my_models has no 'other'",
    "my_models:Nested.other": "my_models has no 'Nested.other'",
    "my_models:constant": "is no function but of type int",
    "my_models:number": "must return (losses, params, batch) or a dict of these, found int",
    "my_models:pair": "found tuple of 2",
    "my_models:lacking": "missing ['params', 'batch']",
    "my_models:raising": "my_models:raising() raises KeyError: 'mine'",
    "my_models:needing": "raises TypeError",
    "my_models:a_mean": "must return one number per sample",
    "my_models:failing": "the losses raise RuntimeError",
}


@pytest.mark.parametrize("target", USAGE)
def test_bad_targets(command: Any, target: str) -> None:
    for name in ("check", "plan"):
        ran = command(name, target)
        assert (ran.status, ran.out) == (2, "")
        last = ran.err.rstrip().splitlines()[-1]
        assert last.startswith(f"funcghost {name}: ")
        assert USAGE[target] in last
        assert ("raises" in last or "raise " in last) == ("raise" in USAGE[target])


BAD = [
    *([], ["check"], ["other", "my_models:small"], ["check", "my_models:small", "--samples", "0"]),
    *(["check", "my_models:small", "--seed", "x"], ["plan", "my_models:small", "--json"]),
]


@pytest.mark.parametrize("arguments", BAD, ids=" ".join)
def test_bad_arguments(command: Any, arguments: list[str]) -> None:
    ran = command(*arguments)
    assert (ran.status, ran.out) == (2, "")
    assert "usage: python -m funcghost" in ran.err


def test_help_and_version(command: Any) -> None:
    assert command("--version").out.split() == ["funcghost", fg.__version__]
    for arguments in (["--help"], ["check", "--help"], ["plan", "--help"]):
        ran = command(*arguments)
        assert ran.status == 0
        assert "python -m funcghost check mine:small" in ran.out


def test_the_example_of_the_help_runs_as_a_module(tmp_path: Path, command: Any) -> None:
    text = command("--help").out.partition("in mine.py:\n")[2].partition("    $")[0]
    (tmp_path / "mine.py").write_text("\n".join(line[4:] for line in text.splitlines()))
    ran = subprocess.run(
        [sys.executable, "-m", "funcghost", "check", "mine:small"], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.rstrip().endswith("ok: everything agrees")
