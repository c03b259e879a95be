"""The site of pages: links lead somewhere, tutorials are cells, and what is broken is found."""

import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.docs import build_site

ROOT = Path(__file__).resolve().parent.parent
SOURCES = build_site.targets()


def text_of(source: str) -> str:
    text = (ROOT / source).read_text(encoding="utf-8")
    if source.endswith(".md"):
        return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return "\n\n".join(cell.text for cell in build_site.cells(text) if cell.markdown)


def anchors(source: str) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", text_of(source), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head).lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("source", SOURCES)
def test_links_of_a_text_lead_somewhere(source: str) -> None:
    for href in re.findall(r"\]\(([^)\s]+)\)", text_of(source)):
        parts = urlsplit(href)
        if parts.scheme:
            assert parts.scheme == "https", href
            continue
        target = (ROOT / source).parent / parts.path if parts.path else ROOT / source
        assert target.exists(), href
        if parts.fragment:
            assert parts.fragment in anchors(target.resolve().relative_to(ROOT).as_posix()), href


def test_every_tutorial_is_a_page() -> None:
    scripts = {path.name for path in (ROOT / "examples").glob("tutorial_*.py")}
    assert {f"tutorial_{name}.py" for name in build_site.TUTORIALS} == scripts
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"(examples/{script})" in readme for script in scripts)


@pytest.mark.parametrize("name", build_site.TUTORIALS)
def test_a_tutorial_is_text_and_code_in_turns(name: str) -> None:
    script = (ROOT / "examples" / f"tutorial_{name}.py").read_text(encoding="utf-8")
    first, *others = build_site.cells(script)
    assert first.markdown
    assert first.text.startswith("# ")
    assert any(not cell.markdown for cell in others)
    assert re.search(r"\bassert", script), "it claims nothing"
    code = [line for line in script.splitlines() if line and not line.startswith(("#", '"""'))]
    kept = "\n".join(cell.text for cell in (first, *others) if not cell.markdown)
    assert [line for line in kept.splitlines() if line] == code


def test_the_site_has_no_broken_links(tmp_path: Path) -> None:
    pytest.importorskip("markdown2", reason="needs the extra docs")
    assert build_site.build(tmp_path, quick=True) == []
    for page in SOURCES.values():
        text = (tmp_path / page).read_text(encoding="utf-8")
        assert "<h1" in text
        assert 'name="viewport"' in text
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert 'href="tutorial_value_data.html"' in page
    (tmp_path / "index.html").write_text(
        page + '<a href="nowhere.html">x</a><a href="models.html#nothing">y</a>', "utf-8"
    )
    assert build_site.broken_links(tmp_path) == [
        "index.html: models.html#nothing leads to no anchor",
        "index.html: nowhere.html leads to no page",
    ]


def test_a_link_to_no_file_ends_the_build(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"README\.md: the link missing\.md leads to no file"):
        build_site.link("missing.md", "README.md", tmp_path)


def test_cells_print_and_draw() -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plots")
    script = '"""Doc."""\n\n# %% [markdown]\n# # Title\n#\n# text\n\n# %%\nx = 1\nprint(x)\n\n# %%\n'
    script += "from funcghost import plots\nsheet = plots.gram([[x]])\n"
    found = build_site.cells(script)
    assert [cell.text.splitlines()[0] for cell in found] == ["# Title", "x = 1", "from funcghost import plots"]
    (title, none), (said, _), (_, drawn) = build_site.executed(found, "drawn")
    assert (title, none, said, len(drawn)) == ("", [], "1\n", 1)
