"""What a pass over a corpus costs: beside plain training, beside other libraries, and what asking costs.

    python tests/benchmarks/bench_corpus.py --quick --threads 1

- `pass`: samples/s of `corpus.score`, store included, over those of the plain forward and backward on the same batches,
  taken in turns: one direction; 16 directions with a projection to 2048 dimensions and norms.
- `peers`: dattri, trak and bergson where they are installed, over the same samples of the same model in the same run:
  samples/s of funcghost's passes over theirs, both with what they write. dattri (TracIn) projects training and test
  gradients and multiplies them, for 16 test samples, whose gradients it takes anew for every training batch: ours are
  exact scores of these samples, their gradients included, and projections alone. trak has features in float32 by a
  dense random projection: ours are two-sided (`kind="kronecker"`), and dense with signs that are computed anew for
  each batch. bergson indexes gradients of the sums of token losses by the weights of a GPT-2's blocks, each projected
  from two sides to 16 x 16: ours is the two-sided projection of the same losses by the same weights together, of the
  same length. A package that is not installed is a row that says so.
- `nearest`: one query against all vectors, over reading their files once; and the next one, for which their checksums
  are known to hold.
- `memory`: the peak of a pass over many samples beside that over few, in processes of their own.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

import funcghost as fg
from funcghost import corpus
from funcghost.store import Column, Manifest, VectorColumn, writing
from funcghost.store.tables import schema_of

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.benchmarks.common import describe, parser_of, positive, table
from tests.benchmarks.corpus_contenders import CONTENDERS, LENGTH, VOCABULARY, MissingError, Sizes
from tests.benchmarks.models import GPT, next_token

DIRECTIONS, DIM = 16, 2048


class Workload:
    """A model, its losses, and a data set of token rows."""

    def __init__(self, samples: int, length: int, width: int, layers: int, vocabulary: int) -> None:
        torch.manual_seed(0)
        self.model = GPT(vocabulary, length, width, layers, heads=4)
        self.params = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        self.losses = fg.module_losses(self.model, next_token)
        self.data = torch.randint(vocabulary, (samples, length))

    def direction(self) -> dict[str, Tensor]:
        return {name: torch.randn_like(value) for name, value in self.params.items()}

    def plain(self, batch_size: int) -> None:
        """A forward and a backward of every batch."""
        leaves = {name: value.requires_grad_() for name, value in self.params.items()}
        for batch in self.data.split(batch_size):
            torch.autograd.grad(self.losses(leaves, batch).mean(), list(leaves.values()))
        for value in leaves.values():
            value.requires_grad_(False)


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def passes(work: Workload, args: argparse.Namespace) -> dict[str, Any]:
    """Ratios of samples/s, medians over rounds taken in turns. Planning is done before: it is once for a corpus."""
    directions = [work.direction() for _ in range(DIRECTIONS)]
    sketch = fg.project(DIM, kind="kronecker")
    wanted: dict[str, Any] = {
        "one direction": {"score": fg.dot(directions[0])},
        f"{DIRECTIONS} directions, projection to {DIM}": {"score": fg.dot(fg.stack(directions)), "sketch": sketch},
        f"projection to {DIM}": {"sketch": sketch},
    }
    plans = {
        name: fg.plan(work.losses, work.params, work.data[: args.batch], reducers) for name, reducers in wanted.items()
    }
    times: dict[str, list[float]] = {name: [] for name in ("plain", *wanted)}
    for number in range(args.rounds + 1):
        for name in times:
            if name == "plain":
                taken = seconds(lambda: work.plain(args.batch))
            else:
                with tempfile.TemporaryDirectory() as folder:
                    call = _score(work, wanted[name], folder, args.batch, plans[name])
                    taken = seconds(call)
            if number:
                times[name].append(taken)
    count = len(work.data)
    rates = {name: count / median(taken) for name, taken in times.items()}
    ratios = {
        name: median([p / t for p, t in zip(times["plain"], taken, strict=True)]) for name, taken in times.items()
    }
    return {"samples_per_second": rates, "of_plain": ratios}


def _score(work: Workload, reducers: Any, folder: str, batch: int, plan: fg.Plan | None) -> Callable[[], Any]:
    def collate(rows: Any) -> Tensor:
        return torch.stack(list(rows))

    return lambda: corpus.score(
        work.losses,
        work.params,
        work.data,
        reducers,
        Path(folder) / "run",
        batch_size=batch,
        collate=collate,
        plan=plan,
    )


def peers(args: argparse.Namespace) -> dict[str, Any]:
    """Their seconds over ours for the same samples of the same model; medians over rounds taken in turns."""
    torch.manual_seed(0)
    data = torch.randint(VOCABULARY, (16 if args.quick else 128, LENGTH))
    found: dict[str, Any] = {}
    for name, make in CONTENDERS.items():
        if args.peer not in (None, name):
            continue
        try:
            job = make(data, Sizes(args.batch, DIM, DIRECTIONS))
            ratios: dict[str, list[float]] = {what: [] for what in job.ours}
            for number in range(args.rounds + 1):
                theirs = seconds(job.theirs)
                for what, own in job.ours.items():
                    taken = seconds(own)
                    if number:
                        ratios[what].append(theirs / taken)
            found[name] = {what: round(median(each), 2) for what, each in ratios.items()}
        except MissingError as missing:
            found[name] = f"not measured: {missing}"
        except Exception as error:  # what another library raises on this model is its row
            found[name] = f"failed: {type(error).__name__}: {str(error)[:200]}"
    return found


def nearest(args: argparse.Namespace) -> dict[str, Any]:
    """One exact query over all vectors, beside reading their files once through ordinary calls."""
    random = np.random.default_rng(0)
    block = random.standard_normal((4096, DIM)).astype(np.float32)
    with tempfile.TemporaryDirectory() as name:
        columns = (Column("id", "int64"), Column("value", "float32"))
        manifest = Manifest("corpus", columns, (VectorColumn("v", DIM, "float32"),))
        with writing(Path(name) / "run", manifest) as writer:
            pa = __import__("pyarrow")
            for start in range(0, args.vectors, 4096):
                stop = min(start + 4096, args.vectors)
                rows = {"id": np.arange(start, stop), "value": np.zeros(stop - start, np.float32)}
                part = pa.Table.from_pydict(rows, schema=schema_of(columns))
                writer.add(start, stop, part, {"v": block[: stop - start]})
            writer.finish(args.vectors)
        files = sorted((Path(name) / "run" / "vectors" / "v").iterdir())
        query = random.standard_normal(DIM)
        buffer = bytearray(1 << 24)

        def read() -> None:
            for path in files:
                with path.open("rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass

        first, later = [], []
        for number in range(args.rounds + 1):
            store = corpus.open(Path(name) / "run")
            once, *asked = seconds(read), *(seconds(partial(store.nearest, query, 10)) for _ in range(2))
            if number:
                first.append(asked[0] / once)
                later.append(asked[1] / once)
    return {"vectors": args.vectors, "of_reading_once": median(first), "the_next_query": median(later)}


MEMORY = """
import sys, resource, tempfile, torch, funcghost as fg
from funcghost import corpus
class Data:
    def __len__(self): return int(sys.argv[1])
    def __getitem__(self, k):
        if k >= len(self): raise IndexError
        return torch.full((16,), k % 7, dtype=torch.float32)
params = {"w": torch.ones(16, 16)}
def losses(params, x): return (x @ params["w"]).square().sum(1)
with tempfile.TemporaryDirectory() as folder:
    reducers = {"n": fg.squared_norm(), "p": fg.project(16)}
    corpus.score(losses, params, Data(), reducers, folder, batch_size=256, part=4096)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Peaks in MiB."""
    found = {}
    for samples in (1000, args.samples):
        command = [sys.executable, "-c", MEMORY, str(samples)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[str(samples)] = int(done.stdout.split()[-1]) / 1024
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of("What a pass over a corpus costs.", quick="small sizes, for CI")
    parser.add_argument("--threads", type=positive(int))
    parser.add_argument("--rounds", type=positive(int), default=3)
    parser.add_argument("--batch", type=positive(int), default=16, help="(default: 16, that of corpus.score)")
    parser.add_argument("--rows", type=positive(int), help="samples of a pass (default: 256, quick: 32)")
    parser.add_argument("--vectors", type=positive(int), help="for nearest (default: 10^6, quick: 10^5)")
    parser.add_argument("--samples", type=positive(int), help="for memory (default: 10^6, quick: 5 10^4)")
    parser.add_argument("--only", choices=("pass", "peers", "nearest", "memory"))
    parser.add_argument("--peer", choices=tuple(CONTENDERS), help="one of the peers")
    args = parser.parse_args(arguments)
    args.vectors = args.vectors or (100_000 if args.quick else 1_000_000)
    args.samples = args.samples or (50_000 if args.quick else 1_000_000)
    if args.threads:
        torch.set_num_threads(args.threads)
    work = Workload(args.rows or (32 if args.quick else 256), 128, 256, 4, 8192)
    sections: dict[str, Callable[[], Any]] = {
        "pass": lambda: passes(work, args),
        "peers": lambda: peers(args),
        "nearest": lambda: nearest(args),
        "memory": lambda: memory(args),
    }
    found: dict[str, Any] = {"where": describe(torch.device("cpu"))}
    for name, measure in sections.items():
        if args.only in (None, name):
            found[name] = measure()
            print(f"{name}\n{table(_rows(found[name]))}\n", flush=True)
    found["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _rows(found: dict[str, Any], where: str = "") -> list[list[str]]:
    rows: list[list[str]] = []
    for name, value in found.items():
        inside = f"{where}{name}"
        if isinstance(value, dict):
            rows += _rows(value, f"{inside}: ")
        else:
            rows.append([inside, f"{value:.3f}" if isinstance(value, float) else str(value)])
    return rows


if __name__ == "__main__":
    main()
