import ast
import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "funcghost"

# A module imports only from those that stand before it; "" is the package itself.
ORDER = (
    "_version",
    "errors",
    "trees",
    "directions",
    "sketch",
    "allocation",
    "ranks",
    "lowrank",
    "factors",
    "cost",
    "contract",
    "rules",
    "tangent",
    "layout",
    "moves",
    "products",
    "slices",
    "descriptions",
    "arrangement",
    "uses",
    "shadows",
    "codec",
    "state",
    "plans",
    "reducers",
    "positions",
    "quadratic",
    "projections",
    "ledger",
    "collector",
    "composite",
    "digest",
    "prepared",
    "tap",
    "tapping",
    "capture",
    "run",
    "requests",
    "lifting",
    "generic",
    "trace",
    "sites",
    "batching",
    "chunks",
    "head",
    "functional",
    "losses",
    "verify",
    "rehearsal",
    "planning",
    "witness",
    "pairs",
    "tracking",
    "algebra",
    "steps",
    "transforms",
    "oracle",
    "progress",
    "report",
    "mixing",
    "compare",
    "judge",
    "check",
    "testing.naive",
    "testing.strategies",
    "testing.reducer_laws",
    "testing.rule_laws",
    "testing",
    "weighting",
    "clipping",
    "geometry",
    "pruning",
    "attribution.in_run",
    "attribution",
    "",
    "__main__",
)


def module_name(path: Path) -> str:
    *packages, stem = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(packages if stem == "__init__" else [*packages, stem])


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


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
    above = ORDER[: ORDER.index(module)]
    faults = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        where = f"line {node.lineno}: {ast.unparse(node)}"
        if node not in tree.body:
            faults.append(f"{where}: not at the top level")
        if isinstance(node, ast.ImportFrom) and node.level:
            faults.append(f"{where}: relative")
        elif upward := [name for name in imported(node) if name not in above]:
            faults.append(f"{where}: {upward} not above {module!r}")
    return faults


def test_every_module_has_a_place_in_the_order() -> None:
    assert set(MODULES) - set(ORDER) == set()
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_only_downwards(module: str) -> None:
    assert import_faults(module, MODULES[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("from funcghost.reducers import dot", "not above"),
        ("from funcghost import errors, reducers", "not above"),
        ("import funcghost.tangent", "not above"),
        ("import funcghost", "not above"),
        ("from funcghost import dot", "not above"),
        ("from .errors import InputError", "relative"),
        ("def f():\n    import torch", "not at the top level"),
        ("if True:\n    import torch", "not at the top level"),
    ],
)
def test_a_misplaced_import_is_found(source: str, fault: str) -> None:
    [found] = import_faults("tangent", source)
    assert fault in found


def test_a_proper_import_is_no_fault() -> None:
    above = ["import torch", "import funcghostly", "import funcghost.errors", "from funcghost import trees, rules"]
    assert import_faults("tangent", "\n".join([*above, "from funcghost.rules import Op"])) == []


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples_run(module: str) -> None:
    found = doctest.testmod(importlib.import_module(f"funcghost.{module}".rstrip(".")))
    assert found.failed == 0


def test_hypothesis_is_not_needed_to_import_the_package() -> None:
    code = "import sys, funcghost, funcghost.attribution; assert 'hypothesis' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


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
