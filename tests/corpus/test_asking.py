"""A store asked: the best, the nearest, exact scores anew, several stores as one, and whether it still holds."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

import funcghost as fg
from funcghost import corpus
from funcghost.corpus import asking
from funcghost.store import vectors
from funcghost.store.files import checksum
from tests.corpus.stores import stored
from tests.depth import fewer
from tests.models.corpora import COUNT, collate, losses_of, make, reducers_of, samples


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus") / "run"
    make(out)
    return out


NUMBERS = st.sampled_from([-np.inf, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, np.inf, np.nan])


FEWER = fewer(2)


@FEWER
@given(arrays.arrays(np.float32, st.integers(1, 12), elements=NUMBERS), st.integers(1, 15), st.booleans())
def test_top_is_the_head_of_a_stable_sort(
    tmp_path_factory: pytest.TempPathFactory, values: Any, k: int, largest: bool
) -> None:
    found = stored(tmp_path_factory.mktemp("top") / "run", values, np.zeros((len(values), 1), np.float32))
    signed = values if largest else -values
    order = [place for place in np.argsort(-signed, kind="stable") if not np.isnan(values[place])][:k]
    hits = found.top(k, largest=largest)
    assert hits.positions.tolist() == hits.ids.tolist() == order
    np.testing.assert_array_equal(hits.values, values[order])


@FEWER
@given(
    arrays.arrays(np.float32, st.tuples(st.integers(1, 12), st.just(3)), elements=st.integers(-3, 3)),
    arrays.arrays(np.float32, st.tuples(st.integers(1, 3), st.just(3)), elements=st.integers(-3, 3)),
    st.integers(1, 15),
    st.booleans(),
)
def test_nearest_is_exact(
    tmp_path_factory: pytest.TempPathFactory, vectors: Any, queries: Any, k: int, normalised: bool
) -> None:
    found = stored(tmp_path_factory.mktemp("near") / "run", np.zeros(len(vectors)), vectors, part=5)
    values = queries.astype(np.float64) @ vectors.T
    if normalised:
        norms = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(vectors, axis=1)
        values = np.divide(values, norms, out=np.full_like(values, np.nan), where=norms > 0)
        values[np.linalg.norm(queries, axis=1) == 0] = np.where(np.linalg.norm(vectors, axis=1) > 0, 0.0, np.nan)
    saved, asking.BLOCK = asking.BLOCK, 24  # two vectors
    try:
        hits = found.nearest(torch.from_numpy(queries), k, normalised=normalised)
    finally:
        asking.BLOCK = saved
    for query, row in enumerate(values):
        wanted = np.sort(row[~np.isnan(row)])[::-1][:k]
        np.testing.assert_allclose(hits.values[query], wanted, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(row[hits.positions[query]], wanted, rtol=1e-6, atol=1e-6)
        if not normalised:
            assert hits.positions[query].tolist() == np.argsort(-row, kind="stable")[:k].tolist()


def test_vectors_are_not_copied_and_torch_takes_them(whole: Path) -> None:
    found = corpus.open(whole)
    (_, block), *_ = found.vectors()
    assert not block.flags.owndata
    tensor = torch.from_numpy(block)  # a warning would be an error here
    assert tensor.data_ptr() == block.ctypes.data
    before = block[0, 0]
    block[0, 0] = 99.0  # pages of this process alone
    assert next(found.vectors())[1][0, 0] == before


def test_ids_and_positions(tmp_path: Path) -> None:
    found = stored(tmp_path / "run", np.arange(4.0), np.eye(4, dtype=np.float32), ids=["d", "c", "b", "a"])
    assert found.top(1).ids.tolist() == ["a"]
    assert found.position("b") == 2
    assert found.nearest(np.array([0, 1, 0, 0]), 1).ids.tolist() == ["c"]
    with pytest.raises(fg.InputError, match="no sample has the id 'e'"):
        found.position("e")


@pytest.mark.parametrize(
    ("ask", "complaint"),
    [
        (lambda c: c.top(0, "norm"), "k: must be"),
        (lambda c: c.top(1), "column: must be one of"),
        (lambda c: c.top(1, "no"), "column: must be one of"),
        (lambda c: c.column("no"), "column: must be one of"),
        (lambda c: c.nearest(np.ones(3), 1), r"query: must be \[48\]"),
        (lambda c: c.nearest(np.full(48, np.nan), 1), "of finite numbers"),
        (lambda c: c.nearest(np.ones(48), 1, projection="no"), "projection: must be one of"),
        (lambda c: c.vector(COUNT), "position: must be"),
    ],
)
def test_bad_questions_are_refused(whole: Path, ask: Any, complaint: str) -> None:
    with pytest.raises(fg.InputError, match=complaint):
        ask(corpus.open(whole))


def test_rescore_gives_exact_scores_in_their_order(whole: Path) -> None:
    losses, params = losses_of()
    gradient = torch.func.grad(lambda p: losses(p, collate([samples()[4]])).sum())(params)
    found = corpus.open(whole)
    near = found.nearest(found.vector(4), 8)
    assert near.positions[0] == 4
    hits = corpus.rescore(losses, params, samples(), fg.dot(gradient), near, batch_size=3, collate=collate)
    assert sorted(hits.positions) == sorted(near.positions)
    assert (np.diff(hits.values) <= 0).all()
    exact = fg.reduce(losses)(params, collate(samples()), fg.dot(gradient)).numpy()
    np.testing.assert_allclose(hits.values, exact[hits.positions], rtol=1e-4, atol=1e-4)
    with pytest.raises(fg.InputError, match="must be of one query"):
        corpus.rescore(losses, params, samples(), fg.dot(gradient), found.nearest(np.ones((2, 48)), 2))
    with pytest.raises(fg.InputError, match="fewer than the position"):
        corpus.rescore(losses, params, samples()[:1], fg.dot(gradient), near, collate=collate)
    with pytest.raises(fg.InputError, match="a number for each sample"):
        corpus.rescore(losses, params, samples(), fg.project(3), near, collate=collate)
    with pytest.raises(fg.InputError, match="data set with positions"):
        corpus.rescore(losses, params, iter(samples()), fg.dot(gradient), near)


def named(sample: Tensor) -> str:
    return "-".join(map(str, sample.tolist()))


def test_merged_stores_are_the_whole(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole", ids=named).corpus
    first = make(tmp_path / "first", data=samples()[:10], ids=named)
    second = make(tmp_path / "second", data=samples()[10:], ids=named)
    paths = [first.corpus.store.folder, second.corpus.store.folder]
    found = corpus.merge(tmp_path / "merged", paths)
    assert found.ids().tolist() == whole.ids().tolist()
    # The batches of the halves are others: float32 rounds otherwise in them.
    np.testing.assert_allclose(found.column("norm"), whole.column("norm"), rtol=1e-5)
    np.testing.assert_allclose(found.vector(15), whole.vector(15), rtol=0, atol=1e-5 * abs(whole.vector(15)).max())
    assert corpus.merge(tmp_path / "merged", paths).table().equals(found.table())  # nothing is left to do
    with pytest.raises(fg.InputError, match="ids are there twice"):
        corpus.merge(tmp_path / "again", [paths[0], paths[0]])
    _, params = losses_of()
    other = make(tmp_path / "other", reducers={**reducers_of(params), "sketch": fg.project(48, seed=3)}, ids=named)
    with pytest.raises(fg.StoreError, match=r"holds something else: reducers\.sketch"):
        corpus.merge(tmp_path / "mixed", [paths[0], other.corpus.store.folder])
    with pytest.raises(fg.InputError, match="one or more stores"):
        corpus.merge(tmp_path / "none", [])


def test_verify_reads_everything_and_computes_some_anew(tmp_path: Path, whole: Path) -> None:
    losses, params = losses_of()
    done = corpus.verify(whole, losses, params, samples(), reducers_of(params), count=3, collate=collate)
    assert (done.parts, done.samples, done.complete, done.recomputed) == (3, COUNT, True, 3)
    assert 0 < done.worst < 1e-4
    moved = {name: value * 1.01 for name, value in params.items()}
    with pytest.raises(fg.StoreError, match="holds something else"):
        corpus.verify(whole, losses, moved, samples(), reducers_of(params), collate=collate)
    with pytest.raises(fg.StoreError, match=r"the sample at 0 has other values than are kept"):
        corpus.verify(whole, losses, params, samples()[::-1], reducers_of(params), collate=collate)


def test_verify_tells_what_is_no_number_from_what_is(tmp_path: Path) -> None:
    def losses(params: Any, batch: Tensor) -> Tensor:
        return (batch @ params["w"]) ** 2

    params, data = {"w": torch.ones(2)}, torch.tensor([[1.0, 2.0], [torch.nan, 1.0], [3.0, torch.inf], [1.0, 1.0]])
    reducers = {"norm": fg.squared_norm()}
    corpus.score(losses, params, data, reducers, tmp_path / "run")
    assert corpus.verify(tmp_path / "run", losses, params, data, reducers).worst < 1e-6
    corpus.score(losses, params, 1e3 * data, reducers, tmp_path / "half", dtype="float16")  # the last one is too large
    corpus.verify(tmp_path / "half", losses, params, 1e3 * data, reducers)
    for row in range(4):
        other = data.clone()
        other[row] = 5.0
        with pytest.raises(fg.StoreError, match=f"the sample at {row} has other values"):
            corpus.verify(tmp_path / "run", losses, params, other, reducers)


@pytest.mark.parametrize("way", ["flip", "cut", "gone", "swap"])
def test_damaged_vectors_are_an_error(tmp_path: Path, whole: Path, way: str) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    first, second, *_ = sorted((out / "vectors" / "sketch").iterdir())
    content = bytearray(first.read_bytes())
    if way == "flip":
        content[len(content) // 2] ^= 1
        first.write_bytes(content)
    elif way == "cut":
        first.write_bytes(content[:-700])
    elif way == "gone":
        first.unlink()
    else:
        shutil.copy(second, first)
    for ask in (lambda: corpus.verify(out), lambda: corpus.open(out).nearest(np.ones(48), 3)):
        with pytest.raises(fg.StoreError):
            ask()
    assert len(corpus.open(out).column("norm")) == COUNT


def test_a_file_that_changes_is_checked_again(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a store that is open each file is held to its checksum once, and again when it was written to."""
    shutil.copytree(whole, tmp_path / "run")
    found, sums = corpus.open(tmp_path / "run"), list[int]()

    def counted(content: Any) -> str:
        sums.append(len(content))
        return checksum(content)

    monkeypatch.setattr(vectors, "checksum", counted)
    first, again = found.nearest(np.ones(48), 3), found.nearest(np.ones(48), 3)
    assert first.values.tolist() == again.values.tolist()
    assert len(sums) == 3
    path = next((tmp_path / "run" / "vectors" / "sketch").iterdir())
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"?")
    with pytest.raises(fg.StoreError, match="is damaged"):
        found.nearest(np.ones(48), 3)


def test_a_lost_part_in_the_middle_is_said(tmp_path: Path, whole: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    part = corpus.open(whole).store.parts()[1]
    (tmp_path / "run" / "values" / part.name("parquet")).unlink()
    with pytest.raises(fg.StoreError, match="the samples from 8 to 16 are missing"):
        corpus.verify(tmp_path / "run")
    with pytest.raises(fg.StoreError, match="13 samples are there, and not all"):
        corpus.open(tmp_path / "run")
