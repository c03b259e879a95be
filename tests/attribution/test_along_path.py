"""The account of a step against oracles, and the laws that it keeps."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import funcghost as fg
from funcghost.attribution import in_run
from funcghost.attribution.path import RULES
from funcghost.laws.oracle import per_sample_gradients
from funcghost.training import updates
from tests.depth import fewer
from tests.models.programs import Program, programs
from tests.models.small import rows, small_gpt
from tests.naive import assert_close, assert_trees_close, dots, gradient

Params = dict[str, Tensor]
Make = Callable[[Any, float], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p, lr: torch.optim.SGD(p, lr=10 * lr),
    "momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=0.1),
    "Nesterov": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=True),
    "AdamW": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.1),
    "NAdam": lambda p, lr: torch.optim.NAdam(p, lr=lr),
    "RMSprop": lambda p, lr: torch.optim.RMSprop(p, lr=0.01 * lr, momentum=0.5),
}


def gpt() -> tuple[Any, Params]:
    """Losses and parameters in float64."""
    model, losses, _ = small_gpt(layers=1)
    model.double()
    return losses, {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}


def detached(params: Params) -> Params:
    return {name: p.detach() for name, p in params.items()}


def started(optimizer: torch.optim.Optimizer, losses: Any, params: Params, steps: int = 3) -> Params:
    """Takes some steps, so that there is a memory."""
    for _ in range(steps):
        optimizer.zero_grad()
        losses(params, rows(4)).mean().backward()
        optimizer.step()
    return params


def total(out: in_run.Account) -> Tensor:
    return out.values.sum(0) + out.rest


# -- what the numbers are ------------------------------------------------------------------------


@given(programs(empty=False), st.sampled_from(["mean", "sum"]), st.sampled_from([*RULES]))
def test_values_are_those_of_the_definition(program: Program, reduction: Any, rule: Any) -> None:
    # For SGD, whose update has the Jacobian -lr, with every gradient by autograd.
    assume("no grad" not in program.features)
    batch, validation = program.batch(), program.batch(3, seed=9)
    params = {name: p.detach().clone().requires_grad_() for name, p in program.params.items()}
    lr, decay = 0.05, 0.2
    update, state = updates.of(torch.optim.SGD(params.values(), lr=lr, weight_decay=decay), params)
    out = in_run.along_path(program.losses, update, rule=rule, reduction=reduction)(
        params, batch, state=state, validation=[validation]
    )
    grads, losses = gradient(program.losses, params, batch, reduction)
    gradients = per_sample_gradients(program.losses, params, batch)
    after = {name: p.detach() - lr * (grads[name] + decay * p.detach()) for name, p in params.items()}
    middle = {name: (p.detach() + after[name]) / 2 for name, p in params.items()}
    slopes = [gradient(program.losses, point, validation)[0] for point in (params, middle, after)]
    weights = (1 / 6, 2 / 3, 1 / 6) if rule == "simpson" else (1 / 2, 0, 1 / 2)
    mean = {name: torch.stack([w * s[name] for w, s in zip(weights, slopes, strict=True)]).sum(0) for name in params}
    change = program.losses(after, validation).mean() - program.losses(detached(params), validation).mean()
    moves = torch.cat([(after[name] - p.detach()).flatten() for name, p in params.items()])
    if rule == "discrete" and bool(moves.any()):
        scale = (change - torch.cat([mean[name].flatten() for name in params]) @ moves) / (moves @ moves)
        mean = {name: mean[name] + scale * (after[name] - p) for name, p in detached(params).items()}
    eta = lr / len(losses) if reduction == "mean" else lr
    sizes = {name: g.abs() for name, g in gradients.items()}
    size = float(dots(sizes, {name: m.abs() for name, m in mean.items()}).max()) + 1e-300
    assert float((out.values + eta * dots(gradients, mean)).abs().max()) <= 1e-9 * size
    wanted = -lr * decay * sum(float((mean[name] * p).sum()) for name, p in detached(params).items())
    assert float(out.rest) == pytest.approx(wanted, abs=1e-9 * (size + abs(wanted)))
    assert_trees_close(out.params, after)
    assert_trees_close(out.grads, grads)
    assert_close(out.losses, losses, 1e-12)
    assert float(out.change) == pytest.approx(float(change), abs=1e-12 * float(losses.abs().max()))


@pytest.mark.parametrize("which", OPTIMIZERS)
@pytest.mark.parametrize(("rule", "order"), [("trapezoid", 3), ("simpson", 5)])
def test_the_sum_law_holds_to_the_order_of_the_rule(which: str, rule: Any, order: int) -> None:
    losses, params = gpt()
    batch, validation = rows(5), [rows(3), rows(2, 7)]
    optimizer = OPTIMIZERS[which](params.values(), 1e-3)
    started(optimizer, losses, params)
    errors, step_sizes = [], (0.005, 0.0025)
    for lr in step_sizes:
        for group in optimizer.param_groups:
            group["lr"] = lr
        update, state = updates.of(optimizer, params)
        out = in_run.along_path(losses, update, rule=rule)(params, batch, state=state, validation=validation)
        errors.append(abs(float(total(out) - out.change)))
        assert errors[-1] < 0.05 * abs(float(out.change))
    assert math.log2(errors[0] / errors[1]) > order - 0.6


@pytest.mark.parametrize("which", OPTIMIZERS)
def test_the_sum_law_of_a_discrete_gradient_holds_to_rounding(which: str) -> None:
    losses, params = gpt()
    batch, validation = rows(5), {"a": [rows(3), rows(2, 7)], "b": [rows(2, 5)]}
    optimizer = OPTIMIZERS[which](params.values(), 0.01)
    started(optimizer, losses, params)
    update, state = updates.of(optimizer, params)
    rules: list[Any] = [*RULES]
    found = {
        rule: in_run.along_path(losses, update, rule=rule)(params, batch, state=state, validation=validation)
        for rule in rules
    }
    out = found["discrete"]
    assert float((total(out) - out.change).abs().max()) < 1e-12 * float(out.change.abs().max())
    off = {rule: float((other.values - found["simpson"].values).norm()) for rule, other in found.items()}
    assert off["discrete"] < 2 * off["trapezoid"]


def test_a_step_that_moves_nothing_has_a_discrete_gradient() -> None:
    losses, params = gpt()
    update, state = updates.of(torch.optim.SGD(params.values(), lr=0.0), params)
    step = in_run.along_path(losses, update, rule="discrete")
    out = step(params, rows(5), state=state, validation=[rows(3)])
    assert not out.values.any()
    assert not out.rest
    with pytest.raises(fg.InputError, match=r"rule='discrete' .* would hide"):
        in_run.along_path(losses, update, rule="discrete", rank=2)


@pytest.mark.parametrize("rule", ["trapezoid", "discrete"])
def test_values_of_plain_descent_are_second_order_values_to_third_order(rule: Any) -> None:
    losses, params = gpt()
    batch, validation = rows(5), [rows(3)]
    gaps = []
    for lr in (0.1, 0.05):
        update, state = updates.of(torch.optim.SGD(params.values(), lr=lr), params)
        out = in_run.along_path(losses, update, rule=rule)(params, batch, state=state, validation=validation)
        reference = in_run.second_order(losses)(params, batch, lr=lr, validation=validation)
        gaps.append(float((out.values - reference.values).abs().max()))
        first = float((out.values - reference.first).abs().max())
        assert gaps[-1] < 0.2 * first
    assert math.log2(gaps[0] / gaps[1]) > 2.6


def test_muon_and_clipping_and_schedules_keep_the_law() -> None:
    losses, params = gpt()
    matrices = [p for p in params.values() if p.dim() == 2]
    others = [p for p in params.values() if p.dim() != 2]
    both = [torch.optim.Muon(matrices, lr=0.01), torch.optim.AdamW(others, lr=0.01)]
    for _ in range(2):
        losses(params, rows(4)).mean().backward()
        for one in both:
            one.step()
    update, state = updates.of(both, params)
    update_, state_ = updates.scheduled(updates.clipped(update, 0.5), state, lambda count: 0.5 + 0 * count)
    for rule, most in (("trapezoid", 2e-2), ("simpson", 1e-3)):
        step = in_run.along_path(losses, update_, rule=rule, tolerance=1e-6)  # type: ignore[arg-type]
        out = step(params, rows(5), state=state_, validation=[rows(3)])
        assert abs(float(total(out) - out.change)) < most * abs(float(out.change)), rule


def test_the_first_step_of_a_low_rank_adapter() -> None:
    # B = 0: the gradient of A is zero, second moments are zero, and 1 / (sqrt(v) + eps) is 1e8.
    torch.manual_seed(0)
    base, x = torch.randn(6, 4, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    params = {
        "a": torch.randn(6, 2, dtype=torch.float64).requires_grad_(),
        "b": torch.zeros(2, 4, dtype=torch.float64).requires_grad_(),
    }

    def losses(p: Params, batch: Tensor) -> Tensor:
        return (batch @ (base + p["a"] @ p["b"])).square().mean(1)

    update, state = updates.of(torch.optim.Adam(params.values(), lr=1e-3), params)
    out = in_run.along_path(losses, update, rule="simpson")(params, x, state=state, validation=[x[:3]])
    assert float(total(out)) == pytest.approx(float(out.change), rel=1e-6)
    assert float(out.values.abs().max()) < 10 * abs(float(out.change))


# -- laws ----------------------------------------------------------------------------------------


@cache
def accounts(which: str = "AdamW", of: str = "plain", **options: Any) -> tuple[Any, Params, Any]:
    """The same step, parameters and state whenever it is called."""
    torch.manual_seed(7)
    losses, params = gpt()
    optimizer = OPTIMIZERS[which](params.values(), 0.01)
    started(optimizer, losses, params)
    update, state = updates.of(optimizer, params)

    def weighted(p: Params, batch: Any) -> Tensor:
        return losses(p, (batch[0],)) * batch[1]

    def mixed(p: Params, batch: Any) -> Tensor:
        return batch[2] * losses(p, (batch[0],)) + (1 - batch[2]) * losses(p, (batch[1],))

    if of == "mixed":
        options["validation_losses"] = mixed
    return in_run.along_path(weighted if of == "weighted" else losses, update, **options), params, state


@given(
    st.sampled_from(["momentum", "AdamW"]),
    st.sampled_from(["step", "impulse"]),
    st.sampled_from([[4, 3, 2, 1, 0], [1, 2, 0, 4, 3]]),
)
def test_permuted_equal_and_idle_samples(which: str, credit: Any, order: list[int]) -> None:
    (tokens,) = rows(5)
    tokens[3] = tokens[1]
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    step, params, state = accounts(which, of="weighted", credit=credit)
    validation = [(rows(3)[0], weights.new_ones(3))]
    out = step(params, (tokens, weights), state=state, validation=validation)
    assert float(out.values[2]) == 0.0
    size = float(out.values.abs().max())
    assert float((out.values[1] - out.values[3]).abs()) <= 1e-10 * size
    again = step(params, (tokens[order], weights[order]), state=state, validation=validation)
    assert float((again.values - out.values[order]).abs().max()) <= 1e-9 * size


@fewer(3)
@given(st.sampled_from(["step", "impulse"]), st.sampled_from([0.2, 0.7]))
def test_values_are_linear_in_the_validation_loss(credit: Any, share: float) -> None:
    one, other, batch = rows(3)[0], rows(3)[0], rows(4)
    step, params, state = accounts(credit=credit, rule="simpson")
    mixed = accounts(of="mixed", credit=credit, rule="simpson")[0]
    sets = {"one": [(one,)], "other": [(other,)]}
    both = step(params, batch, state=state, validation=sets)
    alone = step(params, batch, state=state, validation=[(other,)])
    mix = mixed(params, batch, state=state, validation=[(one, other, share)])
    weights = torch.tensor([share, 1 - share], dtype=torch.float64)
    for name in ("values", "rest", "change"):
        columns, single, blended = (getattr(out, name) for out in (both, alone, mix))
        size = float(both.values.abs().max())
        assert float((columns[..., 1] - single).abs().max()) <= 1e-10 * size
        assert float((columns @ weights - blended).abs().max()) <= 1e-9 * size
    assert both.after.loss.shape == (2,)
    chained = step(both.params, batch, state=both.state, validation=sets, before=both.after)
    fresh = step(both.params, batch, state=both.state, validation=sets)
    assert_close(chained.values, fresh.values, 1e-9)


@fewer(6)
@given(st.sampled_from([[4], [1, 3], [2, 1, 1]]), st.sampled_from([None, 0, 1, 20_000, 10**9]), st.booleans())
def test_splitting_the_batch_changes_nothing(sizes: list[int], pairs_memory: int | None, impulse: bool) -> None:
    credit = "impulse" if impulse else "step"
    whole, params, state = accounts(credit=credit)
    split, _, _ = accounts(credit=credit, pairs_memory=pairs_memory)
    (tokens,) = rows(sum(sizes))
    validation = [rows(3)]
    wanted = whole(params, (tokens,), state=state, validation=validation)
    parts = in_run.Microbatches([(part,) for part in tokens.split(sizes)])
    for _ in range(2):  # the second call knows how large pairs are
        found = split(params, parts, state=state, validation=validation)
        assert_close(found.values, wanted.values, 1e-9)
        assert_close(found.losses, wanted.losses, 1e-12)
        assert_trees_close(found.grads, wanted.grads, 1e-10)
        assert_trees_close(found.params, wanted.params, 1e-9)
    assert found.route.startswith("two passes" if pairs_memory in (0, 1) else ("one pass", "two passes"))
    assert ("one pass" in found.route) == (pairs_memory in (None, 10**9)) or pairs_memory == 20_000


def test_values_by_parameter_and_by_position() -> None:
    plain, params, state = accounts()
    batch, validation = rows(4), {"a": [rows(3)], "b": [rows(2)]}
    wanted = plain(params, batch, state=state, validation=validation["a"])
    by_name = accounts(by=fg.per_param)[0](params, batch, state=state, validation=validation["a"])
    assert by_name.values.keys() == params.keys()
    assert_close(sum(by_name.values.values()), wanted.values, 1e-9)
    by_token = accounts(by=fg.per_token)[0](params, batch, state=state, validation=validation["a"])
    assert by_token.values.shape == (4, 12)
    assert by_token.route == "two passes over 1 of 1 batches: values by position are those of a step"
    assert_close(by_token.values.sum(1), wanted.values, 1e-9)
    columns = accounts(by=fg.per_param)[0](params, batch, state=state, validation=validation)
    assert_close(sum(columns.values.values())[:, 0], wanted.values, 1e-9)
    assert columns.rest.shape == (2,)


def test_a_second_pass_sees_what_the_first_saw() -> None:
    # Dropout, and the running statistics of a batch norm.
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))

    def losses(p: Params, batch: Any) -> Tensor:
        logits = torch.func.functional_call(model, p, (batch[0],))
        return nn.functional.cross_entropy(logits, batch[1], reduction="none")

    def still(p: Params, batch: Any) -> Tensor:
        model.eval()
        try:
            return losses(p, batch)
        finally:
            model.train()

    params = dict(model.named_parameters())
    update, state = updates.of(torch.optim.SGD(params.values(), lr=0.1), params)
    found, norms = [], []
    for pairs_memory in (None, 0):
        for buffer in model.buffers():
            buffer.zero_()
        torch.manual_seed(4)
        step = in_run.along_path(losses, update, validation_losses=still, pairs_memory=pairs_memory)
        out = step(params, (x, y), state=state, validation=[(x[:3], y[:3])])
        found.append(out)
        norms.append([buffer.clone() for buffer in model.buffers()])
        assert float(total(out)) == pytest.approx(float(out.change), rel=0.1)
    assert_close(found[1].values, found[0].values, 1e-9)
    assert all(torch.equal(a, b) for a, b in zip(*norms, strict=True))
    assert int(norms[0][2]) == 1


@pytest.mark.parametrize("pairs_memory", [None, 1])
def test_autocast_with_master_weights(pairs_memory: int | None) -> None:
    _, losses, _ = small_gpt(layers=1)
    params = {name: p.float().requires_grad_() for name, p in detached(gpt()[1]).items()}

    def rounded(p: Params, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return losses(p, batch)

    batch, validation, found = rows(5), rows(4), {}
    for name, own in (("bfloat16", rounded), ("float32", losses)):
        optimizer = torch.optim.SGD(params.values(), lr=0.05, momentum=0.9, weight_decay=0.1)
        update, state = updates.of(optimizer, params)
        step = in_run.along_path(own, update, rule="simpson", pairs_memory=pairs_memory)
        found[name] = step(params, batch, state=state, validation=[validation])
    out = found["bfloat16"]
    assert {value.dtype for value in (*out.params.values(), *out.grads.values())} == {torch.float32}
    assert_close(out.values, found["float32"].values, 0.03)
    assert_close(total(out), found["float32"].change, 0.03)  # what the losses say is itself rounded
    grads = torch.autograd.grad(rounded(params, batch).mean(), list(params.values()))
    for gradient_of, wanted in zip(out.grads.values(), grads, strict=True):
        assert_close(gradient_of, wanted, 0.02)
    kept = [p.detach().clone().requires_grad_() for p in params.values()]
    stepped = torch.optim.SGD(kept, lr=0.05, momentum=0.9, weight_decay=0.1)
    for leaf, gradient_of in zip(kept, out.grads.values(), strict=True):
        leaf.grad = gradient_of.clone()
    stepped.step()
    for leaf, moved in zip(kept, out.params.values(), strict=True):
        torch.testing.assert_close(moved.detach(), leaf.detach(), rtol=1e-6, atol=1e-7)


def test_directions_of_low_rank_are_tracked() -> None:
    dense, params, state = accounts(rule="simpson")
    low, _, _ = accounts(rank=8, rule="simpson")
    narrow, _, _ = accounts(rank=2)
    batch, validation = rows(4), [rows(2), rows(1)]
    exact = dense(params, batch, state=state, validation=validation)
    full = low(params, batch, state=state, validation=validation)
    assert_close(full.values, exact.values, 1e-6)
    out = narrow(params, batch, state=state, validation=validation)
    for _ in range(2):
        exact = dense(out.params, batch, state=out.state, validation=validation)
        out = narrow(out.params, batch, state=out.state, validation=validation, before=out.after)
        error = float((out.values - exact.values).norm() / exact.values.norm())
        assert 1e-9 < error < 0.7
        assert float(out.change) == pytest.approx(float(exact.change), rel=1e-9)
    assert any(isinstance(leaf, fg.LowRank) for leaf in out.after.gradients[0].values())


def test_impulses_explain_a_run_with_momentum() -> None:
    # Along a straight valley the direction stays: what all samples moved is the whole change, what this step did is
    # a half of it.
    slope = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found = {}
    for credit in ("step", "impulse"):
        params = {"w": torch.zeros(3, dtype=torch.float64, requires_grad=True)}
        update, state = updates.of(torch.optim.SGD(params.values(), lr=0.1, momentum=0.5), params)
        step = in_run.along_path(lambda p, x: x @ p["w"], update, credit=credit)
        out, values, change = None, 0.0, 0.0
        here: Params = params
        for number in range(50):
            x = (slope * (number < 20))[None].expand(2, 3)
            out = step(here, x, state=state, validation=[slope[None]], before=out.after if out else None)
            here, state = out.params, out.state
            values, change = values + float(out.values.sum()), change + float(out.change)
            assert float(total(out)) == pytest.approx(float(out.change), abs=1e-12)
        found[credit] = values / change
    assert found["impulse"] == pytest.approx(1.0, rel=1e-6)
    assert found["step"] == pytest.approx(0.5, rel=1e-6)


def test_a_learning_rate_of_zero_moves_nothing() -> None:
    losses, params = gpt()
    for which in OPTIMIZERS:
        update, state = updates.of(OPTIMIZERS[which](params.values(), 0.0), params)
        out = in_run.along_path(losses, update)(params, rows(3), state=state, validation=[rows(2)])
        assert float(out.values.abs().max()) == float(out.rest.abs()) == float(out.change) == 0.0
        assert_trees_close(out.params, detached(params), 0.0)


def test_nothing_of_the_users_is_touched() -> None:
    step, params, state = accounts()
    kept = detached({name: p.clone() for name, p in params.items()})
    slots = {name: {k: v.clone() for k, v in own.items()} for name, own in state.items()}
    for p in params.values():
        p.grad = None
    out = step(params, rows(3), state=state, validation=[rows(2)])
    assert all(p.grad is None and p.requires_grad for p in params.values())
    assert all(torch.equal(params[name], value) for name, value in kept.items())
    assert all(torch.equal(state[n][k], v) for n, own in slots.items() for k, v in own.items())
    assert not any(leaf.requires_grad for leaf in (*out.params.values(), *out.grads.values(), out.values, out.rest))


def test_arguments() -> None:
    x = torch.eye(2, dtype=torch.float64)
    params = {"w": torch.ones(2, dtype=torch.float64, requires_grad=True)}

    def losses(p: Params, batch: Tensor) -> Tensor:
        return (batch @ p["w"]).square()

    update, state = updates.of(torch.optim.SGD(params.values(), lr=0.1), params)
    for bad in ({"rule": "midpoint"}, {"credit": "all"}, {"reduction": "max"}, {"rank": 0}, {"pairs_memory": -1}):
        with pytest.raises(fg.InputError, match=f"along_path: {next(iter(bad))}"):
            in_run.along_path(losses, update, **bad)
    with pytest.raises(fg.InputError, match="tolerance"):
        in_run.along_path(losses, update, tolerance=0.0)
    with pytest.raises(fg.InputError, match="takes a function"):
        in_run.along_path(losses, 3)  # type: ignore[arg-type]
    step = in_run.along_path(losses, update)
    good = step(params, x, state=state, validation=[x])
    for keywords, match in [
        ({"validation": x}, r"Pass \[batch\]"),
        ({"validation": {}}, "no set"),
        ({"validation": {"a": x}}, r"validation\['a'\]"),
        ({"validation": [x[:0]]}, "no samples"),
        ({"before": 3}, "must be the `after`"),
        ({"before": good.after, "validation": {"a": [x], "b": [x]}}, "of 2 validation sets, found of 1"),
        ({"before": in_run.Validation(good.after.loss, ({"w": torch.ones(3)},))}, "before"),
        ({"state": {}}, "slots for"),
    ]:
        with pytest.raises(fg.InputError, match=match):
            step(params, x, **({"state": state, "validation": [x]} | keywords))  # type: ignore[operator]
    for empty in (x[:0], in_run.Microbatches([])):
        with pytest.raises(fg.InputError, match=r"no samples|one or more"):
            step(params, empty, state=state, validation=[x])

    def writes(p: Params, g: Params, s: Any) -> Any:
        return {"w": p["w"].add_(g["w"])}, s

    def draws(p: Params, g: Params, s: Any) -> Any:
        return {"w": p["w"] - g["w"] * torch.rand(())}, s

    for function, match in [
        (writes, "has written"),
        (draws, "a second time"),
        (lambda p, g, s: ({"w": p["w"][:1]}, s), r"update\(...\)\[0\]"),
        (lambda p, g, s: p, "must return"),
    ]:
        twin = {"w": params["w"].detach().clone()}
        with pytest.raises(fg.InputError, match=match):
            in_run.along_path(losses, function)(twin, x, state={}, validation=[x])


def test_numbers_that_are_none_reach_the_user() -> None:
    x, params = torch.eye(2, dtype=torch.float64), {"w": torch.ones(2, dtype=torch.float64)}
    step = in_run.along_path(
        lambda p, batch: (batch @ p["w"]).square(), lambda p, g, s: ({"w": p["w"] - g["w"] * torch.inf + g["w"]}, s)
    )
    first = step(params, x, state={}, validation=[x])
    assert bool(first.params["w"].isinf().all())
    update, state = updates.of(torch.optim.SGD([leaf := torch.full((2,), torch.nan)], lr=0.1), {"w": leaf})
    known = in_run.along_path(lambda p, batch: (batch @ p["w"]).square(), update)
    for _ in range(2):  # the second is not compared with another call
        out = known({"w": leaf}, x.float(), state=state, validation=[x.float()])
        assert bool(out.values.isnan().all())
        assert bool(out.params["w"].isnan().all())
