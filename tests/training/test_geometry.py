"""Noise scale, diversity, rank and pruning scores against their definitions."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import funcghost as fg
from funcghost.attribution import pruning
from funcghost.laws.oracle import per_sample_gradients
from funcghost.training import geometry
from tests.models.programs import Program, programs
from tests.naive import assert_close

Params = dict[str, Tensor]


def flat(gradients: Params) -> Tensor:
    return torch.cat([g.reshape(len(g), math.prod(g.shape[1:])) for g in gradients.values()], 1)


@given(programs(empty=False))
def test_geometry_of_naive_gradients(program: Program) -> None:
    batch = program.batch()
    rows = flat(per_sample_gradients(program.losses, program.params, batch))
    out = fg.grad_and_reduce(program.losses)(program.params, batch, {"norm": fg.squared_norm(), "gram": fg.gram()})
    size, b = float(rows.square().sum()) + 1.0, len(rows)
    if b > 1:
        found = geometry.noise_scale(out.reduced["norm"], out.grads)
        mean = rows.mean(0)
        variance = (rows - mean).square().sum() / (b - 1)  # of samples, with Bessel's correction
        assert abs(float(found.variance - variance)) <= 1e-9 * size
        # |mean|^2 is too large by the variance of a mean.
        assert abs(float(found.signal - (mean.square().sum() - variance / b))) <= 1e-9 * size
    total = float(rows.sum(0).square().sum())
    if total > 1e-3 * size:
        assert float(geometry.gradient_diversity(out.reduced["gram"])) == pytest.approx(
            float(rows.square().sum()) / total, rel=1e-5
        )
    values = torch.linalg.svdvals(rows).square()
    if float(values.sum()) > 1e-3:
        entropy = float(torch.special.entr(values / values.sum()).sum())
        assert float(geometry.effective_rank(out.reduced["gram"])) == pytest.approx(math.exp(entropy), rel=1e-5)


def test_noise_estimates_have_no_bias() -> None:
    """Over all batches of two of three gradients, drawn with replacement: the population's own figures, exactly."""
    rows = torch.tensor([[3.0, 1.0], [1.0, 0.0], [-1.0, 5.0]], dtype=torch.float64)
    true = rows.mean(0)
    variance = (rows - true).square().sum(1).mean()
    step = fg.grad_and_reduce(lambda p, x: x @ p["w"])
    found = []
    for i in range(3):
        for j in range(3):
            out = step({"w": torch.zeros(2, dtype=torch.float64)}, rows[[i, j]], fg.squared_norm())
            found.append(geometry.noise_scale(out.reduced, out.grads))
    mean = geometry.NoiseScale(*(torch.stack(parts).mean() for parts in zip(*found, strict=True)))
    assert float(mean.variance) == pytest.approx(float(variance), rel=1e-12)
    assert float(mean.signal) == pytest.approx(float(true.square().sum()), rel=1e-12)
    assert float(mean.scale) == pytest.approx(float(variance / true.square().sum()), rel=1e-12)


@given(st.integers(1, 12))
def test_diversity_and_rank_at_their_ends(b: int) -> None:
    same, apart = torch.full((b, b), 2.0), 3 * torch.eye(b)
    assert float(geometry.gradient_diversity(same)) == pytest.approx(1 / b)
    assert float(geometry.gradient_diversity(apart)) == 1
    assert float(geometry.effective_rank(same)) == pytest.approx(1, abs=1e-4)
    assert float(geometry.effective_rank(apart)) == pytest.approx(b, rel=1e-5)
    assert float(geometry.effective_rank(torch.zeros(b, b))) == 0
    opposed = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert float(geometry.gradient_diversity(opposed)) == math.inf
    assert float(geometry.effective_rank(opposed)) == pytest.approx(1, abs=1e-5)


BAD: dict[str, tuple[Any, str]] = {
    "one sample": (lambda: geometry.noise_scale(torch.ones(1), {"w": torch.ones(1)}), "two samples or more"),
    "norms [b, 1]": (lambda: geometry.noise_scale(torch.ones(2, 1), {"w": torch.ones(1)}), r"\[b\]"),
    "norms of integers": (lambda: geometry.noise_scale(torch.arange(3), {"w": torch.ones(1)}), "floating"),
    "no gradient": (lambda: geometry.noise_scale(torch.ones(2), {}), "tree of tensors"),
    "a norm for a gradient": (lambda: geometry.noise_scale(torch.ones(2), 3.0), "tree of tensors"),
    "cross": (lambda: geometry.gradient_diversity(torch.ones(2, 3)), r"\[b, b\]"),
    "no samples": (lambda: geometry.effective_rank(torch.ones(0, 0)), "one sample or more"),
    "norms": (lambda: geometry.effective_rank(torch.ones(3)), r"\[b, b\]"),
    "no runs": (lambda: pruning.grand(lambda p, x: x @ p["w"])([], torch.eye(2)), "one run or more"),
    "labels of floats": (lambda: pruning.el2n(torch.ones(2, 3), torch.ones(2)), "int64 labels"),
    "too few labels": (lambda: pruning.el2n(torch.ones(2, 3), torch.tensor([1])), r"labels must be \[b\]"),
    "classes alone": (lambda: pruning.el2n(torch.ones(3), torch.tensor([1])), r"labels must be \[b\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_arguments(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(fg.InputError, match=message):
        call()


# -- pruning -------------------------------------------------------------------------------------


def classifier() -> tuple[nn.Module, Any, list[Params], tuple[Tensor, Tensor]]:
    """A network, its losses, the parameters of three runs, and a batch."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()

    def losses(params: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, params, (batch[0],)), batch[1], reduction="none")

    runs = [{k: torch.randn_like(p) for k, p in model.named_parameters()} for _ in range(3)]
    return model, losses, runs, (torch.randn(7, 5, dtype=torch.float64), torch.randint(3, (7,)))


def test_grand_is_the_mean_norm_over_runs() -> None:
    _, losses, runs, batch = classifier()
    wanted = torch.stack([flat(per_sample_gradients(losses, run, batch)).norm(dim=1) for run in runs]).mean(0)
    assert_close(pruning.grand(losses)(iter(runs), batch), wanted, 1e-12)


def test_el2n_is_the_norm_of_the_gradient_of_the_last_bias() -> None:
    model, losses, runs, (x, y) = classifier()
    logits = torch.stack([torch.func.functional_call(model, run, (x,)) for run in runs])
    score = fg.reduce(losses)
    biases = [score(run, (x, y), fg.per_param(fg.squared_norm()))["2.bias"].sqrt() for run in runs]
    assert_close(pruning.el2n(logits.softmax(-1), y), torch.stack(biases).mean(0), 1e-12)
    assert_close(pruning.el2n(logits[0].softmax(-1), y), biases[0], 1e-12)
    assert_close(pruning.el2n(F.one_hot(y, 3).double(), y), torch.zeros(7, dtype=torch.float64), 1e-12)
