"""How well scores foresee what retraining does: the linear datamodelling score, and leaving out single samples."""

from typing import NamedTuple

import torch
from torch import Tensor

from funcghost.errors import InputError
from funcghost.evaluation.tables import flags, numbers, pearson, same_length, spearman


class LDS(NamedTuple):
    """Rank correlations by query [q] with their standard errors [q], and the mean over the queries with its own."""

    by_query: Tensor
    errors: Tensor
    mean: Tensor
    error: Tensor


def lds(scores: Tensor, masks: Tensor, outputs: Tensor) -> LDS:
    """The linear datamodelling score: do sums of scores rank retrained models as their outputs do?

        by_query[q] = spearman over subsets s of ( sum_{i in s} scores[i, q] , outputs[s, q] )

    Shapes: `scores` is [n, q], `masks` [m, n] of bool (True: the model was trained on the sample), `outputs` [m, q], as
    `retrain` gives them, averaged over seeds; the fields of the result are [q], [q] and scalars, in float64.

    Units: none, -1 to 1; a table of scores that says nothing (constant sums) has 0. Scores and outputs must point the
    same way: for outputs that are losses, helpful samples have negative scores.

    The standard errors are the jackknife's over subsets, `(m - 1)/m sum_s (theta_(s) - mean theta)^2`, with the queries
    held: `error` knows that all queries share the subsets, which the spread over queries does not.

    Cost: m rankings of m subsets for every query.

    Raises:
        InputError: tables do not go together, there are fewer than three subsets, or the outputs of a query are the
            same for all subsets, so that there is nothing to rank.

    Example:
        >>> import torch
        >>> from funcghost import evaluation
        >>> masks = torch.tensor([[True, False], [False, True], [True, True], [False, False]])
        >>> found = evaluation.lds(torch.tensor([[1.0], [2.0]]), masks, torch.tensor([[1.0], [2.5], [3.0], [0.0]]))
        >>> found.mean
        tensor(1., dtype=torch.float64)

    Source: Ilyas et al., "Datamodels" (arXiv 2202.00622); Park et al., "TRAK" (arXiv 2303.14186), definition 2.4.
    """
    scores, outputs = numbers("lds: scores", scores, "nq"), numbers("lds: outputs", outputs, "mq")
    masks = flags("lds: masks", masks, "mn")
    same_length("lds", "samples n", scores=len(scores), masks=masks.shape[1])
    same_length("lds", "subsets m", masks=len(masks), outputs=len(outputs))
    same_length("lds", "queries q", scores=scores.shape[1], outputs=outputs.shape[1])
    m = len(masks)
    if m < 3:
        raise InputError(f"lds: takes three subsets or more, found {m}.")
    constant = (outputs == outputs[:1]).all(0)
    if bool(constant.any()):
        raise InputError(
            f"lds: the outputs of query {int(constant.nonzero()[0])} are the same for all {m} subsets: there is "
            "nothing to rank. Leave the query out."
        )
    foreseen = masks.to(scores.device).double() @ scores
    whole = spearman(foreseen, outputs)
    kept = torch.arange(m, device=scores.device)
    without = torch.stack([spearman(foreseen[kept != s], outputs[kept != s]) for s in range(m)])

    def jackknife(values: Tensor) -> Tensor:
        return ((values - values.mean(0)).square().sum(0) * ((m - 1) / m)).sqrt()

    return LDS(whole, jackknife(without), whole.mean(), jackknife(without.mean(1)))


class LeaveOneOut(NamedTuple):
    """Of predicted and true changes, by query: correlations [q], rank correlations [q], and the slope [q]."""

    pearson: Tensor
    spearman: Tensor
    slope: Tensor


def leave_one_out(scores: Tensor, samples: Tensor, full: Tensor, outputs: Tensor) -> LeaveOneOut:
    """Scores against what leaving one sample out does.

    Over l samples, `scores[samples[j], q]` is held to `full[q] - outputs[j, q]`.

    `slope` is that of the true changes on the scores through zero, `<scores, changes> / <scores, scores>`: 1 for scores
    in units of the change.

    Shapes: `scores` is [n, q], `samples` [l] of int64, `full` [q] the outputs with all samples, `outputs` [l, q] those
    without each of them.

    Raises:
        InputError: tables do not go together, or there are fewer than two samples.

    Example:
        >>> import torch
        >>> from funcghost import evaluation
        >>> scores, without = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[9.0], [6.0]])
        >>> evaluation.leave_one_out(scores, torch.tensor([0, 2]), torch.tensor([10.0]), without).slope
        tensor([1.3000], dtype=torch.float64)

    Source: Koh, Liang, "Understanding Black-box Predictions via Influence Functions" (arXiv 1703.04730), section 4.1.
    """
    scores, outputs = numbers("leave_one_out: scores", scores, "nq"), numbers("leave_one_out: outputs", outputs, "lq")
    full = numbers("leave_one_out: full", full, "q")
    if not isinstance(samples, Tensor) or samples.dtype != torch.int64 or samples.dim() != 1:
        raise InputError("leave_one_out: samples must be a tensor [l] of int64, the samples left out.")
    same_length("leave_one_out", "samples left out l", samples=len(samples), outputs=len(outputs))
    same_length("leave_one_out", "queries q", scores=scores.shape[1], outputs=outputs.shape[1], full=len(full))
    if len(samples) < 2 or not 0 <= int(samples.min()) <= int(samples.max()) < len(scores):
        raise InputError(f"leave_one_out: takes two samples or more between 0 and {len(scores) - 1}.")
    foreseen, changes = scores[samples], full - outputs
    size = foreseen.square().sum(0)
    slope = torch.where(size > 0, (foreseen * changes).sum(0) / torch.where(size > 0, size, 1), 0)
    return LeaveOneOut(pearson(foreseen, changes), spearman(foreseen, changes), slope)
