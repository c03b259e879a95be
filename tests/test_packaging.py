import ast
import doctest
import importlib
import pydoc
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hatchling.builders.wheel import WheelBuilder

import funcghost as fg
from funcghost.versions import SHARDED_MODELS, TORCH
from tests.mutation import mutated, mutations

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "funcghost"

# Each wing imports only from those that stand before it; "" are the files beside them, which all may import.
WINGS = (
    "",
    "algebra",
    "ops",
    "losses",
    "reducers",
    "engine",
    "laws",
    "planning",
    "transforms",
    "checking",
    "store",
    "training",
    "attribution",
    "corpus",
    "distributed",
    "evaluation",
    "integrations",
    "plots",
    "testing",
    "shell",
)
# What stands beside the wings for the names that users import, and the wing that it belongs to.
FACADES = {"functional": "losses", "__init__": "testing", "__main__": "shell"}


def module_name(path: Path) -> str:
    *packages, stem = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(packages if stem == "__init__" else [*packages, stem])


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def wing(module: str) -> int:
    """The place of the wing that a module belongs to."""
    first, *inside = module.split(".")
    name = FACADES.get(first or "__init__", "") if not inside and first not in WINGS[1:] else first
    return WINGS.index(name)


def imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    """The modules of funcghost that the statement imports, named as in `ORDER`."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:
        members = [f"{node.module}.{alias.name}" for alias in node.names]
        names = [name if name.removeprefix("funcghost.") in MODULES else str(node.module) for name in members]
    return [name[len("funcghost.") :] for name in names if f"{name}.".startswith("funcghost.")]


def import_faults(module: str, source: str) -> list[str]:
    """Every import statement of the module that breaks a rule of the layout."""
    tree = ast.parse(source)
    faults = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        where = f"line {node.lineno}: {ast.unparse(node)}"
        if node not in tree.body:
            faults.append(f"{where}: not at the top level")
        if isinstance(node, ast.ImportFrom) and node.level:
            faults.append(f"{where}: relative")
        elif upward := [name for name in imported(node) if wing(name) > wing(module) or name == module]:
            faults.append(f"{where}: {upward} not below {module!r}")
    return faults


def test_every_module_is_in_a_wing() -> None:
    folders = {name.partition(".")[0] for name, path in MODULES.items() if path.parent != PACKAGE}
    assert folders - set(WINGS) == set()


def test_no_modules_of_a_wing_import_each_other() -> None:
    below = {
        name: {other for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) for other in uses(node)}
        for name, path in MODULES.items()
    }
    order = TopologicalSorter({name: others & below.keys() - {""} for name, others in below.items() if name})
    order.prepare()  # raises CycleError, with the circle


def uses(node: ast.AST) -> list[str]:
    return imported(node) if isinstance(node, ast.Import | ast.ImportFrom) else []


@pytest.mark.parametrize("name", [wing for wing in WINGS if wing in MODULES and wing])
def test_a_wing_says_what_it_is(name: str) -> None:
    text = ast.get_docstring(ast.parse(MODULES[name].read_text(encoding="utf-8"))) or ""
    assert len(text) > 80, f"{MODULES[name]}: what the wing is, what it may import, which file to read first"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_only_downwards(module: str) -> None:
    assert import_faults(module, MODULES[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("from funcghost.reducers.dots import dot", "not below"),
        ("from funcghost import errors, functional", "not below"),
        ("import funcghost.engine.run", "not below"),
        ("import funcghost", "not below"),
        ("from funcghost import dot", "not below"),
        ("import funcghost.ops.tangent", "not below"),
        ("from .errors import InputError", "relative"),
        ("def f():\n    import torch", "not at the top level"),
        ("if True:\n    import torch", "not at the top level"),
    ],
)
def test_a_misplaced_import_is_found(source: str, fault: str) -> None:
    [found] = import_faults("ops.tangent", source)
    assert fault in found


def test_a_proper_import_is_no_fault() -> None:
    below = ["import torch", "import funcghostly", "import funcghost.errors", "from funcghost import trees, codec"]
    assert import_faults("ops.tangent", "\n".join([*below, "from funcghost.ops.rules import Op"])) == []


# Trainers that are too large to install for the tests: what is in these folders runs where they are installed.
EXTRAS = ("trl", "lightning")
SINCE = {"distributed.sharded": SHARDED_MODELS}


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples_run(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    for extra in EXTRAS:
        if f"{module}.".startswith(f"integrations.{extra}."):
            pytest.importorskip(extra)
    found = doctest.testmod(importlib.import_module(f"funcghost.{module}".rstrip(".")))
    if SINCE.get(module, TORCH) > TORCH:
        assert "funcghost.errors.VersionError: " in capsys.readouterr().out
    else:
        assert found.failed == 0


@pytest.mark.parametrize("absent", ["hypothesis", "matplotlib", "pyarrow", "torch._dynamo", "torch._inductor"])
def test_an_import_waits_until_it_is_needed(absent: str, imported_modules: set[str]) -> None:
    """What extras bring, and the compiler, which takes as long to import as the rest of torch."""
    assert absent not in imported_modules


@pytest.fixture(scope="module")
def imported_modules() -> set[str]:
    """What the package and its wings have imported, in a fresh process."""
    code = "import sys, funcghost, funcghost.attribution, funcghost.training, funcghost.__main__; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    return set(run.stdout.split())


def test_the_wheel_holds_the_package_and_its_type_marker() -> None:
    shipped = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    sources = {path.relative_to(ROOT).as_posix() for path in MODULES.values()}
    assert shipped == sources | {"funcghost/py.typed"}


def test_the_built_version_is_the_importable_one() -> None:
    assert WheelBuilder(str(ROOT)).metadata.version == importlib.import_module("funcghost").__version__


def test_readme_code_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every ```python block, in order, in one namespace."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__readme__"}
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE))
    assert blocks
    for block in blocks:
        first_line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * first_line + block[1], str(readme), "exec"), namespace)


def test_help_is_an_index_of_every_name() -> None:
    index = pydoc.plain(pydoc.render_doc(fg))
    assert len(index.splitlines()) < 130
    wings = {name.partition(".")[0] for name in MODULES} - {"functional"}
    public = {name for name in dir(fg) if not name.startswith("_")} - wings
    assert {"dot", "Pairs", "InputError"} <= public
    assert {name for name in public if not re.search(rf"\b{name}\b", fg.__doc__ or "")} == set()
    assert not any(isinstance(getattr(fg, name), ModuleType) for name in public - {"functional"})


@pytest.mark.parametrize("name", mutations())
def test_every_mutation_finds_its_piece_once(name: str) -> None:
    mutation = mutations()[name]
    source = (PACKAGE / mutation.file).read_text(encoding="utf-8")
    assert mutated(mutation, source)
    assert all((PACKAGE.parent / path).exists() for path in mutation.tests if path.startswith("tests/"))
