"""A curvature in a store: its eigenvectors and eigenvalues as rows of numbers, what it was made of in the manifest.

The tensors lie one after the other, each filled up with zeros to whole rows: one part of the store for each, held to
its checksum when it is read. Needs the extra `store`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from funcghost.algebra.factors import Form
from funcghost.attribution.inverses import Curvature, blank
from funcghost.attribution.spectra import Sided, Spectrum, Whole
from funcghost.codec import MalformedError, decode, encode
from funcghost.errors import InputError, StoreError
from funcghost.store.manifest import Column, Manifest, VectorColumn
from funcghost.store.parts import Store, open_store, writing
from funcghost.store.tables import schema_of
from funcghost.trees import Tree, split_params

ROW = 1024
COLUMNS = (Column("id", "int64"),)
NUMBERS = "numbers"


@dataclass(frozen=True)
class Numbers:
    """What one tensor is called, its dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """A spectrum without its numbers: names and shapes of its parameters, and the form of one that has sides."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    base: tuple[int, ...]
    roles: tuple[tuple[int, ...], ...]
    tensors: tuple[Numbers, ...]


def save(curvature: Curvature, folder: Path | str) -> None:
    """Writes a curvature to a store in a folder, new or holding the same; exactly, in its own dtypes.

    Raises:
        StoreError: the folder holds something else, or cannot be written to.

    Example:
        >>> import tempfile, torch
        >>> from funcghost.attribution import curvature, kept
        >>> params, folder = {"w": torch.zeros(2)}, tempfile.mkdtemp()
        >>> kept.save(curvature.ekfac(lambda p, x: x @ p["w"], params, [torch.eye(2)]), folder)
        >>> kept.load(folder, params).made_of["kind"]
        'ekfac'
    """
    described, tensors = list[Any](), list[Tensor]()
    for spectrum in curvature.spectra:
        own = _tensors(spectrum)
        described.append(_entry(spectrum, own))
        tensors += own.values()
    wide: Any = "float64" if any(tensor.dtype == torch.float64 for tensor in tensors) else "float32"
    origin = {"made_of": dict(curvature.made_of), "spectra": [encode(entry) for entry in described]}
    manifest = Manifest("curvature", COLUMNS, (VectorColumn(NUMBERS, ROW, wide),), origin)
    with writing(folder, manifest) as writer:
        there, at = {part.start for part in writer.store.parts()}, 0
        for tensor in tensors:
            rows = _rows(tensor.numel())
            if rows and at not in there:
                filled = np.zeros((rows, ROW), wide)
                filled.reshape(-1)[: tensor.numel()] = tensor.detach().cpu().reshape(-1).numpy()
                ids = pa.Table.from_pydict({"id": np.arange(at, at + rows)}, schema=schema_of(COLUMNS))
                writer.add(at, at + rows, ids, {NUMBERS: filled})
            at += rows
        writer.finish(at)


def load(folder: Path | str, params: Tree) -> Curvature:
    """Reads a curvature for parameters like those it was made of, onto their devices; `made_of` says what it was.

    Raises:
        StoreError: there is none, it is damaged, or parts of it are missing.
        InputError: the parameters differ in names or shapes, or in values from those it was made at.
    """
    split, store = split_params(params), open_store(folder, "curvature")
    if store.end() is None or store.missing():
        raise StoreError(f"{folder}: parts of the curvature are missing. Save it again.")
    entries = _entries(store)
    shapes = dict(zip(split.names, (tuple(leaf.shape) for leaf in split.leaves), strict=True))
    found = {name: shape for entry in entries for name, shape in zip(entry.names, entry.shapes, strict=True)}
    if found != shapes:
        other = sorted(set(found.items()) ^ set(shapes.items()))[:4]
        raise InputError(f"kept.load: {folder} is of other parameters; on one side only: {other}.")
    made_of, numbers = store.manifest.origin["made_of"], _read(store)
    if made_of.get("params") not in (None, split.digest()):
        raise InputError(
            f"kept.load: the curvature in {folder} was made at other values of the parameters. Pass those it was made "
            "at (a checkpoint of that step), or make it anew."
        )
    device = split.leaves[0].device
    return Curvature(tuple(_spectrum(entry, numbers, device) for entry in entries), blank(split), made_of)


def _tensors(spectrum: Spectrum) -> dict[str, Tensor]:
    if isinstance(spectrum, Whole):
        return {"basis": spectrum.basis, "values": spectrum.values}
    sides = {"left": spectrum.left, "right": spectrum.right, "values": spectrum.values}
    return {name: value for name, value in sides.items() if value is not None}


def _entry(spectrum: Spectrum, tensors: Mapping[str, Tensor]) -> Entry:
    described = tuple(Numbers(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())
    if isinstance(spectrum, Whole):
        return Entry(spectrum.names, spectrum.shapes, (), (), described)
    form = spectrum.form
    return Entry(spectrum.names, (tuple(form.shape),), tuple(form.base), tuple(map(tuple, form.roles)), described)


def _rows(count: int) -> int:
    return -(-count // ROW)


def _entries(store: Store) -> list[Entry]:
    try:
        found: Sequence[Any] = store.manifest.origin["spectra"]
        return [decode(Entry, value, "spectra") for value in found]
    except (MalformedError, KeyError, TypeError) as error:
        raise StoreError(f"{store.folder}: must say what its numbers are of. It is damaged ({error}).") from error


def _read(store: Store) -> Iterator[Tensor]:
    """The tensors that are not empty, flat, with what they are filled up by."""
    for part in store.parts():
        yield torch.from_numpy(store.vectors(part, NUMBERS)).reshape(-1)


def _spectrum(entry: Entry, numbers: Iterator[Tensor], device: torch.device) -> Spectrum:
    tensors = {}
    for own in entry.tensors:
        count = torch.Size(own.shape).numel()
        flat = next(numbers)[:count] if count else torch.zeros(0)
        tensors[own.name] = flat.to(device, own.dtype, copy=True).view(own.shape)
    if not entry.roles:
        return Whole(entry.names, entry.shapes, tensors["basis"], tensors["values"])
    q, m, n = entry.roles
    form = Form(entry.shapes[0], entry.base, (q, m, n))
    return Sided(entry.names[0], form, tensors.get("left"), tensors.get("right"), tensors["values"])
