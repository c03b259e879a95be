from pathlib import Path

import pytest
import torch
from torch import Tensor

import attribution_digits
import attribution_lm
import custom_loop
import funcghost as fg
import mislabelled_digits
import online_selection
import private_digits
import prune_digits
import write_your_own_reducer
from funcghost.testing import assert_reducer_laws

PNG = b"\x89PNG\r\n\x1a\n"


def test_custom_loop_selects_to_its_advantage() -> None:
    test_loss = custom_loop.main()
    assert test_loss["selected"] < test_loss["all"]


def test_mislabelled_digits_are_found_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = tmp_path / "new" / "sheet.png"
    summary = mislabelled_digits.main(["--epochs", "8", "--out", str(sheet)])
    assert summary.flipped == 150
    assert summary.precision > 0.8
    assert sheet.read_bytes().startswith(PNG)
    assert f"AUROC               {summary.auroc:.3f}" in capsys.readouterr().out


def test_private_digits_are_learnt(capsys: pytest.CaptureFixture[str]) -> None:
    summary = private_digits.main([])
    assert summary.accuracy > 0.85
    assert summary.error < 1e-6
    assert 0.1 < summary.clipped < 0.9
    assert summary.losses[1] < summary.losses[0] / 2
    assert f"test accuracy          {summary.accuracy:.3f}" in capsys.readouterr().out


def test_digits_of_large_gradients_are_worth_more(capsys: pytest.CaptureFixture[str]) -> None:
    summary = prune_digits.main([])
    assert summary.accuracy["low"] + 0.05 < min(summary.accuracy["high"], summary.accuracy["random"])
    assert summary.effective_rank["low"] < summary.effective_rank["random"]
    assert "rank correlation of GraNd and EL2N 0.9" in capsys.readouterr().out


def test_attribution_methods_are_held_to_retraining(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smallest size and a narrow model, which run all of it and claim nothing."""
    monkeypatch.setattr(attribution_digits, "HIDDEN", 8)
    for name in ("exact, by layer", "K-FAC", "diagonal"):  # as others but for a number, or a part of EK-FAC
        monkeypatch.delitem(attribution_digits.METHODS, name)
    rows = attribution_digits.main(["--size", "tiny", "--halves", "--out", str(tmp_path / "digits")])
    assert [row.method for row in rows] == [*attribution_digits.METHODS, "unrolled, halves"]
    assert all(0 <= row.auroc <= 1 and -1 <= row.lds <= 1 and row.cost > 0 for row in rows)
    by_name = {row.method: row for row in rows}
    assert by_name["unrolled, one run"].same_run > 0.7
    assert (tmp_path / "digits" / "lds.png").read_bytes().startswith(PNG)
    assert (tmp_path / "digits" / "helped_and_harmed.png").read_bytes().startswith(PNG)
    assert "EK-FAC" in capsys.readouterr().out


def test_pieces_of_text_are_traced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("gradient cosine", "K-FAC", "diagonal"):  # tested by themselves, or a part of EK-FAC
        monkeypatch.delitem(attribution_lm.METHODS, name)
    rows = attribution_lm.main(["--size", "tiny", "--unrolled", "--out", str(tmp_path / "table.json")])
    assert [row.method for row in rows] == [*attribution_lm.METHODS, "unrolled"]
    assert all(0 <= row.recall <= 1 and 0 < row.reciprocal_rank <= 1 and row.cost > 0 for row in rows)
    assert "MRR" in capsys.readouterr().out


def test_online_selection_says_what_came_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = (
        "--seeds 1 --steps 4 --candidates 4 --validation-windows 4 --refresh 2 --documents 4 --context 16 --width 8 "
        "--layers 1 --look 1"
    )
    summary = online_selection.main(tiny.split())
    said = capsys.readouterr().out
    assert ("is at random" in said) == summary.holds
    assert ("is NOT at random" in said) == (not summary.holds)
    assert 0 < summary.trained < 1


def test_reducers_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert write_your_own_reducer.main() == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["contrast", "distances", "cosine"]


def test_reducers_of_ones_own_keep_the_laws() -> None:
    def contrast(params: dict[str, Tensor], _: int) -> fg.Reducer:
        one, other = ({name: torch.full_like(value, by) for name, value in params.items()} for by in (1.0, -0.5))
        return write_your_own_reducer.Contrast(one, other)

    assert_reducer_laws(contrast, examples=5)
    assert_reducer_laws(write_your_own_reducer.SquaredDistances(), examples=5)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--out", "taken.png"], "--out taken.png exists; pass --overwrite"),
        (["--out", "."], "--out . is a folder"),
        (["--out", "taken.png", "--overwrite", "--epochs", "0"], "--epochs: must be a whole number above zero"),
    ],
)
def test_mislabelled_digits_refuses(
    arguments: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    taken = tmp_path / "taken.png"
    taken.write_bytes(b"kept")
    with pytest.raises(SystemExit):
        mislabelled_digits.main(arguments)
    assert complaint in capsys.readouterr().err
    assert taken.read_bytes() == b"kept"
