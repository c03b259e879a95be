"""Features of every sample of a data set on the disk, for attribution that looks at them a part at a time."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from funcghost._version import __version__
from funcghost.attribution.features import Block, Features
from funcghost.corpus.asking import Corpus
from funcghost.corpus.asking import open as open_corpus
from funcghost.corpus.describing import of_features, of_function, of_params
from funcghost.corpus.feeding import Cutting, describe, source_of
from funcghost.corpus.results import Results, as_numpy, checked, dtype_of
from funcghost.corpus.score import DEFAULT_PART, Target, go_through, place
from funcghost.errors import InputError
from funcghost.store.manifest import JSON
from funcghost.store.parts import Part
from funcghost.store.record import checked_origin
from funcghost.trees import Tree, split_params


def keep(
    of: Features,
    params: Tree,
    data: Any,
    out: str | Path,
    *,
    batch_size: int = 16,
    collate: Callable[..., Tree] | None = None,
    ids: Callable[[Any], Any] | None = None,
    length: Callable[[Any], int] | None = None,
    part: int = DEFAULT_PART,
    dtype: str = "float32",
    origin: Mapping[str, JSON] | None = None,
    progress: bool = True,
) -> Corpus:
    """The features (`funcghost.attribution.features`) of all samples in a store: [b, dim] as vectors, [b] in columns.

    Law: scores from `kept(out)` are those of the features in memory, rounded to `dtype`. Killed passes go on, ranks
    take their parts, and other settings (seed, dim, moments, parameters) are refused, as with `corpus.score`, whose
    arguments these are. `Corpus.nearest` finds the nearest in any of them, too.

    Cost: that of the features; in memory are those of one part.

    Raises:
        InputError: an argument is not what it must be; before anything is written.
        StoreError: the folder holds something else, or cannot be written.

    Example:
        >>> import tempfile, torch
        >>> from funcghost import corpus
        >>> from funcghost.attribution import comparing, features
        >>> def losses(params, x):
        ...     return (x @ params["w"]).square()
        >>> params, data, out = {"w": torch.ones(2)}, list(torch.eye(2)), tempfile.mkdtemp()
        >>> of = features.Sided(losses, 8)
        >>> _ = corpus.keep(of, params, data, out)
        >>> comparing.by_blocks(corpus.kept(out), [of(params, torch.eye(2))]).argmax(0)
        tensor([0, 1])
    """
    if not isinstance(of, Features):
        raise InputError(f"keep: takes features of funcghost.attribution.features, found {type(of).__name__}.")
    source = source_of(data, Cutting(batch_size, part, collate, ids, length))
    whole: dict[str, JSON] = {
        "versions": {"funcghost": __version__, "torch": torch.__version__},
        "losses": of_function(of.losses),
        "params": of_params(split_params(params)),
        "features": of_features(of),
        "data": describe(source),
        "dtype": dtype_of(dtype),
        "given": checked_origin(origin),
    }
    go_through(source, _Featured(of, params), Target(Path(out), whole, dtype, *place()), progress)
    return open_corpus(out, partial=True)


@dataclass(frozen=True)
class _Featured:
    """The features of every batch."""

    of: Features
    params: Tree
    note: str = ""

    def results(self, batch: Tree) -> Results:
        """Those of a batch, as columns and vectors."""
        found = {name: as_numpy(leaf) for name, leaf in self.of(self.params, batch).items()}
        columns = {name: value for name, value in found.items() if value.ndim == 1}
        vectors = {name: value for name, value in found.items() if value.ndim == 2}
        (size,) = {len(value) for value in found.values()}
        return checked(Results(size, columns, vectors), "features")


class Kept:
    """The features in a store as blocks, one for each part, which can be gone through again and again."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus

    def __iter__(self) -> Iterator[Block]:
        for part in self.corpus.store.parts():
            yield _Block(self.corpus, part)


@dataclass(frozen=True)
class _Block(Mapping[str, Tensor]):
    """What is in a part, read when it is asked for."""

    corpus: Corpus
    part: Part

    def __getitem__(self, name: str) -> Tensor:
        if name in self.corpus.projections:
            return torch.from_numpy(self.corpus.store.vectors(self.part, name))
        if name in self.corpus.columns:
            return torch.from_numpy(self.corpus.store.read(self.part)[name].to_numpy().copy())
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        yield from (*self.corpus.projections, *self.corpus.columns)

    def __len__(self) -> int:
        return len(self.corpus.projections) + len(self.corpus.columns)


def kept(path: str | Path) -> Kept:
    """The features that `keep` has put in a folder, for the functions of `funcghost.attribution.comparing`.

    Raises:
        StoreError: there is no store, it is damaged, or lacks samples.
    """
    return Kept(open_corpus(path))
