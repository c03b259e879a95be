"""Figures show what they were given: from a record and from arrays."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import funcghost as fg
from funcghost import plots, store
from funcghost.training import geometry

STEPS = np.repeat(np.arange(5), 4)
VALUES = np.linspace(-1, 1, 20) + 10 * STEPS
GROUPS = ["one", "two", "two", "three"] * 5


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("figures") / "run"
    with store.record(folder, ["value"], {"domain": "string"}) as kept:
        for step in range(5):
            rows = step == STEPS
            kept.add(step, np.arange(4), {"value": VALUES[rows]}, {"domain": GROUPS[:4]})
    return folder


def lines(drawn: Figure) -> dict[str, Any]:
    return {str(line.get_label()): np.asarray(line.get_ydata()) for line in drawn.axes[0].get_lines()}


def same(one: Figure, other: Figure) -> None:
    one.canvas.draw()
    other.canvas.draw()
    assert one.axes[0].get_xlabel() == other.axes[0].get_xlabel()
    for mine, others in zip(one.axes[0].get_lines(), other.axes[0].get_lines(), strict=True):
        assert np.allclose(np.asarray(mine.get_xydata()), np.asarray(others.get_xydata()), rtol=1e-6)


def test_values_over_steps(record: Path) -> None:
    drawn = plots.over_steps(record, group="domain")
    means = lines(drawn)
    np.testing.assert_allclose(means["mean of one"], VALUES[::4])
    np.testing.assert_allclose(means["mean of two"], (VALUES[1::4] + VALUES[2::4]) / 2)
    same(drawn, plots.over_steps(torch.tensor(VALUES), steps=STEPS, groups=GROUPS))
    assert len(lines(plots.over_steps(np.zeros(5000), steps=np.arange(5000)))["mean of all"]) == 200
    plots.over_steps([], steps=[]).canvas.draw()
    with pytest.raises(fg.InputError, match="found no steps"):
        plots.over_steps(VALUES)
    with pytest.raises(fg.InputError, match="one for each of the 20 values, found 3"):
        plots.over_steps(VALUES, steps=[1, 2, 3])


def test_groups_are_ordered_by_their_medians_within_steps(record: Path) -> None:
    drawn = plots.by_group(record, group="domain")
    names = [label.get_text() for label in drawn.axes[0].get_yticklabels()]
    assert names == ["one (5)", "two (10)", "three (5)"]  # the ten a step that all gain are taken off
    plots.by_group([np.nan, np.nan], groups=["a", "b"]).canvas.draw()
    with pytest.raises(fg.InputError, match="group="):
        plots.by_group(VALUES)


def test_distribution(record: Path) -> None:
    drawn = plots.distribution(record, group="domain")
    legend: Any = drawn.axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["one (5)", "three (5)", "two (10)"]
    plots.distribution([np.nan]).canvas.draw()


def test_the_account_adds_up() -> None:
    values, rest, change = [-0.3, -0.2, 0.1], [0.1, 0.0, 0.0], [-0.2, -0.25, 0.1]
    drawn = plots.account(torch.tensor(values, dtype=torch.float64), rest, change, [10, 20, 30])
    np.testing.assert_allclose(lines(drawn)["change"], np.cumsum(change))
    off = np.asarray(drawn.axes[1].get_lines()[0].get_ydata())
    np.testing.assert_allclose(off, [1e-12, 0.2, 1e-12], rtol=1e-6, atol=1e-7)
    with pytest.raises(fg.InputError, match="rest must be one for each of 3 steps"):
        plots.account(values, rest[:2], change)


def test_maps_show_the_matrix() -> None:
    found = torch.randn(6, 4, dtype=torch.float64)
    found[5] = 0
    products = found @ found.T
    shown = plots.gram(products, [f"s{row}" for row in range(6)]).axes[0].images[0]
    np.testing.assert_array_equal(shown.get_array(), products.numpy())
    assert shown.get_clim() == (-float(products.abs().max()), float(products.abs().max()))
    cosines = plots.cosine(products).axes[0].images[0]
    assert cosines.get_clim() == (-1.0, 1.0)
    expected = torch.cosine_similarity(found[:5, None], found[None, :5], dim=-1)
    np.testing.assert_allclose(np.asarray(cosines.get_array())[:5, :5], expected, atol=1e-12)
    for wrong in (torch.ones(2, 3), torch.ones(3)):
        with pytest.raises(fg.InputError):
            plots.gram(wrong)
    with pytest.raises(fg.InputError, match="labels"):
        plots.cosine(torch.eye(3), ["a"])


def test_the_spectrum_is_that_of_the_gradients() -> None:
    rows = torch.randn(5, 9, dtype=torch.float64)
    drawn = plots.spectrum(rows @ rows.T)
    squares = torch.linalg.svdvals(rows).square()
    np.testing.assert_allclose(np.asarray(drawn.axes[0].get_lines()[0].get_ydata()), squares / squares.sum())
    rank = float(geometry.effective_rank(rows @ rows.T))
    assert drawn.axes[0].get_title(loc="left") == f"effective rank {rank:.1f} of 5"
    plots.spectrum(torch.zeros(3, 3)).canvas.draw()
    with pytest.raises(fg.InputError, match="finite"):
        plots.spectrum(torch.full((2, 2), torch.nan))


def test_methods_stand_at_their_cost() -> None:
    drawn = plots.lds_against_cost(["dot", "EK-FAC"], [0.4, 0.7], [0.1, 2.0], [0.01, 0.02])
    notes: Any = drawn.axes[0].texts
    assert [(note.get_text(), note.xy) for note in notes] == [("dot", (0.1, 0.4)), ("EK-FAC", (2.0, 0.7))]
    with pytest.raises(fg.InputError, match="above zero"):
        plots.lds_against_cost(["dot"], [0.4], [0.0])


def titles(drawn: Figure, loc: Any = "center") -> list[str]:
    return [axis.get_title(loc=loc) for axis in drawn.axes if axis.get_title(loc=loc)]


@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 1, 5, 6), (4, 3, 5, 6)])
def test_sheets_show_the_largest_first(record: Path, shape: tuple[int, ...]) -> None:
    images = torch.rand(shape)
    drawn = plots.contact_sheet(images, record, list("abcd"), count=3)
    drawn.canvas.draw()
    assert [title[0] for title in titles(drawn)] == ["d", "c", "b"]
    shown = np.asarray(drawn.axes[0].images[0].get_array())
    np.testing.assert_allclose(shown, images[3].movedim(0, -1) if shape[1:2] == (3,) else images[3].reshape(5, 6))
    assert [title[0] for title in titles(plots.contact_sheet(images, record, smallest=True))] == ["0", "1", "2", "3"]


def test_cards_are_cut_and_show_anything(record: Path) -> None:
    texts = ["$a^", "b\x00\x1b[31m" + "word " * 500, "中文 <b>", ""]
    drawn = plots.text_cards(texts, record)
    drawn.canvas.draw()
    assert [title[0] for title in titles(drawn, "left")] == ["3", "2", "1", "0"]
    assert drawn.axes[2].texts[0].get_text().endswith("…")
    plots.text_cards([], []).canvas.draw()


def test_samples_that_are_not_there_are_refused(record: Path) -> None:
    with pytest.raises(fg.InputError, match="positions among the 2 samples"):
        plots.text_cards(["a", "b"], record)
    with pytest.raises(fg.InputError, match="captions"):
        plots.contact_sheet(torch.rand(4, 2, 2), record, ["a"])
    with pytest.raises(fg.InputError, match="images"):
        plots.contact_sheet(torch.rand(4, 2, 2, 7), record)
    with pytest.raises(fg.InputError, match="values: must be numbers"):
        plots.text_cards(["a"], ["no number"])  # type: ignore[list-item]
