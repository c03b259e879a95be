"""A corpus scored: every number as `fg.reduce` gives it, however the data come, whoever computes, whenever it stops."""

import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import funcghost as fg
from funcghost import corpus
from tests.corpus.stores import contents
from tests.depth import fewer
from tests.models.corpora import COUNT, collate, losses_of, make, padded_collate, reducers_of, samples


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus") / "run"
    make(out)
    return out


def test_everything_equals_reduce(whole: Path) -> None:
    losses, params = losses_of()
    found = corpus.open(whole)
    assert found.columns == ["norm", "score_0", "score_1"]
    assert found.projections == {"sketch": 48}
    np.testing.assert_array_equal(found.ids(), np.arange(COUNT))
    alone = fg.reduce(losses)
    for position, sample in enumerate(samples()):
        wanted = alone(params, collate([sample]), reducers_of(params))
        for name, value in (("norm", wanted["norm"]), ("score_0", wanted["score"][:, 0])):
            assert found.column(name)[position] == pytest.approx(float(value[0]), rel=1e-4, abs=1e-5)
        np.testing.assert_allclose(found.vector(position), wanted["sketch"][0], rtol=1e-4, atol=1e-5)


class Stream:
    """Samples that come one after the other."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from samples()


def test_however_the_data_come(tmp_path: Path, whole: Path) -> None:
    losses, params = losses_of()
    wanted = corpus.open(whole)
    loader = DataLoader(TensorDataset(torch.stack(samples())), batch_size=4)
    ways: dict[str, Any] = {
        "tensor": {"data": torch.stack(samples()), "collate": collate},
        "stream": {"data": Stream(), "collate": collate},
        "generator": {"data": (sample for sample in samples()), "collate": collate},
        "loader": {"data": loader},
    }
    for name, way in ways.items():
        more = {key: value for key, value in way.items() if key != "data"}
        done = corpus.score(
            losses, params, way["data"], reducers_of(params), tmp_path / name, batch_size=4, part=8, **more
        )
        assert done.samples == COUNT
        assert done.corpus.complete
        assert done.corpus.table().equals(wanted.table()), name
        for (_, mine), (_, theirs) in zip(done.corpus.vectors(), wanted.vectors(), strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_samples_of_unlike_lengths_are_batched_by_length(tmp_path: Path) -> None:
    """Few sizes, ids of one's own, and rows in the order of the data."""
    losses, params = losses_of(padding=True)
    ragged = [sample[: 3 + (7 * k) % 9] for k, sample in enumerate(samples())]
    sizes = []

    def spy(items: Sequence[Tensor], length: int) -> Any:
        sizes.append((len(items), length))
        return padded_collate(items, length)

    done = corpus.score(
        losses,
        params,
        ragged,
        {"norm": fg.squared_norm()},
        tmp_path / "run",
        batch_size=4,
        part=12,
        collate=spy,
        length=len,
        ids=lambda sample: f"id {len(sample)} {int(sample[0])}",
    )
    assert {length for _, length in sizes} <= {3, 4, 5, 6, 7, 8, 10, 12}
    assert done.sizes <= len(set(sizes))
    assert done.corpus.ids().tolist() == [f"id {len(sample)} {int(sample[0])}" for sample in ragged]
    alone = fg.reduce(losses)
    for position, sample in enumerate(ragged):
        norm = alone(params, padded_collate([sample], len(sample)), fg.squared_norm())
        assert done.corpus.column("norm")[position] == pytest.approx(float(norm[0]), rel=1e-4)


def test_resuming_gives_the_same_bits(tmp_path: Path, whole: Path) -> None:
    """Stopped at every part, with what a kill leaves lying about."""
    wanted = contents(whole)
    parts = corpus.open(whole).store.parts()
    for kept in range(len(parts) + 1):
        out = tmp_path / str(kept)
        shutil.copytree(whole, out)
        (out / "end.json").unlink()
        for part in parts[kept:]:
            (out / "values" / part.name("parquet")).unlink()
        for path in sorted((out / "vectors" / "sketch").iterdir())[kept + 1 :]:  # the last one had its vectors already
            path.unlink()
        (out / "unfinished" / "0-half").write_bytes(b"half")
        partial = corpus.open(out, partial=True)
        assert not partial.complete
        known = len(partial)
        assert known == sum(part.stop - part.start for part in parts[:kept])
        with pytest.raises(fg.StoreError, match="samples are there, and not all"):
            corpus.open(out)
        done = make(out)
        assert done.samples == COUNT - known
        assert contents(out) == wanted
    assert make(whole).samples == 0


def test_other_data_are_not_added_to_a_store(tmp_path: Path, whole: Path) -> None:
    """As many samples, and others: what a pass goes on from is held to the first batch, which it computes anyway."""
    shutil.copytree(whole, tmp_path / "run")
    last = corpus.open(whole).store.parts()[-1]
    (tmp_path / "run" / "end.json").unlink()
    (tmp_path / "run" / "values" / last.name("parquet")).unlink()
    before = contents(tmp_path / "run")
    with pytest.raises(fg.StoreError, match="the first samples have other values there than here"):
        make(tmp_path / "run", data=samples()[::-1])
    assert contents(tmp_path / "run") == before
    with pytest.raises(fg.StoreError, match=r"the first samples are \[0, 1, 2\] there and \[1, 2, 3\] here"):
        make(tmp_path / "run", data=[sample + 0 for sample in samples()], ids=counting())
    assert make(tmp_path / "run").samples == last.stop - last.start


def counting() -> Callable[[Any], int]:
    numbers = itertools.count(1)
    return lambda sample: next(numbers)


@fewer(8)
@given(st.integers(1, 6), st.integers(1, 30), st.integers(1, 3))
def test_no_cut_of_the_data_matters(
    tmp_path_factory: pytest.TempPathFactory, batch_size: int, part: int, ranks: int
) -> None:
    """A linear model in small integers: every order of sums gives the same bits."""
    out = tmp_path_factory.mktemp("corpus") / "run"
    data = torch.randint(-4, 5, (23, 3)).float()
    params = {"w": torch.tensor([1.0, -2.0, 3.0])}

    def losses(params: Any, batch: Tensor) -> Tensor:
        return (batch @ params["w"]) ** 2

    reducers = {"norm": fg.squared_norm(), "dot": fg.dot({"w": torch.ones(3)}), "p": fg.project(4)}
    wanted = fg.reduce(losses)(params, data, reducers)
    saved = {name: os.environ.pop(name, None) for name in ("RANK", "WORLD_SIZE")}
    try:
        for rank in reversed(range(ranks)):
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
            corpus.score(losses, params, data, reducers, out, batch_size=batch_size, part=part)
    finally:
        for name, value in saved.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
    found = corpus.open(out)
    assert found.tensor("norm").equal(wanted["norm"])
    assert found.tensor("dot").equal(wanted["dot"])
    assert torch.cat([torch.from_numpy(block) for _, block in found.vectors()]).equal(wanted["p"])


def test_memory_is_that_of_a_part(tmp_path: Path) -> None:
    """Samples come and go: no more than two parts of them are alive at a time."""
    alive, most = [0], [0]

    class Sample:
        def __init__(self, value: int) -> None:
            self.value = value
            alive[0] += 1
            most[0] = max(most[0], alive[0])

        def __del__(self) -> None:
            alive[0] -= 1

    def stack(items: Sequence[Sample]) -> Tensor:
        return torch.tensor([[float(item.value), 1.0] for item in items])

    losses: Callable[[Any, Tensor], Tensor] = lambda params, batch: batch @ params["w"]  # noqa: E731
    stream = (Sample(number) for number in itertools.count())
    data = itertools.islice(stream, 600)
    corpus.score(
        losses, {"w": torch.zeros(2)}, data, fg.squared_norm(), tmp_path / "run", batch_size=8, part=16, collate=stack
    )
    assert most[0] <= 33
    assert corpus.open(tmp_path / "run").column("value")[599] == 599.0**2 + 1


# -- what is said and what is refused ---------------------------------------------------------------------


def test_what_is_rounded_is_said(tmp_path: Path) -> None:
    _, params = losses_of()
    precise = {name: value.double() for name, value in params.items()}
    half = make(tmp_path / "half", params=precise, dtype="float16").corpus
    assert half.origin["rounded"]["norm"] == "float64 to float16"
    full = make(tmp_path / "full", params=precise, dtype="float64").corpus
    assert full.origin["rounded"] == {}
    np.testing.assert_array_equal(half.column("norm"), full.column("norm").astype(np.float16))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"batch_size": 2}, r"data\.batch_size is 4 there and 2 here"),
        ({"origin": {"step": 2}}, r"given\.step is null there and 2 here"),
        ({"dtype": "float16"}, 'dtype is "float32" there'),
        ({"params": "moved"}, r"params\.digest is"),
        ({"reducers": {"norm": fg.squared_norm(), "sketch": fg.project(48, seed=1)}}, r"reducers\.s"),
        ({"losses": "other"}, r"losses\.(name|source) is"),
        ({"data": samples()[:-1]}, rf"data\.samples is {COUNT} there and {COUNT - 1} here"),
    ],
)
def test_other_settings_on_the_same_path_are_refused(
    tmp_path: Path, whole: Path, change: dict[str, Any], complaint: str
) -> None:
    losses, params = losses_of()
    if change.get("params"):
        change = {"params": {name: value + 1e-6 for name, value in params.items()}}
    if change.get("losses"):
        change = {"losses": lambda params, batch: 2 * losses(params, batch)}
    before = contents(whole)
    with pytest.raises(fg.StoreError, match=f"holds something else: .*{complaint}"):
        make(whole, **change)
    assert contents(whole) == before


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"batch_size": 0}, "batch_size: must be"),
        ({"part": 2.5}, "part: must be"),
        ({"dtype": "int8"}, "dtype: must be one of"),
        ({"data": 3}, "data: must be a data set"),
        ({"data": {"a": torch.ones(3)}}, "data: must be a data set"),
        ({"data": []}, "there is no sample in it"),
        ({"data": DataLoader(TensorDataset(torch.ones(4, 2)), shuffle=True), "collate": None}, "shuffles"),
        ({"data": DataLoader(TensorDataset(torch.ones(4, 2)))}, "a DataLoader makes its own batches"),
        ({"length": len, "collate": None}, r"pass collate\(samples, padded_length\)"),
        ({"ids": lambda sample: 0.5}, "ids: must all be integers or all strings, found"),
        ({"reducers": fg.gram()}, "is about the samples of a batch"),
        ({"reducers": {"a b/..": fg.project(4)}}, "must be plain words"),
        ({"reducers": {"id": fg.squared_norm()}}, "no column may be called 'id'"),
        ({"reducers": {"norm": 3}}, "every leaf must be a reducer|holds|must be a reducer"),
        ({"origin": {"x": object()}}, "origin: must be a JSON object"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(fg.InputError, match=complaint):
        make(tmp_path / "run", **change)
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_any_reader_of_parquet_and_arrow_reads_it(whole: Path) -> None:
    found = corpus.open(whole)
    table = pq.read_table(whole / "values")
    assert sorted(table["id"].to_pylist()) == list(range(COUNT))
    (first, *_) = sorted((whole / "vectors" / "sketch").glob("*.arrow"))
    import_ipc = __import__("pyarrow.ipc", fromlist=["open_file"])
    with first.open("rb") as file:
        batch = import_ipc.open_file(file).read_all()
    np.testing.assert_array_equal(np.array(batch["sketch"].to_pylist(), np.float32), next(found.vectors())[1])
    assert batch["id"].to_pylist() == list(range(8))
