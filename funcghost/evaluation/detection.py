"""Whether samples that are known to be wrong stand out by their scores."""

from typing import NamedTuple

from torch import Tensor

from funcghost.errors import InputError
from funcghost.evaluation.tables import flags, numbers, ranks, same_length


class Detection(NamedTuple):
    """The area under the receiver's curve, and the average precision."""

    auroc: float
    average_precision: float


def detection(suspicion: Tensor, wrong: Tensor) -> Detection:
    """How well high suspicion finds the samples that are wrong (mislabelled, say).

    `auroc` is the chance that a wrong sample has more suspicion than a right one, a tie counting half. With thresholds
    at every value that occurs, from the highest, `average_precision = sum_k (recall_k - recall_(k-1)) precision_k`.

    Shapes: `suspicion` is [n], `wrong` [n] of bool.

    Raises:
        InputError: the tables do not go together, or all samples are right, or all wrong.

    Example:
        >>> import torch
        >>> from funcghost import evaluation
        >>> evaluation.detection(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([True, False, True])).auroc
        0.5
    """
    suspicion, wrong = numbers("detection: suspicion", suspicion, "n"), flags("detection: wrong", wrong, "n")
    same_length("detection", "samples n", suspicion=len(suspicion), wrong=len(wrong))
    bad = int(wrong.sum())
    good = len(wrong) - bad
    if not bad or not good:
        raise InputError(f"detection: {bad} of {len(wrong)} samples are wrong: there must be some of both.")
    auroc = (float(ranks(suspicion)[wrong].sum()) - bad * (bad + 1) / 2) / (bad * good)
    order = suspicion.argsort(descending=True)
    found, values = wrong[order].double().cumsum(0), suspicion[order]
    last = values.new_ones(len(values), dtype=wrong.dtype)
    last[:-1] = values[1:] != values[:-1]  # ties stand or fall together
    at = last.nonzero().squeeze(1)
    hits = found[at]
    gains = hits.diff(prepend=hits.new_zeros(1))
    return Detection(auroc, float((gains * hits / (at + 1)).sum() / bad))
