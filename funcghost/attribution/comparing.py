"""Scores from features of training samples and of queries, wherever these lie: a small matrix between them.

Features come as blocks, each a mapping from names to [b, dim] or [b] (`funcghost.attribution.features`): a list, or
`corpus.kept(folder)`, which reads the parts of a store one after the other. Training blocks are gone through twice; in
memory are one block, matrices [dim, dim], the features of the queries, and the scores [n, q]. Sums are in float64.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from funcghost.attribution.batches import joined
from funcghost.attribution.features import Block
from funcghost.errors import InputError

Blocks = Iterable[Block]


def trak(models: Iterable[tuple[Blocks, Blocks]], damping: float = 0.0) -> Tensor:
    """TRAK from the features `Trak` of training samples and queries for each model, see `projected.trak`.

    Raises:
        InputError: there is no model, or no features.
    """
    check_damping("trak", damping, zero=True)
    products, wrong, dtype = [], [], torch.float64
    for train, asked in models:
        moment = _moment(train)
        fraction = damping * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
        queries = _all(asked, "phi")
        against = torch.linalg.pinv(moment + fraction, hermitian=True) @ queries.to(moment).T
        products.append(_products(train, "phi", against))
        wrong.append(_all(train, "wrong").double())
        dtype = queries.dtype
    if not products:
        raise InputError("trak: takes one model or more, found none.")
    found = torch.stack(products).mean(0) * torch.stack(wrong).mean(0).unsqueeze(1)
    return found.to(dtype)


def cosines(checkpoints: Iterable[tuple[Blocks, Blocks, float]]) -> Tensor:
    """`sum_c rate_c cos(phi_i, phi_q)` over checkpoints: LESS from `Moved` of training samples, `Projected` of queries.

    Raises:
        InputError: there is no checkpoint, or no features.
    """
    total: Tensor | None = None
    for train, asked, rate in checkpoints:
        against = _unit(_all(asked, "phi")).T
        found = rate * joined("features", [_unit(phi) @ against.to(phi) for phi in _each(train, "phi")])
        total = found if total is None else total + found
    if total is None:
        raise InputError("less: takes one checkpoint or more, found none.")
    return total


def whitened_cosines(train: Blocks, asked: Blocks, mixing: float = 0.5, damping: float = 1e-3) -> Tensor:
    """TrackStar from the features `Scaled` of training samples and queries, see `projected.trackstar`.

    Raises:
        InputError: there are no features.
    """
    check_mixing(mixing)
    check_damping("trackstar", damping)
    ours = _moment(train)
    values, basis = torch.linalg.eigh((1 - mixing) * ours + mixing * _moment(asked).to(ours))
    whitened = basis * (values.clamp(min=0) + damping * values.mean()).rsqrt()
    queries = _all(asked, "phi")
    right = _unit(queries.to(whitened) @ whitened).T
    found = [_unit(phi.to(whitened) @ whitened) @ right for phi in _each(train, "phi")]
    return joined("features", found).to(queries.dtype)


def by_blocks(train: Blocks, asked: Blocks, damping: float = 0.1) -> Tensor:
    """LoGra from the features `Sided` of training samples and queries, see `projected.logra`.

    Raises:
        InputError: there are no features, or all are zero.
    """
    check_damping("logra", damping)
    first = next(iter(asked), None)
    if first is None:
        raise InputError("logra: takes the features of one query or more, found none.")
    total, dtype = [], torch.float64
    for name in first:
        moment = _moment(train, name)
        size = damping * moment.diagonal().mean()
        if not float(size) > 0:
            continue  # no loss depends on it
        inverse = torch.linalg.inv(moment + size * torch.eye(len(moment), dtype=moment.dtype, device=moment.device))
        queries = _all(asked, name)
        total.append(_products(train, name, inverse @ queries.to(inverse).T))
        dtype = queries.dtype
    if not total:
        raise InputError("logra: no loss of the batches depends on the parameters.")
    return torch.stack(total).sum(0).to(dtype)


def check_damping(where: str, damping: float, zero: bool = False) -> None:
    """A fraction of the mean eigenvalue.

    Raises:
        InputError: it is not above zero, or below it where `zero` may be.
    """
    if not isinstance(damping, int | float) or not (damping > 0 or (zero and damping == 0)):
        least = "0 or more" if zero else "above 0"
        raise InputError(f"{where}: damping must be a fraction of the mean eigenvalue, {least}, found {damping!r}.")


def check_mixing(mixing: float) -> None:
    """How much the queries' moments count.

    Raises:
        InputError: it is not from 0 to 1.
    """
    if not isinstance(mixing, int | float) or not 0 <= mixing <= 1:
        raise InputError(f"trackstar: mixing must be from 0 to 1, found {mixing!r}.")


def _each(blocks: Blocks, name: str) -> Iterator[Tensor]:
    for block in blocks:
        if name not in block:
            raise InputError(f"features: must have {name!r}, found {sorted(block)}.")
        yield block[name]


def _all(blocks: Blocks, name: str) -> Tensor:
    return joined("features", list(_each(blocks, name)))


def _products(blocks: Blocks, name: str, against: Tensor) -> Tensor:
    return joined("features", [phi.to(against) @ against for phi in _each(blocks, name)])


def _moment(blocks: Blocks, name: str = "phi") -> Tensor:
    """`Phi^T Phi / n` of n rows."""
    total, count = None, 0
    for phi in _each(blocks, name):
        own = phi.double().T @ phi.double()
        total, count = own if total is None else total + own, count + len(phi)
    if total is None or not count:
        raise InputError("features: takes those of one sample or more, found none.")
    return total / count


def _unit(features: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return features / norms.clamp(min=1e-30)
