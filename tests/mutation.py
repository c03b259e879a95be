"""Breaks one rule of funcghost at a time, in a copy, and asks the tests whether they see it.

`python -m tests.mutation [name ...]` says for each mutation which test killed it, or that it SURVIVED; it ends with 1
if one survives, or if its text does not stand exactly once in the source any more. They lie beside their
wing's tests.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("funcghost", "tests", "examples", "pyproject.toml")


class Mutation(NamedTuple):
    """`text` in a file of the package becomes `instead`; `tests` are pytest's arguments for who should notice."""

    file: str
    text: str
    instead: str
    tests: tuple[str, ...]


def mutations() -> dict[str, Mutation]:
    """Those of all wings, by name."""
    tests = Path(__file__).parent
    found = dict[str, Mutation]()
    for path in sorted(tests.rglob("mutations.py")):
        found |= import_module(".".join(path.relative_to(tests.parent).with_suffix("").parts)).MUTATIONS
    return found


def run(folder: Path, tests: Sequence[str]) -> str | None:
    """The first test that fails in a folder, None where all pass."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "HYPOTHESIS_PROFILE": "ci", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no", *tests]
    found = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if found.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", found.stdout, re.MULTILINE)
    if found.returncode != 1 or failed is None:
        raise RuntimeError(f"pytest ended with {found.returncode}: {found.stdout[-2000:]}{found.stderr[-2000:]}")
    return failed[1]


def outcomes(chosen: Mapping[str, Mutation], folder: Path) -> Iterator[tuple[str, str, bool]]:
    """For each mutation what came of it, and whether that is as it should be."""
    sound: dict[tuple[str, ...], str | None] = {}
    for name, (file, text, instead, tests) in chosen.items():
        path = folder / "funcghost" / file
        source = path.read_text(encoding="utf-8")
        if source.count(text) != 1:
            yield name, f"its text stands {source.count(text)} times in {file}", False
            continue
        if tests not in sound:
            sound[tests] = run(folder, tests)
        if sound[tests] is not None:
            yield name, f"{sound[tests]} fails without it", False
            continue
        path.write_text(source.replace(text, instead), encoding="utf-8")
        killer = run(folder, tests)
        path.write_text(source, encoding="utf-8")
        yield name, f"killed by {killer}" if killer else "SURVIVED", killer is not None


def main(names: Sequence[str]) -> int:
    """Runs the mutations of these names, or all."""
    known = mutations()
    if unknown := set(names) - known.keys():
        print(f"no mutations {sorted(unknown)} among {sorted(known)}")
        return 2
    fine = True
    with tempfile.TemporaryDirectory() as made:
        for part in COPIED:
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, Path(made) / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(ROOT / part, made)
        for name, outcome, expected in outcomes({name: known[name] for name in names or known}, Path(made)):
            fine = fine and expected
            print(f"{name:32} {outcome}", flush=True)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
