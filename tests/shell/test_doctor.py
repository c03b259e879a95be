"""`python -m funcghost doctor`: what it finds here, and that it sees what is wrong."""

import json
from importlib import metadata
from typing import Any

import pytest
import torch

import funcghost as fg
from funcghost.shell import doctors
from funcghost.shell.main import main


def test_what_is_here_is_listed_and_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    assert found["versions"]["torch"] == torch.__version__
    packages = {package["name"]: package for package in found["packages"]}
    assert packages["torch"]["extras"] == []
    assert packages["pyarrow"]["found"] == metadata.version("pyarrow")
    assert packages["pyarrow"]["extras"]
    assert found["devices"][0]["device"] == "cpu"
    assert len(found["devices"]) == 1 + torch.accelerator.device_count()


def test_what_lacks_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["torch>=999.0", "nowhere-at-all>=1.2; extra == 'some'", "funcghost[some]; extra == 'all'"]
    monkeypatch.setattr(
        metadata, "requires", lambda _: [*lines, "nowhere-at-all>=1.2; extra == 'all'", "a; extra == 'all'"]
    )
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "none             some, all: pip install 'funcghost[some]'" in said
    assert f"{metadata.version('torch')} (old)" in said  # which names no build, as `torch.__version__` may
    assert "cpu (" in said
    assert said.rstrip().endswith("exact")


def test_a_folder_on_the_path_has_no_extras(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(_: str) -> Any:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "requires", missing)
    assert main(["doctor"]) == 0
    assert "not installed" in capsys.readouterr().out


def test_wrong_numbers_and_broken_devices_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctors, "_devices", lambda: [torch.device("meta"), torch.device("cpu")])
    fg.register_rule(torch.nn.functional.layer_norm, linear=[["weight"], ["bias"]])  # only together they are
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [device["ok"] for device in found["devices"]] == [False, False]
    assert all(device["error"] for device in found["devices"])
