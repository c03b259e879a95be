"""Factored per-sample gradients and their reducers, held to naive per-sample gradients on random programs."""

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import funcghost as fg
from funcghost.cost import Means
from funcghost.factors import Dense
from funcghost.oracle import per_sample_gradients
from tests.naive import gradient
from tests.programs import Program, programs

BUDGETS = (1, 4096, 2**28)


def flat(gradients: Mapping[str, Tensor]) -> Tensor:
    """[b, all entries]."""
    return torch.cat([g.reshape(len(g), prod(g.shape[1:])) for g in gradients.values()], 1)


def assert_gram(found: Tensor, a: Tensor, b: Tensor, largest: float, tolerance: float = 1e-10) -> None:
    """Equality of inner products to a tolerance relative to the size of the terms, and to the square of the largest.

    Terms may cancel inside an op before they reach the gradient.
    """
    wanted, size = a @ b.T, a.abs() @ b.abs().T
    largest = largest**2
    assert found.shape == wanted.shape
    assert bool(((found - wanted).abs() <= tolerance * (size + largest)).all()), (found, wanted)


def all_options(verify: Any = "first") -> st.SearchStrategy[fg.Options]:
    return st.builds(
        fg.Options,
        verify=st.just(verify),
        route=st.sampled_from(["backward", "ghost", "materialise"]),
        memory_budget=st.sampled_from([2**15, 2**28]),
    )


@given(program=programs(), options=all_options())
def test_quadratic_reducers_equal_naive_gradients(program: Program, options: fg.Options) -> None:
    batch = program.batch()
    truth = per_sample_gradients(program.losses, program.params, batch)
    rows, b = flat(truth), len(batch["x"])
    largest = max(float(rows.abs().max()), 1.0) if rows.numel() else 1.0
    v = max(1, b // 2)
    reducers: dict[str, Any] = {"norm": fg.squared_norm(), "gram": fg.gram(), "each": fg.per_param(fg.gram())}
    if b > 0:
        reducers["cross"] = fg.cross(v)
    step = fg.grad_and_reduce(program.losses, options=options)
    out = step(program.params, batch, reducers)
    for i in range(b):
        assert_gram(out.reduced["norm"][i].view(1, 1), rows[i : i + 1], rows[i : i + 1], largest)
    assert_gram(out.reduced["gram"], rows, rows, largest)
    if b:
        assert_gram(out.reduced["cross"], rows[: b - v], rows[b - v :], largest)
    for name, found in out.reduced["each"].items():
        own = flat({name: truth[name]})
        assert_gram(found, own, own, largest)
    grads, losses = gradient(program.losses, program.params, batch)
    torch.testing.assert_close(out.losses, losses)
    if b:
        for name, wanted in grads.items():
            torch.testing.assert_close(out.grads[name], wanted, rtol=1e-9, atol=1e-9)


@given(program=programs(empty=False), options=all_options(), seed=st.integers(0, 99))
def test_pairs_are_the_gradients(program: Program, options: fg.Options, seed: int) -> None:
    batch = program.batch()
    truth = per_sample_gradients(program.losses, program.params, batch)
    rows, b = flat(truth), len(batch["x"])
    pairs = fg.pairs(program.losses, options=options)(program.params, batch)
    assert len(pairs) == b
    largest = size = max(float(rows.abs().max()), 1.0)
    found = fg.materialize(pairs)
    for name, wanted in truth.items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-10, atol=1e-10 * size)
    assert_gram(fg.cross_dots(pairs, pairs, options=options), rows, rows, largest)
    weights = torch.randn(b, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    leaves = {k: p.detach().requires_grad_() for k, p in program.params.items()}
    total = (weights * program.losses(leaves, batch)).sum()
    wanted = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    combined = fg.combine(pairs, weights)
    for name, value in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(combined[name], value, rtol=1e-9, atol=1e-10 * size * b)
    direction = program.direction()
    reducers = (fg.dot(direction), fg.squared_norm(), fg.gram(), fg.project(6, seed), fg.project(6, seed, "kronecker"))
    score = fg.reduce(program.losses, options=options)
    streamed, kept = score(program.params, batch, reducers), fg.apply(reducers, pairs, options=options)
    for one, other in zip(streamed, kept, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * max(1.0, size**2 * rows.shape[1]))
    naive = [Dense(value) for value in truth.values()]
    for reducer, got in zip(reducers[3:], kept[3:], strict=True):
        parts = [reducer.of_parameter(k, [use], MEANS) for k, use in zip(truth, naive, strict=True)]
        torch.testing.assert_close(got, torch.stack(parts).sum(0), rtol=1e-9, atol=1e-9 * size * rows.shape[1])


MEANS = Means()
