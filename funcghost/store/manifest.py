"""What a store holds and what its numbers follow from, as JSON."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NoReturn

from funcghost.codec import MalformedError, decode, encode
from funcghost.errors import StoreError
from funcghost.store.files import read_whole

FORMAT = "funcghost-store-1"
MANIFEST = "manifest.json"
MOST_BYTES = 1 << 24
MOST_COLUMNS = 1 << 14
MOST_DIM = 1 << 24

Type = Literal["int64", "float16", "float32", "float64", "bool", "string"]
VectorType = Literal["float16", "float32", "float64"]
Kind = Literal["corpus", "record", "curvature"]
JSON = Any
"""What `json.dumps` takes: None, bool, int, float, str, and lists and dicts of these."""


@dataclass(frozen=True)
class Column:
    """A column of the table of values."""

    name: str
    type: Type


@dataclass(frozen=True)
class VectorColumn:
    """A column of vectors, all of one length."""

    name: str
    dim: int
    type: VectorType


@dataclass(frozen=True)
class Manifest:
    """What is in a store (its kind, the columns of its table, its vectors), and what that follows from.

    `origin` is a JSON object: two stores with one origin hold the same numbers.
    """

    kind: Kind
    columns: tuple[Column, ...]
    vectors: tuple[VectorColumn, ...] = ()
    origin: Mapping[str, JSON] = field(default_factory=dict, compare=False)

    @cached_property
    def identity(self) -> str:
        """What every part of the store says it belongs to."""
        return sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The text, the same for the same manifest."""
        whole = {"format": FORMAT, **encode(self), "origin": self.origin}
        return json.dumps(whole, indent=1, sort_keys=True, allow_nan=False) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a store.

    Raises:
        StoreError: there is none, or it is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise StoreError(f"{folder}: must be a store of funcghost, found no {MANIFEST} in it.")
    whole = read_json(path)
    if not isinstance(whole, dict) or whole.pop("format", None) != FORMAT or not isinstance(whole.get("origin"), dict):
        raise StoreError(f"{path}: must be a manifest of the format {FORMAT!r} with its origin, found something else.")
    origin = whole.pop("origin")
    try:
        found: Manifest = decode(Manifest, whole, "manifest")
    except MalformedError as error:
        raise StoreError(f"{path}: {error}.") from error
    _check_names(path, found)
    return Manifest(found.kind, found.columns, found.vectors, origin)


def _check_names(path: Path, manifest: Manifest) -> None:
    columns, vectors = ([each.name for each in kind] for kind in (manifest.columns, manifest.vectors))
    strange = [vector.name for vector in manifest.vectors if not is_plain(vector.name) or not 0 < vector.dim < MOST_DIM]
    if strange or len(columns) > MOST_COLUMNS or any(len(set(names)) != len(names) for names in (columns, vectors)):
        raise StoreError(f"{path}: names of columns must be unlike, and those of vectors plain words, found {strange}.")


def is_plain(name: str) -> bool:
    """Whether a name can be that of a folder inside the store and of nothing outside it."""
    return 0 < len(name) <= 100 and name.replace("_", "").replace("-", "").replace(".", "").isalnum() and name[0] != "."


def read_json(path: Path) -> JSON:
    """The value in a JSON file of moderate size.

    Raises:
        StoreError: it is no JSON.
    """
    content = read_whole(path, MOST_BYTES)
    try:
        return json.loads(content.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path}: must be JSON, found something else ({error}). It is damaged.") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def differences(there: JSON, here: JSON, where: str = "") -> Iterator[str]:
    """Where two JSON values differ, for people."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted(there.keys() | here.keys()):
            yield from differences(there.get(key), here.get(key), f"{where}.{key}" if where else key)
    elif there != here or type(there) is not type(here):
        yield f"{where} is {_shown(there)} there and {_shown(here)} here"


def _shown(value: JSON) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def refuse_other(folder: Path, there: JSON, here: JSON) -> None:
    """Nothing is added to a store that holds something else.

    Raises:
        StoreError: they differ; it says where.
    """
    found = list(differences(json.loads(json.dumps(there)), json.loads(json.dumps(here))))
    if found:
        more = f", and {len(found) - 5} more" if len(found) > 5 else ""
        raise StoreError(
            f"{folder}: holds something else: {'; '.join(found[:5])}{more}. Name another folder, or remove this one."
        )
