"""What a run found: how its values fit the truth, and what they tell of the documents."""

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lm_corpus import Corpus
from lm_directions import Cost, costs_of
from lm_scores import Tally, auroc
from lm_training import Log, OracleStep

ORACLE_TOLERANCE = 1e-3
WHOLE = ("values", "rest", "change", "impulse")


@dataclass(frozen=True)
class Claim:
    """What the run asserts, what it measured, and whether that holds."""

    text: str
    measured: str
    holds: bool


@dataclass(frozen=True)
class Findings:
    """The numbers of a run.

    `law_error` is how far values and rests are off the changes of the validation loss, over all steps, relative to the
    size of the changes: `sum |sum_i phi_i + rest - change| / sum |change|`. Of the checked steps, with changes in
    float64, `account_error` is the same; `trapezoid_error`, `simpson_error` and `first_order_error` are by these rules
    in its place, and `median_error` is the median of the relative errors of single steps. `whole` are the sums of
    values, rests, changes and impulses over the run. `overhead` is the median time of a step with its account in units
    of the plain step beside it. `oracle_error` is the largest difference from the exact values, relative to the largest
    of these in their batch; `oracle_auroc` the AUROC of the values of the oracle steps alone, and of the exact ones.
    `costs` are those of the ways to keep the validation gradient; empty where the run was too short for a comparison.
    """

    law_error: float
    account_error: float
    trapezoid_error: float
    simpson_error: float
    first_order_error: float
    median_error: float
    whole: dict[str, float]
    auroc: float
    auroc_by_corruption: dict[str, float]
    auroc_in_validation_domain: float
    oracle_error: float
    oracle_auroc: tuple[float, float]
    overhead: float
    costs: dict[str, Cost]


def find(tally: Tally, log: Log, corpus: Corpus, validation_domain: str) -> Findings:
    """Works the findings out."""
    documents = corpus.training
    drawn = tally.drawn > 0
    corruption = np.array([document.corruption for document in documents])
    inside = np.array([document.domain == validation_domain for document in documents])
    corrupted = corruption != ""
    ways = {way: ~corrupted | (corruption == way) for way in sorted(set(corruption) - {""})}
    errors = [abs(row.values + row.rest - row.change) / abs(row.change) for row in log.account if row.change]
    changes = [row.change for row in log.account]
    checked = [check.change for check in log.checks]
    return Findings(
        law_error=_weighted_error(changes, [row.values + row.rest for row in log.account]),
        account_error=_weighted_error(checked, [check.account for check in log.checks]),
        trapezoid_error=_weighted_error(checked, [check.trapezoid for check in log.checks]),
        simpson_error=_weighted_error(checked, [check.simpson for check in log.checks]),
        first_order_error=_weighted_error(checked, [check.first for check in log.checks]),
        median_error=statistics.median(errors) if errors else math.inf,
        whole={name: sum(getattr(row, name) for row in log.account) for name in WHOLE},
        auroc=auroc(tally.values[drawn], corrupted[drawn]),
        auroc_by_corruption={
            way: auroc(tally.values[drawn & among], corrupted[drawn & among]) for way, among in ways.items()
        },
        auroc_in_validation_domain=auroc(tally.values[drawn & inside], corrupted[drawn & inside]),
        oracle_error=max(
            (float((o.values - o.exact).abs().max() / o.exact.abs().max()) for o in log.oracle), default=0.0
        ),
        oracle_auroc=_oracle_auroc(log.oracle, corrupted),
        overhead=overhead(log.seconds),
        costs=costs_of(log.comparisons),
    )


def _weighted_error(changes: Sequence[float], found: Sequence[float]) -> float:
    size = sum(map(abs, changes))
    return sum(abs(a - b) for a, b in zip(found, changes, strict=True)) / size if size else math.inf


def _oracle_auroc(steps: Sequence[OracleStep], corrupted: NDArray[np.bool_]) -> tuple[float, float]:
    if not steps:
        return math.nan, math.nan
    positive = np.concatenate([corrupted[step.documents.numpy()] for step in steps])
    ours = np.concatenate([(step.values - step.values.mean()).numpy() for step in steps])
    exact = np.concatenate([(step.exact - step.exact.mean()).numpy() for step in steps])
    return auroc(ours, positive), auroc(exact, positive)


def overhead(seconds: Sequence[dict[str, float]]) -> float:
    """The median ratio of times taken one after the other; not a number before the first probe."""
    return statistics.median(probe["account"] / probe["plain"] for probe in seconds) if seconds else math.nan


def claims_of(args: argparse.Namespace, found: Findings) -> tuple[Claim, ...]:
    """What the run asserts."""
    ways = ", ".join(f"{way} {value:.3f}" for way, value in found.auroc_by_corruption.items())
    used = max((cost.used for cost in found.costs.values()), default=0.0)
    certified = Claim(
        "scores along directions of low rank are within the certified bounds of those along the directions themselves",
        f"at most {used:.1%} of a bound was used",
        used <= 1,
    )
    return (
        Claim(
            f"values and rests are within {args.max_change_error:.2%} of the changes of the validation loss",
            f"{found.law_error:.4%} off over all steps, weighted by the changes; of those in float64 "
            f"{found.account_error:.5%} off, {found.trapezoid_error:.3%} by the plain trapezoid, "
            f"{found.simpson_error:.5%} by Simpson's rule, "
            f"{found.first_order_error:.1%} at first order; median step {found.median_error:.4%}",
            found.law_error <= args.max_change_error,
        ),
        Claim(
            f"corrupted documents are found with an AUROC of at least {args.min_auroc:.2f}",
            f"{found.auroc:.3f} ({ways})",
            args.min_auroc == 0 or found.auroc >= args.min_auroc,
        ),
        Claim(
            "values equal those of per-sample gradients taken one by one in float64",
            f"within {found.oracle_error:.1e} of the largest",
            found.oracle_error <= ORACLE_TOLERANCE,
        ),
        *([certified] if found.costs else []),
    )


def remark_of(args: argparse.Namespace, found: Findings, claims: Sequence[Claim]) -> str:
    """What is to be said where corrupted documents do not stand out although the values are right."""
    if claims[1].holds or not claims[2].holds:
        return ""
    if math.isnan(found.auroc):
        return f"In {args.steps} steps no corrupted document was drawn, or no clean one: take more."
    ours, exact = found.oracle_auroc
    return (
        f"This is the method's own answer after {args.steps} steps, not an error of its computation: on the windows "
        f"compared with exact per-sample gradients, the AUROC is {exact:.3f} by exact values and {ours:.3f} by these. "
        f"Values are about {args.validation_domain}; clean text of other domains need not help it more than noise "
        f"does. Among the documents of {args.validation_domain} alone the AUROC is "
        f"{found.auroc_in_validation_domain:.3f}."
    )


def explained(found: Findings) -> str:
    """How much of the change over the whole run the values explain, by either credit."""
    change = found.whole["change"]
    shares = {name: found.whole[name] / change if change else math.nan for name in ("values", "rest", "impulse")}
    return (
        f"of the whole change of the validation loss, {change:.4f}, this step's values explain {shares['values']:.1%} "
        f"and rests of momentum and decay {shares['rest']:.1%}; by impulses, all that a gradient moves through the "
        f"optimizer's memory, the samples explain {shares['impulse']:.1%}"
    )
