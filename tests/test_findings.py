"""The scripts in findings/ are run by hand; here, that each can be, and says what it shows."""

import ast
import os
import re
from pathlib import Path

import pytest

FINDINGS = Path(__file__).resolve().parent.parent / "findings"
SCRIPTS = sorted(path for path in FINDINGS.iterdir() if path.name != "README.md")


def shown(text: str) -> ast.Module:
    """The program in the script."""
    [program] = re.findall(r"<<'PYTHON'\n(.*?)^PYTHON$", text, flags=re.DOTALL | re.MULTILINE)
    return ast.parse(program)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_finding_stands_alone(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert script.suffix == ".sh"
    assert os.access(script, os.X_OK)
    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert "set -euo pipefail" in text
    assert "mktemp -d" in text
    assert "funcghost" not in text
    for part in ("Versions", "Guess", "Seen"):
        assert re.search(f"^# {part}: .", text, flags=re.MULTILINE), f"no line '# {part}: ...'"
    [packages] = re.findall(r"pip install (.*)", text)
    wanted = [word for word in packages.split() if not word.startswith("-")]
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", word) for word in wanted), "every version is pinned"
    assert any(isinstance(node, ast.Assert) for node in ast.walk(shown(text))), (
        "nothing fails when the behaviour changes"
    )
