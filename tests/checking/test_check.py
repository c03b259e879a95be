"""What `fg.check` finds right, and what it refuses: precisions, reducers, norms."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcghost as fg
from funcghost.algebra import contractions as contract
from funcghost.checking.checker import lowest_precision
from funcghost.checking.judge import _measured
from funcghost.ops.known import _KNOWN
from funcghost.ops.products import Product
from funcghost.options import Options
from tests.depth import thinned
from tests.models.awkward import CASES, SLICE
from tests.models.checked import Made, Params, named, net, normal, of_module
from tests.models.small import like, rows, small_gpt

# -- what is right, and what is refused ----------------------------------------------------------


REFUSED = [name for name, make in CASES.items() if make().outcome is not None]


@pytest.mark.parametrize("name", thinned(CASES, [*SLICE, *REFUSED]))
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


@pytest.mark.parametrize("factor", [1e30, 1e-30])
def test_squares_out_of_range_are_said_to_be(factor: float) -> None:
    params, x = {"w": torch.randn(3, 4), "b": torch.randn(4)}, torch.randn(5, 3)

    def losses(p: Any, x: Any) -> Any:
        return factor * torch.tanh(x @ p["w"] + p["b"]).square().sum(1)

    report = fg.check(losses, params, x)
    assert not report.ok
    assert {row["note"] for row in report.rows} == {"norms out of range"}
    [said] = report.failures
    assert "Multiply the losses by a constant" in said
    assert "report" not in said
    fg.check(lambda p, x: losses(p, x) / factor, params, x).raise_if_failed()
    fg.check(losses, {name: value.double() for name, value in params.items()}, x.double()).raise_if_failed()


def test_a_norm_where_autograd_has_none_is_plainly_wrong() -> None:
    def judged(found: float, wanted: float) -> bool:
        ours, theirs, scale = (torch.tensor([value], dtype=torch.float64) for value in (found, wanted, 0.0))
        return _measured(ours, theirs, scale, [], 1e-5, torch.finfo(torch.float32)).out_of_range

    assert judged(float("inf"), 1e60)
    assert judged(0.0, 1e-60)
    assert not judged(1.0, 0.0)
    assert not judged(float("inf"), 1e30)
