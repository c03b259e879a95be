"""Breaks one rule of funcghost at a time, in a copy, and asks the tests whether they see it.

`python -m tests.mutation [name ...]` says for each mutation which test killed it, or that it SURVIVED; it ends with 1
if one survives, or if what it replaces does not stand exactly once in its function any more. They lie beside their
wing's tests.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("funcghost", "tests", "examples", "pyproject.toml")


class Mutation(NamedTuple):
    """In a function of a file of the package, `piece` becomes `instead`; `tests`, pytest's arguments, say who notices.

    `piece` is an expression or a statement, found by its syntax: how the function is laid out, what is said beside it,
    and the rest of the file do not count. `function` is a qualified name (a class will do), or a name that the module
    assigns.
    """

    file: str
    function: str
    piece: str
    instead: str
    tests: tuple[str, ...]


class _Replaced(ast.NodeTransformer):
    def __init__(self, piece: str, instead: str) -> None:
        self.piece, self.instead, self.found = _syntax(piece), _syntax(instead), 0
        self.dumped = ast.dump(self.piece)

    def visit(self, node: ast.AST) -> Any:
        if type(node) is not type(self.piece) or ast.dump(node) != self.dumped:
            return self.generic_visit(node)
        self.found += 1
        return self.instead


def _syntax(text: str) -> ast.stmt | ast.expr:
    (statement,) = ast.parse(text).body
    return statement.value if isinstance(statement, ast.Expr) else statement


def _within(nodes: Sequence[ast.AST], name: str) -> list[ast.AST]:
    """The definitions of this qualified name below some nodes: overloads have several."""
    own, _, rest = name.partition(".")
    found: list[ast.AST] = [
        node
        for top in nodes
        for node in ast.walk(top)
        if (isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == own)
        or (isinstance(node, ast.Assign | ast.AnnAssign | ast.For) and own in _assigned(node))
    ]
    return _within([child for node in found for child in ast.iter_child_nodes(node)], rest) if rest else found


def _assigned(node: ast.Assign | ast.AnnAssign | ast.For) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def mutated(mutation: Mutation, source: str) -> ast.Module:
    """The syntax of the source with the piece replaced.

    Raises:
        LookupError: the piece does not stand exactly once in the function.
    """
    tree = ast.parse(source)
    replaced = _Replaced(mutation.piece, mutation.instead)
    for definition in _within([tree], mutation.function):
        replaced.generic_visit(definition)
    if replaced.found != 1:
        raise LookupError(f"stands {replaced.found} times in {mutation.function} of {mutation.file}: {mutation.piece}")
    return ast.fix_missing_locations(tree)


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
    for name, mutation in chosen.items():
        path, tests = folder / "funcghost" / mutation.file, mutation.tests
        source = path.read_text(encoding="utf-8")
        try:
            broken = mutated(mutation, source)
        except LookupError as error:
            yield name, str(error), False
            continue
        if tests not in sound:
            sound[tests] = run(folder, tests)
        if sound[tests] is not None:
            yield name, f"{sound[tests]} fails without it", False
            continue
        path.write_text(ast.unparse(broken), encoding="utf-8")
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
