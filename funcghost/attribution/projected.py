"""Attribution from projected gradients, in memory: TRAK, LESS, TrackStar and LoGra.

Each is features [n, d] of training samples and of queries, by `fg.project`, and a small matrix between them. Features
of samples and of queries must be projected with the same `dim`, `seed` and `kind`.

    TRAK        mean over models of  Phi_q (Phi^T Phi / n + damping)^-1 Phi^T, times the mean of (1 - p_i)
    LESS        sum over checkpoints of  rate * cos(P Adam(g_i), P g_q)
    TrackStar   cos(W P (g_i / sqrt(v)), W P (g_q / sqrt(v)))  with  W = (R + damping)^(-1/2)
    LoGra       sum over parameters of  P g_q (Phi^T Phi / n + damping)^-1 P g_i, each with a projection of its own
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from funcghost.algebra.factors import Dense
from funcghost.algebra.pair_algebra import materialize
from funcghost.attribution.batches import check_batches, joined
from funcghost.errors import InputError
from funcghost.options import Options
from funcghost.problem import Losses
from funcghost.reducers.by_parameter import per_param
from funcghost.reducers.projections import Kind, Project, project
from funcghost.transforms.steps import pairs, reduce
from funcghost.trees import Tree, match_direction, split_params


def features(
    losses: Losses, dim: int, *, seed: int = 0, kind: Kind = "rademacher", options: Options | None = None
) -> Callable[[Tree, Iterable[Tree]], Tensor]:
    """`of(params, batches)`: the projected gradients [n, dim] of all samples of all batches.

    Units, cost and errors: those of `fg.project`.

    Example:
        >>> import torch
        >>> from funcghost.attribution import projected
        >>> of = projected.features(lambda params, x: x @ params["w"], 4)
        >>> of({"w": torch.zeros(2)}, [torch.eye(2)]).square().sum(1)
        tensor([1., 1.])
    """
    reducer, score = project(dim, seed, kind), reduce(losses, options=options)

    def of(params: Tree, batches: Iterable[Tree]) -> Tensor:
        parts = [score(params, batch, reducer) for batch in check_batches("features: batches", batches)]
        return joined("features: batches", parts)

    return of


def margins(losses: Losses) -> Losses:
    """The margins `log(p / (1 - p)) = -log(exp(loss) - 1)` from losses that are `-log p`: what TRAK takes gradients of.

    Example:
        >>> import torch
        >>> from funcghost.attribution import projected
        >>> projected.margins(lambda params, x: -torch.log(x))({}, torch.tensor([0.5, 0.75]))
        tensor([-0.0000, 1.0986])
    """

    def of(params: Tree, batch: Tree) -> Tensor:
        found: Tensor = losses(params, batch)
        return -(found.clamp(min=torch.finfo(found.dtype).tiny).expm1()).log()

    return of


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
    if not damping >= 0:
        raise InputError(f"trak: damping must be a fraction, 0 or more, found {damping!r}.")
    of_margins = margins(losses)

    def score(models: Iterable[Tree], batches: Iterable[Tree], queries: Iterable[Tree]) -> Tensor:
        batches, queries = check_batches("trak: batches", batches), check_batches("trak: queries", queries)
        products, wrong = [], []
        for number, params in enumerate(models):
            of = features(of_margins, dim, seed=seed + number, kind=kind, options=options)
            train, asked = of(params, batches), of(params, queries)
            moment = (train.T @ train / len(train)).double()
            fraction = damping * moment.diagonal().mean() * torch.eye(dim, dtype=moment.dtype, device=moment.device)
            inverse = torch.linalg.pinv(moment + fraction, hermitian=True)
            products.append(train.double() @ inverse @ asked.double().T)
            with torch.no_grad():
                wrong.append(torch.cat([-torch.expm1(-losses(params, batch)) for batch in batches]).double())
        if not products:
            raise InputError("trak: takes one model or more, found none.")
        found = torch.stack(products).mean(0) * torch.stack(wrong).mean(0).unsqueeze(1)
        return found.to(train.dtype)

    return score


def adam_moved(
    gradients: Mapping[str, Tensor],
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    step: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> dict[str, Tensor]:
    """What Adam would move along on each gradient alone, [b, *shape] by name: `m' / (sqrt(v') + eps)`, without rate.

    `m' = (beta1 m + (1 - beta1) g) / (1 - beta1^step)`, likewise `v'`, for the moments before and the number of this
    step.

    Example:
        >>> import torch
        >>> from funcghost.attribution import projected
        >>> none = {"w": torch.zeros(1)}
        >>> projected.adam_moved({"w": torch.tensor([[2.0], [-3.0]])}, none, none, step=1)["w"]
        tensor([[ 1.],
                [-1.]])
    """
    one, two = betas
    moved = {}
    for name, gradient in gradients.items():
        m = (one * first[name] + (1 - one) * gradient) / (1 - one**step)
        v = (two * second[name] + (1 - two) * gradient.square()) / (1 - two**step)
        moved[name] = m / (v.sqrt() + eps)
    return moved


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
    kept = pairs(losses, options=options)
    reducer = None if dim is None else project(dim, seed)

    def score(checkpoints: Iterable[tuple[Tree, Tree, Tree, int, float]], batches: Any, queries: Any) -> Tensor:
        batches, queries = check_batches("less: batches", batches), check_batches("less: queries", queries)
        total = None
        for params, first, second, step, rate in checkpoints:
            split = split_params(params)
            m, v = (
                dict(zip(split.names, match_direction(tree, split, what), strict=True))
                for tree, what in ((first, "first"), (second, "second"))
            )

            def projected(gradients: Mapping[str, Tensor]) -> Tensor:
                found = _projected(gradients, reducer)
                norms: Tensor = torch.linalg.vector_norm(found, dim=1, keepdim=True)
                return found / norms.clamp(min=1e-30)

            def named(batch: Tree, at: Tree = params) -> dict[str, Tensor]:
                tree = split_params(materialize(kept(at, batch)))
                return dict(zip(tree.names, tree.leaves, strict=True))

            ours = [projected(adam_moved(named(batch), m, v, step, betas, eps)) for batch in batches]
            theirs = [projected(named(batch)) for batch in queries]
            found = rate * joined("less: batches", ours) @ joined("less: queries", theirs).T
            total = found if total is None else total + found
        if total is None:
            raise InputError("less: takes one checkpoint or more, found none.")
        return total

    return score


def _projected(gradients: Mapping[str, Tensor], reducer: Project | None) -> Tensor:
    if reducer is None:
        return torch.cat([leaf.reshape(len(leaf), -1) for leaf in gradients.values()], 1)
    parts = [reducer.of_parameter(name, [Dense(leaf)]) for name, leaf in gradients.items()]
    return torch.stack(parts).sum(0)


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
    if not 0 <= mixing <= 1 or not damping > 0:
        raise InputError(
            f"trackstar: mixing must be from 0 to 1 and damping above 0, found {mixing!r} and {damping!r}."
        )
    kept, reducer = pairs(losses, options=options), project(dim, seed)

    def score(params: Tree, batches: Iterable[Tree], queries: Iterable[Tree], second: Tree | None = None) -> Tensor:
        split = split_params(params)
        roots = None if second is None else [leaf.sqrt() for leaf in match_direction(second, split, "second")]

        def of(batch: Tree) -> Tensor:
            leaves = split_params(materialize(kept(params, batch))).leaves
            scaled = leaves if roots is None else [g / (root + 1e-8) for g, root in zip(leaves, roots, strict=True)]
            return _projected(dict(zip(split.names, scaled, strict=True)), reducer)

        train = joined("batches", [of(batch) for batch in check_batches("trackstar: batches", batches)]).double()
        asked = joined("queries", [of(batch) for batch in check_batches("trackstar: queries", queries)]).double()
        moment = (1 - mixing) * train.T @ train / len(train) + mixing * asked.T @ asked / len(asked)
        values, basis = torch.linalg.eigh(moment)
        whitened = basis * (values.clamp(min=0) + damping * values.mean()).rsqrt()
        one, other = (torch.nn.functional.normalize(part @ whitened, dim=1) for part in (train, asked))
        return (one @ other.T).to(split.leaves[0].dtype)

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
    if not damping > 0:
        raise InputError(f"logra: damping must be above 0, found {damping!r}.")
    by_parameter, reducer = reduce(losses, options=options), per_param(project(dim, seed, "kronecker"))

    def score(params: Tree, batches: Iterable[Tree], queries: Iterable[Tree]) -> Tensor:
        train = [by_parameter(params, batch, reducer) for batch in check_batches("logra: batches", batches)]
        asked = [by_parameter(params, batch, reducer) for batch in check_batches("logra: queries", queries)]
        names: Sequence[str] = split_params(params).names
        total = []
        for name in names:
            one = joined("logra: batches", [part[name] for part in train]).double()
            other = joined("logra: queries", [part[name] for part in asked]).double()
            moment = one.T @ one / len(one)
            size = damping * moment.diagonal().mean()
            if not float(size) > 0:
                continue  # no loss depends on it
            inverse = torch.linalg.inv(moment + size * torch.eye(dim, dtype=moment.dtype, device=moment.device))
            total.append(one @ inverse @ other.T)
        if not total:
            raise InputError("logra: no loss of the batches depends on the parameters.")
        return torch.stack(total).sum(0).to(train[0][names[0]].dtype)

    return score
