"""Several stores as one."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from funcghost.corpus.asking import Corpus
from funcghost.corpus.asking import open as open_corpus
from funcghost.errors import InputError, StoreError
from funcghost.store.manifest import JSON, Manifest, refuse_other
from funcghost.store.parts import writing

OF_THE_DATA = ("data",)


def merge(out: str | Path, paths: Sequence[str | Path]) -> Corpus:
    """A store with the samples of several, in their order, for which nothing is computed.

    They must follow from the same but for their data, and no id may be there twice. Run it again to go on with a merge
    that was killed. Memory: the ids, and one part.

    Raises:
        InputError: there are none, or an id is in two of them.
        StoreError: one is damaged, lacks samples, or differs from the first in more than its data; or `out` holds
            something else.
    """
    if not paths:
        raise InputError("paths: must name one or more stores.")
    stores = [open_corpus(path) for path in paths]
    first = stores[0].store.manifest
    for path, found in zip(paths, stores, strict=True):
        refuse_other(Path(path), _shared(first), _shared(found.store.manifest))
    ids = pa.concat_arrays([pa.array(found.ids(), first_type(stores)) for found in stores])
    twice = len(ids) - len(ids.unique())
    if twice:
        raise InputError(f"paths: {twice} ids are there twice. Score with ids= that are unlike in the stores.")
    data: JSON = {"merged": [[found.store.manifest.identity, len(found)] for found in stores]}
    manifest = Manifest(first.kind, first.columns, first.vectors, {**first.origin, "data": data})
    at = 0
    with writing(out, manifest) as writer:
        done = {part.start for part in writer.store.parts()}
        for found in stores:
            for part in found.store.parts():
                stop = at + part.stop - part.start
                if at not in done:
                    vectors = {name: np.asarray(found.store.vectors(part, name)) for name in found.projections}
                    writer.add(at, stop, found.store.read(part), vectors)
                at = stop
        writer.finish(at)
    return open_corpus(out)


def first_type(stores: Sequence[Corpus]) -> pa.DataType:
    """The type of the ids."""
    found = {found.store.schema.field("id").type for found in stores}
    if len(found) > 1:
        raise StoreError("paths: ids are numbers in some of the stores and strings in others.")
    return found.pop()


def _shared(manifest: Manifest) -> JSON:
    origin = {name: value for name, value in manifest.origin.items() if name not in OF_THE_DATA}
    columns = [[column.name, column.type] for column in manifest.columns]
    return {**origin, "columns": columns, "vectors": [[v.name, v.dim, v.type] for v in manifest.vectors]}
