"""Plans as text: read back equal, right in another process, and refused where they are not what was written."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import funcghost as fg
from funcghost.codec import DTYPES, MalformedError, decode, encode
from funcghost.engine import plans
from funcghost.engine.plans import Site, _checksum
from funcghost.engine.verified import Verified
from funcghost.ops.layout import Layout, Rows
from funcghost.ops.moves import Moved
from funcghost.transforms import steps
from tests.models.small import like, next_token, rows, small_gpt
from tests.naive import assert_scores, expected
from tests.ops.test_moves import cut_and_joined, masked, mixture, scattered, sorted_and_back, twice
from tests.versions import compiles

Made = tuple[Any, dict[str, Tensor], Any]
hf: Any = transformers


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def of_module(module: nn.Module, batch: Tensor, pick: Callable[[Any], Tensor] = lambda out: out) -> Made:
    losses = fg.module_losses(module.double(), lambda out, _: pick(out).square().flatten(1).sum(1))
    return losses, dict(module.named_parameters()), batch


def mlp() -> Made:
    return of_module(nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)), normal(4, 6))


def one_sample() -> Made:
    return of_module(nn.Linear(6, 5), normal(1, 6))


def tied_embedding() -> Made:
    model, losses, params = small_gpt(layers=1)
    model.double()
    return losses, params, rows()


def lstm() -> Made:
    return of_module(nn.LSTM(6, 4, batch_first=True), normal(4, 3, 6), lambda out: out[0])


def sequence_first() -> Made:
    return of_module(nn.GRU(6, 4), normal(3, 4, 6), lambda out: out[0].transpose(0, 1))


def token_major() -> Made:
    """The tokens of all samples in one axis, the samples turning fastest."""

    def losses(p: dict[str, Tensor], x: Tensor) -> Tensor:
        low = (x.transpose(0, 1).flatten(0, 1) @ p["w"]).tanh() @ p["v"]
        return low.unflatten(0, (3, 4)).square().sum((0, 2))

    return losses, {"w": normal(6, 5), "v": normal(5, 2)}, normal(4, 3, 6)


def several_outputs() -> Made:
    def losses(p: dict[str, Tensor], x: Tensor) -> Tensor:
        values, order = (x @ p["w"]).sort(-1)
        kept, _ = (values * (1 + order) * p["scale"]).split([2, 3], -1)
        return kept.square().sum(1)

    return losses, {"w": normal(6, 5), "scale": normal(5), "dead": normal(2)}, normal(4, 6)


def batch_norm() -> Made:
    return of_module(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)), normal(4, 6))


def written_in_place() -> Made:
    def losses(p: dict[str, Tensor], x: Tensor) -> Tensor:
        h = x @ p["w"]
        h.add_(p["b"]).mul_(p["b"])
        return torch.nn.functional.dropout(h, 0.3).square().sum(1)

    return losses, {"w": normal(6, 5), "b": normal(5)}, normal(4, 6)


def gpt2() -> Made:
    config = hf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16)
    model = hf.GPT2LMHeadModel(config).double().eval()
    losses = fg.module_losses(model, lambda out, batch: next_token(out.logits, (batch["input_ids"],)))
    return losses, dict(model.named_parameters()), {"input_ids": rows()[0]}


def experts(kind: Any) -> Callable[[], Made]:
    return lambda: (*mixture(kind), normal(4, 3, 5))


MODELS: dict[str, Callable[[], Made]] = {
    **{f.__name__: f for f in (mlp, one_sample, tied_embedding, lstm, sequence_first, token_major, several_outputs)},
    **{f.__name__: f for f in (batch_norm, written_in_place, gpt2)},
    **{f"experts {f.__name__}": experts(f) for f in (sorted_and_back, scattered, twice, masked, cut_and_joined)},
}


@pytest.fixture
def unplanned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is planned or verified from here on."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("planned or verified again")

    monkeypatch.setattr(steps, "make_plan", refuse)
    monkeypatch.setattr(steps, "verify_plan", refuse)


def there_and_back(plan: fg.Plan) -> fg.Plan:
    return fg.Plan.from_json(plan.to_json())


@pytest.mark.parametrize(
    "options", [fg.Options(), fg.Options(route="forward", verify="never")], ids=["taps", "carries"]
)
@pytest.mark.parametrize("name", MODELS)
def test_a_plan_read_back_is_the_plan(name: str, options: fg.Options) -> None:
    plan = fg.plan(*MODELS[name](), options=options)
    again = there_and_back(plan)
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert str(again) == str(plan)


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_read_back_scores_without_being_made_again(name: str, request: pytest.FixtureRequest) -> None:
    losses, params, batch = MODELS[name]()
    plan, direction, state = there_and_back(fg.plan(losses, params, batch)), like(params), torch.get_rng_state()
    wanted = expected(losses, params, batch, direction)
    request.getfixturevalue("unplanned")
    torch.set_rng_state(state)
    assert_scores(fg.reduce(losses, plan=plan)(params, batch, fg.dot(direction)), wanted)


def test_the_models_reach_every_kind_of_layout() -> None:
    made = [fg.plan(*make()) for make in MODELS.values()]
    sites = [site for plan in made for site in plan.sites]
    layouts = {layout for site in sites for layout in site.layouts}
    assert {layout.fold for layout in layouts if isinstance(layout, Layout)} == {"whole", "high", "low", "single"}
    assert any(isinstance(layout, Layout) and layout.axis for layout in layouts)
    assert any(isinstance(layout, Rows) for layout in layouts)
    assert {"unused", "constant", "carried"} <= layouts
    assert {site.action for site in sites} >= {"tap", "carry"}
    assert {site.way for site in sites} >= {"rule", "forward"}
    assert any(site.written for site in sites)
    assert any(site.random for site in sites)
    assert any(isinstance(where, Layout) for plan in made for moved in plan.moves for where in moved.outputs)


ELSEWHERE = """
import json
import sys
import funcghost as fg
from funcghost.transforms import halves, steps
from tests.naive import assert_scores, expected
from tests.models.small import like
from tests.engine.test_plan_json import MODELS
import torch

def refuse(*_, **__):
    raise AssertionError("planned or verified again")

made, texts = {}, json.load(sys.stdin)
for name, text in texts.items():
    torch.manual_seed(0)
    made[name] = MODELS[name]()
    assert fg.plan(*made[name]).to_json() == text, name
steps.make_plan = steps.verify_plan = halves.make_plan = refuse
for name, text in texts.items():
    losses, params, batch = made[name]
    direction = like(params)
    score = fg.reduce(losses, plan=fg.Plan.from_json(text))
    assert_scores(score(params, batch, fg.dot(direction)), expected(losses, params, batch, direction))
"""


def python(code: str, *arguments: str, given: str = "", seed: str = "7") -> subprocess.CompletedProcess[str]:
    """Runs code in a process that hashes strings in another way."""
    root = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    around = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], input=given, env=around, text=True, capture_output=True, check=False
    )


def test_another_process_makes_the_same_text_and_never_plans() -> None:
    texts = dict[str, str]()
    for name in ("tied_embedding", "experts twice"):
        torch.manual_seed(0)
        texts[name] = fg.plan(*MODELS[name]()).to_json()
    done = python(ELSEWHERE, given=json.dumps(texts))
    assert done.returncode == 0, done.stderr


# -- what a text does not hold -----------------------------------------------------------------


def test_memory_that_is_written_to_is_found_in_the_first_run(unplanned_after: Callable[[], None]) -> None:
    def made() -> Made:
        torch.manual_seed(3)
        module = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
        return fg.module_losses(module, lambda out, _: out.square().sum(1)), dict(module.named_parameters()), module

    (plain, params, module), (losses, ours, other) = made(), made()
    x = normal(5, 6)
    plan = there_and_back(fg.plan(losses, ours, x))
    assert plan.written is None
    plain(params, x)
    unplanned_after()
    step = fg.grad_and_reduce(losses, plan=plan)
    step(ours, x, fg.dot(like(ours)))
    for name, buffer in module.named_buffers():
        assert torch.equal(dict(other.named_buffers())[name], buffer)
    [known] = step.__self__.plans  # type: ignore[attr-defined]
    held = {buffer.untyped_storage()._cdata for buffer in other.buffers()}
    assert {storage._cdata for storage in known.written} >= held
    assert there_and_back(known).written is None


@pytest.fixture
def unplanned_after(request: pytest.FixtureRequest) -> Callable[[], None]:
    return lambda: request.getfixturevalue("unplanned")


def test_a_run_that_does_not_fit_leaves_no_trace_in_buffers() -> None:
    """The plan is for another network behind the same batch norm: it is found out after that has been run."""
    norm = nn.BatchNorm1d(6).double()
    params = {"w": normal(6, 3), **{f"norm.{name}": value for name, value in norm.named_parameters()}}

    def losses(p: dict[str, Tensor], batch: tuple[Tensor, bool]) -> Tensor:
        x, deep = batch
        h = torch.func.functional_call(norm, {"weight": p["norm.weight"], "bias": p["norm.bias"]}, (x,)) @ p["w"]
        return (h.tanh() @ p["w"].T if deep else h).square().sum(1)

    x = normal(5, 6)
    plan = there_and_back(fg.plan(losses, params, (x, False)))
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    direction, step = like(params), fg.grad_and_reduce(losses, plan=plan)
    wanted = expected(losses, params, (x, True), direction)
    out = step(params, (x, True), fg.dot(direction))
    assert_scores(out.reduced, wanted)
    assert int(norm.num_batches_tracked) == int(before["num_batches_tracked"]) + 1  # type: ignore[arg-type]
    assert torch.allclose(norm.running_mean, 0.9 * before["running_mean"] + 0.1 * x.mean(0))  # type: ignore[arg-type]


def test_a_raising_run_leaves_no_trace() -> None:
    module = nn.BatchNorm1d(6).double()
    failing = False

    def losses(p: dict[str, Tensor], x: Tensor) -> Tensor:
        out = torch.func.functional_call(module, p, (x,)).square().sum(1)
        if failing:
            raise KeyError("mine")
        return out

    params, x = dict(module.named_parameters()), normal(5, 6)
    step = fg.grad_and_reduce(losses, plan=there_and_back(fg.plan(losses, params, x)))
    failing = True
    with pytest.raises(KeyError, match="mine"):
        step(params, x, fg.dot(like(params)))
    assert int(module.num_batches_tracked) == 0  # type: ignore[arg-type]
    assert not bool(module.running_mean.any())  # type: ignore[union-attr]


@compiles
def test_compiling_finds_the_tensors_that_a_text_does_not_hold() -> None:
    torch._dynamo.reset()
    losses, params, batch = tied_embedding()  # closes over a buffer
    plan = fg.plan(losses, params, batch)
    read = there_and_back(plan)
    assert (len(plan.captured or ()), read.captured) == (1, None)
    compiled, direction = torch.compile(fg.reduce(losses, plan=read), fullgraph=True, backend="aot_eager"), like(params)
    assert_scores(compiled(params, batch, fg.dot(direction)), expected(losses, params, batch, direction))


@compiles
def test_a_plan_without_captured_tensors_compiles() -> None:
    torch._dynamo.reset()
    losses, params, batch = mlp()
    compiled = torch.compile(
        fg.reduce(losses, plan=there_and_back(fg.plan(losses, params, batch))), fullgraph=True, backend="aot_eager"
    )
    direction = like(params)
    assert_scores(compiled(params, batch, fg.dot(direction)), expected(losses, params, batch, direction))


def test_a_plan_read_back_traces_with_make_fx() -> None:
    losses, params, batch = tied_embedding()
    plan, direction = there_and_back(fg.plan(losses, params, batch)), like(params)
    score = fg.reduce(losses, plan=plan)
    traced = make_fx(lambda tokens: score(params, (tokens,), fg.dot(direction)))(batch[0])
    other = rows()
    assert_scores(traced(other[0]), expected(losses, params, other, direction))


def test_a_plan_read_back_runs_on_the_meta_device() -> None:
    module = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    losses = fg.module_losses(module, lambda out, _: out.square().sum(1))
    plan = there_and_back(fg.plan(losses, dict(module.named_parameters()), torch.randn(4, 6)))
    params = dict(module.to("meta").named_parameters())
    out = fg.grad_and_reduce(losses, plan=plan)(params, torch.empty(4, 6, device="meta"), fg.dot(like(params)))
    assert out.reduced.device.type == "meta"


def test_a_plan_of_another_model_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    _, params, x = mlp()
    plan = there_and_back(fg.plan(lambda p, x: (x @ p["0.weight"].T).sum(1), params, x))
    losses, direction = mlp()[0], like(params)
    with caplog.at_level(logging.INFO, "funcghost"):
        scores = fg.reduce(losses, plan=plan)(params, x, fg.dot(direction))
    assert_scores(scores, expected(losses, params, x, direction))
    assert "does not fit" in caplog.text


# -- versions and damage -----------------------------------------------------------------------


@pytest.mark.parametrize("package", ["torch", "funcghost"])
def test_a_plan_of_another_version_is_verified_once(package: str, caplog: pytest.LogCaptureFixture) -> None:
    losses, params, batch = mlp()
    plan = fg.plan(losses, params, batch)
    text = json.dumps(json.loads(plan.to_json()) | {package: "0.0.1"})
    read = fg.Plan.from_json(text)
    assert not read.verified
    assert not read.sizes
    assert replace(read, verified=True, sizes=plan.sizes) == plan
    score, direction = fg.reduce(losses, plan=read), like(params)
    wanted = expected(losses, params, batch, direction)
    with caplog.at_level(logging.INFO, "funcghost"):
        assert_scores(score(params, batch, fg.dot(direction)), wanted)
    assert "planned" not in caplog.text
    bound: Any = score
    assert bound.__self__.plans == [plan]


def test_a_wrong_plan_of_another_version_is_found_out() -> None:
    losses, params, batch = token_major()
    plan = fg.plan(losses, params, batch)
    wrong: dict[Any, Any] = {Layout(0, "low"): Layout(0, "high")}
    sites = tuple(replace(s, layouts=tuple(wrong.get(x, x) for x in s.layouts)) for s in plan.sites)
    assert sites != plan.sites
    text = json.dumps(json.loads(replace(plan, sites=sites).to_json()) | {"torch": "0.0.1"})
    direction = like(params)
    found = fg.reduce(losses, plan=fg.Plan.from_json(text))(params, batch, fg.dot(direction))
    assert_scores(found, expected(losses, params, batch, direction))


def change(path: str, value: Any, *, signed: bool = True) -> Callable[[dict[str, Any]], Any]:
    """Puts a value into the text; `signed`: with a checksum that fits it."""

    def changed(whole: dict[str, Any]) -> dict[str, Any]:
        *parents, last = path.split(".")
        place: Any = whole
        for key in parents:
            place = place[int(key) if key.isdecimal() else key]
        place[int(last) if last.isdecimal() else last] = value
        return whole | ({"checksum": _checksum(whole["plan"])} if signed else {})

    return changed


DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another format": (change("format", 2), "has format 2"),
    "no format": (lambda whole: {"plan": whole["plan"]}, "no format"),
    "no plan": (change("plan", 3, signed=False), "no format and plan"),
    "no object": (lambda whole: [whole], "no format and plan"),
    "an extra key": (lambda whole: whole | {"more": 1}, "checksum"),
    "changed by hand": (change("plan.batch", 5, signed=False), "was changed"),
    "a layout changed by hand": (change("plan.sites.0.layouts.0.axis", 1, signed=False), "was changed"),
    "no checksum": (lambda whole: {k: v for k, v in whole.items() if k != "checksum"}, "checksum"),
    "a batch that is no number": (change("plan.batch", "4"), r"plan\.batch must be int, found '4'"),
    "a boolean for a number": (change("plan.batch", True), r"plan\.batch must be int, found True"),
    "a number for a boolean": (change("plan.verified", 1), r"plan\.verified must be bool"),
    "sites that are no list": (change("plan.sites", {}), r"plan\.sites must be a list"),
    "a site that is none": (change("plan.sites.0", 1), r"plan\.sites\[0\] must be an object"),
    "an unknown field": (change("plan.more", 1), "plan must be an object with the keys"),
    "an unknown action": (change("plan.sites.0.action", "tip"), r"plan\.sites\[0\]\.action must be one of"),
    "an unknown way": (change("plan.sites.0.way", "by hand"), r"plan\.sites\[0\]\.way must be"),
    "an unknown layout": (change("plan.sites.0.layouts.0", "lost"), r"plan\.sites\[0\]\.layouts\[0\]"),
    "an unknown fold": (change("plan.sites.0.layouts.0.fold", "odd"), r"layouts\[0\]\.fold must be one of"),
    "a dtype that is none": (change("plan.precision", "float31"), r"plan\.precision must be a dtype"),
    "an axis of three numbers": (change("plan.axes", [[0, 0, 0]]), r"plan\.axes\[0\] must be 2 items"),
    "a capture that is no boolean": (change("plan.captures", None), "captures must be bool"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_text_is_refused(name: str) -> None:
    damage, message = DAMAGED[name]
    whole = json.loads(fg.plan(*mlp()).to_json())
    with pytest.raises(fg.PlanError, match=message) as raised:
        fg.Plan.from_json(json.dumps(damage(whole)))
    assert "fg.plan(...).to_json()" in str(raised.value)


@pytest.mark.parametrize("text", ["", "{", "null", "3", "[]", '"plan"', "{}", None, b"\xff"])
def test_what_is_no_plan_is_refused(text: Any) -> None:
    with pytest.raises(fg.PlanError, match="the text is not a plan"):
        fg.Plan.from_json(text)


# -- the codec ---------------------------------------------------------------------------------

LAYOUTS = st.builds(Layout, st.integers(0, 5), st.sampled_from(["whole", "high", "low", "single"]))
ROWS = st.builds(Rows, st.integers(0, 5), st.integers(0, 99), st.integers(0, 3))
NUMBERS = st.lists(st.integers(0, 9), max_size=3).map(tuple)
SITES = st.builds(
    Site,
    st.text(max_size=9),
    NUMBERS,
    st.sampled_from(["tap", "carry", "skip"]),
    st.lists(LAYOUTS | ROWS | st.sampled_from(["unused", "constant", "carried"]), max_size=3).map(tuple),
    st.lists(st.text(max_size=5), max_size=3).map(tuple),
    st.lists(NUMBERS, max_size=3).map(tuple),
    NUMBERS,
    st.booleans(),
    st.sampled_from(["rule", "forward", "transpose", None]),
    st.integers(0, 2**70),
    st.integers(0, 2**70),
)
MOVED = st.builds(
    Moved,
    st.integers(0, 99),
    st.text(max_size=9),
    NUMBERS,
    st.lists(LAYOUTS | ROWS, max_size=3).map(tuple),
    st.lists(LAYOUTS | ROWS | st.just("unused"), max_size=3).map(tuple),
    st.booleans(),
)
PLANS = st.builds(
    fg.Plan,
    st.lists(SITES, max_size=3).map(tuple),
    st.integers(0, 2**40),
    st.integers(-(2**63), 2**63 - 1),
    st.builds(Verified, st.frozensets(st.integers(-(2**63), 2**63 - 1), max_size=4)),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=3).map(tuple),
    st.booleans(),
    st.lists(MOVED, max_size=2).map(tuple),
)


@given(PLANS)
def test_any_plan_is_read_back_equal(plan: fg.Plan) -> None:
    again = there_and_back(plan)
    assert again == plan
    assert again.to_json() == plan.to_json()


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_any_other_value_is_refused(value: Any) -> None:
    with pytest.raises(MalformedError):
        decode(fg.Plan, value)


def test_every_dtype_has_a_name() -> None:
    for name, dtype in DTYPES.items():
        if str(dtype) == f"torch.{name}":
            assert decode(torch.dtype, encode(dtype)) is dtype
    assert plans.FORMAT == 1
