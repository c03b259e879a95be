"""A page of HTML that needs nothing beside it: sections of figures, tables that sort, and passages of text.

It reads well on a phone (figures and wide tables scroll by themselves) and in the dark (figures are inverted,
photographs are not). Nothing is loaded from anywhere: the policy in its head allows the page's own script, by its hash,
and no other.
"""

import base64
import hashlib
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from funcghost.store.files import write_whole

SORT = """
for (const head of document.querySelectorAll("table.sorts th")) {
  head.firstChild.addEventListener("click", () => {
    const body = head.closest("table").tBodies[0], column = head.cellIndex;
    const down = head.getAttribute("aria-sort") !== "descending";
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => row.cells[column].textContent.trim();
    const number = (text) => /^[-+.\\d]/.test(text) ? parseFloat(text) : NaN;
    const compare = (a, b) => {
      const x = number(a), y = number(b);
      if (isNaN(x) !== isNaN(y)) return isNaN(x) ? -1 : 1;
      return isNaN(x) ? a.localeCompare(b) : x - y;
    };
    const rows = [...body.rows].sort((a, b) => (down ? -1 : 1) * compare(key(a), key(b)));
    body.append(...rows);
  });
}
"""
STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --faint: #666; --line: #ddd; --box: #f5f5f2;
  --good: #23733a; --bad: #b3261e; --link: #2a5d9f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ddd; --paper: #16181b; --faint: #999; --line: #3a3d42; --box: #212428;
    --good: #7fd49a; --bad: #f2877f; --link: #8fb8ec; }
  img.figure { filter: invert(.91) hue-rotate(180deg); }
}
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 1.5rem auto; padding: 0 1rem; color: var(--ink);
  background: var(--paper); overflow-wrap: anywhere; }
a { color: var(--link); }
h1 { line-height: 1.2; }
h2 { margin-top: 2.2rem; }
.wide { overflow-x: auto; }
img { width: 100%; min-width: 28rem; display: block; }
table { border-collapse: collapse; font-size: .92rem; overflow-wrap: normal; margin: .6rem 0; }
.sorts { white-space: nowrap; }
td, th { border-bottom: 1px solid var(--line); padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top; }
th button { all: unset; cursor: pointer; font-weight: bold; }
th button:focus-visible { outline: 2px solid var(--link); }
th[aria-sort] button::after { content: " \\25BE"; }
th[aria-sort=ascending] button::after { content: " \\25B4"; }
pre { max-height: 12rem; overflow: auto; background: var(--box); padding: .5rem; font-size: .8rem;
  white-space: pre-wrap; }
ol { padding-left: 1.6rem; }
.holds { color: var(--good); font-weight: bold; }
.fails { color: var(--bad); font-weight: bold; }
.note { color: var(--faint); }
"""


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


PAGE = Template(
    f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src '{_hash(STYLE)}'; script-src '{_hash(SORT)}'">
<title>$title</title>
<style>{STYLE}</style>
</head>
<body>
<h1>$title</h1>
$body
<script>{SORT}</script>
</body>
</html>
"""
)


def escape(text: str) -> str:
    """Text for HTML; what cannot be shown is spelt out."""
    return html.escape("".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text))


def write_page(path: Path, title: str, sections: Iterable[tuple[str, str]]) -> None:
    """Writes a page of sections, each a heading (empty for none) and what is below it, as HTML.

    Raises:
        StoreError: it cannot be written; what was there before is as it was.
    """
    body = "\n".join((f"<h2>{escape(head)}</h2>\n" if head else "") + content for head, content in sections)
    text = PAGE.substitute(title=escape(title), body=body)
    write_whole(path.with_name(f".unfinished-{path.name}"), path, text.encode())


def table(rows: Iterable[Sequence[str]], heads: Sequence[str] = ()) -> str:
    """A table of escaped cells. With heads it is sorted by a click on one; without, the first of a row is its head."""
    kind = "td" if heads else "th"
    lines = "".join(
        f"<tr><{kind}>{escape(first)}</{kind}>{''.join(f'<td>{escape(cell)}</td>' for cell in others)}</tr>"
        for first, *others in rows
    )
    if not heads:
        return f'<div class="wide"><table>{lines}</table></div>'
    top = "".join(f'<th scope="col"><button type="button">{escape(head)}</button></th>' for head in heads)
    inner = f"<thead><tr>{top}</tr></thead><tbody>{lines}</tbody>"
    return f'<div class="wide"><table class="sorts">{inner}</table></div>'


def passages(items: Iterable[tuple[str, str, str, str | None]]) -> str:
    """A list of items: a name, what is remarkable of it, a note, and its text."""
    return f"<ol>{''.join(map(_passage, items))}</ol>"


def _passage(item: tuple[str, str, str, str | None]) -> str:
    name, mark, note, text = item
    return (
        f'<li><b>{escape(name)}</b> <span class="fails">{escape(mark)}</span> <span class="note">{escape(note)}</span>'
        + ("" if text is None else f"<pre>{escape(text)}</pre>")
        + "</li>"
    )


def figure(columns: int = 1, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    """A figure with axes beside each other."""
    made = Figure(figsize=(9, height), layout="constrained")
    axes = list(made.subplots(1, columns, squeeze=False)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return made, axes


def image(drawn: Figure, description: str, *, photographs: bool = False) -> str:
    """A figure as part of a page; one of photographs keeps its colours in the dark."""
    content = io.BytesIO()
    drawn.savefig(content, format="png", dpi=130)
    encoded = base64.b64encode(content.getvalue()).decode()
    kind, said = "photographs" if photographs else "figure", escape(description)
    return f'<div class="wide"><img class="{kind}" alt="{said}" src="data:image/png;base64,{encoded}"></div>'
