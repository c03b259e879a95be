"""Scores of every sample of a data set, in one pass, on the disk."""

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import optree
import torch

from funcghost._version import __version__
from funcghost.algebra.cost import NOMINAL
from funcghost.corpus.asking import Corpus
from funcghost.corpus.asking import open as open_corpus
from funcghost.corpus.describing import of_function, of_params, of_reducers
from funcghost.corpus.feeding import Cutting, Loaded, Source, describe, source_of
from funcghost.corpus.results import Results, dtype_of, gathered, id_type, results_of
from funcghost.corpus.verifying import check_first
from funcghost.engine.plans import Plan
from funcghost.errors import InputError
from funcghost.options import Options, check_options
from funcghost.problem import Losses
from funcghost.progress import Meter
from funcghost.reducers.bases import Reducer
from funcghost.reducers.many import by_gradients
from funcghost.store.manifest import JSON, MANIFEST, Manifest, read_manifest, refuse_other
from funcghost.store.parts import writing
from funcghost.store.record import checked_origin
from funcghost.transforms.steps import Transform
from funcghost.trees import Tree, split_params

log = logging.getLogger("funcghost")

DEFAULT_PART = 4096


@dataclass(frozen=True)
class Scored:
    """What a pass did: the store, how many samples it took in how many seconds, how often it planned and verified."""

    corpus: Corpus
    samples: int
    seconds: float
    plans: int
    sizes: int


class Going(Protocol):
    """What is computed of every batch, and how that went."""

    def results(self, batch: Tree) -> Results:
        """What is kept of a batch."""

    @property
    def note(self) -> str:
        """A word on it, for those who watch."""


@dataclass
class Pass:
    """One way through the data: the transform with its plans, and how the results are kept."""

    transform: Transform
    params: Tree
    reducers: Tree

    def results(self, batch: Tree) -> Results:
        """What is kept of a batch."""
        step = self.transform.step(self.params, batch, self.reducers)
        return results_of(self.reducers, step.reduced, len(step.losses))

    @property
    def note(self) -> str:
        """How often it planned, and for how many sizes that was verified."""
        plans, sizes = self.counts
        return f"{plans} plan{'s' * (plans != 1)}, {sizes} size{'s' * (sizes != 1)}"

    @property
    def counts(self) -> tuple[int, int]:
        """Plans that are kept, and the sizes that they hold for."""
        return len(self.transform.plans), sum(len(plan.sizes) for plan in self.transform.plans)


def score(
    losses: Losses,
    params: Tree,
    data: Any,
    reducers: Tree,
    out: str | Path,
    *,
    batch_size: int = 16,
    collate: Callable[..., Tree] | None = None,
    ids: Callable[[Any], Any] | None = None,
    length: Callable[[Any], int] | None = None,
    part: int = DEFAULT_PART,
    dtype: str = "float32",
    origin: Mapping[str, JSON] | None = None,
    has_aux: bool = False,
    options: Options | None = None,
    plan: Plan | None = None,
    progress: bool = True,
) -> Scored:
    """The reduced per-sample gradients of all samples of a data set, in a store.

        corpus.score(losses, params, data, {"score": fg.dot(v), "projection": fg.project(2048)}, "runs/corpus")

    Law: what is kept of a sample is `fg.reduce(losses)(params, batch, reducers)`, rounded to `dtype`: [b] makes a
    column, [b, k] one for each k (`score_0`, ..), and projections [b, dim] make vectors. Call it again to go on with a
    pass that was killed; the store is the same to the bit, and so it is with any number of ranks of a `torchrun` job
    (each takes every so-manieth part; no collectives). In memory are the samples and results of one part.

    Args:
        losses: `losses(params, batch) -> [b]`.
        params: a tree of parameters.
        data: a map-style data set (anything with positions and a length), an iterable of samples, or a `DataLoader`
            that does not shuffle.
        reducers: a tree of reducers whose result for a sample depends on that sample: `fg.dot`, `fg.squared_norm`,
            `fg.project`, `fg.per_param` of them.
        out: the folder of the store, new or to be gone on with.
        batch_size: samples of a batch, unless the loader makes them.
        collate: `collate(samples) -> batch`; `torch.utils.data.default_collate` by default.
        ids: `ids(sample)` gives an integer or a string (of a loader, `ids(batch)` gives [b]); positions by default.
        length: `length(sample)`: samples of a part are batched by their length, longest first, and
            `collate(samples, padded)` is told to which length, one of four between a power of two and the next.
        part: about how many samples are computed before they are written.
        dtype: "float32", "float64" or "float16" for what is kept.
        origin: anything else that the numbers follow from, a JSON object: a checkpoint's name, a tokeniser's.
        has_aux: whether the losses return `(losses, aux)`.
        options: see `fg.Options`.
        plan: see `fg.grad_and_reduce`.
        progress: whether to say how far it is: a bar on a terminal, otherwise lines in the log.

    Cost: that of `fg.reduce`, and one batch more at the start.

    Raises:
        InputError: an argument is not what it must be; before anything is written.
        StoreError: the folder holds a store that differs in origin, which it says, or in its first samples; or it
            cannot be written.

    Example:
        >>> import tempfile, torch, funcghost as fg
        >>> from funcghost import corpus
        >>> data = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]
        >>> def losses(params, x):
        ...     return x @ params["w"]
        >>> done = corpus.score(losses, {"w": torch.zeros(2)}, data, {"norm": fg.squared_norm()}, tempfile.mkdtemp())
        >>> done.corpus.column("norm").tolist()
        [5.0, 25.0]
    """
    source = source_of(data, Cutting(batch_size, part, collate, ids, length))
    # Measured rates might send two processes two ways, to numbers that differ by rounding.
    fixed = options if options is not None and options.rates else replace(check_options(options), rates=NOMINAL)
    transform = Transform(losses, None, has_aux, fixed, plan)
    split = split_params(params)
    whole: dict[str, JSON] = {
        "versions": {"funcghost": __version__, "torch": torch.__version__},
        "losses": of_function(losses),
        "params": of_params(split),
        "reducers": of_reducers(reducers),
        "data": describe(source),
        "dtype": dtype_of(dtype),
        "given": checked_origin(origin),
    }
    cheaper = optree.tree_map(
        lambda leaf: by_gradients(leaf, split), reducers, is_leaf=lambda node: isinstance(node, Reducer)
    )
    going = Pass(transform, params, cheaper)
    samples, seconds = go_through(source, going, Target(Path(out), whole, dtype, *place()), progress)
    plans, sizes = going.counts
    log.info("scored %d samples in %.1f s, %s", samples, seconds, going.note)
    return Scored(open_corpus(out, partial=True), samples, seconds, plans, sizes)


@dataclass(frozen=True)
class Target:
    """Where results go."""

    folder: Path
    origin: dict[str, JSON]
    dtype: str
    rank: int
    ranks: int

    def known(self) -> Manifest | None:
        """The manifest of what is there, if that follows from the same.

        Raises:
            StoreError: it does not.
        """
        if not (self.folder / MANIFEST).exists():
            return None
        found = read_manifest(self.folder)
        refuse_other(self.folder, {k: v for k, v in found.origin.items() if k != "rounded"}, self.origin)
        return found


def go_through(source: Source, going: Going, target: Target, progress: bool) -> tuple[int, float]:
    """Computes the parts that are missing; how many samples these were, in how many seconds."""
    known = target.known()
    with ExitStack() as held:
        opened = partial(writing, target.folder, rank=target.rank, ranks=target.ranks)
        writer = None if known is None else held.enter_context(opened(known))
        finished = {} if writer is None else {part.start: part for part in writer.store.parts()}
        if writer is not None and writer.store.end() is not None and not writer.store.missing():
            return 0, 0.0
        samples = sum(part.stop - part.start for part in finished.values())
        meter = held.enter_context(Meter("scoring", "samples", source.total, samples, progress))

        def due(number: int, start: int) -> bool:
            return number % target.ranks == target.rank and start not in finished

        # The first batch of all is where every process plans, so that all go the same way, to the bit.
        for stretch in source.stretches(lambda number, start: not number or due(number, start)):
            own = due(stretch.number, stretch.start)
            rows: list[tuple[Loaded, Results]] = []
            for loaded in stretch.batches if own else islice(stretch.batches, 1):
                results = going.results(loaded.batch)
                manifest = results.manifest(target.origin, target.dtype, id_type(loaded.ids))
                if writer is None:
                    writer = held.enter_context(opened(manifest))
                check_same(writer.store.manifest, manifest)
                if stretch.start in finished:
                    check_first(Corpus(writer.store), loaded, results)
                rows.append((loaded._replace(batch=None), results))
                if own:
                    meter.update(len(loaded.rows), going.note)
            if own and writer is not None:
                table, vectors = gathered(writer.store, stretch, rows)
                writer.add(stretch.start, stretch.start + stretch.size, table, vectors)
        if writer is None:
            raise InputError("data: there is no sample in it.")
        assert source.total is not None
        writer.finish(source.total)
        return meter.done - meter.first, meter.seconds


def check_same(manifest: Manifest, found: Manifest) -> None:
    """Every batch gives the same columns.

    Raises:
        InputError: one does not.
    """
    if (found.columns, found.vectors) != (manifest.columns, manifest.vectors):
        here, there = ([(c.name, c.type) for c in each.columns] for each in (found, manifest))
        raise InputError(
            f"reducers: must give the same columns for every batch, found {sorted(set(here) ^ set(there))} in some, or "
            "vectors of unlike lengths; or ids are numbers here and strings there."
        )


def place() -> tuple[int, int]:
    """The rank of this process, and of how many: those of the process group, or of `torchrun`."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
