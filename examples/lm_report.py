"""The report of a run: one HTML file with everything in it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from funcghost.plots.drawings import by_group_over_time, distributions
from funcghost.plots.page import escape, figure, image, passages, table, write_page
from lm_corpus import Corpus, Document
from lm_directions import Cost
from lm_findings import Claim, Findings, explained, overhead
from lm_scores import GROUPS, Tally
from lm_training import Log

CLEAN_COLOUR, CORRUPTED_COLOUR, FIRST_COLOUR = "#3b6ea5", "#c8442e", "#9a9a9a"
SHOWN_DOCUMENTS = 10

INTRODUCTION = """<p>A window's value is its share in the change of the validation loss by the step it was trained in
(In-Run Data Shapley, <a href="https://arxiv.org/abs/2406.11011">arXiv 2406.11011</a>), in nats.
<b>Negative values lower the validation loss.</b></p>"""
DOMAINS = "<p>Values, windows of clean documents by their domain, and those of corrupted documents.</p>"
ACCOUNT = """<p>What each step did to the validation loss: the values of its windows together, what the optimizer did
without them (momentum, weight decay), and the change of the loss that the step really made; added up over the run.
Right: how far each step's values and rest together are off its change, and the same at first order and by Simpson's
rule at some steps.</p>"""
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
            "The account of the run",
            ACCOUNT
            + f"<p>{escape(explained(findings).capitalize())}.</p>"
            + image(_draw_account(log), "account of the run"),
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
    order = drawn[np.argsort(-tally.values[drawn] if worst else tally.values[drawn])]
    return passages(
        (
            documents[index].name,
            documents[index].corruption,
            f"{tally.values[index]:.2e} in {tally.drawn[index]} windows",
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
    values = {"clean": tally.values[drawn & ~corrupted], "corrupted": tally.values[drawn & corrupted]}
    label = "mean value of a document's windows, less their batch's mean (negative lowers the validation loss)"
    return distributions(values, label, f"AUROC {findings.auroc:.3f}")


def _draw_account(log: Log) -> Figure:
    """What values and rests add up to, one on top of the other, beside the change; and how far each step is off."""
    drawn, (stacked, errors) = figure(columns=2)
    steps, values, rest, change = (
        np.array([getattr(row, name) for row in log.account]) for name in ("step", "values", "rest", "change")
    )
    of_samples, with_rest = np.cumsum(values), np.cumsum(values + rest)
    stacked.fill_between(steps, 0, of_samples, color=CLEAN_COLOUR, alpha=0.6, label="values")
    stacked.fill_between(steps, of_samples, with_rest, color=FIRST_COLOUR, alpha=0.6, label="rest")
    stacked.plot(steps, np.cumsum(change), color="black", linewidth=1, label="change")
    stacked.set(xlabel="step", ylabel="validation loss, added up")
    off = np.abs(values + rest - change) / np.maximum(np.abs(change), np.finfo(float).tiny)
    errors.plot(steps, np.maximum(off, 1e-12), ".", color=CLEAN_COLOUR, markersize=4, label="values + rest")
    found = [check for check in log.checks if check.change]
    for name, colour in (("first", FIRST_COLOUR), ("simpson", CORRUPTED_COLOUR)):
        wrong = [max(abs(getattr(check, name) / check.change - 1), 1e-12) for check in found]
        label = {"first": "at first order", "simpson": "by Simpson's rule"}[name]
        errors.plot([check.step for check in found], wrong, "o", color=colour, markersize=3, label=label)
    errors.set(xlabel="step", ylabel="off the change of the step", yscale="log")
    drawn.legend(loc="outside upper left", ncols=6, frameon=False)
    return drawn


def _draw_overhead(log: Log) -> Figure:
    drawn, (axis,) = figure(height=2.4)
    ratios = {"plain": 1.0, "account": overhead(log.seconds)} if log.seconds else {}
    for row, name in enumerate(ratios):
        times = 1e3 * np.array([probe[name] for probe in log.seconds])
        axis.plot(times, np.full(len(times), row), "o", color=CLEAN_COLOUR, alpha=0.3, markeredgewidth=0)
        axis.plot(np.median(times), row, "|", color="black", markersize=22, markeredgewidth=2)
    axis.set_yticks(range(len(ratios)), [f"{name}  {ratio:.2f}x" for name, ratio in ratios.items()])
    axis.set_ylim(1.5, -0.5)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.set_xlabel("milliseconds of a step, plain and with its account, validation gradient included (bars: medians)")
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
    steps = [row.step for row in log.account]
    axis.plot(steps, [row.training_loss for row in log.account], color=FIRST_COLOUR, label="training batch")
    axis.plot(steps, [row.validation_loss for row in log.account], color=CLEAN_COLOUR, label="validation")
    axis.set(xlabel="step", ylabel="nats per byte")
    axis.legend(frameon=False)
    return drawn
