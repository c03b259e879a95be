"""A page of HTML that needs nothing beside it: sections of figures, tables and passages of text."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from funcghost.store.files import write_whole

PAGE = Template(
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>$title</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h2 { margin-top: 2.2rem; }
img { width: 100%; }
table { border-collapse: collapse; }
td, th { border-bottom: 1px solid #ddd; padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top; }
pre { max-height: 9rem; overflow: auto; background: #f5f5f2; padding: .5rem; font-size: 12px; }
.holds { color: #23733a; font-weight: bold; }
.fails { color: #b3261e; font-weight: bold; }
.note { color: #666; }
</style>
</head>
<body>
<h1>$title</h1>
$body
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
    """A table of escaped cells; the first of a row is its head where there are no heads."""
    lines = ["".join(f"<th>{escape(head)}</th>" for head in heads)] if heads else []
    for first, *others in rows:
        kind = "td" if heads else "th"
        lines.append(f"<{kind}>{escape(first)}</{kind}>" + "".join(f"<td>{escape(cell)}</td>" for cell in others))
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


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


def image(drawn: Figure, description: str) -> str:
    """A figure as part of a page."""
    content = io.BytesIO()
    drawn.savefig(content, format="png", dpi=130)
    encoded = base64.b64encode(content.getvalue()).decode()
    return f'<img alt="{escape(description)}" src="data:image/png;base64,{encoded}">'
