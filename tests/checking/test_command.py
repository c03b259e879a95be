"""`python -m funcghost check` and `plan`."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import funcghost as fg
from funcghost.shell.main import main

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
            return None, (g * ctx.saved_tensors[0]).sum(0).detach() + 0 * g.sum()  # hides that it depends on g
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
