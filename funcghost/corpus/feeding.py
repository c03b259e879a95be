"""Data in parts, and parts in batches, so that a part is a function of its samples and the settings alone."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import optree
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, default_collate

from funcghost.errors import InputError
from funcghost.store.manifest import JSON
from funcghost.trees import Tree

Id = int | str
Rows = NDArray[np.int64]
Wanted = Callable[[int, int], bool]
"""Whether a part is wanted, by its number and its first position."""


class Loaded(NamedTuple):
    """A batch, the rows of its part that its samples are, and their ids; None for their positions."""

    batch: Tree
    rows: Rows
    ids: list[Id] | None


class Stretch(NamedTuple):
    """A part of the data: `size` samples from the position `start`. Its batches are loaded one by one."""

    number: int
    start: int
    size: int
    batches: Iterable[Loaded]


@dataclass(frozen=True)
class Cutting:
    """How data are cut: about `part` samples make a part, `batch_size` a batch.

    With a `length`, the samples of a part are sorted by it, longest first, and a batch is collated to the padded length
    of its longest sample, which is one of few.
    """

    batch_size: int
    part: int
    collate: Callable[..., Tree] | None
    ids: Callable[[Any], Any] | None
    length: Callable[[Any], int] | None

    def __post_init__(self) -> None:
        """Checks the values."""
        for name in ("batch_size", "part"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise InputError(f"{name}: must be a number of samples, 1 or more, found {getattr(self, name)!r}.")
        for name in ("collate", "ids", "length"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise InputError(f"{name}: must be a function, found {type(getattr(self, name)).__name__}.")
        if self.length is not None and self.collate is None:
            raise InputError("collate: with length, pass collate(samples, padded_length) -> batch.")

    @property
    def step(self) -> int:
        """Samples of a part: whole batches."""
        return -(-self.part // self.batch_size) * self.batch_size

    def batches(self, fetch: Callable[[range], Sequence[Any]], size: int) -> Iterator[Loaded]:
        """The batches of a part of `size` samples, which `fetch` loads."""
        if self.length is None:
            for start in range(0, size, self.batch_size):
                rows = range(start, min(start + self.batch_size, size))
                yield self._loaded(fetch(rows), np.array(rows))
            return
        samples = fetch(range(size))
        lengths = [self.length(sample) for sample in samples]
        order = np.argsort([-length for length in lengths], kind="stable")
        for start in range(0, size, self.batch_size):
            longest = order[start : start + self.batch_size]
            yield self._loaded([samples[row] for row in longest], longest, padded(lengths[longest[0]]))

    def _loaded(self, samples: Sequence[Any], rows: Rows, *more: int) -> Loaded:
        batch = (self.collate or default_collate)(list(samples), *more)
        return Loaded(batch, rows, None if self.ids is None else [self.ids(sample) for sample in samples])


def padded(length: int) -> int:
    """The least length that is not smaller and has at most three bits set at its head: at most a quarter is padding."""
    step = 1 << max(0, int(length).bit_length() - 3)
    return -(-int(length) // step) * step


class Samples:
    """A data set with a length and samples by position."""

    def __init__(self, data: Any, cutting: Cutting) -> None:
        self.data, self.cutting = data, cutting
        self.total: int | None = len(data)

    def stretches(self, wanted: Wanted) -> Iterator[Stretch]:
        """The parts that are wanted."""
        assert self.total is not None
        for number, start in enumerate(range(0, self.total, self.cutting.step)):
            if wanted(number, start):
                size = min(self.cutting.step, self.total - start)
                fetch = _shifted(self.take, start)
                yield Stretch(number, start, size, self.cutting.batches(fetch, size))

    def take(self, positions: Sequence[int]) -> Sequence[Any]:
        """The samples at these positions."""
        whole = getattr(self.data, "__getitems__", None)
        return whole(list(positions)) if whole is not None else [self.data[position] for position in positions]


def _shifted(take: Callable[[Sequence[int]], Sequence[Any]], start: int) -> Callable[[range], Sequence[Any]]:
    return lambda rows: take([start + row for row in rows])


class Stream:
    """Samples that come one after the other; those of parts that are not wanted are passed over."""

    def __init__(self, data: Iterable[Any], cutting: Cutting) -> None:
        self.data, self.cutting = data, cutting
        self.total: int | None = None

    def stretches(self, wanted: Wanted) -> Iterator[Stretch]:
        """The parts that are wanted; after the last one `total` is known."""
        source, number, start = iter(self.data), 0, 0
        while samples := list(islice(source, self.cutting.step)):
            if wanted(number, start):
                yield Stretch(number, start, len(samples), self.cutting.batches(_picked(samples), len(samples)))
            number, start = number + 1, start + len(samples)
        self.total = start


def _picked(samples: Sequence[Any]) -> Callable[[range], Sequence[Any]]:
    return lambda rows: samples[rows.start : rows.stop]


class Batches:
    """A loader's own batches; a part is as many of them as have about `part` samples."""

    def __init__(self, data: Iterable[Any], cutting: Cutting) -> None:
        self.data, self.cutting = data, cutting
        self.total: int | None = None

    def stretches(self, wanted: Wanted) -> Iterator[Stretch]:
        """The parts that are wanted; after the last one `total` is known."""
        number, start, kept, size = 0, 0, [], 0
        for batch in chain(self.data, [None]):
            if batch is not None:
                ids = None if self.cutting.ids is None else list(self.cutting.ids(batch))
                count = _samples(batch) if ids is None else len(ids)
                kept.append(Loaded(batch, np.arange(size, size + count), ids))
                size += count
            if kept and (batch is None or size >= self.cutting.part):
                if wanted(number, start):
                    yield Stretch(number, start, size, kept)
                number, start, kept, size = number + 1, start + size, [], 0
        self.total = start


def _samples(batch: Tree) -> int:
    for leaf in optree.tree_leaves(batch):
        if isinstance(leaf, Tensor | np.ndarray) and leaf.ndim:
            return len(leaf)
    raise InputError("ids: a batch of the loader holds no tensor to count its samples by. Pass ids(batch) -> [b].")


Source = Samples | Stream | Batches


def source_of(data: Any, cutting: Cutting) -> Source:
    """How to go through the data.

    Raises:
        InputError: it is no data set, iterable or loader, or a loader that shuffles.
    """
    if isinstance(data, DataLoader):
        if cutting.length is not None or cutting.collate is not None:
            raise InputError("collate, length: a DataLoader makes its own batches: pass its data set in its place.")
        if isinstance(getattr(data, "sampler", None), RandomSampler):
            raise InputError(
                "data: the DataLoader shuffles, so that nothing says which sample is which: shuffle=False."
            )
        return Batches(data, cutting)
    if isinstance(data, Mapping | str | bytes):
        raise InputError(
            f"data: must be a data set, an iterable of samples or a DataLoader, found {type(data).__name__}."
        )
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return Samples(data, cutting)
    if hasattr(data, "__iter__"):
        return Stream(data, cutting)
    raise InputError(f"data: must be a data set, an iterable of samples or a DataLoader, found {type(data).__name__}.")


def describe(source: Source) -> JSON:
    """What the manifest says of the data."""
    cutting = source.cutting
    return {
        "type": type(source.data).__qualname__,
        "samples": source.total,
        "batch_size": getattr(source.data, "batch_size", None) if isinstance(source, Batches) else cutting.batch_size,
        "part": cutting.part if isinstance(source, Batches) else cutting.step,
        "by_length": cutting.length is not None,
    }
