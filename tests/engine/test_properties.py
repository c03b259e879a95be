"""The laws, on random programs, in float64."""

import copy
from typing import Any

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import funcghost as fg
from funcghost.laws.oracle import per_sample_gradients
from tests.depth import fewer
from tests.models.programs import FEATURES, Program, programs
from tests.naive import assert_scores, assert_trees_close, dots, expected, gradient


def test_strategy_reaches_every_hard_case() -> None:
    reached: set[str] = set()
    layered: set[str] = set()

    @settings(max_examples=1000, derandomize=True, database=None)
    @given(programs())
    def collect(program: Program) -> None:
        reached.update(program.features)
        if program.shape.batch > 1:
            layered.update(site for site in program.features)

    collect()
    assert reached == FEATURES
    assert layered == FEATURES - {"b = 0", "b = 1"}


@given(programs())
def test_oracle_is_vmap_of_grad_and_jvp(program: Program) -> None:
    # The oracle is checked by what it does not use. vmap(grad) knows samples that do not mix, jvp knows all.
    batch, direction = program.batch(), program.direction()
    found = per_sample_gradients(program.losses, program.params, batch)
    if "no grad" not in program.features:  # forward mode looks through torch.no_grad()
        slopes = torch.func.jvp(lambda p: program.losses(p, batch), (program.params,), (direction,))[1]
        assert_scores(slopes, expected(program.losses, program.params, batch, direction))
    # Data-dependent routing and in-place writes to unbatched tensors have no vmap.
    if program.mixes or program.features & {"experts", "into zeros"} or not program.shape.batch:
        return

    def one(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return program.losses(p, {"x": x.unsqueeze(0)})[0]

    assert_trees_close(found, torch.func.vmap(torch.func.grad(one), (None, 0))(program.params, batch["x"]))


@given(programs(), st.sampled_from(["mean", "sum"]))
def test_scores_gradient_and_losses_are_those_of_autograd(program: Program, reduction: Any) -> None:
    batch, direction = program.batch(), program.direction()
    step = fg.grad_and_reduce(program.losses, reduction=reduction)
    out = step(program.params, batch, {"v": fg.dot(direction)})
    assert_scores(out.reduced["v"], expected(program.losses, program.params, batch, direction))
    if program.shape.batch:
        grads, losses = gradient(program.losses, program.params, batch, reduction)
        assert torch.equal(out.losses, losses)
        assert_trees_close(out.grads, grads)


@fewer(2)
@given(programs())
def test_scoring_alone_and_forward_route_agree(program: Program) -> None:
    batch, direction = program.batch(), program.direction()
    wanted = expected(program.losses, program.params, batch, direction)
    assert_scores(fg.reduce(program.losses)(program.params, batch, fg.dot(direction)), wanted)
    forward = fg.reduce(program.losses, options=fg.Options(route="forward"))
    assert_scores(forward(program.params, batch, fg.dot(direction)), wanted)


@fewer(2)
@given(programs(), st.floats(-3, 3), st.floats(-3, 3))
def test_linear_in_the_direction(program: Program, a: float, b: float) -> None:
    batch, u, v = program.batch(), program.direction(1), program.direction(2)
    both = {k: a * u[k] + b * v[k] for k in u}
    out = fg.reduce(program.losses)(program.params, batch, [fg.dot(fg.stack([u, v])), fg.dot(both)])
    stacked, combined = out
    assert stacked.shape == (program.shape.batch, 2)
    size = expected(program.losses, program.params, batch, {k: abs(a) * u[k].abs() + abs(b) * v[k].abs() for k in u})[1]
    assert_scores(combined, (stacked @ torch.tensor([a, b], dtype=torch.float64), size))


@fewer(2)
@given(programs(empty=False))
def test_sum_over_samples_is_the_training_gradient(program: Program) -> None:
    batch, direction = program.batch(), program.direction()
    out = fg.grad_and_reduce(program.losses, reduction="sum")(program.params, batch, fg.dot(direction))
    total = sum((out.grads[k] * direction[k]).sum() for k in direction)
    size = expected(program.losses, program.params, batch, direction)[1]
    assert_scores(out.reduced.sum()[None], (total[None], size.sum()[None]))


@given(programs(empty=False), st.randoms(use_true_random=False))
def test_permutation_of_the_batch(program: Program, random: Any) -> None:
    batch, direction = program.batch(), program.direction()
    order = torch.tensor(random.sample(range(program.shape.batch), program.shape.batch))
    score = fg.reduce(program.losses)
    before = score(program.params, batch, fg.dot(direction))
    after = score(program.params, {"x": batch["x"][order]}, fg.dot(direction))
    size = expected(program.losses, program.params, batch, direction)[1]
    assert_scores(after, (before[order], size[order]))


@fewer(2)
@given(programs(empty=False), st.integers(0, 4))
def test_any_split_of_the_batch_gives_the_same_scores(program: Program, cut: int) -> None:
    assume(not program.mixes)
    batch, direction = program.batch(), program.direction()
    score = fg.reduce(program.losses)
    parts = [score(program.params, {"x": part}, fg.dot(direction)) for part in (batch["x"][:cut], batch["x"][cut:])]
    assert_scores(torch.cat(parts), expected(program.losses, program.params, batch, direction))


@given(programs(empty=False), st.integers(1, 5), st.integers(1, 5))
def test_a_plan_serves_other_sizes_and_values(program: Program, size: int, length: int) -> None:
    direction = program.direction()
    plan = fg.plan(program.losses, program.params, program.batch(max(2, program.shape.batch)))
    other = program.batch(size, length, seed=5)
    moved = {k: p + 0.1 for k, p in program.params.items()}
    found = fg.reduce(program.losses, plan=plan)(moved, other, fg.dot(direction))
    assert_scores(found, expected(program.losses, moved, other, direction))


@given(programs())
def test_nothing_of_the_users_is_changed(program: Program) -> None:
    batch, direction = program.batch(), program.direction()
    params = {k: p.clone().requires_grad_() for k, p in program.params.items()}
    for p in params.values():
        p.grad = torch.full_like(p, 7.0)
    before = copy.deepcopy({k: (p.detach(), p.grad) for k, p in params.items()})
    versions, state = {k: p._version for k, p in params.items()}, torch.get_rng_state()
    out = fg.grad_and_reduce(program.losses)(params, batch, fg.dot(direction))
    assert not any(t.requires_grad for t in (out.losses, out.reduced, *out.grads.values()))
    assert torch.equal(torch.get_rng_state(), state)
    for name, p in params.items():
        assert p.requires_grad
        assert p.is_leaf
        assert p._version == versions[name]
        assert torch.equal(p, before[name][0])
        grad, kept = p.grad, before[name][1]
        assert grad is not None
        assert kept is not None
        assert torch.equal(grad, kept)


@given(programs(empty=False, blocks=("matmul", "addmm", "einsum", "shift", "scale", "transposed", "cat", "gathered")))
def test_small_integers_are_exact(program: Program) -> None:
    # Sums and products of small integers have no rounding: other routes must agree to the last bit.
    params = {k: (p * 4).round() for k, p in program.params.items()}
    batch = {"x": (program.batch()["x"] * 3).round()}
    direction = {k: (v * 3).round() for k, v in program.direction().items()}

    def losses(p: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        h = program.shape.enter(b["x"])
        for block in program.blocks:
            h = block(p, h, b["x"])
        return program.shape.leave(h, b["x"]).flatten(1).sum(1)

    gradients = per_sample_gradients(losses, params, batch)
    assert torch.equal(fg.reduce(losses)(params, batch, fg.dot(direction)), dots(gradients, direction))
