"""`score`, `top`, `nearest` and `verify`."""

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funcghost import corpus
from funcghost.corpus.describing import of_tree
from funcghost.errors import InputError, StoreError
from funcghost.reducers.projections import project
from funcghost.shell.targets import CHECKED, MAY_BE_CHECKED, MAY_BE_SCORED, SCORED, UsageError, called, load, named
from funcghost.store.manifest import read_manifest
from funcghost.store.record import open_record
from funcghost.transforms.steps import reduce

OK = 0
NOT_OF_VERIFY = ("batch_size", "ids", "part", "dtype", "origin", "plan", "texts")


def score(chosen: argparse.Namespace) -> int:
    """Scores the data of a factory into a store."""
    given = load(chosen.target, SCORED, MAY_BE_SCORED)
    given.pop("texts", None)
    with nullcontext() if sys.stderr.isatty() else _said():
        done = corpus.score(**given, out=chosen.out)
    size = len(done.corpus)
    found = {
        "samples": size,
        "scored_now": done.samples,
        "seconds": round(done.seconds, 3),
        "plans": done.plans,
        "sizes": done.sizes,
        "complete": done.corpus.complete,
        "columns": done.corpus.columns,
        "projections": done.corpus.projections,
    }
    rate = f"{done.samples / done.seconds:.1f} a second" if done.seconds else "nothing was left to do"
    text = f"{size} samples in {chosen.out}, {done.samples} of them scored now: {rate}"
    print(json.dumps(found) if chosen.json else text)
    return OK


@contextmanager
def _said() -> Iterator[None]:
    """Lines of the library's log on stderr, which is no terminal, as long as the body runs."""
    log = logging.getLogger("funcghost")
    if log.handlers:
        yield
        return
    level, handler = log.level, logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def top(chosen: argparse.Namespace) -> int:
    """The samples with the largest or smallest values."""
    found = corpus.open(chosen.run, partial=chosen.partial)
    _show(found.top(chosen.k, chosen.column, largest=not chosen.smallest), chosen.json)
    return OK


def nearest(chosen: argparse.Namespace) -> int:
    """The samples nearest to a query in gradient space."""
    found = corpus.open(chosen.run, partial=chosen.partial)
    query = _query(found, chosen.query, chosen.projection)
    _show(found.nearest(query, chosen.k, normalised=chosen.cosine, projection=chosen.projection), chosen.json)
    return OK


def _query(found: corpus.Corpus, query: str, projection: str | None) -> Any:
    """The vector of a query: that of a sample by its id, or what a factory makes."""
    if ":" not in query:
        numbers = found.store.schema.field("id").type == "int64"
        if numbers and not query.removeprefix("-").isdecimal():
            raise UsageError(
                f"--query: ids are numbers in this store, found {query!r}; or give package.module:factory."
            )
        return found.vector(found.position(int(query) if numbers else query), projection)
    made = called(query)
    if isinstance(made, Tensor | np.ndarray):
        return made
    given = named(made, query, CHECKED, MAY_BE_CHECKED)
    if of_tree(given["params"]) != found.origin["params"]["digest"]:
        raise StoreError(f"--query: {query} has other parameters than those that {found.store.folder} follows from.")
    name = projection if projection is not None else next(iter(found.projections), "")
    described = found.origin["reducers"].get(name)
    if not isinstance(described, Mapping) or described.get("type") != "Project":
        raise InputError(f"--projection: must name a projection of the whole gradient, found {name!r}.")
    reducer = project(described["dim"], described["seed"], described["kind"])
    value = reduce(given["losses"], options=given.get("options"))(given["params"], given["batch"], reducer)
    return torch.sum(value, 0)


def _show(hits: corpus.Hits, as_json: bool) -> None:
    rows = [
        {"id": own.item() if hasattr(own, "item") else own, "position": int(position), "value": float(value)}
        for own, position, value in zip(*hits, strict=True)
    ]
    if as_json:
        print(json.dumps(rows))
        return
    for number, row in enumerate(rows, 1):
        print(f"{number:4d}  {row['value']: .6e}  {row['id']}")


def verify(chosen: argparse.Namespace) -> int:
    """Reads everything again, and computes some of it anew."""
    if read_manifest(chosen.run).kind == "record":
        if chosen.target is not None:
            raise UsageError(f"{chosen.run}: is a record of values in a run, of which nothing can be computed anew.")
        record = open_record(chosen.run)
        rows = sum(len(table) for table in record.tables())
        found: dict[str, Any] = {"steps": record.steps, "rows": rows, "recomputed": 0}
        text = f"{rows} rows of {record.steps} steps are whole"
    else:
        given = {} if chosen.target is None else load(chosen.target, SCORED, MAY_BE_SCORED)
        for name in NOT_OF_VERIFY:
            given.pop(name, None)
        done = corpus.verify(chosen.run, **given, count=chosen.count)
        found = {**vars(done)}
        text = f"{done.samples} samples in {done.parts} parts are whole" + (
            "" if done.complete else ", more are to come"
        )
        if done.recomputed:
            text += f"; {done.recomputed} computed anew are within {done.worst:.1e}"
    print(json.dumps(found) if chosen.json else text)
    return OK
