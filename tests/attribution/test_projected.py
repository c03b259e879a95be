"""Projected methods against their formulas on per-sample gradients."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import funcghost as fg
from funcghost.attribution import features, projected
from funcghost.laws.oracle import per_sample_gradients
from funcghost.training import updates
from tests.naive import assert_close

D = torch.float64
SOURCE = torch.Generator().manual_seed(4)


def made(seed: int) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(4, 3, generator=source, dtype=D), "b": torch.randn(4, generator=source, dtype=D)}


def losses(params: Any, batch: Any) -> Tensor:
    return F.cross_entropy(F.linear(batch[0], params["a"], params["b"]), batch[1], reduction="none")


def batch(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, generator=SOURCE, dtype=D), torch.randint(0, 4, (n,), generator=SOURCE)


TRAIN, QUERIES = [batch(12), batch(9)], [batch(3)]


def gradients(of: Any, params: Any, batches: Any) -> dict[str, Tensor]:
    parts = [per_sample_gradients(of, params, own) for own in batches]
    return {name: torch.cat([part[name] for part in parts]) for name in params}


def seen(tree: dict[str, Tensor], dim: int, seed: int = 0, kind: Any = "rademacher") -> Tensor:
    """`fg.project` of gradients as they are."""
    params = {name: leaf[0] for name, leaf in tree.items()}

    def linear(params: Any, rows: Any) -> Tensor:
        return torch.stack([(params[k] * rows[k]).reshape(len(rows[k]), -1).sum(1) for k in params]).sum(0)

    return fg.reduce(linear)(params, tree, fg.project(dim, seed, kind))


def test_trak() -> None:
    models, dim = [made(1), made(2)], 6
    products, wrong = [], []
    for number, params in enumerate(models):

        def margin(params: Any, batch: Any) -> Tensor:
            p = torch.exp(-losses(params, batch))
            return torch.log(p / (1 - p))

        train, asked = (seen(gradients(margin, params, own), dim, seed=number) for own in (TRAIN, QUERIES))
        moment = train.T @ train / len(train)
        damped = moment + 0.1 * moment.trace() / dim * torch.eye(dim, dtype=D)
        products.append(train @ torch.linalg.solve(damped, asked.T))
        wrong.append(1 - torch.exp(-torch.cat([losses(params, own) for own in TRAIN])))
    wanted = torch.stack(products).mean(0) * torch.stack(wrong).mean(0)[:, None]
    assert_close(projected.trak(losses, dim, damping=0.1)(models, TRAIN, QUERIES), wanted, 1e-8)


@pytest.mark.parametrize("dim", [None, 64])
def test_less_moves_as_adam_does(dim: int | None) -> None:
    params = {name: leaf.requires_grad_() for name, leaf in made(1).items()}
    update, state = updates.of(torch.optim.Adam(list(params.values()), lr=1.0, betas=(0.8, 0.9)), params)
    now: Any = params
    for own in TRAIN:
        now, state = update(now, {k: g.mean(0) for k, g in gradients(losses, now, [own]).items()}, state)
    now = {k: v.detach() for k, v in now.items()}
    first, second = ({k: state[k][slot] for k in now} for slot in ("exp_avg", "exp_avg_sq"))
    rows = gradients(losses, now, TRAIN)
    moves = []
    for i in range(21):
        after, _ = update(now, {k: g[i] for k, g in rows.items()}, state)
        moves.append({k: (now[k] - after[k]).detach() for k in now})
    ours = {k: torch.stack([move[k] for move in moves]) for k in now}
    theirs = gradients(losses, now, QUERIES)
    if dim is None:
        one, other = (torch.cat([leaf.flatten(1) for leaf in tree.values()], 1) for tree in (ours, theirs))
    else:
        one, other = seen(ours, dim), seen(theirs, dim)
    wanted = 0.3 * F.normalize(one, dim=1) @ F.normalize(other, dim=1).T
    score = projected.less(losses, dim, betas=(0.8, 0.9))
    found = score([(now, first, second, 3, 0.1), (now, first, second, 3, 0.2)], TRAIN, QUERIES)
    assert_close(found, wanted, 1e-8)


def test_trackstar() -> None:
    params, second = made(1), {k: v.square() + 0.1 for k, v in made(3).items()}
    scaled = [{k: g / second[k].sqrt() for k, g in gradients(losses, params, own).items()} for own in (TRAIN, QUERIES)]
    train, asked = (seen(tree, 10) for tree in scaled)
    moment = 0.7 * train.T @ train / 21 + 0.3 * asked.T @ asked / 3
    values, basis = torch.linalg.eigh(moment + 0.01 * moment.trace() / 10 * torch.eye(10, dtype=D))
    root = (basis / values.sqrt()) @ basis.T
    wanted = F.normalize(train @ root, dim=1) @ F.normalize(asked @ root, dim=1).T
    score = projected.trackstar(losses, 10, mixing=0.3, damping=0.01)
    assert_close(score(params, TRAIN, QUERIES, second), wanted, 1e-5)


def test_logra() -> None:
    params = made(1)
    wanted = torch.zeros(21, 3, dtype=D)
    for name in params:
        train, asked = (
            seen({name: gradients(losses, params, own)[name]}, 6, kind="kronecker") for own in (TRAIN, QUERIES)
        )
        moment = train.T @ train / 21
        wanted += train @ torch.linalg.solve(moment + 0.1 * moment.trace() / 6 * torch.eye(6, dtype=D), asked.T)
    assert_close(projected.logra(losses, 6)(params, TRAIN, QUERIES), wanted, 1e-8)


def test_bad_arguments() -> None:
    params = made(1)
    for call, says in [
        (lambda: projected.trak(losses, 4, damping=-1.0), "damping"),
        (lambda: projected.trak(losses, 4)([], TRAIN, QUERIES), "one model"),
        (lambda: projected.trackstar(losses, 4, mixing=2.0), "mixing"),
        (lambda: projected.trackstar(losses, 4)(params, TRAIN, QUERIES, {"a": params["a"]}), "second"),
        (lambda: projected.logra(losses, 4, damping=0.0), "damping"),
        (lambda: projected.less(losses, 4)([], TRAIN, QUERIES), "one checkpoint"),
        (lambda: features.Projected(losses, 4).all(params, [], "features"), "found none"),
    ]:
        with pytest.raises(fg.InputError, match=says):
            call()
