"""Projected attribution over a store is that in memory, however the data set is cut."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import funcghost as fg
from funcghost import corpus
from funcghost.attribution import comparing, projected
from funcghost.attribution.features import Features, Moved, Scaled, Sided, Trak
from tests.naive import assert_close

D = torch.float64
SOURCE = torch.Generator().manual_seed(3)
PARAMS, FIRST, SECOND = (
    {k: torch.randn(shape, generator=SOURCE, dtype=D) for k, shape in (("a", (4, 3)), ("b", (4,)))} for _ in range(3)
)
SECOND = {k: leaf.square() + 0.1 for k, leaf in SECOND.items()}
X, Y = torch.randn(14, 3, generator=SOURCE, dtype=D), torch.randint(0, 4, (14,), generator=SOURCE)
DATA = list(zip(X[:11], Y[:11], strict=True))
TRAIN, QUERIES = [(X[:11], Y[:11])], [(X[11:], Y[11:])]


def losses(params: Any, batch: Any) -> Tensor:
    return F.cross_entropy(F.linear(batch[0], params["a"], params["b"]), batch[1], reduction="none")


def stored(of: Features, out: Path, **more: Any) -> corpus.Corpus:
    return corpus.keep(of, PARAMS, DATA, out, batch_size=3, part=4, dtype="float64", progress=False, **more)


def test_scores_from_stores_are_those_in_memory(tmp_path: Path) -> None:
    def pair(of: Features, asking: Features | None = None) -> tuple[Any, Any]:
        folder = tmp_path / type(of).__name__
        assert stored(of, folder).complete
        return corpus.kept(folder), (asking or of).all(PARAMS, QUERIES, "queries")

    moments: Any = {"first": FIRST, "second": SECOND, "step": 3}
    plain = Scaled(losses, 8)
    found = {
        "trak": comparing.trak([pair(Trak(losses, 8))], 0.1),
        "less": comparing.cosines([(*pair(Moved(losses, 8, **moments), plain), 0.2)]),
        "trackstar": comparing.whitened_cosines(*pair(Scaled(losses, 8, second=SECOND))),
        "logra": comparing.by_blocks(*pair(Sided(losses, 8))),
    }
    wanted = {
        "trak": projected.trak(losses, 8, damping=0.1)([PARAMS], TRAIN, QUERIES),
        "less": projected.less(losses, 8)([(PARAMS, FIRST, SECOND, 3, 0.2)], TRAIN, QUERIES),
        "trackstar": projected.trackstar(losses, 8)(PARAMS, TRAIN, QUERIES, SECOND),
        "logra": projected.logra(losses, 8)(PARAMS, TRAIN, QUERIES),
    }
    for name, scores in found.items():
        assert scores.shape == (11, 3)
        assert_close(scores, wanted[name], 1e-9)


def test_other_settings_are_refused(tmp_path: Path) -> None:
    stored(Trak(losses, 8), tmp_path / "trak")
    stored(Trak(losses, 8), tmp_path / "trak")
    for other in (Trak(losses, 8, 1), Trak(losses, 9), Sided(losses, 8)):
        with pytest.raises(fg.StoreError, match="something else"):
            stored(other, tmp_path / "trak")
    moments: dict[str, Any] = {"first": FIRST, "second": SECOND, "step": 3}
    stored(Moved(losses, 8, **moments), tmp_path / "moved")
    for change in ({"step": 4}, {"second": FIRST}, {"betas": (0.8, 0.9)}):
        with pytest.raises(fg.StoreError, match="features"):
            stored(Moved(losses, 8, **(moments | change)), tmp_path / "moved")
    with pytest.raises(fg.InputError, match="takes features"):
        corpus.keep(losses, PARAMS, DATA, tmp_path / "none")  # type: ignore[arg-type]
    with pytest.raises(fg.InputError, match="must have 'phi'"):
        comparing.trak([([{"a": X}], [{"phi": X}])])
