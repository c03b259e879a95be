"""Tutorials run as they are, and their claims hold."""

import runpy
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).resolve().parents[2] / "examples").glob("tutorial_*.py"))
LAST_WORDS = {
    "value_data": "report.html: ",
    "select_online": "test accuracy: ",
    "score_corpus": "refused: ",
    "find_mislabelled": "of the 16 most suspicious",
    "influence": "most influential documents, ",
    "clip_privately": "test accuracy ",
    "own_reducer": "per norm: ",
    "many_gpus": "rank 0 of 1: ",
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem.removeprefix("tutorial_"))
def test_a_tutorial_runs(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script), run_name="__main__")
    assert LAST_WORDS[script.stem.removeprefix("tutorial_")] in capsys.readouterr().out.splitlines()[-1]
    assert not list(tmp_path.iterdir())
