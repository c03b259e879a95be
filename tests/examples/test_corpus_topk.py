"""The example that asks a corpus, at a size for tests."""

from pathlib import Path

import pytest

import corpus_topk
from funcghost import corpus

SMALL = ["--steps", "60", "--documents", "20", "--context", "64", "--width", "32", "--dim", "1024"]


def test_the_nearest_documents_are_the_copies_and_their_package(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    summary = corpus_topk.main([*SMALL, "--out", str(out)])
    assert summary.copies_first
    assert summary.enrichment > 1.5
    assert summary.agreement >= 0.95
    assert len(corpus.open(out)) == summary.documents
    assert f"{summary.enrichment:.1f}x" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        corpus_topk.main([*SMALL, "--out", str(out)])
    assert "exists; pass --overwrite" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        corpus_topk.main([*SMALL, "--out", str(tmp_path), "--overwrite"])
    assert "holds something that is no store" in capsys.readouterr().err
    assert out.exists()
