"""Scores that are inner products of gradients: plain, cosines, TracIn over checkpoints, and each with itself.

All are written for queries and samples that are both losses: with `g_i = grad losses[i]` of training sample i and
`g_q` of query q, at the parameters of checkpoint c with learning rate `eta_c`,

    dot      <g_i, g_q>                        cosine   <g_i, g_q> / (|g_i| |g_q|)
    tracin   sum_c eta_c <g_i, g_q>            self     sum_c eta_c |g_i|^2

A positive score: a step on the sample lowers the query's loss. No factor of 1/n: where a step is on the mean of b
losses, the rate is `lr / b`.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from funcghost.algebra.pair_algebra import materialize
from funcghost.algebra.pairs import Pairs
from funcghost.attribution.batches import check_batches, joined
from funcghost.engine.plans import Plan
from funcghost.errors import InputError
from funcghost.options import Options
from funcghost.problem import Losses
from funcghost.progress import progress
from funcghost.reducers.many import ManyDots
from funcghost.reducers.quadratic import squared_norm
from funcghost.transforms.halves import apply
from funcghost.transforms.steps import pairs, reduce
from funcghost.trees import Tree, match_direction, split_params

Score = Callable[[Tree, Iterable[Tree], Iterable[Tree]], Tensor]


def query_gradients(losses: Losses, *, options: Options | None = None) -> Callable[[Tree, Tree], Tree]:
    """`of(params, queries)`: the gradients of the queries of a batch, one by one: a tree like params of [q, *shape].

    What a curvature preconditions, and `against` scores along. Cost: q copies of the parameters.

    Example:
        >>> import torch
        >>> from funcghost.attribution import gradient
        >>> gradient.query_gradients(lambda params, x: x @ params["w"])({"w": torch.zeros(2)}, torch.eye(2))
        {'w': tensor([[1., 0.],
                [0., 1.]])}
    """
    asking = pairs(losses, options=options)
    return lambda params, queries: materialize(asking(params, queries))


def tracin(
    losses: Losses,
    query_losses: Losses | None = None,
    *,
    normalise: Literal["none", "cosine"] = "none",
    options: Options | None = None,
) -> Callable[..., Tensor]:
    """TracIn: `score(checkpoints, batches, queries, rates=None)[i, q] = sum_c rates[c] <g_i, g_q>` at each checkpoint.

    Checkpoints are trees of parameters, in a list or from a generator (`checkpoints` reads a folder): one is held at a
    time. `rates` are as many numbers, 1 for each if not given. With `normalise="cosine"` every term is
    `rates[c] <g_i, g_q> / (|g_i| |g_q|)`, and 0 where a gradient is zero.

    Shapes: [n, q], all n samples of `batches` by all queries of `queries`, each a list of batches.

    Units: losses squared per parameters squared, times a rate; cosines have none.

    Cost: for every checkpoint, the gradients of all queries of one batch of queries are held (q copies of the
    parameters), and the training batches are gone through once for each of these.

    Args:
        losses: as in `fg.grad_and_reduce`.
        query_losses: those of the queries, if they are others.
        normalise: whether terms are cosines.
        options: as in `fg.grad_and_reduce`.

    Raises:
        InputError: (when used) there are not as many rates as checkpoints, or no checkpoint, batch or query.

    Example:
        >>> import torch
        >>> from funcghost.attribution import gradient
        >>> score = gradient.tracin(lambda params, x: (x @ params["w"]).square() / 2)
        >>> runs = [{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([1.0, 1.0])}]
        >>> score(runs, [torch.eye(2)], [torch.ones(1, 2)], rates=[0.5, 0.1])
        tensor([[0.7000],
                [0.2000]])

    Source: Pruthi, Liu, Sundararajan, Kale, "Estimating Training Data Influence by Tracing Gradient Descent"
    (arXiv 2002.08484), section 3.2.
    """
    if normalise not in ("none", "cosine"):
        raise InputError(f"tracin: normalise must be 'none' or 'cosine', found {normalise!r}.")
    cosines = normalise == "cosine"
    scoring, asking = reduce(losses, options=options), pairs(query_losses or losses, options=options)

    def score(
        checkpoints: Iterable[Tree],
        batches: Iterable[Tree],
        queries: Iterable[Tree],
        rates: Iterable[float] | None = None,
    ) -> Tensor:
        batches, queries = check_batches("tracin: batches", batches), check_batches("tracin: queries", queries)

        def at(params: Tree) -> Tensor:
            names = split_params(params).names
            columns = []
            for query in queries:
                kept = asking(params, query)
                wanted: dict[str, Any] = {"products": ManyDots(_by_name(kept, names))}
                if cosines:
                    wanted["norms"] = squared_norm()
                found = [scoring(params, batch, wanted) for batch in batches]
                products = joined("tracin: batches", [part["products"] for part in found])
                if cosines:
                    norms = torch.cat([part["norms"] for part in found])
                    products = _cosines(products, norms, apply(squared_norm(), kept, options=options))
                columns.append(products.T)
            return joined("tracin: queries", columns).T

        return _summed("tracin", checkpoints, rates, at)

    return score


def _by_name(kept: Pairs, names: tuple[str, ...]) -> dict[str, Tensor]:
    tree = split_params(materialize(kept))
    found = dict(zip(tree.names, tree.leaves, strict=True))
    return {name: found[name] for name in names}


def _cosines(products: Tensor, ours: Tensor, theirs: Tensor) -> Tensor:
    scale = (ours.unsqueeze(1) * theirs).sqrt()
    return torch.where(scale > 0, products / torch.where(scale > 0, scale, 1), 0)


def _summed(
    where: str, checkpoints: Iterable[Tree], rates: Iterable[float] | None, at: Callable[[Tree], Tensor]
) -> Tensor:
    if rates is not None:
        rates = list(rates)
        if not all(isinstance(rate, int | float) for rate in rates):
            raise InputError(f"{where}: rates must be numbers, one for each checkpoint.")
    total, count = None, 0
    for params in progress(checkpoints, where, "checkpoints"):
        if rates is not None and count >= len(rates):
            raise InputError(f"{where}: there are {len(rates)} rates, and more checkpoints than that.")
        found = at(params) * (1 if rates is None else rates[count])
        total, count = found if total is None else total + found, count + 1
    if total is None:
        raise InputError(f"{where}: takes the parameters of one checkpoint or more, found none.")
    if rates is not None and count < len(rates):
        raise InputError(f"{where}: there are {len(rates)} rates for {count} checkpoints.")
    return total


def dot(losses: Losses, query_losses: Losses | None = None, *, options: Options | None = None) -> Score:
    """`score(params, batches, queries)[i, q] = <g_i, g_q>`, [n, q]: `tracin` at one checkpoint.

    Example:
        >>> import torch
        >>> from funcghost.attribution import gradient
        >>> gradient.dot(lambda p, x: x @ p["w"])({"w": torch.zeros(2)}, [torch.eye(2)], [torch.ones(1, 2)])
        tensor([[1.],
                [1.]])
    """
    score = tracin(losses, query_losses, options=options)
    return lambda params, batches, queries: score([params], batches, queries)


def cosine(losses: Losses, query_losses: Losses | None = None, *, options: Options | None = None) -> Score:
    """`score(params, batches, queries)[i, q]`, the cosine of the angle between `g_i` and `g_q`, [n, q].

    Example:
        >>> import torch
        >>> from funcghost.attribution import gradient
        >>> gradient.cosine(lambda p, x: x @ p["w"])({"w": torch.zeros(2)}, [torch.eye(2)], [torch.ones(1, 2)])
        tensor([[0.7071],
                [0.7071]])
    """
    score = tracin(losses, query_losses, normalise="cosine", options=options)
    return lambda params, batches, queries: score([params], batches, queries)


def self_influence(
    losses: Losses, *, options: Options | None = None, plan: Plan | None = None
) -> Callable[..., Tensor]:
    """`score(checkpoints, batches, rates=None)[i] = sum_c rates[c] |g_i|^2`, [n]: high for what is hard or mislabelled.

    Checkpoints, rates and errors as in `tracin`. Cost: that of `fg.squared_norm` for every checkpoint.

    Example:
        >>> import torch
        >>> from funcghost.attribution import gradient
        >>> score = gradient.self_influence(lambda params, x: x @ params["w"])
        >>> score([{"w": torch.zeros(2)}], [torch.tensor([[3.0, 4.0]])], rates=[0.5])
        tensor([12.5000])

    Source: Pruthi et al. (arXiv 2002.08484), section 4.
    """
    norms = reduce(losses, options=options, plan=plan)

    def score(checkpoints: Iterable[Tree], batches: Iterable[Tree], rates: Iterable[float] | None = None) -> Tensor:
        batches = check_batches("self_influence: batches", batches)

        def at(params: Tree) -> Tensor:
            return joined("self_influence: batches", [norms(params, batch, squared_norm()) for batch in batches])

        return _summed("self_influence", checkpoints, rates, at)

    return score


def checkpoints(folder: Path | str, like: Tree, pattern: str = "*.pt") -> Iterator[Tree]:
    """The trees of parameters that `torch.save` wrote to the files of a folder, one at a time, by the numbers in names.

    `step2.pt` comes before `step10.pt`. Only tensors are read (`weights_only=True`), onto the devices of `like`, a tree
    like those in the files; what else a file's dict holds under other names is an error.

    Raises:
        InputError: no file fits the pattern, or one is not like `like`.

    Example:
        >>> import tempfile, torch
        >>> from funcghost.attribution import gradient
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"w": torch.ones(2)}, f"{folder}/step1.pt")
        ...     [found] = gradient.checkpoints(folder, {"w": torch.zeros(2)})
        >>> found
        {'w': tensor([1., 1.])}
    """
    split = split_params(like)
    files = sorted(Path(folder).glob(pattern), key=_natural)
    if not files:
        raise InputError(f"checkpoints: no file of {folder} fits {pattern!r}.")
    return (_read(file, split) for file in files)


def _read(file: Path, like: Any) -> Tree:
    tree = torch.load(file, map_location=like.leaves[0].device, weights_only=True)
    return like.rebuild(match_direction(tree, like, f"checkpoint {file.name}"))


def _natural(file: Path) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", file.name) if part]
