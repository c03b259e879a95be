"""What a run found: how its values fit the truth, and what they tell of the documents."""

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lm_corpus import Corpus
from lm_directions import Cost, costs_of
from lm_scores import Tally, auroc
from lm_training import Check, Log, OracleStep

ORACLE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Claim:
    """What the run asserts, what it measured, and whether that holds."""

    text: str
    measured: str
    holds: bool


@dataclass(frozen=True)
class Findings:
    """The numbers of a run.

    `change_error` is the error of the summed second-order values over the checked steps, relative to the size of the
    changes, `sum |sum_i phi_i - change| / sum |change|`; `first_order_error` the same for first-order values.
    `median_change_error` is the median of the relative errors of single steps, and `close_steps` the share of steps
    within 5 %. `overhead` is the median time of a step with first- and with second-order values, each in units of the
    plain step beside it.
    `oracle_error` is the largest difference from the exact values, relative to the largest of these in their batch;
    `oracle_auroc` the AUROC of the values of the oracle steps alone, and of the exact ones. `costs` are those of the
    ways to keep the validation gradient; empty where the run was too short for a comparison.
    """

    change_error: float
    first_order_error: float
    median_change_error: float
    close_steps: float
    auroc: float
    auroc_first: float
    auroc_by_corruption: dict[str, float]
    auroc_in_validation_domain: float
    oracle_error: float
    oracle_auroc: tuple[float, float]
    overhead: dict[str, float]
    costs: dict[str, Cost]


def find(tally: Tally, log: Log, corpus: Corpus, validation_domain: str) -> Findings:
    """Works the findings out."""
    documents = corpus.training
    drawn = tally.drawn > 0
    corruption = np.array([document.corruption for document in documents])
    inside = np.array([document.domain == validation_domain for document in documents])
    corrupted = corruption != ""
    ways = {way: ~corrupted | (corruption == way) for way in sorted(set(corruption) - {""})}
    errors = [abs(check.second / check.change - 1) if check.change else math.inf for check in log.checks]
    return Findings(
        change_error=_weighted_error(log.checks, lambda check: check.second),
        first_order_error=_weighted_error(log.checks, lambda check: check.first),
        median_change_error=statistics.median(errors),
        close_steps=statistics.fmean(error <= 0.05 for error in errors),
        auroc=auroc(tally.second[drawn], corrupted[drawn]),
        auroc_first=auroc(tally.first[drawn], corrupted[drawn]),
        auroc_by_corruption={
            way: auroc(tally.second[drawn & among], corrupted[drawn & among]) for way, among in ways.items()
        },
        auroc_in_validation_domain=auroc(tally.second[drawn & inside], corrupted[drawn & inside]),
        oracle_error=max(float((o.values - o.exact).abs().max() / o.exact.abs().max()) for o in log.oracle),
        oracle_auroc=_oracle_auroc(log.oracle, corrupted),
        overhead=overhead(log.seconds),
        costs=costs_of(log.comparisons),
    )


def _weighted_error(checks: Sequence[Check], total: Callable[[Check], float]) -> float:
    size = sum(abs(check.change) for check in checks)
    return sum(abs(total(check) - check.change) for check in checks) / size if size else math.inf


def _oracle_auroc(steps: Sequence[OracleStep], corrupted: NDArray[np.bool_]) -> tuple[float, float]:
    positive = np.concatenate([corrupted[step.documents.numpy()] for step in steps])
    ours = np.concatenate([(step.values - step.values.mean()).numpy() for step in steps])
    exact = np.concatenate([(step.exact - step.exact.mean()).numpy() for step in steps])
    return auroc(ours, positive), auroc(exact, positive)


def overhead(seconds: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median ratios of times taken one after the other; empty before the first probe."""
    names = ("first", "second") if seconds else ()
    return {name: statistics.median(probe[name] / probe["plain"] for probe in seconds) for name in names}


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
            f"sums of second-order values are within {args.max_change_error:.1%} of the changes of the validation loss",
            f"{found.change_error:.2%} off, weighted by the changes (first order {found.first_order_error:.1%}); "
            f"median step {found.median_change_error:.2%}; {found.close_steps:.0%} of the steps within 5 %",
            found.change_error <= args.max_change_error,
        ),
        Claim(
            f"corrupted documents are found with an AUROC of at least {args.min_auroc:.2f}",
            f"{found.auroc:.3f} ({ways}; by first-order values {found.auroc_first:.3f})",
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
