"""Losses that are taken as one op: the same numbers, and the engine where that cannot be done."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import funcghost as fg
from funcghost.transforms import one_op
from tests.models.awkward import CASES, SEQUELS
from tests.models.programs import Program, programs
from tests.models.small import like
from tests.naive import assert_close, assert_scores, assert_trees_close, expected, gradient

Params = dict[str, Tensor]
drawn = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def _any_losses_are_small(monkeypatch: pytest.MonkeyPatch, _along_plans: None) -> None:
    monkeypatch.setattr(one_op, "FEWEST_OPS", 1)


@pytest.fixture
def plans(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], int]]:
    """How many plans have been made so far."""
    with caplog.at_level(logging.INFO, "funcghost"):
        yield lambda: sum(record.message.startswith("planned ") for record in caplog.records)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def unrolled(p: Params, x: Tensor) -> Tensor:
    h = x.new_zeros(len(x), 4)
    for t in range(x.shape[1]):
        h = torch.tanh(x[:, t] @ p["w"] + h @ p["u"])
    return h.square().sum(1)


PARAMS = {"w": (3, 4), "u": (4, 4)}


def params() -> Params:
    return {name: normal(*shape) for name, shape in PARAMS.items()}


# -- the same numbers --------------------------------------------------------------------------


@drawn
@given(programs(), st.sampled_from(["mean", "sum"]))
def test_everything_at_once(program: Program, reduction: Any) -> None:
    batch, direction, other = program.batch(), program.direction(), program.direction(2)
    step = fg.grad_and_reduce(program.losses, reduction=reduction)
    wanted = {"dots": fg.dot(fg.stack([direction, other])), "norms": fg.squared_norm(), "gram": fg.gram()}
    out = step(program.params, batch, wanted)
    plan = fg.plan(program.losses, program.params, batch) if program.shape.batch else None
    along = fg.grad_and_reduce(program.losses, reduction=reduction, plan=plan)(program.params, batch, wanted)
    assert_scores(out.reduced["dots"][:, 0], expected(program.losses, program.params, batch, direction))
    assert_scores(out.reduced["dots"][:, 1], expected(program.losses, program.params, batch, other))
    assert_close(out.reduced["norms"], along.reduced["norms"], 1e-9)
    assert_close(out.reduced["gram"], along.reduced["gram"], 1e-9)
    if program.shape.batch:
        grads, losses = gradient(program.losses, program.params, batch, reduction)
        assert torch.equal(out.losses, losses)
        assert_trees_close(out.grads, grads)


@pytest.mark.parametrize("name", CASES)
def test_awkward_losses_are_exact_or_refused(name: str) -> None:
    made = CASES[name]()
    step, state = fg.grad_and_reduce(made.losses), torch.get_rng_state()
    if made.outcome is not None:
        try:
            out = step(made.params, made.batch, fg.dot(made.params))
        except fg.GhostError:
            return
        torch.set_rng_state(state)
        assert_scores(out.reduced, expected(made.losses, made.params, made.batch, made.params), made.tolerance)
        return
    direction = {k: torch.randn_like(p) for k, p in made.params.items()}
    state = torch.get_rng_state()
    wanted = expected(made.losses, made.params, made.batch, direction)
    grads, losses = gradient(made.losses, made.params, made.batch)
    after = torch.get_rng_state()
    for _ in range(2):
        torch.set_rng_state(state)
        out = step(made.params, made.batch, fg.dot(direction))
        assert_scores(out.reduced, wanted, made.tolerance)
        assert torch.equal(out.losses, losses)
        assert_trees_close({k: g.to_dense() for k, g in out.grads.items()}, {k: g.to_dense() for k, g in grads.items()})
        assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("name", SEQUELS)
def test_steps_that_follow_one_another(name: str) -> None:
    made = SEQUELS[name]()
    direction = {k: torch.randn_like(p) for k, p in made.params.items()}
    step = fg.grad_and_reduce(made.losses)
    for batch in made.batches:
        state = torch.get_rng_state()
        wanted = expected(made.losses, made.params, batch, direction)
        torch.set_rng_state(state)
        assert_scores(step(made.params, batch, fg.dot(direction)).reduced, wanted)


def test_nothing_is_planned_for_any_length(plans: Callable[[], int]) -> None:
    p, direction = params(), {name: normal(*shape) for name, shape in PARAMS.items()}
    step, norms = fg.grad_and_reduce(unrolled), fg.reduce(unrolled)
    for length in (5, 3, 9):
        x = normal(4, length, 3)
        out = step(p, x, {"dot": fg.dot(direction), "by": fg.per_param(fg.dot(direction))})
        wanted = expected(unrolled, p, x, direction)
        assert_scores(out.reduced["dot"], wanted)
        assert_close(sum(out.reduced["by"].values(), torch.zeros(())), wanted[0], 1e-10)
        pairs = fg.pairs(unrolled)(p, x)
        before = plans()
        assert_close(norms(p, x, fg.squared_norm()), fg.apply(fg.squared_norm(), pairs), 1e-10)
        assert plans() == before
    assert plans() == 3  # those of the pairs, which are to be in factored form


def test_own_leaves_and_buffers_are_left_as_a_plain_step_leaves_them() -> None:
    norm = nn.BatchNorm1d(4)
    model = nn.Sequential(nn.Linear(3, 4), norm, nn.Dropout(0.5), nn.Linear(4, 1)).double()
    assert norm.running_mean is not None
    own, x = dict(model.named_parameters()), normal(6, 3)
    losses = fg.module_losses(model, lambda out, _: out.square().sum(1))
    step, direction = fg.grad_and_reduce(losses), like(own)
    for _ in range(3):
        state, mean = torch.get_rng_state(), norm.running_mean.clone()
        wanted = expected(losses, own, x, direction)
        norm.running_mean.copy_(mean)
        torch.set_rng_state(state)
        losses(own, x)
        after, moved = torch.get_rng_state(), norm.running_mean.clone()
        norm.running_mean.copy_(mean)
        torch.set_rng_state(state)
        out = step(own, x, fg.dot(direction))
        assert_scores(out.reduced, wanted)
        assert torch.equal(torch.get_rng_state(), after)
        assert torch.equal(norm.running_mean, moved)
        assert all(parameter.grad is None for parameter in own.values())


def test_directions_under_vmap_and_scores_that_are_differentiated() -> None:
    p, x, score = params(), normal(4, 3, 3), fg.reduce(unrolled)
    directions = {name: normal(2, *shape) for name, shape in PARAMS.items()}
    found = torch.func.vmap(lambda v: score(p, x, fg.dot(v)))(directions)
    for k in range(2):
        assert_scores(found[k], expected(unrolled, p, x, {name: v[k] for name, v in directions.items()}))
    one = {name: v[0] for name, v in directions.items()}

    def summed(p: Params) -> Tensor:
        return score(p, x, fg.dot(one)).sum()

    def total(p: Params) -> Tensor:
        return unrolled(p, x).sum()

    slope = torch.func.grad(summed)(p)
    wanted = torch.func.jvp(torch.func.grad(total), (p,), (one,))[1]
    assert_trees_close(slope, wanted, 1e-10)


def test_low_rank_directions_and_projections() -> None:
    p, x = params(), normal(4, 5, 3)
    wanted = (fg.dot(fg.compress(like(p), rank=2)), fg.project(8, seed=1))
    found = fg.reduce(unrolled)(p, x, wanted)
    along = fg.reduce(unrolled, plan=fg.plan(unrolled, p, x))(p, x, wanted)
    for ours, theirs in zip(found, along, strict=True):
        assert_close(ours, theirs, 1e-10)


# -- where it cannot be done -------------------------------------------------------------------


class Once(torch.autograd.Function):
    """A square whose backward hides how it depends on the incoming gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * g


def test_a_function_that_comes_up_later_goes_to_the_engine() -> None:
    p, x, held = params(), normal(4, 3, 3), {"own": False}
    direction = {name: normal(*shape) for name, shape in PARAMS.items()}

    def losses(p: Params, x: Tensor) -> Tensor:
        found = unrolled(p, x)
        return found + (Once.apply(found) if held["own"] else found.square())

    step = fg.grad_and_reduce(losses)
    for own in (False, True, False):
        held["own"] = own
        assert_scores(step(p, x, fg.dot(direction)).reduced, expected(losses, p, x, direction))


def test_a_backward_that_is_not_linear_is_refused() -> None:
    p, x = {"w": normal(3, 4).requires_grad_()}, normal(4, 3)
    p["w"].register_hook(lambda g: g.clamp(-0.01, 0.01))
    with pytest.raises(fg.ConservationError, match="not linear"):
        fg.grad_and_reduce(lambda p, x: torch.tanh(x @ p["w"]).sum(1))(p, x, fg.dot(p))


def test_a_linear_hook_is_followed() -> None:
    p, x = {"w": normal(3, 4).requires_grad_()}, normal(4, 3)
    mask = torch.arange(12.0, dtype=torch.float64).view(3, 4) % 2
    p["w"].register_hook(lambda g: g * mask)

    def losses(p: Params, x: Tensor) -> Tensor:
        return torch.tanh(x @ p["w"]).sum(1)

    direction = {"w": normal(3, 4)}
    out = fg.grad_and_reduce(losses, reduction="sum")(p, x, (fg.dot(direction), fg.squared_norm()))
    [whole_gradient] = torch.autograd.grad(losses(p, x).sum(), [p["w"]])
    assert_close(out.grads["w"], whole_gradient, 1e-12)
    rows = torch.stack([torch.autograd.grad(losses(p, x)[i], [p["w"]])[0] for i in range(4)])
    assert_close(out.reduced[0], (rows * direction["w"]).sum((1, 2)), 1e-10)
    assert_close(out.reduced[1], rows.square().sum((1, 2)), 1e-10)


def test_sparse_gradients_and_those_over_the_budget_go_to_the_engine(plans: Callable[[], int]) -> None:
    p, tokens = {"table": normal(5, 2), "u": normal(2, 2)}, torch.randint(5, (3, 4))

    def losses(p: Params, tokens: Tensor) -> Tensor:
        return torch.tanh(F.embedding(tokens, p["table"], sparse=True) @ p["u"]).sum((1, 2))

    direction = {name: torch.randn_like(value) for name, value in p.items()}
    assert_scores(fg.reduce(losses)(p, tokens, fg.dot(direction)), expected(losses, p, tokens, direction))
    assert plans() == 1
    x, few = normal(4, 5, 3), fg.Options(memory_budget=256)
    found = fg.reduce(unrolled, options=few)(params(), x, fg.dot(like(params())))
    assert found.shape == (4,)
    assert plans() == 1
    fg.reduce(unrolled, options=few)(params(), x, fg.squared_norm())
    assert plans() == 2


def test_errors_of_the_losses_reach_the_user_and_change_nothing(plans: Callable[[], int]) -> None:
    p, step = params(), fg.grad_and_reduce(unrolled)
    direction = {name: normal(*shape) for name, shape in PARAMS.items()}
    for x in (normal(4, 5, 3), normal(4, 5, 2), normal(4, 5, 3)):
        if x.shape[-1] == 3:
            assert_scores(step(p, x, fg.dot(direction)).reduced, expected(unrolled, p, x, direction))
            continue
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            step(p, x, fg.dot(direction))
    assert plans() == 0


def test_numbers_that_are_not_finite_reach_the_user() -> None:
    p, x = params(), normal(4, 5, 3)
    x[1, 2, 0] = torch.nan
    out = fg.grad_and_reduce(unrolled)(p, x, (fg.dot(like(p)), fg.squared_norm()))
    for found in (out.losses, *out.reduced):
        assert found.isnan().tolist() == [False, True, False, False]
    assert all(bool(value.isnan().any()) for value in out.grads.values())


def test_large_or_few_ops_are_planned(plans: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    p, x, direction = params(), normal(4, 5, 3), like(params())
    for limit, value in (("FEWEST_OPS", 200), ("MOST_FLOPS", 1), ("MOST_ENTRIES", 1), ("MOST_PARAMETERS", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(one_op, limit, value)
            before = plans()
            fg.reduce(unrolled)(p, x, fg.dot(direction))
            assert plans() == before + 1
    before = plans()
    half = {name: value.bfloat16() for name, value in p.items()}
    fg.reduce(unrolled)(half, x.bfloat16(), fg.dot(half))
    fg.reduce(unrolled, options=fg.Options(route="forward"))(p, x, fg.dot(direction))
    assert plans() == before + 2


def test_losses_with_fewer_digits_inside_keep_those_of_the_gradients(plans: Callable[[], int]) -> None:
    p, direction, x = params(), {name: normal(*shape) for name, shape in PARAMS.items()}, normal(4, 5, 3)

    def attention(p: Params, x: Tensor) -> Tensor:
        h = x @ p["w"]
        shares = F.softmax(h @ p["u"] @ h.mT, dim=-1, dtype=torch.float32).to(h.dtype)  # as transformers has it
        return (shares @ h).square().sum((1, 2))

    assert_scores(fg.reduce(attention)(p, x, fg.dot(direction)), expected(attention, p, x, direction), 1e-7)
    assert plans() == 1
    single = {name: value.float() for name, value in p.items()}
    way = {name: value.float() for name, value in direction.items()}
    on = {"cpu": False}

    def losses(p: Params, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=on["cpu"]):
            return unrolled(p, x).float()

    step = fg.reduce(losses)
    step(single, x.float(), fg.dot(way))
    assert plans() == 1
    on["cpu"] = True
    step(single, x.float(), fg.dot(way))
    assert plans() == 2


def test_check_compares_the_step_that_a_caller_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    p, x = params(), normal(3, 5, 3)
    fg.check(unrolled, p, x, fg.gram()).raise_if_failed()
    fill = one_op._fill
    with monkeypatch.context() as patch:
        patch.setattr(one_op._Transpose, "scores", lambda self, directions: self.losses.new_ones((3, len(directions))))
        patch.setattr(one_op._Transpose, "verify", lambda self, problem: None)
        assert "disagree" in "".join(fg.check(unrolled, p, x).failures)
        fg.check(unrolled, p, x, plan=fg.plan(unrolled, p, x)).raise_if_failed()
    monkeypatch.setattr(
        one_op, "_fill", lambda ledger, losses, leaves, budget: fill(ledger, 2 * losses, leaves, budget)
    )
    assert "factored gradients is wrong" in "".join(fg.check(unrolled, p, x, fg.gram()).failures)
