"""A store on the disk: a manifest, and parts that are each there whole or not at all."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pyarrow as pa

from funcghost.errors import StoreError
from funcghost.store.files import (
    check_folder,
    checksum,
    listed,
    locked,
    make_folder,
    read_whole,
    write_whole,
)
from funcghost.store.manifest import JSON, MANIFEST, Manifest, read_json, read_manifest, refuse_other
from funcghost.store.tables import from_parquet, schema_of, to_parquet
from funcghost.store.vectors import Checked, Vectors, mapped, to_arrow

VALUES, VECTORS, ASIDE, END = "values", "vectors", "unfinished", "end.json"
EMPTY = "part-empty.parquet"
NAME = re.compile(r"part-(\d{15})-(\d{15})-([0-9a-f]{8})\.parquet", re.ASCII)


@dataclass(frozen=True, order=True)
class Part:
    """What covers [start, stop): positions of samples in a corpus, steps of a run in a record."""

    start: int
    stop: int
    digest: str

    def name(self, ending: str) -> str:
        """That of its file."""
        return f"part-{self.start:015d}-{self.stop:015d}-{self.digest}.{ending}"


@dataclass(frozen=True)
class Store:
    """A store that is there, to be read.

    Its folder holds `manifest.json`, `values/*.parquet` and, where there are vectors, `vectors/NAME/*.arrow`, for any
    tool that reads these. The checksum of a file is part of its name, and a Parquet file says which vectors belong to
    it and which store it is of.
    """

    folder: Path
    manifest: Manifest
    schema: pa.Schema = field(compare=False)
    checked: set[Checked] = field(default_factory=set, compare=False, repr=False)
    """The files of vectors that were held to their checksums, each once for a store that is open."""

    def parts(self) -> list[Part]:
        """The finished parts, in order; what a later part replaces is left out.

        Raises:
            StoreError: two of them overlap.
        """
        return _chosen(self.folder, _listed(self.folder / VALUES))

    def end(self) -> int | None:
        """Where the whole ends, once that is known."""
        if not (self.folder / END).exists():
            return None
        found = read_json(self.folder / END)
        stop = found.get("stop") if isinstance(found, dict) and found.get("store") == self.manifest.identity else None
        if type(stop) is not int or stop < 0:
            raise StoreError(f"{self.folder / END}: must say where this store ends. It is damaged, or of another one.")
        return stop

    def missing(self) -> list[tuple[int, int]]:
        """The stretches without a part before the end, or before the last part where no end is known."""
        found, at = [], 0
        for part in self.parts():
            found += [(at, part.start)] if part.start > at else []
            at = part.stop
        end = self.end()
        return [*found, (at, end)] if end is not None and end > at else found

    def read(self, part: Part) -> pa.Table:
        """The table of a part.

        Raises:
            StoreError: it is damaged, or of another store.
        """
        return self._read(part)[0]

    def vectors(self, part: Part, name: str) -> Vectors:
        """The vectors [b, dim] of a part, memory-mapped; see `funcghost.store.vectors.mapped`.

        Raises:
            StoreError: they are damaged or missing.
        """
        return self.read_with(part, name)[1]

    def read_with(self, part: Part, name: str) -> tuple[pa.Table, Vectors]:
        """The table of a part and its vectors.

        Raises:
            StoreError: they are damaged or missing.
        """
        column = next(column for column in self.manifest.vectors if column.name == name)
        table, note = self._read(part)
        digest, offset = note["vectors"][name]
        path = self.folder / VECTORS / name / Part(part.start, part.stop, digest).name("arrow")
        return table, mapped(path, len(table), column, offset, digest, self.checked)

    def _read(self, part: Part) -> tuple[pa.Table, dict[str, JSON]]:
        path = self.folder / VALUES / part.name("parquet")
        content = read_whole(path)
        if checksum(content) != part.digest:
            raise StoreError(f"{path}: is damaged: its bytes are not those that were written.")
        table, note = from_parquet(content, self.schema, path)
        return table, _checked_note(note, path, part, self.manifest)


def open_store(path: str | Path, kind: str) -> Store:
    """The store in a folder.

    Raises:
        StoreError: there is none, it is damaged, or of another kind.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    if manifest.kind != kind:
        raise StoreError(f"{folder}: must be a store of the kind {kind!r}, found {manifest.kind!r}.")
    for inner in (folder / VALUES, *([folder / VECTORS] if manifest.vectors else [])):
        check_folder(inner)
    for vector in manifest.vectors:
        check_folder(folder / VECTORS / vector.name)
    return Store(folder, manifest, schema_of(manifest.columns))


@dataclass(frozen=True)
class Writer:
    """Adds parts to a store, and takes away."""

    store: Store
    rank: int

    def add(self, start: int, stop: int, table: pa.Table, vectors: Mapping[str, Vectors]) -> Part:
        """Writes a part; the last thing to appear is its Parquet file, and with it the part.

        Raises:
            StoreError: it cannot be written; the store is as before.
        """
        manifest, folder, placed = self.store.manifest, self.store.folder, {}
        for column in manifest.vectors:
            content, offset = to_arrow(table["id"].combine_chunks(), vectors[column.name], column)
            digest = checksum(content)
            name = Part(start, stop, digest).name("arrow")
            write_whole(self._aside(f"{column.name}-{name}"), folder / VECTORS / column.name / name, content)
            placed[column.name] = digest, offset
        note = {"store": manifest.identity, "start": start, "stop": stop, "vectors": placed}
        content = to_parquet(table, json.dumps(note, sort_keys=True).encode())
        part = Part(start, stop, checksum(content))
        name = part.name("parquet")
        write_whole(self._aside(name), folder / VALUES / name, content)
        return part

    def remove(self, part: Part) -> None:
        """Takes the table of a part away, and with it the part."""
        (self.store.folder / VALUES / part.name("parquet")).unlink(missing_ok=True)

    def finish(self, stop: int) -> None:
        """Says where the whole ends.

        Raises:
            StoreError: it was said to end elsewhere.
        """
        end = {"store": self.store.manifest.identity, "stop": stop}
        if self.store.end() is None:
            write_whole(self._aside(END), self.store.folder / END, json.dumps(end).encode())
        refuse_other(self.store.folder, {"samples": self.store.end()}, {"samples": stop})

    def _aside(self, name: str) -> Path:
        return self.store.folder / ASIDE / f"{self.rank}-{name}"


@contextmanager
def writing(path: str | Path, manifest: Manifest, rank: int = 0, ranks: int = 1) -> Iterator[Writer]:
    """A writer to the store in a folder, which is made if there is none; one for each rank at a time.

    Raises:
        StoreError: the folder holds another store or something else, cannot be made, or is being written to.
    """
    folder = Path(path)
    _refuse_strangers(folder)
    for inner in ("", VALUES, ASIDE, VECTORS, *(f"{VECTORS}/{column.name}" for column in manifest.vectors)):
        if inner != VECTORS or manifest.vectors:
            make_folder(folder / inner)
    with ExitStack() as held:
        held.enter_context(locked(folder / f"writer-{rank}.lock", "it"))
        for path in (folder / ASIDE).iterdir():
            owner = path.name.partition("-")[0]
            if owner.isdecimal() and int(owner) % ranks == rank:
                path.unlink(missing_ok=True)
        if not (folder / MANIFEST).exists():
            empty = to_parquet(schema_of(manifest.columns).empty_table(), b"")
            write_whole(folder / ASIDE / f"{rank}-{EMPTY}", folder / VALUES / EMPTY, empty)
            text = manifest.to_json().encode()
            write_whole(folder / ASIDE / f"{rank}-{MANIFEST}", folder / MANIFEST, text)
        refuse_other(folder, json.loads(read_manifest(folder).to_json()), json.loads(manifest.to_json()))
        writer = Writer(open_store(folder, manifest.kind), rank)
        for part in set(_listed(folder / VALUES)) - set(writer.store.parts()):
            writer.remove(part)  # what a later part replaced
        yield writer


def _refuse_strangers(folder: Path) -> None:
    """A folder in which something else lies is left alone."""
    if not folder.exists() or (folder / MANIFEST).exists():
        return
    check_folder(folder)
    own = {VALUES, VECTORS, ASIDE}
    strange = [path.name for path in folder.iterdir() if path.name not in own and not path.name.startswith("writer-")]
    if strange:
        raise StoreError(f"{folder}: holds {sorted(strange)[0]!r} and is no store. Name a folder that is empty or new.")


def _listed(folder: Path) -> Iterable[Part]:
    for name in listed(folder):
        if match := NAME.fullmatch(name):
            yield Part(int(match[1]), int(match[2]), match[3])


def _chosen(folder: Path, parts: Iterable[Part]) -> list[Part]:
    """Of parts with one start the shortest, which is what a longer one was cut to."""
    first: dict[int, Part] = {}
    for part in sorted(parts):
        first.setdefault(part.start, part)
    chosen = list(first.values())
    for before, after in pairwise(chosen):
        if before.stop > after.start:
            raise StoreError(
                f"{folder}: the parts {before.name('parquet')} and {after.name('parquet')} overlap. One of them is of "
                "another store: remove it."
            )
    return chosen


def _checked_note(note: bytes, path: Path, part: Part, manifest: Manifest) -> dict[str, JSON]:
    """What a Parquet file says of itself must fit where it lies."""
    found: JSON = None
    with suppress(ValueError, RecursionError):
        found = json.loads(note)
    said = (found.get("store"), found.get("start"), found.get("stop")) if isinstance(found, dict) else None
    if said != (manifest.identity, part.start, part.stop):
        raise StoreError(f"{path}: is no part of this store: it says {note[:80]!r}. Remove it.")
    placed = found.get("vectors")
    names = [column.name for column in manifest.vectors]
    if not isinstance(placed, dict) or sorted(placed) != sorted(names) or not all(map(_is_place, placed.values())):
        raise StoreError(f"{path}: must say where its vectors {names} are. It is damaged.")
    return dict(found)


def _is_place(value: JSON) -> bool:
    if not isinstance(value, list) or len(value) != 2 or type(value[0]) is not str or type(value[1]) is not int:
        return False
    return re.fullmatch("[0-9a-f]{8}", value[0]) is not None
