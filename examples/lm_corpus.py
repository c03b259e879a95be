"""Text that comes with CPython: its library by package and the prose of its manual, cut into documents."""

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PROSE = "prose"
PACKAGES = ("asyncio", "email", "http", "importlib", "json", "logging", "multiprocessing", "unittest", "urllib", "xml")
DOMAINS = (*PACKAGES, PROSE)
LONGEST, SHORTEST = 2048, 512
CORRUPTED_SHARE = 0.1

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Document:
    """A passage of a source file or of the manual; `corruption` says how it was spoilt, empty if it was not."""

    name: str
    domain: str
    text: bytes
    corruption: str = ""


@dataclass(frozen=True)
class Corpus:
    """Training documents, some of them corrupted, and held-out documents of one domain."""

    training: tuple[Document, ...]
    validation: tuple[Document, ...]

    def digest(self) -> str:
        """A fingerprint of every byte, and of what each belongs to."""
        content = hashlib.sha256()
        for document in (*self.training, *self.validation):
            content.update(repr(document).encode())
        return content.hexdigest()


def _sources(domain: str) -> Iterator[tuple[str, bytes]]:
    if domain == PROSE:
        yield from ((f"{PROSE}/{topic}", topics[topic].encode()) for topic in sorted(topics))
        return
    root = Path(sysconfig.get_path("stdlib")) / domain
    for path in sorted(root.rglob("*.py")):
        within = path.relative_to(root)
        if not {"test", "tests"}.intersection(within.parts):
            yield f"{domain}/{within.as_posix()}", path.read_bytes()


def _passages(name: str, domain: str, text: bytes) -> list[Document]:
    """The text cut at line ends into documents of `SHORTEST` to `LONGEST` bytes; shorter rests are dropped."""
    cuts = [b""]
    for line in text.splitlines(keepends=True):
        if len(cuts[-1]) + len(line) > LONGEST:
            cuts.append(b"")
        cuts[-1] += line[:LONGEST]
    kept = [cut for cut in cuts if len(cut) >= SHORTEST]
    return [Document(f"{name}#{number}", domain, cut) for number, cut in enumerate(kept)]


def _shuffle(document: Document, random: np.random.Generator) -> Document:
    """The document with its bytes in random order."""
    text = random.permutation(np.frombuffer(document.text, dtype=np.uint8)).tobytes()
    return replace(document, text=text, corruption="shuffled bytes")


def _drown(document: Document, others: Sequence[Document], random: np.random.Generator) -> Document:
    """As much noise of the wrong domains: pieces of 1 to 3 bytes from anywhere in `others`."""
    text = b""
    while len(text) < len(document.text):
        source = others[int(random.integers(len(others)))].text
        start = random.integers(len(source) - 3)
        text += source[start : start + random.integers(1, 4)]
    return replace(document, text=text[: len(document.text)], corruption="wrong-domain noise")


def _corrupt(documents: Sequence[Document], share: float, random: np.random.Generator) -> Iterator[Document]:
    """The documents with this share of them replaced, half of these in either way."""
    chosen = random.permutation(len(documents))[: round(share * len(documents))]
    ways = {int(index): rank % 2 for rank, index in enumerate(chosen)}
    for index, document in enumerate(documents):
        if index not in ways:
            yield document
        elif ways[index]:
            yield _drown(document, [other for other in documents if other.domain != document.domain], random)
        else:
            yield _shuffle(document, random)


def build_corpus(
    validation_domain: str, per_domain: int, held_out: int, seed: int, corrupted: float = CORRUPTED_SHARE
) -> Corpus:
    """Reads the text of this Python, cuts it, holds some out and corrupts some of the rest.

    Of the validation domain, whole sources are held out until they make `held_out` documents: no training document
    is a neighbour of a validation document. Of every domain, `per_domain` documents at most are for training.
    """
    random = np.random.default_rng(seed)
    training: list[Document] = []
    validation: list[Document] = []
    for domain in DOMAINS:
        sources = list(_sources(domain))
        kept: list[Document] = []
        for index in random.permutation(len(sources)):
            holding_out = domain == validation_domain and len(validation) < held_out
            (validation if holding_out else kept).extend(_passages(sources[index][0], domain, sources[index][1]))
        training.extend(kept[index] for index in random.permutation(len(kept))[:per_domain])
    return Corpus(tuple(_corrupt(training, corrupted, random)), tuple(validation[:held_out]))


class Draw(NamedTuple):
    """A training batch: the documents' indices [b], the windows' ids [b] and their tokens [b, context + 1]."""

    documents: Integers
    windows: Integers
    tokens: Tensor


class WindowSampler:
    """Draws windows of the documents, as a function of seed and step alone.

    Every pass over the corpus visits each document once, in a new order, at a random place: at any time all documents
    were drawn equally often, give or take one. A window's id is where it starts in the documents laid end to end.
    """

    def __init__(self, documents: Sequence[Document], context: int, batch_size: int, seed: Sequence[int]) -> None:
        self.context = context
        self.batch_size = batch_size
        self.seed = tuple(seed)
        self.lengths = np.array([len(document.text) for document in documents])
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.text = _tokens(b"".join(document.text for document in documents))

    def draw(self, step: int) -> Draw:
        """The batch of this step."""
        turns, places = np.divmod(step * self.batch_size + np.arange(self.batch_size), len(self.lengths))
        orders = {turn: self._random(0, turn).permutation(len(self.lengths)) for turn in np.unique(turns)}
        documents = np.array([orders[turn][place] for turn, place in zip(turns, places, strict=True)])
        offsets = self._random(1, step).integers(0, self.lengths[documents] - self.context)
        windows = self.starts[documents] + offsets
        tokens = self.text[torch.from_numpy(windows)[:, None] + torch.arange(self.context + 1)]
        return Draw(documents, windows, tokens)

    def _random(self, purpose: int, count: int) -> np.random.Generator:
        return np.random.default_rng([*self.seed, purpose, int(count)])


def validation_tokens(documents: Sequence[Document], context: int, count: int) -> Tensor:
    """At most `count` windows [., context + 1] that do not overlap, spread evenly over the documents."""
    length = context + 1
    cuts = [
        document.text[start : start + length]
        for document in documents
        for start in range(0, len(document.text) - context, length)
    ]
    chosen = np.linspace(0, len(cuts) - 1, min(count, len(cuts))).round().astype(int)
    return _tokens(b"".join(cuts[index] for index in chosen)).view(-1, length)


def _tokens(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
