"""Text that every CPython has: its own library by package, and its prose manual, cut into documents."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch

PROSE = "prose"
PACKAGES = (
    "asyncio",
    "email",
    "http",
    "importlib",
    "json",
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
    "xml",
)
DOMAINS = (*PACKAGES, PROSE)
PASSAGE = 2048
SHORTEST = 512


@dataclass(frozen=True)
class Document:
    """A passage of a source file or of the manual; `corruption` says how it was spoilt, and is empty if it was not."""

    name: str
    domain: str
    text: bytes
    corruption: str = ""


@dataclass(frozen=True)
class Corpus:
    """Training documents, some corrupted, and the held-out documents of one domain."""

    training: tuple[Document, ...]
    validation: tuple[Document, ...]


def _sources(domain: str) -> Iterator[tuple[str, bytes]]:
    if domain == PROSE:
        for topic in sorted(topics):
            yield f"{PROSE}/{topic}", topics[topic].encode()
        return
    root = Path(sysconfig.get_path("stdlib")) / domain
    for path in sorted(root.rglob("*.py")):
        if "tests" not in path.parts and "test" not in path.parts:
            yield f"{domain}/{path.relative_to(root).as_posix()}", path.read_bytes()


def _passages(name: str, domain: str, text: bytes) -> list[Document]:
    """Cut `text` at line ends into documents of `SHORTEST` to `PASSAGE` bytes; a shorter rest is dropped."""
    documents: list[Document] = []
    current = b""
    for line in [*text.splitlines(keepends=True), b""]:
        if current and (not line or len(current) + len(line) > PASSAGE):
            if len(current) >= SHORTEST:
                documents.append(Document(f"{name}#{len(documents)}", domain, current[:PASSAGE]))
            current = b""
        current += line
    return documents


def _shuffled(document: Document, random: np.random.Generator) -> Document:
    """Return the document with its bytes in random order."""
    text = random.permutation(np.frombuffer(document.text, dtype=np.uint8)).tobytes()
    return replace(document, text=text, corruption="shuffled bytes")


def _noise(document: Document, others: Sequence[Document], random: np.random.Generator) -> Document:
    """Return noise of the document's length: pieces of 1 to 3 bytes from anywhere in `others`, of other domains."""
    pieces: list[bytes] = []
    while sum(map(len, pieces)) < len(document.text):
        source = others[random.integers(len(others))].text
        start = random.integers(len(source) - 3)
        pieces.append(source[start : start + random.integers(1, 4)])
    return replace(document, text=b"".join(pieces)[: len(document.text)], corruption="wrong-domain noise")


def _corrupt(documents: list[Document], share: float, random: np.random.Generator) -> list[Document]:
    """Spoil a `share` of the documents, half of them in either way."""
    chosen = random.permutation(len(documents))[: round(share * len(documents))]
    spoilt = list(documents)
    for rank, index in enumerate(chosen):
        document = documents[index]
        if rank % 2:
            others = [other for other in documents if other.domain != document.domain]
            spoilt[index] = _noise(document, others, random)
        else:
            spoilt[index] = _shuffled(document, random)
    return spoilt


def build_corpus(validation_domain: str, per_domain: int, held_out: int, share: float, seed: int) -> Corpus:
    """Read, cut, hold out and corrupt.

    Sources are shuffled by `seed`; of the validation domain, whole sources are held out until they hold
    `held_out` documents, so that no training document is a neighbour of a validation document. Of every
    domain at most `per_domain` documents are for training, and a `share` of all of these is corrupted.
    """
    random = np.random.default_rng(seed)
    training: list[Document] = []
    validation: list[Document] = []
    for domain in DOMAINS:
        sources = list(_sources(domain))
        kept: list[Document] = []
        for index in random.permutation(len(sources)):
            name, text = sources[index]
            passages = _passages(name, domain, text)
            if domain == validation_domain and len(validation) < held_out:
                validation.extend(passages)
            else:
                kept.extend(passages)
        training.extend(kept[index] for index in random.permutation(len(kept))[:per_domain])
    return Corpus(tuple(_corrupt(training, share, random)), tuple(validation[:held_out]))


class WindowSampler:
    """Draws the training windows: a pure function of the seed and the step.

    Documents are visited in a new random order in every pass over the corpus, so that at any time all of
    them were drawn equally often, give or take one. Each draw is a window at a random place of its document.
    """

    def __init__(self, documents: Sequence[Document], context: int, batch_size: int, seed: int) -> None:
        """Lay the documents end to end; a window's id is where it starts in that text."""
        self.context = context
        self.batch_size = batch_size
        self.seed = seed
        self.lengths = np.array([len(document.text) for document in documents])
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]])
        self.text = torch.frombuffer(bytearray(b"".join(d.text for d in documents)), dtype=torch.uint8).long()

    def _document(self, draw: int) -> int:
        turn, place = divmod(draw, len(self.lengths))
        return int(np.random.default_rng([self.seed, 1, turn]).permutation(len(self.lengths))[place])

    def draw(self, step: int) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
        """Return the step's document indices [b], window ids [b] and tokens [b, context + 1]."""
        first = step * self.batch_size
        documents = np.array([self._document(first + place) for place in range(self.batch_size)])
        random = np.random.default_rng([self.seed, 2, step])
        windows = self.starts[documents] + random.integers(0, self.lengths[documents] - self.context)
        return documents, windows, self.tokens(windows)

    def tokens(self, windows: np.ndarray) -> torch.Tensor:
        """Return the text [b, context + 1] of windows, by their ids."""
        return self.text[torch.from_numpy(windows)[:, None] + torch.arange(self.context + 1)]


def validation_windows(documents: Sequence[Document], context: int, count: int) -> torch.Tensor:
    """Return [at most count, context + 1]: windows that do not overlap, spread evenly over the documents."""
    length = context + 1
    cuts = [
        document.text[start : start + length]
        for document in documents
        for start in range(0, len(document.text) - length + 1, length)
    ]
    chosen = np.linspace(0, len(cuts) - 1, min(count, len(cuts))).astype(int)
    return torch.frombuffer(bytearray(b"".join(cuts[index] for index in chosen)), dtype=torch.uint8).view(-1, length).long()
