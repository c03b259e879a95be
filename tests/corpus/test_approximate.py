"""An index of faiss: its values are exact, and what it misses is measured. Runs where faiss is installed."""

import sys
from typing import Any

import numpy as np
import pytest
import torch

import funcghost as fg
from funcghost import corpus
from tests.corpus.stores import stored

DIM, COUNT = 16, 600


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> corpus.Corpus:
    random = np.random.default_rng(0)
    vectors = random.standard_normal((COUNT, DIM)).astype(np.float32)
    vectors[7] = 0
    own = [f"id {number}" for number in range(COUNT)]
    return stored(tmp_path_factory.mktemp("approximate") / "run", np.zeros(COUNT), vectors, part=250, ids=own)


@pytest.mark.parametrize("normalised", [False, True])
def test_values_are_exact_and_the_recall_is_that_of_the_exact_answer(found: corpus.Corpus, normalised: bool) -> None:
    pytest.importorskip("faiss")
    index = corpus.approximate(found, normalised=normalised, kind="IVF8,Flat", probes=2, queries=40, k=5)
    assert (index.measured, index.k) == (40, 5)
    assert 0.2 < index.recall < 0.95  # two lists of eight
    every = corpus.approximate(found, normalised=normalised, kind="IVF8,Flat", probes=8)
    assert every.recall == 1.0
    queries = torch.randn(3, DIM)
    exact = found.nearest(queries, COUNT - 1, normalised=normalised)
    hits, whole = index.nearest(queries, 6), every.nearest(queries, 6)
    np.testing.assert_array_equal(whole.positions, exact.positions[:, :6])
    np.testing.assert_array_equal(whole.ids, exact.ids[:, :6])
    for row in range(3):
        values = dict(zip(exact.positions[row].tolist(), exact.values[row], strict=True))
        wanted = [values[position] for position in hits.positions[row].tolist()]
        np.testing.assert_allclose(hits.values[row], wanted, rtol=1e-5, atol=1e-6)
        assert (np.diff(hits.values[row]) <= 0).all()
    assert index.nearest(queries[0], 1).ids.shape == (1,)


def test_few_vectors_are_all_looked_at(found: corpus.Corpus) -> None:
    pytest.importorskip("faiss")
    assert corpus.approximate(found).recall > 0.99  # eight bits propose, exact products choose


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"projection": "no"}, "projection: must be one of"),
        ({"probes": 0}, "probes: must be an integer"),
        ({"kind": "NoSuch7"}, "faiss refuses 'NoSuch7'"),
    ],
)
def test_bad_indices_are_refused(found: corpus.Corpus, change: dict[str, Any], complaint: str) -> None:
    pytest.importorskip("faiss")
    with pytest.raises(fg.InputError, match=complaint):
        corpus.approximate(found, **change)
    with pytest.raises(fg.InputError, match="query: must be"):
        corpus.approximate(found).nearest(np.ones(3), 1)


def test_without_faiss_it_says_what_to_install(found: corpus.Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)  # importing it fails
    with pytest.raises(fg.InputError, match=r"pip install 'funcghost\[faiss\]'"):
        corpus.approximate(found)
