"""The report of any store: one file, with what was asked for, and no script but the one that sorts its tables."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import funcghost as fg
from funcghost import plots, store
from tests.models.pages import Page


@pytest.fixture
def record(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    random = np.random.default_rng(0)
    origin = {"seed": 0, "<b>": {"inner": "<i>"}}
    with store.record(folder, ["value"], {"document": "string", "domain": "string"}, origin=origin) as kept:
        for step in range(30):
            chosen = random.permutation(12)[:4]
            values = chosen + 100.0 * step + random.standard_normal(4) * 1e-3
            names = [f"document {index}" for index in chosen]
            kept.add(step, chosen, {"value": values}, {"document": names, "domain": [f"<{n % 3}>" for n in chosen]})
    return folder


def test_the_best_and_the_worst_stand_first_with_their_texts(record: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    texts = {f"document {index}": f"<script>text {index}</script>" for index in range(12)}
    found = plots.report(record, out, by="document", group="domain", texts=texts, title="<u>")
    assert (found.column, found.rows, found.items) == ("value", 120, 12)
    page = Page(out.read_text(encoding="utf-8"))
    assert page.open == []
    assert not page.seen.keys() & {"link", "iframe", "u", "i"}
    assert page.seen["script"] == 1
    assert len(page.sources) == 4
    assert all(source.startswith("data:image/png;base64,iVBORw0KGgo") for source in page.sources)
    # The mean of a step is taken off, or the values of its steps would decide.
    assert len(page.passages) == 20
    assert "11" in page.passages[0]
    assert "text 0<" in page.passages[10]


def test_a_column_is_enough(record: Path, tmp_path: Path) -> None:
    found = plots.report(record, tmp_path / "page.html")
    assert found.items == 12
    assert Page((tmp_path / "page.html").read_text(encoding="utf-8")).open == []


def test_what_is_no_number_is_counted_and_the_outermost_items_are_listed(tmp_path: Path) -> None:
    with store.record(tmp_path / "run", ["value"]) as kept:
        kept.add(0, range(502), {"value": [*range(500), np.nan, np.inf]})
    plots.report(tmp_path / "run", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<th>not finite</th><td>2</td>" in text
    assert "300 between them are left out" in text
    assert all(f"<td>{item}</td>" in text for item in (0, 99, 400, 499))
    assert not any(f"<td>{item}</td>" in text for item in (100, 399))


@pytest.mark.parametrize("wrong", [{"column": "no"}, {"by": "no"}, {"group": "no"}, {"column": "document"}])
def test_columns_that_are_not_there_are_refused(record: Path, tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(fg.InputError, match="column: must be one of"):
        plots.report(record, tmp_path / "page.html", **wrong)
    assert not (tmp_path / "page.html").exists()


def test_nothing_to_report_is_said(tmp_path: Path) -> None:
    store.record(tmp_path / "run", ["value"]).close()
    with pytest.raises(fg.InputError, match="no rows yet"):
        plots.report(tmp_path / "run", tmp_path / "page.html")


def test_more_figures_and_images_are_on_the_page(record: Path, tmp_path: Path) -> None:
    out, images = tmp_path / "page.html", np.random.default_rng(0).random((12, 4, 4))
    plots.report(record, out, images=images, figures={"A <map>": plots.gram(np.eye(3))})
    page = Page(out.read_text(encoding="utf-8"))
    assert len(page.sources) == 5
    assert "<h2>A &lt;map&gt;</h2>" in out.read_text(encoding="utf-8")
    assert page.seen["button"] == 3
