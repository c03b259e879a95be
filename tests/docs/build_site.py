"""Builds the site of pages from what is there: the README and other texts, the tutorials, the docstrings.

    python tests/docs/build_site.py --out site [--quick]

Nothing is written twice. Texts are rendered from Markdown. Tutorials are the scripts `examples/tutorial_*.py`, which
are executed here, with what they print and draw below each cell. `api/` is made of the docstrings by pdoc. Links
between texts are turned into links between pages, and every link and anchor within the site is checked: one that leads
nowhere ends the build. `--quick` leaves out `api/`, and executes nothing.
"""

import argparse
import contextlib
import html
import importlib
import io
import os
import pkgutil
import posixpath
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[2]

TEXTS = {
    "README.md": "index.html",
    "tests/docs/how_it_works.md": "how_it_works.html",
    "tests/docs/models.md": "models.html",
    "tests/benchmarks/README.md": "benchmarks.html",
    "findings/README.md": "findings.html",
    "CHANGELOG.md": "changelog.html",
}
TUTORIALS = (
    *("value_data", "select_online", "score_corpus", "find_mislabelled"),
    *("influence", "clip_privately", "own_reducer", "many_gpus"),
)
PUBLIC = {
    *("functional", "attribution", "training", "corpus", "store", "distributed", "evaluation", "integrations"),
    *("plots", "testing"),
}
"""What of the package stands in `api/`, besides its own names."""

MARKDOWN = ("fenced-code-blocks", "tables", "header-ids", "code-friendly", "cuddled-lists")
CODE_STYLE = """
pre { max-height: none; white-space: pre; } pre code { font-size: .85rem; } td code { overflow-wrap: break-word; }
nav a { margin-right: .8rem; white-space: nowrap; display: inline-block; }
"""


@dataclass(frozen=True)
class Cell:
    """A piece of a script in the percent format: Markdown, or code."""

    markdown: bool
    text: str


def cells(script: str) -> list[Cell]:
    """The cells of a script, its own docstring left out."""
    found = []
    for head, text in re.findall(r"^# %%([^\n]*)\n(.*?)(?=^# %%|\Z)", script, flags=re.DOTALL | re.MULTILINE):
        markdown = "[markdown]" in head
        lines = [re.sub(r"^# ?", "", line) for line in text.splitlines()] if markdown else text.splitlines()
        found.append(Cell(markdown, "\n".join(lines).strip("\n")))
    return found


def executed(code: Sequence[Cell], name: str) -> Iterator[tuple[str, list[Any]]]:
    """What each cell of code prints, and the figures that it makes; Markdown gives nothing."""
    figure = importlib.import_module("matplotlib.figure").Figure
    module = ModuleType(f"tutorial_{name}")
    sys.modules[module.__name__] = module
    for cell in code:
        if cell.markdown:
            yield "", []
            continue
        known, said = dict(vars(module)), io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(cell.text, f"tutorial_{name}.py", "exec"), vars(module))
        new = [
            value for key, value in vars(module).items() if isinstance(value, figure) and known.get(key) is not value
        ]
        yield said.getvalue(), new


def tutorial(name: str, *, run: bool) -> str:
    """The Markdown of a tutorial, with what its cells print and draw."""
    found = cells((ROOT / "examples" / f"tutorial_{name}.py").read_text(encoding="utf-8"))
    image = importlib.import_module("funcghost.plots.page").image if run else None
    outputs = executed(found, name) if run else (("", list[Any]()) for _ in found)
    parts = []
    for cell, (said, drawn) in zip(found, outputs, strict=True):
        parts.append(cell.text if cell.markdown else f"```python\n{cell.text}\n```")
        if said:
            parts.append(f"```text\n{said.rstrip()}\n```")
        parts += [image(figure, "what the cell draws", photographs=True) for figure in drawn if image is not None]
    parts.append(
        f"This page is the script [examples/tutorial_{name}.py](tutorial_{name}.py), which opens as a notebook."
    )
    return "\n\n".join(parts)


def targets() -> dict[str, str]:
    """The page of every source, by its path in the repository."""
    return TEXTS | {f"examples/tutorial_{name}.py": f"tutorial_{name}.html" for name in TUTORIALS}


def link(href: str, source: str, out: Path, *, page: bool = True) -> str:
    """Where a link of a text leads to on the site; files that are no pages are put beside them.

    Raises:
        SystemExit: it leads nowhere.
    """
    parts = urlsplit(href)
    if parts.scheme or not parts.path:
        return href
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), unquote(parts.path)))
    end = f"#{parts.fragment}" if parts.fragment else ""
    if page and path in targets():
        return targets()[path] + end
    if path.startswith("..") or not (ROOT / path).exists():
        raise SystemExit(f"{source}: the link {href} leads to no file.")
    if (ROOT / path).is_dir():
        return href
    (out / "files" / path).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ROOT / path, out / "files" / path)
    return f"files/{path}{end}"


def render(markdown: str, source: str, out: Path) -> str:
    """Markdown as HTML, its links turned to the site's."""
    body = str(importlib.import_module("markdown2").markdown(markdown, extras=list(MARKDOWN)))
    own = source.startswith("examples/tutorial_")

    def turned(match: re.Match[str]) -> str:
        href = html.unescape(match[1])
        script = own and href == posixpath.basename(source)  # a tutorial's link to itself is to the script
        return f'href="{html.escape(link(href, source, out, page=not script))}"'

    body = re.sub(r'href="([^"]*)"', turned, body)
    body = re.sub(r"<td.*?</td>", breakable, body, flags=re.DOTALL)
    return re.sub(r"(<table>.*?</table>)", r'<div class="wide">\1</div>', body, flags=re.DOTALL)


def breakable(cell: re.Match[str]) -> str:
    """A cell of a table whose code may be broken between names, as a narrow screen needs."""

    def broken(code: re.Match[str]) -> str:
        return re.sub(r"(?<=\w)([._(]+)(?=\w)", r"\1<wbr>", code[0])

    return re.sub(r"<code>.*?</code>", broken, cell[0], flags=re.DOTALL)



def write(out: Path, name: str, body: str) -> None:
    """A page of the site."""
    style = importlib.import_module("funcghost.plots.page").STYLE
    formatter = importlib.import_module("pygments.formatters").HtmlFormatter
    colours = formatter(style="default").get_style_defs(".codehilite")
    dark = formatter(style="github-dark").get_style_defs(".codehilite")
    heading = re.search(r"<h1[^>]*>(.*?)</h1>", body, flags=re.DOTALL)
    title = re.sub("<[^>]*>", "", heading[1]) if heading else "funcghost"
    pages = [("funcghost", "index.html"), ("how it works", "how_it_works.html"), ("names", "api/funcghost.html")]
    pages += [(tutorial_name.replace("_", " "), f"tutorial_{tutorial_name}.html") for tutorial_name in TUTORIALS]
    bar = "".join(f'<a href="{href}">{text}</a>' for text, href in pages if not href.startswith("api/") or api(out))
    (out / name).write_text(
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f"<style>{style}\n{CODE_STYLE}\n{colours}\n.codehilite {{ background: var(--box); }}\n"
        f"@media (prefers-color-scheme: dark) {{ {dark} }}</style></head>\n"
        f"<body><nav>{bar}</nav>\n{body}\n</body></html>\n",
        encoding="utf-8",
    )


def api(out: Path) -> bool:
    """Whether the docstrings are part of the site."""
    return (out / "api" / "funcghost.html").exists()


def write_api(out: Path) -> None:
    """The pages of docstrings, by pdoc."""
    package = importlib.import_module("funcghost")
    submodules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    package.__all__ = sorted(name for name in dir(package) if not name.startswith("_") and name not in submodules)  # type: ignore[attr-defined]
    pdoc = importlib.import_module("pdoc")
    pdoc.render.configure(docformat="google", footer_text="funcghost")
    wings = [f"funcghost.{name}" for name in sorted(PUBLIC & submodules)]
    left_out = [f"!{name}" for name in _without_what_they_need("funcghost.integrations")]
    pdoc.pdoc("funcghost", *wings, *left_out, output_directory=out / "api")


def _without_what_they_need(package: str) -> Iterator[str]:
    """The modules of a package whose extras are not installed."""
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            print(f"{module.name} is left out: {error}")
            yield module.name


class Anchors(HTMLParser):
    """The anchors of a page, and where it links to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids, self.links = set[str](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Takes in a tag."""
        for name, value in attrs:
            if value is not None and name in ("id", "name"):
                self.ids.add(value)
            if value is not None and name in ("href", "src"):
                self.links.append(value)


def broken_links(out: Path) -> list[str]:
    """Links within the site that lead to no page, or to no anchor of one.

    Not those to private names, which pdoc makes for what is inherited from a private class.
    """
    pages = {path: Anchors(path.read_text(encoding="utf-8")) for path in out.rglob("*.html")}
    faults = []
    for path, page in pages.items():
        for href in page.links:
            parts = urlsplit(href)
            if parts.scheme or parts.netloc:
                continue
            target = path if not parts.path else Path(os.path.normpath(path.parent / unquote(parts.path)))
            anchor = unquote(parts.fragment)
            if not target.exists():
                faults.append(f"{path.relative_to(out)}: {href} leads to no page")
            elif anchor and anchor not in pages.get(target, page).ids and not anchor.startswith("_"):
                faults.append(f"{path.relative_to(out)}: {href} leads to no anchor")
    return sorted(set(faults))


def build(out: Path, *, quick: bool = False) -> list[str]:
    """Builds the site, and gives the links that lead nowhere."""
    out.mkdir(parents=True, exist_ok=True)
    if not quick:
        write_api(out)
    for source, name in TEXTS.items():
        write(out, name, render((ROOT / source).read_text(encoding="utf-8"), source, out))
    for name in TUTORIALS:
        source = f"examples/tutorial_{name}.py"
        write(out, f"tutorial_{name}.html", render(tutorial(name, run=not quick), source, out))
    return broken_links(out)


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds the site; gives the exit status."""
    parser = argparse.ArgumentParser(description="Builds the site of pages.")
    parser.add_argument("--out", type=Path, default=ROOT / "site")
    parser.add_argument("--quick", action="store_true", help="without docstrings, and without executing tutorials")
    args = parser.parse_args(arguments)
    sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
    faults = build(args.out, quick=args.quick)
    print("\n".join([*faults, f"{args.out / 'index.html'}: {len(faults)} links lead nowhere"]))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
