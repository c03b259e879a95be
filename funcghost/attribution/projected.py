"""Attribution from projected gradients: TRAK, LESS, TrackStar and LoGra, in memory or over features that are kept.

    TRAK        mean over models of  Phi_q (Phi^T Phi / n + damping)^-1 Phi^T, times the mean of (1 - p_i)
    LESS        sum over checkpoints of  rate * cos(P Adam(g_i), P g_q)
    TrackStar   cos(W P (g_i / sqrt(v)), W P (g_q / sqrt(v)))  with  W = (R + damping)^(-1/2)
    LoGra       sum over parameters of  P g_q (Phi^T Phi / n + damping)^-1 P g_i, each with a projection of its own

Each is `features` of samples and of queries (projected with the same `dim`, `seed` and `kind`) and a small matrix
between them (`comparing`). For a data set that does not fit in memory the two are called apart, with a store between:

    of = features.Trak(losses, 2048)
    corpus.keep(of, params, data, "runs/trak")
    scores = comparing.trak([(corpus.kept("runs/trak"), of.all(params, queries, "queries"))], damping=0.1)
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from funcghost.attribution import comparing
from funcghost.attribution.comparing import Blocks
from funcghost.attribution.features import Moved, Scaled, Sided, Trak
from funcghost.options import Options
from funcghost.problem import Losses
from funcghost.reducers.projections import Kind
from funcghost.trees import Tree


def trak(
    losses: Losses,
    dim: int,
    *,
    damping: float = 0.0,
    seed: int = 0,
    kind: Kind = "rademacher",
    options: Options | None = None,
) -> Callable[[Iterable[Tree], Iterable[Tree], Iterable[Tree]], Tensor]:
    """TRAK: `score(models, batches, queries)[i, q]`, for losses that are `-log p`, over an ensemble of models.

        mean_m [ Phi_q (Phi^T Phi / n + damping mean-eigenvalue)^-1 phi_i ] * mean_m [ 1 - p_i ]

    with `phi = P grad log(p / (1 - p))` of each model m, each model with a projection of its own. Positive: training on
    the sample raises the query's margin.

    Shapes: [n, q]. Scale: `Phi^T Phi` is divided by n (the original is not, and its implementation scales each model
    by the mean of its inverse besides: compare ranks). The damping is a fraction of the mean eigenvalue; 0 takes as
    many dimensions as the features span, which is noise where dim is near n or above: give damping, or dim well below
    n.

    Raises:
        InputError: (when used) there is no model, batch or query; the damping is below zero.

    Example:
        >>> import torch
        >>> from funcghost.attribution import projected
        >>> score = projected.trak(lambda p, x: torch.nn.functional.softplus(-(x @ p["w"])), 8, damping=0.1)
        >>> score([{"w": torch.zeros(2)}], [torch.eye(2)], [torch.eye(2)]).argmax(0)
        tensor([0, 1])

    Source: Park, Georgiev, Ilyas, Leclerc, Madry, "TRAK: Attributing Model Behavior at Scale" (arXiv 2303.14186),
    equation (17).
    """
    comparing.check_damping("trak", damping, zero=True)

    def score(models: Iterable[Tree], batches: Iterable[Tree], queries: Iterable[Tree]) -> Tensor:
        def found() -> Iterator[tuple[Blocks, Blocks]]:
            for number, params in enumerate(models):
                of = Trak(losses, dim, seed + number, kind, options=options)
                yield of.all(params, batches, "trak: batches"), of.all(params, queries, "trak: queries")

        return comparing.trak(found(), damping)

    return score


def less(
    losses: Losses,
    dim: int | None,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    seed: int = 0,
    options: Options | None = None,
) -> Callable[..., Tensor]:
    """LESS: `score(checkpoints, batches, queries)[i, q] = sum_c rate_c cos(P Adam_c(g_i), P g_q)`.

    `checkpoints` are tuples `(params, first, second, step, rate)`: the parameters, Adam's two moments before the step
    (trees like params), its number, and the learning rate. Adam is applied to every sample's gradient exactly, which is
    not linear: gradients are formed, b copies of the parameters. `dim=None` takes the gradients as they are,
    unprojected.

    Shapes: [n, q]. Units: those of the rates.

    Raises:
        InputError: (when used) there is no checkpoint, batch or query, or moments are not like params.

    Source: Xia, Malladi, Gururangan, Arora, Chen, "LESS: Selecting Influential Data for Targeted Instruction Tuning"
    (arXiv 2402.04333), definition 3.1.
    """
    asking = Scaled(losses, dim, seed, options=options)

    def score(checkpoints: Iterable[tuple[Tree, Tree, Tree, int, float]], batches: Any, queries: Any) -> Tensor:
        def found() -> Iterator[tuple[Blocks, Blocks, float]]:
            for params, first, second, step, rate in checkpoints:
                of = Moved(
                    losses, dim, seed, options=options, first=first, second=second, step=step, betas=betas, eps=eps
                )
                yield of.all(params, batches, "less: batches"), asking.all(params, queries, "less: queries"), rate

        return comparing.cosines(found())

    return score


def trackstar(
    losses: Losses,
    dim: int,
    *,
    mixing: float = 0.5,
    damping: float = 1e-3,
    seed: int = 0,
    options: Options | None = None,
) -> Callable[..., Tensor]:
    """TrackStar: `score(params, batches, queries, second=None)[i, q]`, the cosine of corrected, projected gradients.

    `second` is a tree like params, the second moments of an optimizer: gradients are divided by their roots first. With
    `R = Phi^T Phi / n` of training samples and of queries, features are multiplied by
    `(mixing R_q + (1 - mixing) R_train + damping mean-eigenvalue)^(-1/2)` and brought to norm 1.

    Shapes: [n, q], from -1 to 1.

    Raises:
        InputError: (when used) there is no batch or query; mixing or damping is out of range; `second` is not like
        params.

    Example:
        >>> import torch
        >>> from funcghost.attribution import projected
        >>> score = projected.trackstar(lambda p, x: (x @ p["w"]).square(), 8)
        >>> score({"w": torch.ones(2)}, [torch.eye(2)], [torch.eye(2)]).argmax(0)
        tensor([0, 1])

    Source: Chang, Rajagopal, Bolukbasi, Dixon, Tenney, "Scalable Influence and Fact Tracing for LLM Pretraining"
    (arXiv 2410.17413), section 3.
    """
    comparing.check_mixing(mixing)
    comparing.check_damping("trackstar", damping)

    def score(params: Tree, batches: Iterable[Tree], queries: Iterable[Tree], second: Tree | None = None) -> Tensor:
        of = Scaled(losses, dim, seed, options=options, second=second)
        train, asked = of.all(params, batches, "trackstar: batches"), of.all(params, queries, "trackstar: queries")
        return comparing.whitened_cosines(train, asked, mixing, damping)

    return score


def logra(
    losses: Losses,
    dim: int,
    *,
    damping: float = 0.1,
    seed: int = 0,
    options: Options | None = None,
) -> Callable[[Tree, Iterable[Tree], Iterable[Tree]], Tensor]:
    """LoGra: `score(params, batches, queries)[i, q]`, influence in projections of rows and columns, by parameter.

    `sum_p <phi_qp, (R_p + damping mean-eigenvalue)^-1 phi_ip>` with `phi_p = (P (x) Q) grad_p`, [n, dim], and
    `R_p = Phi_p^T Phi_p / n` of the training samples.

    Shapes: [n, q]. Cost: that of `fg.project(dim, kind="kronecker")`: nothing of the size of a parameter.

    Raises:
        InputError: (when used) there is no batch or query; the damping is not above zero.

    Example:
        >>> import torch
        >>> from funcghost.attribution import projected
        >>> score = projected.logra(lambda p, x: (x @ p["w"]).square(), 8)
        >>> score({"w": torch.ones(2)}, [torch.eye(2)], [torch.eye(2)]).argmax(0)
        tensor([0, 1])

    Source: Choe et al., "What is Your Data Worth to GPT? LLM-Scale Data Valuation with Influence Functions"
    (arXiv 2405.13954), section 3.
    """
    comparing.check_damping("logra", damping)
    of = Sided(losses, dim, seed, options=options)

    def score(params: Tree, batches: Iterable[Tree], queries: Iterable[Tree]) -> Tensor:
        train, asked = of.all(params, batches, "logra: batches"), of.all(params, queries, "logra: queries")
        return comparing.by_blocks(train, asked, damping)

    return score
