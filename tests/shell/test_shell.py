"""The command line for stores: what it prints, its exit status, and errors in one line."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from funcghost import corpus, store
from funcghost.shell.main import main
from tests.models.corpora import COUNT, collate, losses_of, reducers_of, samples
from tests.store.runs import write

HERE = "tests.shell.test_shell"


def factory() -> dict[str, Any]:
    losses, params = losses_of()
    return {
        **{"losses": losses, "params": params, "data": samples(), "reducers": reducers_of(params)},
        **{"batch_size": 4, "part": 8, "collate": collate},
    }


def other() -> dict[str, Any]:
    return {**factory(), "data": samples()[::-1]}


def query() -> Any:
    losses, params = losses_of()
    return losses, params, collate(samples()[:1])


def moved() -> Any:
    losses, params, batch = query()
    return losses, {name: value + 1 for name, value in params.items()}, batch


def vector() -> torch.Tensor:
    return torch.ones(48)


def wrong() -> Any:
    return {"losses": None}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shell") / "run"
    assert main(["score", f"{HERE}:factory", "--out", str(out)]) == 0
    return out


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_score_says_what_is_there(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "score", f"{HERE}:factory", "--out", str(run))
    assert found["samples"] == COUNT
    assert found["scored_now"] == 0
    assert found["complete"] is True
    assert found["projections"] == {"sketch": 48}


def test_top_and_nearest_are_those_of_the_library(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = corpus.open(run)
    top = printed(capsys, "top", str(run), "--column", "norm", "--k", "3", "--smallest")
    assert [row["id"] for row in top] == found.top(3, "norm", largest=False).ids.tolist()
    near = printed(capsys, "nearest", str(run), "--query", "5", "--cosine", "--k", "4")
    assert [row["id"] for row in near] == found.nearest(found.vector(5), 4, normalised=True).ids.tolist()
    asked = printed(capsys, "nearest", str(run), "--query", f"{HERE}:query", "--k", "4")
    np.testing.assert_allclose(
        [row["value"] for row in asked], found.nearest(found.vector(0), 4).values, rtol=1e-4, atol=1e-4
    )
    given = printed(capsys, "nearest", str(run), "--query", f"{HERE}:vector", "--k", "1")
    assert given[0]["id"] == found.nearest(np.ones(48), 1).ids[0]
    assert main(["top", str(run), "--column", "norm"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 10


def test_verify(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "verify", str(run), f"{HERE}:factory", "--count", "2")
    assert (found["samples"], found["recomputed"], found["complete"]) == (COUNT, 2, True)
    write(tmp_path / "record")
    assert printed(capsys, "verify", str(tmp_path / "record"))["steps"] == 5
    shutil.copytree(run, tmp_path / "damaged")
    part = next((tmp_path / "damaged" / "vectors" / "sketch").iterdir())
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    assert main(["verify", str(tmp_path / "damaged")]) == 1
    assert "is damaged" in capsys.readouterr().err


def test_report(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "report", str(run), "--column", "norm")
    assert found == {"out": str(run / "report.html"), "rows": COUNT, "items": COUNT, "column": "norm"}
    write(tmp_path / "record")
    page = tmp_path / "page.html"
    arguments = ["--group", "domain", "--out", str(page), "--column", "first", "--texts", f"{HERE}:texts"]
    assert main(["report", str(tmp_path / "record"), *arguments]) == 0
    text = page.read_text(encoding="utf-8")
    assert "domain 1" in text
    assert "Over steps" in text
    assert "&lt;the text&gt; of" in text


def test_a_corpus_is_reported_by_group(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert main(["report", str(run), "--column", "norm", "--groups", f"{HERE}:groups", "--out", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    for name, rows in (("even &lt;b&gt;", 6), ("odd", 5), ("no group", 10)):
        assert f"<td>{name}</td><td>{rows}</td>" in text


def groups() -> dict[Any, str]:
    """For numbers and for strings, and not for all."""
    return {0: "even <b>", 1: "odd"} | {str(k): "odd" if k % 2 else "even <b>" for k in range(2, 11)}


def test_a_reader_that_has_had_enough_gets_no_traceback(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    with os.fdopen(theirs, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["top", str(run), "--column", "norm"]) == 1
    assert capsys.readouterr().err == ""


def texts() -> Any:
    class Texts(dict[Any, str]):
        def get(self, key: Any, default: Any = None) -> Any:
            return f"<the text> of {key}"

    return Texts()


@pytest.mark.parametrize(
    ("arguments", "status", "complaint"),
    [
        (["score", f"{HERE}:wrong", "--out", "x"], 2, "missing ['params', 'data', 'reducers']"),
        (["score", "nowhere:factory", "--out", "x"], 2, "there is no module 'nowhere'"),
        (["top", "missing"], 1, "missing: must be a store of funcghost"),
        (["top", "RUN"], 2, "column: must be one of"),
        (["top", "RUN", "--column", "no"], 2, "column: must be one of"),
        (["nearest", "RUN", "--query", "word"], 2, "ids are numbers in this store"),
        (["nearest", "RUN", "--query", "99"], 2, "no sample has the id 99"),
        (["nearest", "RUN", "--query", f"{HERE}:moved"], 1, "has other parameters"),
        (["report", "RUN", "--column", "no"], 2, "column: must be one of"),
        (["report", "RUN", "--group", "id", "--groups", f"{HERE}:groups"], 2, "from a column or by item, found both"),
        (["score", f"{HERE}:other", "--out", "RUN"], 0, ""),
        (["verify", "RUN", f"{HERE}:other"], 1, "has other values than are kept"),
    ],
)
def test_errors_are_one_line_and_a_status(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(run) if word == "RUN" else word for word in arguments]) == status
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("funcghost ")]
    assert len(errors) == (status != 0)
    assert complaint in "".join(errors)
    assert list(tmp_path.iterdir()) == []


def test_a_record_is_no_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with store.record(tmp_path / "run", ["value"]) as kept:
        kept.add(0, [1], {"value": [1.0]})
    assert main(["top", str(tmp_path / "run")]) == 1
    assert "must be a store of the kind 'corpus', found 'record'" in capsys.readouterr().err
