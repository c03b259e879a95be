"""Factored per-sample gradients and their reducers, held to naive per-sample gradients on random programs."""

import json
import sys
from collections.abc import Mapping
from math import prod
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import funcghost as fg
from funcghost.algebra.factors import Dense
from funcghost.laws.oracle import per_sample_gradients
from funcghost.testing import pairs as drawn_pairs
from tests.depth import fewer
from tests.models.programs import Program, programs
from tests.models.small import rows, small_gpt
from tests.naive import gradient


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
        inner_products=st.sampled_from(["cheapest", "ghost", "materialise"]),
        memory_budget=st.sampled_from([2**15, 2**28]),
    )


@fewer(3)
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


@fewer(3)
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
        parts = [reducer.of_parameter(k, [use]) for k, use in zip(truth, naive, strict=True)]
        torch.testing.assert_close(got, torch.stack(parts).sum(0), rtol=1e-9, atol=1e-9 * size * rows.shape[1])


# -- Pairs as values ------------------------------------------------------------------------------------------


def taken_apart(pairs: Any) -> tuple[list[Tensor], Any]:
    return optree.tree_flatten(pairs)


def same(found: fg.Pairs, wanted: fg.Pairs) -> bool:
    """Whether both hold the same factors."""
    (leaves, spec), (others, other) = taken_apart(found), taken_apart(wanted)
    return spec == other and all(torch.equal(a, b) for a, b in zip(leaves, others, strict=True))


def materialized(pairs: fg.Pairs) -> Tensor:
    return flat(fg.materialize(pairs))


@given(pairs=drawn_pairs())
def test_a_pytree_for_optree_and_for_torch(pairs: fg.Pairs) -> None:
    nest: Any = pairs
    leaves, spec = optree.tree_flatten(nest)
    assert sum(leaf.numel() * leaf.element_size() for leaf in leaves) == pairs.nbytes
    again: Any = optree.tree_unflatten(spec, leaves)
    assert isinstance(again, fg.Pairs)
    assert same(again, pairs)
    assert repr(again) == repr(pairs)
    leaves, context = torch.utils._pytree.tree_flatten(pairs)
    again = torch.utils._pytree.tree_unflatten(leaves, context)
    assert same(again, pairs)
    doubled: Any = optree.tree_map(lambda leaf: leaf * 2 if leaf.is_floating_point() else leaf, nest)
    assert len(doubled) == len(pairs)
    assert spec == optree.tree_structure(doubled)


@given(pairs=drawn_pairs(), drawn=st.data())
def test_choosing_samples(pairs: fg.Pairs, drawn: st.DataObject) -> None:
    b, rows = len(pairs), materialized(pairs)
    for start in range(b):
        assert torch.equal(materialized(pairs[start]), rows[start : start + 1])
        assert torch.equal(materialized(pairs[start - b]), rows[start : start + 1])
    part = drawn.draw(st.slices(b).filter(lambda s: (s.step or 1) > 0), label="slice")
    assert torch.equal(materialized(pairs[part]), rows[part])
    mask = torch.tensor(drawn.draw(st.lists(st.booleans(), min_size=b, max_size=b)), dtype=torch.bool)
    assert torch.equal(materialized(pairs[mask]), rows[mask])
    index = torch.tensor(drawn.draw(st.lists(st.integers(0, max(b - 1, 0)), max_size=6 if b else 0)), dtype=torch.int64)
    assert torch.equal(materialized(pairs[index]), rows[index])
    for beyond in (b, -b - 1):
        with pytest.raises(IndexError):
            pairs[beyond]


@given(pairs=drawn_pairs(integers=True), cut=st.integers(0, 4))
def test_cat_undoes_a_split(pairs: fg.Pairs, cut: int) -> None:
    parts = [pairs[:cut], pairs[cut:]]
    assert same(fg.Pairs.cat(parts), pairs)
    assert same(fg.Pairs.cat([pairs]), pairs)


def tied(p: dict[str, Tensor], i: Tensor) -> Tensor:
    return F.linear(F.embedding(i, p["table"]).tanh() * p["scale"], p["table"]).sin().sum((1, 2))


def tied_params() -> dict[str, Tensor]:
    return {"table": torch.randn(6, 3, dtype=torch.float64), "scale": torch.randn(3, dtype=torch.float64)}


def test_cat_of_rows_of_other_lengths() -> None:
    params, lengths = tied_params(), (2, 5, 1)
    batches = [torch.randint(0, 6, (3, length)) for length in lengths]
    apart = [fg.pairs(tied)(params, batch) for batch in batches]
    together = fg.Pairs.cat(apart)
    rows = torch.cat([flat(per_sample_gradients(tied, params, batch)) for batch in batches])
    torch.testing.assert_close(materialized(together), rows)
    for route in ("ghost", "materialise"):
        options = fg.Options(inner_products=route)
        torch.testing.assert_close(fg.apply(fg.gram(), together, options=options), rows @ rows.T)
        wanted = rows @ rows[3:6].T
        torch.testing.assert_close(fg.cross_dots(together, apart[1], options=options), wanted)
    projected = torch.cat([fg.apply(fg.project(4), part) for part in apart])
    torch.testing.assert_close(fg.apply(fg.project(4), together), projected)


@given(pairs=drawn_pairs(integers=True))
def test_to_another_dtype_and_device(pairs: fg.Pairs) -> None:
    narrow = pairs.to(torch.float32)
    assert torch.equal(materialized(narrow), materialized(pairs))  # the parameters' dtype, whole numbers
    assert all(leaf.dtype in (torch.float32, torch.int64) for leaf in taken_apart(narrow)[0])
    away = pairs.to("meta")
    assert all(leaf.is_meta for leaf in taken_apart(away)[0])
    assert len(away) == len(pairs)
    if len(pairs):
        assert fg.apply(fg.squared_norm(), away).is_meta


def test_repr_says_what_there_is() -> None:
    pairs = fg.pairs(tied)(tied_params(), torch.randint(0, 6, (2, 4)))
    assert repr(pairs).splitlines() == [
        f"Pairs of 2 samples, {pairs.nbytes} bytes",
        "  scale  3    dense",
        "  table  6x3  outer, 4 positions; lookup, 4 positions",
    ]


def test_cosine_is_bounded_and_zero_for_zero() -> None:
    params, tokens = tied_params(), torch.randint(0, 6, (4, 3))
    pairs = fg.pairs(lambda p, i: tied(p, i) * torch.tensor([1.0, 2.0, 0.0, -1.0]).double())(params, tokens)
    rows = materialized(pairs)
    found = fg.cosine(pairs, pairs[:2])
    torch.testing.assert_close(found, F.cosine_similarity(rows[:, None], rows[None, :2], dim=2))
    assert torch.equal(found[2], torch.zeros(2, dtype=torch.float64))


def test_what_pairs_cannot_be_asked() -> None:
    params, tokens = tied_params(), torch.randint(0, 6, (4, 3))
    pairs = fg.pairs(tied)(params, tokens)
    others = fg.pairs(lambda p, x: (x @ p["w"]).sum(1))({"w": torch.randn(3, 2)}, torch.randn(4, 3))
    smaller = fg.pairs(tied)({k: v[:2] for k, v in params.items()} | {"scale": params["scale"]}, tokens.clamp(max=1))
    wrong: Any = torch.ones(4)
    for parts in ([], [pairs, wrong], [pairs, others], [pairs, smaller]):
        with pytest.raises(fg.InputError, match=r"Pairs\.cat"):
            fg.Pairs.cat(parts)
    for other, phrase in ((others, "same parameters"), (smaller, "another shape"), (wrong, "takes Pairs")):
        with pytest.raises(fg.InputError, match=phrase):
            fg.cross_dots(pairs, other)
        with pytest.raises(fg.InputError, match=phrase):
            fg.cosine(pairs, other)
    for weights in (torch.ones(3), torch.ones(4, 1), torch.ones(4, dtype=torch.int64), 1.0):
        with pytest.raises(fg.InputError, match=r"combine: weights must be floating numbers \[4\]"):
            fg.combine(pairs, weights)  # type: ignore[arg-type]
    for call in (fg.materialize, lambda p: fg.apply(fg.gram(), p), lambda p: fg.combine(p, torch.ones(4))):
        with pytest.raises(fg.InputError, match="takes Pairs"):
            call(wrong)
    with pytest.raises(fg.InputError, match="every leaf must be a reducer"):
        fg.apply({"a": 3}, pairs)
    with pytest.raises(fg.InputError, match="missing leaves"):
        fg.apply(fg.dot({"w": torch.ones(2)}), pairs)
    with pytest.raises(fg.InputError, match="cross: num_val=5"):
        fg.apply(fg.cross(5), pairs)
    for number in (0, -1, 1.0, True):
        with pytest.raises(fg.InputError, match="cross: num_val must be"):
            fg.cross(number)  # type: ignore[arg-type]


@pytest.mark.parametrize("verify", ["first", "always", "never"])
def test_factors_are_verified_once_for_each_size(verify: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = sys.modules["funcghost.transforms.steps"]
    verified, check = list[int](), module.verify_factors

    def counted(*given: Any) -> Any:
        verified.append(1)
        return check(*given)

    monkeypatch.setattr(module, "verify_factors", counted)
    _, losses, params = small_gpt()
    score, (tokens,) = fg.reduce(losses, options=fg.Options(verify=verify)), rows(3)
    counts = []
    for part in (tokens, tokens, tokens[:2], tokens[:2], tokens):
        score(params, (part,), fg.squared_norm())
        counts.append(len(verified))
    assert counts == {"first": [1, 1, 2, 2, 2], "always": [1, 2, 3, 4, 5], "never": [0] * 5}[verify]


def test_factors_of_a_plan_of_another_version_are_not_trusted() -> None:
    _, losses, params = small_gpt()
    plan = fg.plan(losses, params, rows(3), fg.squared_norm())
    assert fg.Plan.from_json(plan.to_json()).factored == plan.factored
    assert len(plan.factored) == 1
    text = json.dumps(json.loads(plan.to_json()) | {"torch": "0.0.1"})
    assert not fg.Plan.from_json(text).factored
