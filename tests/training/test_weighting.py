"""Weighted and clipped gradients against naive per-sample gradients, on random programs."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import funcghost as fg
from funcghost.laws.oracle import per_sample_gradients
from funcghost.training import clipping, weighting
from funcghost.transforms import steps
from tests.models.programs import Program, programs
from tests.models.small import like, rows, small_gpt
from tests.naive import assert_close, dots

Params = dict[str, Tensor]


def norms(gradients: Params, names: Any) -> Tensor:
    """The norms [b] of the gradients of these parameters together."""
    squares = [gradients[name].square().unsqueeze(-1).flatten(1).sum(1) for name in names]
    return torch.stack(squares).sum(0).sqrt()


def weighted(gradients: Params, weights: Mapping[str, Tensor]) -> Params:
    return {name: torch.tensordot(weights[name], g, 1) for name, g in gradients.items()}


def assert_sums(found: Params, gradients: Params, weights: Mapping[str, Tensor], tolerance: float = 1e-10) -> None:
    """Equality relative to the largest term; terms may cancel inside an op before they reach the gradient."""
    wanted = weighted(gradients, weights)
    size = max((float(g.abs().max()) for g in gradients.values() if g.numel()), default=0.0)
    for name, value in wanted.items():
        assert found[name].shape == value.shape
        terms = weights[name].abs().sum() * max(size, 1.0)
        assert bool(((found[name] - value).abs() <= tolerance * terms + 1e-300).all()), (name, found[name], value)


# -- clipping ------------------------------------------------------------------------------------

GROUPS: dict[str, Callable[[str], str]] = {
    "together": clipping.together,
    "by layer": clipping.by_layer,
    "by parameter": clipping.by_parameter,
    "of one's own": lambda name: name[-1],
}


@given(programs(), st.sampled_from([*GROUPS]), st.sampled_from([0.1, 1.0, 3.0]), st.booleans())
def test_clipped_gradients_are_the_sum_of_clipped_gradients(
    program: Program, which: str, share: float, several: bool
) -> None:
    groups, batch = GROUPS[which], program.batch()
    truth = per_sample_gradients(program.losses, program.params, batch)
    members: dict[str, list[str]] = {}
    for name in program.params:
        members.setdefault(groups(name), []).append(name)
    own = {group: norms(truth, names) for group, names in members.items()}
    # Some gradients are clipped and some are not: the limit is a share of the mean norm.
    limits = {g: share * (float(n.mean()) if len(n) else 1.0) + 1e-3 for g, n in own.items()}
    if not several:
        limits = dict.fromkeys(limits, next(iter(limits.values())))
    given_limits: Any = limits if several else next(iter(limits.values()))
    step = clipping.clipped_gradient(program.losses, groups=groups, allow_mixing=True)
    out = step(program.params, batch, given_limits)
    assert out.norms.keys() == out.weights.keys() == members.keys()
    weights = {group: (limits[group] / n).clamp(max=1) for group, n in own.items()}
    size = max([float(n.max()) for n in own.values() if len(n)], default=0.0)
    for group, n in own.items():
        assert bool(((out.norms[group].square() - n.square()).abs() <= 1e-10 * (size**2 + 1)).all())
        clipped = out.norms[group] * out.weights[group]
        assert bool((clipped <= limits[group] * (1 + 1e-12)).all())
    assert_sums(out.grads, truth, {name: weights[groups(name)] for name in program.params}, 1e-7)


def test_clipping_to_the_last_digit_with_tied_weights() -> None:
    model, losses, params = small_gpt()
    model.double()
    batch = rows(5)
    truth = per_sample_gradients(losses, params, batch)
    own = norms(truth, params)
    limit = float(own.sort().values[2:4].mean())
    out = clipping.clipped_gradient(losses)(params, batch, limit)
    assert not out.losses.requires_grad
    assert_close(out.losses, losses(params, batch).detach(), 1e-12)
    assert_close(out.norms["all"], own, 1e-12)
    assert int((out.weights["all"] == 1).sum()) == 3
    scale = (limit / own).clamp(max=1)
    for name, wanted in weighted(truth, dict.fromkeys(params, scale)).items():
        assert_close(out.grads[name], wanted, 1e-11)


def test_losses_that_mix_samples_are_clipped_only_if_that_is_meant() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)).double()
    params, batch = dict(model.named_parameters()), torch.randn(6, 3, dtype=torch.float64)

    def losses(p: Any, x: Any) -> Any:
        return torch.func.functional_call(model, p, (x,)).square().sum(1)

    before = {name: value.clone() for name, value in model.named_buffers()}
    state = torch.get_rng_state()
    for _ in range(2):
        with pytest.raises(fg.InputError, match=r"not private.*model\.eval\(\).*allow_mixing=True"):
            clipping.clipped_gradient(losses)(params, batch, 1.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    step = clipping.clipped_gradient(losses)
    for training in (False, True, False, True):
        model.train(training)
        with pytest.raises(fg.InputError, match="not private") if training else nullcontext():
            step(params, batch, 1.0)
    found = clipping.clipped_gradient(losses, allow_mixing=True)(params, batch, 0.1)
    truth = per_sample_gradients(losses, params, batch)
    own = norms(truth, params)
    for name, wanted in weighted(truth, dict.fromkeys(params, (0.1 / own).clamp(max=1))).items():
        assert_close(found.grads[name], wanted, 1e-10)


def test_micro_batches_add_up() -> None:
    model, losses, params = small_gpt()
    model.double()
    (tokens,) = rows(6)
    step = clipping.clipped_gradient(losses, groups=clipping.by_layer)
    whole = step(params, (tokens,), 0.05)
    parts = [step(params, (part,), 0.05) for part in tokens.split([2, 4])]
    for name, value in whole.grads.items():
        assert_close(parts[0].grads[name] + parts[1].grads[name], value, 1e-11)


def test_a_gradient_of_zero_is_left_alone() -> None:
    step = clipping.clipped_gradient(lambda p, x: x @ p["w"])
    out = step({"w": torch.ones(2)}, torch.tensor([[0.0, 0.0], [2.0, 0.0]]), 1.0)
    assert out.weights["all"].tolist() == [1.0, 0.5]
    assert out.grads["w"].tolist() == [1.0, 0.0]


def test_layers_are_those_of_modules() -> None:
    names = ["fc1.weight", "fc1.bias", "scale", "body.0.weight"]
    assert [clipping.by_layer(name) for name in names] == ["fc1", "fc1", "", "body.0"]


def test_one_backward_and_one_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    made, passes = list[int](), list[int]()
    module: Any = steps  # it exports neither
    make, run = module.make_plan, module.run

    def counted(calls: list[int], function: Any) -> Any:
        def count(*args: Any, **options: Any) -> Any:
            calls.append(1)
            return function(*args, **options)

        return count

    monkeypatch.setattr(steps, "make_plan", counted(made, make))
    monkeypatch.setattr(steps, "run", counted(passes, run))
    _, losses, params = small_gpt()
    step = clipping.clipped_gradient(losses)
    weigh = weighting.weighted_gradient(losses, weighting.rectified)
    for _ in range(3):
        step(params, rows(), 1.0)
        weigh(params, rows(), fg.dot(like(params)))
    assert (len(made), len(passes)) == (2, 6)


@pytest.mark.parametrize("limit", [0, -1.0, float("inf"), float("nan"), True, "1", None, {"all": 0.0}])
def test_limits_that_are_none(limit: Any) -> None:
    with pytest.raises(fg.InputError, match="above zero"):
        clipping.clipped_gradient(lambda p, x: x @ p["w"])({"w": torch.ones(2)}, torch.eye(2), limit)


def test_limits_of_other_groups() -> None:
    step = clipping.clipped_gradient(lambda p, x: x @ p["w"])
    with pytest.raises(fg.InputError, match="groups \\['all'\\], found some for \\['w'\\]"):
        step({"w": torch.ones(2)}, torch.eye(2), {"w": 1.0})


# -- weights -------------------------------------------------------------------------------------


@given(programs(empty=False))
def test_weights_from_scores_of_the_same_batch(program: Program) -> None:
    batch, direction = program.batch(), program.direction()
    truth = per_sample_gradients(program.losses, program.params, batch)
    # With given scores, so that rounding turns no sign: those of the step are held to the truth by themselves.
    step = weighting.weighted_gradient(program.losses, weighting.rectified)
    out = step(program.params, batch, fg.dot(direction))
    size = max(1.0, *(float(g.abs().max()) for g in truth.values()))
    terms = size * sum(v.numel() for v in direction.values())
    assert bool(((out.reduced - dots(truth, direction)).abs() <= 1e-9 * terms).all())
    positive = out.reduced.clamp(min=0)
    wanted = positive / positive.sum() if bool(positive.any()) else positive
    assert torch.equal(out.weights, wanted)  # type: ignore[arg-type]
    assert_sums(out.grads, truth, dict.fromkeys(truth, wanted))


def test_equal_weights_give_the_mean_gradient() -> None:
    model, losses, params = small_gpt()
    model.double()
    batch = rows(4)
    out = weighting.weighted_gradient(losses, lambda scores: weighting.tempered(scores, 1e12))(
        params, batch, fg.dot(like(params))
    )
    mean = fg.grad_and_reduce(losses)(params, batch, ())
    assert_close(out.losses, mean.losses, 1e-12)
    for name, wanted in mean.grads.items():
        assert_close(out.grads[name], wanted, 1e-10)


def test_weights_may_be_those_of_each_parameter_and_from_any_reducers() -> None:
    model, losses, params = small_gpt()
    model.double()
    batch = rows(4)
    truth = per_sample_gradients(losses, params, batch)
    reducers = {"norm": fg.per_param(fg.squared_norm()), "gram": fg.gram()}
    out = weighting.weighted_gradient(losses, lambda found: {k: v.sqrt() for k, v in found["norm"].items()})(
        params, batch, reducers
    )
    assert out.reduced.keys() == reducers.keys()
    assert_sums(out.grads, truth, {name: norms(truth, [name]) for name in params}, 1e-8)


def test_weights_of_scores() -> None:
    assert weighting.rectified(torch.tensor([-1.0, -2.0])).tolist() == [0, 0]
    assert weighting.rectified(torch.zeros(0)).tolist() == []
    scores = torch.tensor([3.0, 1.0, 2.0])
    assert_close(weighting.tempered(scores, 0.5), torch.softmax(2 * scores, 0), 1e-6)
    assert weighting.tempered(scores, 1e-3).tolist() == [1, 0, 0]


BAD: dict[str, tuple[Any, str]] = {
    "too few": (lambda _: torch.ones(1), r"floating numbers \[2\]"),
    "integers": (lambda _: torch.ones(2, dtype=torch.int64), "floating numbers"),
    "a number": (lambda _: 1.0, "floating numbers"),
    "names": (lambda _: {"v": torch.ones(2)}, r"missing \['w'\], unexpected \['v'\]"),
    "scores [b, k]": (lambda found: weighting.rectified(found.unsqueeze(1)), r"scores must be floating numbers \[b\]"),
    "scores of integers": (lambda found: weighting.tempered(found.long(), 1.0), "scores must be floating"),
    "a temperature of zero": (lambda found: weighting.tempered(found, 0), "above zero"),
    "a temperature of nan": (lambda found: weighting.tempered(found, float("nan")), "above zero"),
}


@pytest.mark.parametrize("name", BAD)
def test_weights_that_are_none(name: str) -> None:
    weigh, message = BAD[name]
    step = weighting.weighted_gradient(lambda p, x: x @ p["w"], weigh)
    with pytest.raises(fg.InputError, match=message):
        step({"w": torch.ones(2)}, torch.eye(2), fg.squared_norm())
