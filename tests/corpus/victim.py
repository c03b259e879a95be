"""Scores a corpus in processes that are killed, one forked for each file call of a pass.

    python -m tests.corpus.victim FOLDER

FOLDER/plan.json is the plan; FOLDER/N is left by the process that was killed at its file call N. No gradient is taken
before a fork: autograd refuses to work in a child after that.
"""

import itertools
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what a first call imports is imported once, before the forks
from torch import Tensor

import funcghost as fg
from funcghost import corpus
from tests.store.victim import die_at

PARAMS = {"w": torch.tensor([1.0, -2.0, 3.0])}
DATA = torch.randint(-4, 5, (23, 3), generator=torch.Generator().manual_seed(0)).float()
REDUCERS = {"norm": fg.squared_norm(), "sketch": fg.project(4)}
EVERY = 3


def losses(params: Any, batch: Tensor) -> Tensor:
    """In small integers: every order of sums gives the same bits."""
    return (batch @ params["w"]) ** 2


def score(out: Path, plan: fg.Plan) -> corpus.Scored:
    return corpus.score(losses, PARAMS, DATA, REDUCERS, out, batch_size=4, part=8, plan=plan, progress=False)


def main(folder: Path) -> None:
    plan = fg.Plan.from_json((folder / "plan.json").read_text())
    for number in itertools.count(0, EVERY):
        child = os.fork()
        if not child:
            die_at(number, folder)
            score(folder / str(number), plan)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            return


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
