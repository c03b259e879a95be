"""What is built from this folder, alone with what it says that it needs: complete, and clear about extras."""

import json
import os
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = {"store": "store", "corpus": "store", "plots": "plots", "testing": "testing"}
"""Wings that need an extra, and which."""


def needed(names: list[str]) -> set[str]:
    """These distributions and all that they need, without extras."""
    found = set[str]()
    while names:
        name = names.pop()
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # for another platform
        if name.lower() not in found:
            found.add(name.lower())
            names += [re.split(r"[^\w.-]", line)[0] for line in lines if "extra ==" not in line]
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with nothing but the wheel, which is built from the unpacked sdist, and what it needs."""
    folder = tmp_path_factory.mktemp("installed")
    packed = next(SdistBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"]))
    subprocess.run(["tar", "-xzf", packed, "-C", folder], check=True)
    [unpacked] = [path for path in folder.iterdir() if path.is_dir()]
    wheel = next(WheelBuilder(str(unpacked)).build(directory=str(folder), versions=["standard"]))
    site = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        [text] = [archive.read(name).decode() for name in archive.namelist() if name.endswith("METADATA")]
    lines = re.findall(r"^Requires-Dist: (.*)$", text, flags=re.MULTILINE)
    assert {re.split(r"[^\w.-]", line)[0] for line in lines if "extra ==" not in line} == {"numpy", "optree", "torch"}
    for name in needed([re.split(r"[^\w.-]", line)[0] for line in lines if "extra ==" not in line]):
        distribution = metadata.distribution(name)
        for first in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / first).exists():
                (site / first).symlink_to(Path(str(distribution.locate_file(first))))
    return site


def python(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-S", "-P", *arguments]
    return subprocess.run(command, cwd=site.parent, env=environment, capture_output=True, text=True, check=False)


def test_the_wheel_works_alone_and_names_what_lacks(alone: Path) -> None:
    """The self-check, every wing that needs an extra, and a command that does, in one process."""
    code = f"""
import importlib
from funcghost.shell.main import main
status = main(["doctor", "--json"])
for wing in {list(EXTRAS)}:
    try:
        importlib.import_module(f"funcghost.{{wing}}")
    except ImportError as error:
        print(error)
    else:
        print("imported")
raise SystemExit([status, main(["top", "nowhere"])] != [0, 2])
"""
    run = python(alone, "-c", code)
    assert run.returncode == 0, run.stdout + run.stderr
    doctor, *said = run.stdout.splitlines()
    found = json.loads(doctor)
    assert found["ok"] is True
    packages = {package["name"]: package for package in found["packages"]}
    assert packages["torch"]["found"] is not None
    assert all(packages[name]["found"] is None for name in ("pyarrow", "matplotlib", "hypothesis"))
    assert packages["pyarrow"]["extras"][0] == "store"
    for line, extra in zip(said, EXTRAS.values(), strict=True):
        assert f"pip install 'funcghost[{extra}]'" in line
    assert run.stderr.startswith("funcghost top: ")
    assert "pip install 'funcghost[store]'" in run.stderr


def test_the_wheel_holds_its_types(alone: Path) -> None:
    assert (alone / "funcghost" / "py.typed").exists()
    sources = {path.relative_to(ROOT) for path in (ROOT / "funcghost").rglob("*.py")}
    assert sources == {path.relative_to(alone) for path in (alone / "funcghost").rglob("*.py")}
