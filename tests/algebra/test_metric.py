"""Norms and products under a metric against the metric as a dense matrix."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import funcghost as fg
from funcghost.algebra.factors import matrix_form
from funcghost.algebra.pairs import Pairs
from funcghost.attribution import curvature
from funcghost.corpus.describing import of_reducers
from funcghost.testing import assert_reducer_laws
from funcghost.testing.strategies import Model, models
from funcghost.testing.strategies import pairs as drawn_pairs
from tests.depth import fewer


def leaf(shape: tuple[int, ...], kronecker: bool, source: torch.Generator) -> tuple[Any, Tensor]:
    """A leaf of a metric, and the matrix that it is."""
    if not kronecker or not shape:
        weights = torch.randint(0, 4, shape, generator=source).double()
        return weights, torch.diag(weights.flatten())
    _, m, n = matrix_form(shape).blocks
    sides = []
    for size in (m, n):
        root = torch.randn(size, 2, generator=source, dtype=torch.float64)
        sides.append(root @ root.T)
    return fg.Kronecker(*sides), torch.kron(*sides)


def assert_near(found: Tensor, wanted: Tensor, size: float) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().sum()) <= 1e-9 * (size + 1e-6)


@given(drawn_pairs(), st.booleans(), st.sampled_from([8, 1000, 1 << 20]), st.integers(0, 99))
def test_metrics_of_pairs(kept: Pairs, kronecker: bool, budget: int, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    leaves = {name: leaf(shape, kronecker, source) for name, shape, _ in kept.parameters}
    metric = {name: own for name, (own, _) in leaves.items()}
    gradients = fg.materialize(kept)
    options = fg.Options(memory_budget=1 << 12 if budget == 1000 else 1 << 20)
    truth, size, b = torch.zeros(len(kept), len(kept), dtype=torch.float64), 0.0, len(kept)
    for name, (_, matrix) in leaves.items():
        rows = gradients[name].reshape(b, len(matrix))
        truth += rows @ matrix @ rows.T
        size += float(rows.square().sum() * matrix.norm())
    found = fg.apply({"norm": fg.squared_norm(metric), "gram": fg.gram(metric)}, kept, options=options)
    assert_near(found["norm"], truth.diagonal(), size)
    assert_near(found["gram"], truth, size)
    assert_near(fg.cross_dots(kept, kept[:1], metric), truth[:, :1], size)
    if b:
        norms = truth.diagonal().clamp(min=0).sqrt()
        if float(norms.min()) > 1e-6:
            assert_near(fg.cosine(kept, kept, metric), truth / norms / norms[:, None], b)


def weights(params: Any, samples: int) -> Any:
    source = torch.Generator().manual_seed(0)
    return {name: torch.rand(value.shape, generator=source, dtype=torch.float64) for name, value in params.items()}


def test_laws() -> None:
    assert_reducer_laws(lambda params, samples: fg.squared_norm(weights(params, samples)), examples=2)
    assert_reducer_laws(lambda params, samples: fg.gram(weights(params, samples)), examples=2)


@fewer(3)
@given(models(), st.data())
def test_a_damped_curvature_is_a_metric(model: Model, data: st.DataObject) -> None:
    """`<g_i, (F + damping)^-1 g_i>` by the metric and by the direction."""
    batch = model.batch(3)
    damped = curvature.ekfac(model.losses, model.params, [batch]).damped(0.1)
    kept = fg.pairs(model.losses)(model.params, batch)
    gradients = fg.materialize(kept)
    moved = damped(gradients)
    truth = sum(
        (gradients[k].reshape(3, -1) @ moved[k].reshape(3, -1).T for k in gradients), torch.zeros(3, 3).double()
    )
    found = fg.apply(fg.gram(damped.metric()), kept)
    assert_near(found, truth, float(truth.abs().sum()))


def test_a_metric_is_described_by_its_numbers() -> None:
    """What a corpus store keeps of a reducer."""
    params = {"w": torch.ones(2, 2)}
    one, other = (
        of_reducers({"norm": fg.squared_norm({"w": own})})
        for own in (torch.ones(2, 2), fg.Kronecker(torch.eye(2), torch.eye(2)))
    )
    assert one != other
    assert one == of_reducers({"norm": fg.squared_norm(params)})


def test_bad_metrics() -> None:
    score = fg.reduce(lambda params, x: x @ params["w"])
    params, x = {"w": torch.zeros(2)}, torch.eye(2)
    for metric, says in [
        ({}, "no leaves"),
        ({"w": torch.tensor([1.0, -1.0])}, "below zero"),
        ({"w": "adam"}, "found str"),
        ({"w": fg.Kronecker(torch.ones(2, 3), torch.eye(1))}, "square"),
        ({"w": fg.Kronecker(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.eye(1))}, "semidefinite"),
    ]:
        with pytest.raises(fg.InputError, match=says):
            fg.squared_norm(metric)
    for metric, says in [
        ({"v": torch.ones(2)}, "no leaf for parameter 'w'"),
        ({"w": torch.ones(3)}, "parameter's shape"),
        ({"w": fg.Kronecker(torch.eye(3), torch.eye(1))}, "parameter's shape"),
    ]:
        with pytest.raises(fg.InputError, match=says):
            score(params, x, fg.squared_norm(metric))
    whole = curvature.exact(lambda params, x: x @ params["w"], params, [x]).damped(1.0)
    with pytest.raises(fg.InputError, match="one block"):
        whole.metric()
