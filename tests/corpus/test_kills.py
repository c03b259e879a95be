"""A pass that is killed at any point: what is finished stays and is right, and going on gives the same bits."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

import funcghost as fg
from funcghost import corpus
from tests.corpus.victim import DATA, PARAMS, REDUCERS, losses, score

ROOT = Path(__file__).resolve().parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    kept = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


def test_killed_at_file_calls(tmp_path: Path) -> None:
    plan = fg.plan(losses, PARAMS, DATA[:4], REDUCERS)
    (tmp_path / "plan.json").write_text(plan.to_json())
    done = score(tmp_path / "whole", plan)
    wanted = contents(tmp_path / "whole")
    norms = done.corpus.column("norm")
    sketches = np.concatenate([block for _, block in done.corpus.vectors()])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.corpus.victim", str(tmp_path)]
    subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=300)
    reached = set()
    for run in sorted((path for path in tmp_path.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name)):
        if (run / "manifest.json").exists():
            found = corpus.open(run, partial=True)
            reached.add(len(found))
            np.testing.assert_array_equal(found.column("norm"), norms[: len(found)])
            for start, block in found.vectors():
                np.testing.assert_array_equal(block, sketches[start : start + len(block)])
        score(run, plan)
        assert contents(run) == wanted, run
    assert reached == {0, 8, 16, 23}
