"""Writes stores in processes that are killed or starved, all of them forked from one.

    python -m tests.corpus.victim FOLDER

FOLDER/corpus/N and FOLDER/record/N: a pass over a corpus and a record, killed at file call N; FOLDER/limit/N: a record
with a limit on the size of files; FOLDER/on: a record written until the process is killed. FOLDER/plan.json is the
plan of the passes: no gradient is taken before a fork, as autograd refuses to work in a child after that.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what a first call imports is imported once, before the forks
from torch import Tensor

import funcghost as fg
from funcghost import corpus
from tests.depth import DEEP
from tests.store.victim import broken_off, killed, limit, on_and_on

PARAMS = {"w": torch.tensor([1.0, -2.0, 3.0])}
DATA = torch.randint(-4, 5, (23, 3), generator=torch.Generator().manual_seed(0)).float()
REDUCERS = {"norm": fg.squared_norm(), "sketch": fg.project(4)}
SIZES = (1, 600, 2500)
EVERY = 1 if DEEP else 4
"""File calls are killed at every so-manieth."""


def losses(params: Any, batch: Tensor) -> Tensor:
    """In small integers: every order of sums gives the same bits."""
    return (batch @ params["w"]) ** 2


def score(out: Path, plan: fg.Plan) -> corpus.Scored:
    return corpus.score(losses, PARAMS, DATA, REDUCERS, out, batch_size=4, part=8, plan=plan, progress=False)


def main(folder: Path) -> None:
    plan = fg.Plan.from_json((folder / "plan.json").read_text())
    for inner in ("corpus", "limit", "record"):
        (folder / inner).mkdir()
    for size in SIZES:
        limit(folder / "limit", size)
    killed(folder / "record", broken_off, EVERY)
    killed(folder / "corpus", partial(score, plan=plan), EVERY)
    on_and_on(folder / "on")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
