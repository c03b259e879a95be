"""The report of a run: one HTML file with everything in it."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from funcghost.plots.drawings import by_group_over_time, distributions
from funcghost.plots.page import escape, figure, image, passages, table, write_page
from lm_corpus import Corpus, Document
from lm_directions import Cost
from lm_findings import Claim, Findings, overhead
from lm_scores import GROUPS, Floats, Tally
from lm_training import Log

CLEAN_COLOUR, CORRUPTED_COLOUR, FIRST_COLOUR = "#3b6ea5", "#c8442e", "#9a9a9a"
SHOWN_DOCUMENTS = 10

INTRODUCTION = """<p>A window's value is its share in the change of the validation loss by the step it was trained in
(In-Run Data Shapley, <a href="https://arxiv.org/abs/2406.11011">arXiv 2406.11011</a>), in nats.
<b>Negative values lower the validation loss.</b></p>"""
DOMAINS = "<p>Second-order values, windows of clean documents by their domain, and those of corrupted documents.</p>"
CHANGES = "<p>At some steps; values are those along the validation gradient of the step itself.</p>"
COSTS = """<p>First-order scores of a batch along a validation gradient that was taken some steps before, averaged, or
cut to low rank, against scores along the fresh gradient: their rank correlation (Spearman) and relative error in norm.
The certified bound is what low rank alone may have changed. Means or medians over batches.</p>"""
OVERHEAD = """<p>Times in this run, taken one after the other on the same batch; the ratios are medians over these
probes.</p>"""


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
    rows = "".join(_claim_row(claim) for claim in claims)
    domains = by_group_over_time(
        tally.bin_edges, GROUPS, tally.by_group, "mean value of a window\n(blue lowers the validation loss)"
    )
    sections = [
        ("", f"{INTRODUCTION}<table>{rows}</table><p>{escape(remark)}</p>"),
        ("Value by domain over time", DOMAINS + image(domains, "value by domain over time")),
        ("Clean and corrupted documents", image(_draw_documents(tally, corpus, findings), "values of documents")),
        (
            "Sum of values against the actual change of the validation loss",
            CHANGES + image(_draw_changes(log), "sum of values against the actual change"),
        ),
        ("What a kept direction costs", COSTS + _show_costs(findings.costs, log)),
        ("Overhead", OVERHEAD + image(_draw_overhead(log), "time of a step")),
        ("Losses", image(_draw_losses(log), "losses")),
        ("Most valuable documents", _list_documents(tally, corpus.training, worst=False)),
        ("Least valuable documents", _list_documents(tally, corpus.training, worst=True)),
        ("The run", table(facts.items())),
    ]
    write_page(path, "Data values in one training run", sections)


def _claim_row(claim: Claim) -> str:
    verdict = "holds" if claim.holds else "fails"
    return (
        f'<tr><td class="{verdict}">{verdict}</td><td>{escape(claim.text)}</td><td>{escape(claim.measured)}</td></tr>'
    )


def _list_documents(tally: Tally, documents: Sequence[Document], *, worst: bool) -> str:
    """The documents of lowest or of highest value, with their text."""
    drawn = np.flatnonzero(tally.drawn)
    order = drawn[np.argsort(-tally.second[drawn] if worst else tally.second[drawn])]
    return passages(
        (
            documents[index].name,
            documents[index].corruption,
            f"{tally.second[index]:.2e} in {tally.drawn[index]} windows",
            documents[index].text.decode("utf-8", "backslashreplace"),
        )
        for index in order[:SHOWN_DOCUMENTS]
    )


def _show_costs(costs: Mapping[str, Cost], log: Log) -> str:
    if not costs:
        return "<p>The run was too short for a comparison.</p>"
    heads = ("gradient taken", "rank correlation", "lowest", "relative error", "certified bound")
    rows = [
        (name, f"{c.correlation:.3f}", f"{c.lowest:.3f}", f"{c.error:.2%}", f"{c.bound:.2%}" if c.bound else "")
        for name, c in costs.items()
    ]
    return table(rows, heads) + image(_draw_costs(log), "scores along kept directions")


def _draw_documents(tally: Tally, corpus: Corpus, findings: Findings) -> Figure:
    drawn = tally.drawn > 0
    corrupted = np.array([bool(document.corruption) for document in corpus.training])
    values = {"clean": tally.second[drawn & ~corrupted], "corrupted": tally.second[drawn & corrupted]}
    label = "mean value of a document's windows, less their batch's mean (negative lowers the validation loss)"
    return distributions(values, label, f"AUROC {findings.auroc:.3f}")


def _draw_changes(log: Log) -> Figure:
    drawn, (over_time, against) = figure(columns=2)
    steps, change, first, second = (
        np.array([getattr(check, name) for check in log.checks]) for name in ("step", "change", "first", "second")
    )
    over_time.axhline(0, color="black", linewidth=0.6)
    over_time.plot(steps, first, ".", color=FIRST_COLOUR, markersize=5, label="sum of first-order values")
    over_time.plot(steps, change, color="black", linewidth=1, label="actual change")
    over_time.plot(steps, second, "o", color=CORRUPTED_COLOUR, markersize=3, label="sum of second-order values")
    over_time.set(xlabel="step", ylabel="change of the validation loss")
    drawn.legend(loc="outside upper left", ncols=3, frameon=False)
    _symmetric_log(over_time, change, "y")
    against.axline((0, 0), slope=1, color="black", linewidth=0.6)
    against.plot(change, first, ".", color=FIRST_COLOUR, markersize=5)
    against.plot(change, second, "o", color=CORRUPTED_COLOUR, markersize=3)
    against.set(xlabel="actual change", ylabel="sum of values")
    _symmetric_log(against, change, "x", "y")
    return drawn


def _symmetric_log(axis: Axes, values: Floats, *directions: Literal["x", "y"]) -> None:
    """Changes are of either sign, and those of the first and of the last steps differ by orders of magnitude."""
    size = float(np.median(np.abs(values)))
    threshold = 10.0 ** math.ceil(math.log10(size)) if size else 1.0
    for direction in directions:
        getattr(axis, f"set_{direction}scale")("symlog", linthresh=threshold)
        getattr(axis, f"{direction}axis").set_minor_locator(NullLocator())


def _draw_overhead(log: Log) -> Figure:
    drawn, (axis,) = figure(height=2.4)
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
    return drawn


def _draw_costs(log: Log) -> Figure:
    drawn, (ranks, errors) = figure(columns=2)
    for name in dict.fromkeys(row.name for row in log.comparisons):
        rows = [row for row in log.comparisons if row.name == name]
        steps = [row.step for row in rows]
        ranks.plot(steps, [row.correlation for row in rows], ".-", linewidth=0.8, label=name)
        errors.plot(steps, [row.error for row in rows], ".-", linewidth=0.8)
    ranks.set(xlabel="step", ylabel="rank correlation with fresh scores")
    errors.set(xlabel="step", ylabel="relative error")
    errors.set_yscale("symlog", linthresh=1e-4)
    drawn.legend(loc="outside upper left", ncols=3, frameon=False)
    return drawn


def _draw_losses(log: Log) -> Figure:
    drawn, (axis,) = figure(height=2.8)
    steps = [check.step for check in log.checks]
    axis.plot(steps, [check.training_loss for check in log.checks], color=FIRST_COLOUR, label="training batch")
    axis.plot(steps, [check.validation_loss for check in log.checks], color=CLEAN_COLOUR, label="validation")
    axis.set(xlabel="step", ylabel="nats per byte")
    axis.legend(frameon=False)
    return drawn
