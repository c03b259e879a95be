"""The report of a run: one HTML file with everything in it."""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from lm_corpus import Corpus, Document
from lm_directions import Cost
from lm_findings import Claim, Findings, overhead
from lm_scores import GROUPS, Floats, Tally, write_atomically
from lm_training import Log

CLEAN_COLOUR, CORRUPTED_COLOUR, FIRST_COLOUR = "#3b6ea5", "#c8442e", "#9a9a9a"
SHOWN_DOCUMENTS = 10

PAGE = Template(
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Data values in one training run</title>
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
<h1>Data values in one training run</h1>
<p>A window's value is its share in the change of the validation loss by the step it was trained in (In-Run Data
Shapley, <a href="https://arxiv.org/abs/2406.11011">arXiv 2406.11011</a>), in nats.
<b>Negative values lower the validation loss.</b></p>
<table>$claims</table>
<p>$remark</p>
<h2>Value by domain over time</h2>
<p>Second-order values, windows of clean documents by their domain, and those of corrupted documents.</p>
$domains
<h2>Clean and corrupted documents</h2>
$documents
<h2>Sum of values against the actual change of the validation loss</h2>
<p>At some steps; values are those along the validation gradient of the step itself.</p>
$changes
<h2>What a kept direction costs</h2>
<p>First-order scores of a batch along a validation gradient that was taken some steps before, averaged, or cut to low
rank, against scores along the fresh gradient: their rank correlation (Spearman) and relative error in norm. The
certified bound is what low rank alone may have changed. Means or medians over batches.</p>
$costs
<h2>Overhead</h2>
<p>Times in this run, taken one after the other on the same batch; the ratios are medians over these probes.</p>
$overhead
<h2>Losses</h2>
$losses
<h2>Most valuable documents</h2>
$most
<h2>Least valuable documents</h2>
$least
<h2>The run</h2>
<table>$facts</table>
</body>
</html>
"""
)


def write_report(
    path: Path,
    corpus: Corpus,
    tally: Tally,
    log: Log,
    findings: Findings,
    claims: Sequence[Claim],
    remark: str,
    facts: Mapping[str, str],
) -> None:
    """Writes the report; `facts` are what the run was started with and how it went."""
    text = PAGE.substitute(
        claims="".join(_claim_row(claim) for claim in claims),
        remark=_escape(remark),
        facts="".join(f"<tr><th>{_escape(name)}</th><td>{_escape(fact)}</td></tr>" for name, fact in facts.items()),
        domains=_image(_draw_domains(tally), "value by domain over time"),
        documents=_image(_draw_documents(tally, corpus, findings), "values of clean and of corrupted documents"),
        changes=_image(_draw_changes(log), "sum of values against the actual change"),
        costs=_show_costs(findings.costs, log),
        overhead=_image(_draw_overhead(log), "time of a step"),
        losses=_image(_draw_losses(log), "losses"),
        most=_list_documents(tally, corpus.training, worst=False),
        least=_list_documents(tally, corpus.training, worst=True),
    )
    write_atomically(path, lambda unfinished: _write(unfinished, text))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _escape(text: str) -> str:
    """Text for HTML; what cannot be shown is spelt out."""
    return html.escape("".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text))


def _claim_row(claim: Claim) -> str:
    verdict = "holds" if claim.holds else "fails"
    return (
        f'<tr><td class="{verdict}">{verdict}</td><td>{_escape(claim.text)}</td><td>{_escape(claim.measured)}</td></tr>'
    )


def _list_documents(tally: Tally, documents: Sequence[Document], *, worst: bool) -> str:
    """The documents of lowest or of highest value, with their text."""
    drawn = np.flatnonzero(tally.drawn)
    order = drawn[np.argsort(-tally.second[drawn] if worst else tally.second[drawn])]
    items = []
    for index in order[:SHOWN_DOCUMENTS]:
        document = documents[index]
        text = _escape(document.text.decode("utf-8", "backslashreplace"))
        items.append(
            f'<li><b>{_escape(document.name)}</b> <span class="fails">{_escape(document.corruption)}</span> '
            f'<span class="note">{tally.second[index]:.2e} in {tally.drawn[index]} windows</span><pre>{text}</pre></li>'
        )
    return f"<ol>{''.join(items)}</ol>"


def _show_costs(costs: Mapping[str, Cost], log: Log) -> str:
    if not costs:
        return "<p>The run was too short for a comparison.</p>"
    heads = ("gradient taken", "rank correlation", "lowest", "relative error", "certified bound")
    rows = [
        (name, f"{c.correlation:.3f}", f"{c.lowest:.3f}", f"{c.error:.2%}", f"{c.bound:.2%}" if c.bound else "")
        for name, c in costs.items()
    ]
    lines = ["".join(f"<th>{head}</th>" for head in heads)]
    lines += ["".join(f"<td>{_escape(cell)}</td>" for cell in row) for row in rows]
    table = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table>{table}</table>{_image(_draw_costs(log), 'scores along kept directions')}"


def _image(figure: Figure, description: str) -> str:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    encoded = base64.b64encode(content.getvalue()).decode()
    return f'<img alt="{description}" src="data:image/png;base64,{encoded}">'


def _figure(columns: int = 1, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _draw_domains(tally: Tally) -> Figure:
    figure, (axis,) = _figure(height=4.4)
    rows = [row for row in range(len(GROUPS)) if np.isfinite(tally.by_group[row]).any()]
    cells = tally.by_group[rows]
    largest = float(np.nanmax(np.abs(cells))) or 1.0
    norm = SymLogNorm(linthresh=float(np.nanmedian(np.abs(cells))) or largest, vmin=-largest, vmax=largest)
    grid = axis.pcolormesh(tally.bin_edges, np.arange(len(rows) + 1), cells, cmap="RdBu_r", norm=norm)
    axis.set_yticks(np.arange(len(rows)) + 0.5, [GROUPS[row] for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel("step")
    figure.colorbar(grid, label="mean value of a window\n(blue lowers the validation loss)")
    return figure


def _draw_documents(tally: Tally, corpus: Corpus, findings: Findings) -> Figure:
    figure, (axis,) = _figure()
    drawn = tally.drawn > 0
    corrupted = np.array([bool(document.corruption) for document in corpus.training])
    low, high = np.quantile(tally.second[drawn], [0.005, 0.995])
    edges = np.linspace(low, high, 50)
    for label, among, colour in (("clean", ~corrupted, CLEAN_COLOUR), ("corrupted", corrupted, CORRUPTED_COLOUR)):
        values = np.clip(tally.second[drawn & among], edges[0], edges[-1])
        shares = np.full(len(values), 1 / max(len(values), 1))
        axis.hist(values, list(edges), weights=shares, alpha=0.7, color=colour, label=f"{label} ({len(values)})")
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_title(f"AUROC {findings.auroc:.3f}", loc="left", fontsize=10)
    axis.set_xlabel("mean value of a document's windows, less their batch's mean (negative lowers the validation loss)")
    axis.set_ylabel("share of documents")
    axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    axis.legend(frameon=False)
    return figure


def _draw_changes(log: Log) -> Figure:
    figure, (over_time, against) = _figure(columns=2)
    steps, change, first, second = (
        np.array([getattr(check, name) for check in log.checks]) for name in ("step", "change", "first", "second")
    )
    over_time.axhline(0, color="black", linewidth=0.6)
    over_time.plot(steps, first, ".", color=FIRST_COLOUR, markersize=5, label="sum of first-order values")
    over_time.plot(steps, change, color="black", linewidth=1, label="actual change")
    over_time.plot(steps, second, "o", color=CORRUPTED_COLOUR, markersize=3, label="sum of second-order values")
    over_time.set(xlabel="step", ylabel="change of the validation loss")
    figure.legend(loc="outside upper left", ncols=3, frameon=False)
    _symmetric_log(over_time, change, "y")
    against.axline((0, 0), slope=1, color="black", linewidth=0.6)
    against.plot(change, first, ".", color=FIRST_COLOUR, markersize=5)
    against.plot(change, second, "o", color=CORRUPTED_COLOUR, markersize=3)
    against.set(xlabel="actual change", ylabel="sum of values")
    _symmetric_log(against, change, "x", "y")
    return figure


def _symmetric_log(axis: Axes, values: Floats, *directions: Literal["x", "y"]) -> None:
    """Changes are of either sign, and those of the first and of the last steps differ by orders of magnitude."""
    size = float(np.median(np.abs(values)))
    threshold = 10.0 ** math.ceil(math.log10(size)) if size else 1.0
    for direction in directions:
        getattr(axis, f"set_{direction}scale")("symlog", linthresh=threshold)
        getattr(axis, f"{direction}axis").set_minor_locator(NullLocator())


def _draw_overhead(log: Log) -> Figure:
    figure, (axis,) = _figure(height=2.4)
    labels = {"plain": "plain step", "first": "with first order", "second": "with second order"}
    ratios = {"plain": 1.0, **overhead(log.seconds)} if log.seconds else {}
    for row, name in enumerate(ratios):
        times = 1e3 * np.array([probe[name] for probe in log.seconds])
        axis.plot(times, np.full(len(times), row), "o", color=CLEAN_COLOUR, alpha=0.3, markeredgewidth=0)
        axis.plot(np.median(times), row, "|", color="black", markersize=22, markeredgewidth=2)
    axis.set_yticks(range(len(ratios)), [f"{labels[name]}  {ratio:.2f}x" for name, ratio in ratios.items()])
    axis.set_ylim(2.5, -0.5)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.set_xlabel("milliseconds for the training gradient, alone and with values (bars: medians)")
    return figure


def _draw_costs(log: Log) -> Figure:
    figure, (ranks, errors) = _figure(columns=2)
    for name in dict.fromkeys(row.name for row in log.comparisons):
        rows = [row for row in log.comparisons if row.name == name]
        steps = [row.step for row in rows]
        ranks.plot(steps, [row.correlation for row in rows], ".-", linewidth=0.8, label=name)
        errors.plot(steps, [row.error for row in rows], ".-", linewidth=0.8)
    ranks.set(xlabel="step", ylabel="rank correlation with fresh scores")
    errors.set(xlabel="step", ylabel="relative error")
    errors.set_yscale("symlog", linthresh=1e-4)
    figure.legend(loc="outside upper left", ncols=3, frameon=False)
    return figure


def _draw_losses(log: Log) -> Figure:
    figure, (axis,) = _figure(height=2.8)
    steps = [check.step for check in log.checks]
    axis.plot(steps, [check.training_loss for check in log.checks], color=FIRST_COLOUR, label="training batch")
    axis.plot(steps, [check.validation_loss for check in log.checks], color=CLEAN_COLOUR, label="validation")
    axis.set(xlabel="step", ylabel="nats per byte")
    axis.legend(frameon=False)
    return figure
