"""Facts beside the verdict: mixing, samples drawn, state, the report."""

import importlib.util
import io
import json
import random
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcghost as fg
from funcghost import progress
from funcghost.checking import compare
from funcghost.engine.run import run
from funcghost.options import Options
from tests.models.checked import Made, Params, all_but_the_first, named, net, normal, of_module

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
    assert list(progress.progress("abcd", "letters", "glyphs")) == list("abcd")
    lines = [line.strip() for line in shown.getvalue().split("\r")]
    assert lines[1].startswith("letters: 3 of 4 glyphs, 0.8 a second, ")
    assert lines[1].endswith(" left")
    assert lines[-2:] == ["", ""]  # it is gone


def test_a_cell_of_a_notebook_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not progress.watched()
    for kernel in (True, False):
        shell = SimpleNamespace(**({"kernel": object()} if kernel else {}))
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda shell=shell: shell))
        assert progress.watched() == kernel


def test_a_line_in_a_log_now_and_then(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    times: Iterator[int] = iter(range(0, 1000, 4))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))  # type: ignore[attr-defined]
    with caplog.at_level("INFO", "funcghost"):
        assert list(progress.progress("abcdefgh", "letters", "glyphs")) == list("abcdefgh")
    assert 1 < len(caplog.messages) < 8
    assert caplog.messages[0].startswith("letters: ")
    assert " of 8 glyphs, " in caplog.messages[0]


@pytest.mark.skipif(importlib.util.find_spec("tqdm") is None, reason="needs tqdm")
def test_a_bar_by_tqdm_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = terminal(monkeypatch)
    assert list(progress.progress("abcd", "letters", "glyphs")) == list("abcd")
    assert not shown.getvalue().strip()
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    assert list(progress.progress("abcd", "letters", "glyphs")) == list("abcd")
    assert "letters" in shown.getvalue()


def test_no_bar_where_nobody_looks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    assert fg.check(*net()).ok
    assert capsys.readouterr() == ("", "")
