"""Updates as pure functions against the real optimizers, finite differences and the fundamental theorem."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import funcghost as fg
from funcghost.training import updates
from funcghost.training.update_kinds import Clipped, Update
from funcghost.trees import split_params
from tests.depth import fewer
from tests.naive import assert_close, assert_trees_close

Params = dict[str, Tensor]
Make = Callable[[list[Tensor]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD, decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.3),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "SGD, dampening": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.4),
    "SGD, Nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, maximize=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.95), weight_decay=0.1),
    "Adam, no memory": lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.0, 0.0)),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True, maximize=True),
    "AdamW": lambda p: torch.optim.AdamW(
        p, lr=torch.tensor(0.1, dtype=torch.float64), weight_decay=0.2, betas=(0.9, 0.99)
    ),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.1, weight_decay=0.1),
    "NAdam, decoupled": lambda p: torch.optim.NAdam(p, lr=0.1, weight_decay=0.1, decoupled_weight_decay=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, alpha=0.9, weight_decay=0.1),
    "RMSprop, centered": lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True, momentum=0.8, maximize=True),
    "Muon": lambda p: torch.optim.Muon(p, lr=0.1),
    "Muon, plain": lambda p: torch.optim.Muon(p, lr=0.1, nesterov=False, adjust_lr_fn="match_rms_adamw"),
}
SMOOTH = [name for name in OPTIMIZERS if not name.startswith("Muon")]


def parameters(seed: int = 0, dtype: torch.dtype = torch.float64) -> Params:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"square": (3, 3), "tall": (4, 2), "wide": (2, 3)}  # in the order of their names, as trees are
    return {
        name: torch.randn(shape, dtype=dtype, generator=generator).requires_grad_() for name, shape in shapes.items()
    }


def gradients(params: Params, seed: int) -> Params:
    generator = torch.Generator().manual_seed(100 + seed)
    return {name: torch.randn(p.shape, dtype=p.dtype, generator=generator) for name, p in params.items()}


def stepped(optimizer: torch.optim.Optimizer, params: Params, grads: Params, max_norm: float | None = None) -> None:
    for name, p in params.items():
        p.grad = grads[name].clone()
    if max_norm:
        torch.nn.utils.clip_grad_norm_(params.values(), max_norm)
    optimizer.step()


def detached(params: Params) -> Params:
    return {name: p.detach().clone() for name, p in params.items()}


def begun(which: str, steps: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """An optimizer after some steps, and its parameters."""
    params = parameters(seed, dtype)
    optimizer = OPTIMIZERS[which](list(params.values()))
    for number in range(steps):
        stepped(optimizer, params, gradients(params, number))
    return optimizer, params


@given(st.sampled_from([*OPTIMIZERS]), st.integers(0, 2), st.sampled_from([torch.float64, torch.float32]))
def test_an_update_is_the_step_of_the_optimizer(which: str, before: int, dtype: torch.dtype) -> None:
    optimizer, params = begun(which, before, dtype=dtype)
    update, state = updates.of(optimizer, params)
    here = detached(params)
    for number in range(10, 13):
        grads = gradients(params, number)
        here, state = update(here, grads, state)
        stepped(optimizer, params, grads)
        # A step of Muon is rounded to eight bits: what comes before may tip one of them.
        tolerance = 1e-12 if dtype == torch.float64 else 2e-6
        assert_trees_close(here, detached(params), tolerance if which in SMOOTH else max(tolerance, 1e-3))


@pytest.mark.parametrize("which", [name for name in OPTIMIZERS if name not in SMOOTH])
def test_a_step_of_muon_has_its_rounding(which: str) -> None:
    optimizer, params = begun(which, 0)
    update, state = updates.of(optimizer, params)
    grads = gradients(params, 5)
    found = update({name: torch.zeros_like(p) for name, p in params.items()}, grads, state)[0]
    with torch.no_grad():
        for p in params.values():
            p.zero_()
    stepped(optimizer, params, grads)
    assert_trees_close(found, detached(params), 1e-15)


@given(st.sampled_from([*OPTIMIZERS]), st.integers(0, 2))
def test_the_optimizer_is_left_alone(which: str, before: int) -> None:
    optimizer, params = begun(which, before)
    twin, own = begun(which, before)
    kept = copy.deepcopy(optimizer.state_dict())
    update, state = updates.of(optimizer, params)
    versions = [p._version for p in params.values()]
    given_grads = gradients(params, 7)
    update(params, given_grads, state)
    split = split_params(params)
    update.share(split, list(given_grads.values()), state, [list(given_grads.values())], "step", 0.1)
    assert [p._version for p in params.values()] == versions
    assert str(optimizer.state_dict()) == str(kept)
    stepped(optimizer, params, given_grads)
    stepped(twin, own, given_grads)
    assert all(torch.equal(params[name], own[name]) for name in params)


@given(st.sampled_from(SMOOTH), st.integers(0, 2))
def test_derivatives_in_gradient_parameters_and_state(which: str, before: int) -> None:
    optimizer, params = begun(which, before)
    update, state = updates.of(optimizer, params)
    assert_differentiable(update, params, gradients(params, 9), state)


def assert_differentiable(update: Any, params: Params, grads: Params, state: Any) -> None:
    """By finite differences of everything that a step takes, learning rates included; counts are no variables."""
    slots = [
        (name, slot, value)
        for name, own in state.items()
        for slot, value in own.items()
        if slot not in ("step", "started", "mu_product")
    ]
    # A second moment of zero has no derivative to either side: see the tests of it.
    slots = [(name, slot, value + 0.1 if "sq" in slot else value) for name, slot, value in slots]

    def flat(*leaves: Tensor) -> tuple[Tensor, ...]:
        count = len(params)
        new = {name: dict(own) for name, own in state.items()}
        for (name, slot, _), value in zip(slots, leaves[2 * count :], strict=True):
            new[name][slot] = value
        moved, after = update(
            dict(zip(params, leaves[:count], strict=True)),
            dict(zip(params, leaves[count : 2 * count], strict=True)),
            new,
        )
        kept = [after[name][slot] for name, slot, _ in slots if slot != "lr"]
        return (*moved.values(), *(value for value in kept if value.requires_grad))

    leaves = [*params.values(), *grads.values(), *(value for _, _, value in slots)]
    inputs = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(flat, inputs, eps=1e-6, atol=1e-5, fast_mode=True)


def test_derivatives_of_muon_are_those_of_its_iteration() -> None:
    optimizer, params = begun("Muon", 2)
    update, state = updates.of(optimizer, params)
    grads, along = gradients(params, 9), gradients(params, 10)
    leaves = {name: g.requires_grad_() for name, g in grads.items()}
    moved = update(detached(params), leaves, state)[0]
    found = torch.autograd.grad([moved[k] for k in moved], list(leaves.values()), [along[k] for k in moved])

    def smooth(name: str, grad: Tensor) -> Tensor:
        return update.rules[name].moved(params[name].detach(), grad, state[name], rounded=False).move

    for name, value in zip(moved, found, strict=True):
        leaf = grads[name].detach().clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda g, name=name: smooth(name, g), [leaf], fast_mode=True)
        [wanted] = torch.autograd.grad(smooth(name, leaf), leaf, along[name])
        torch.testing.assert_close(value, wanted)
        # The rounded step is what its iteration comes to in exact numbers, to the digits that bfloat16 has.
        step = update.rules[name].moved(params[name].detach(), leaf.detach(), state[name]).move
        torch.testing.assert_close(step, smooth(name, leaf.detach()), rtol=0, atol=0.05 * float(step.abs().max()))


@pytest.mark.parametrize("which", SMOOTH)
def test_a_second_moment_of_zero(which: str) -> None:
    # Rows of zeros in the first gradient, as LoRA's first step has them: values and derivatives are finite, and
    # derivatives are those of finite differences far below eps.
    optimizer, params = begun(which, 0)
    update, state = updates.of(optimizer, params)
    grads, origin = gradients(params, 3), {name: torch.zeros_like(p) for name, p in params.items()}
    for g in grads.values():
        g[0] = 0
    leaves = {name: g.clone().requires_grad_() for name, g in grads.items()}
    slots = {n: {k: v.clone().requires_grad_() for k, v in own.items()} for n, own in state.items()}
    moved, _ = update(origin, leaves, slots)
    inputs = [*leaves.values(), *(v for own in slots.values() for v in own.values())]
    found = torch.autograd.grad(sum(m.sum() for m in moved.values()), inputs, allow_unused=True)
    assert all(bool(f.isfinite().all()) for f in found if f is not None)
    tiny = 1e-14
    there = {name: g.clone() for name, g in grads.items()}
    there["wide"][0, 1] += tiny
    difference = update(origin, there, state)[0]["wide"][0, 1] - update(origin, grads, state)[0]["wide"][0, 1]
    assert float(found[2][0, 1]) == pytest.approx(float(difference / tiny), rel=1e-4)


# -- what goes around ----------------------------------------------------------------------------


@given(st.sampled_from([*OPTIMIZERS]), st.sampled_from([0.5, 3.0, 100.0]), st.integers(0, 1))
def test_clipping_and_schedules_are_those_of_torch(which: str, max_norm: float, before: int) -> None:
    optimizer, params = begun(which, before)
    update, state = updates.of(optimizer, params)
    whole, scheduled = updates.scheduled(updates.clipped(update, max_norm), state, lambda count: 1 / (1 + count))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: 1 / (1 + count))
    here, followed, alone = detached(params), state, detached(params)
    for number in range(10, 13):
        grads = gradients(params, number)
        followed = updates.rated(followed, optimizer, params)
        alone, followed = updates.clipped(update, max_norm)(alone, grads, followed)
        here, scheduled = whole(here, grads, scheduled)
        stepped(optimizer, params, grads, max_norm)
        scheduler.step()
        tolerance = 1e-12 if which in SMOOTH else 1e-3
        assert_trees_close(here, detached(params), tolerance)
        assert_trees_close(alone, here, tolerance)
    assert float(scheduled.taken) == 3


def test_several_optimizers_make_one_update() -> None:
    params = parameters() | {"bias": torch.randn(3, dtype=torch.float64).requires_grad_()}
    matrices = [p for p in params.values() if p.dim() == 2]
    both = [torch.optim.Muon(matrices, lr=0.1), torch.optim.AdamW([params["bias"]], lr=0.2)]
    update, state = updates.of(both, params)
    grads = gradients(params, 0)
    found, _ = update(params, grads, state)
    for one in both:
        stepped(one, params, grads)
    assert_trees_close(detached(found), detached(params), 1e-12)


# -- shares --------------------------------------------------------------------------------------


def compositions(update: Update, how: str, params: Params, grads: Params) -> Update:
    norm = float(torch.cat([g.flatten() for g in grads.values()]).norm())
    if how == "as it is":
        return update
    return updates.clipped(update, 0.4 * norm if how == "clipped" else 2 * norm)


@fewer(3)
@given(st.sampled_from([*OPTIMIZERS]), st.integers(0, 2), st.sampled_from(["as it is", "clipped", "not clipped"]))
def test_parts_add_up_to_what_the_gradient_moves(which: str, before: int, how: str) -> None:
    optimizer, params = begun(which, before)
    update, state = updates.of(optimizer, params)
    grads, split = gradients(params, 20), split_params(detached(params))
    whole = compositions(update, how, params, grads)
    cotangents = [list(gradients(params, number).values()) for number in (30, 31)]
    tolerance = 1e-6 if which in SMOOTH else 1e-3
    found, parts = whole.share(split, list(grads.values()), state, cotangents, "step", tolerance)
    scale = whole._scale(list(grads.values()))[0] if isinstance(whole, Clipped) else 1.0
    for along, total, v in zip(found, parts, cotangents, strict=True):
        part = sum(float((a * g).sum()) for a, g in zip(along, grads.values(), strict=True))
        moved, size = 0.0, 0.0
        for name, value in zip(params, v, strict=True):
            rule = update.rules[name]
            there, here = (
                rule.moved(params[name].detach(), s * grads[name], state[name], rounded=False).move
                for s in (scale, 0.0)
            )
            moved += float((value * (there - here)).sum())
            size += float((value * (there - here)).abs().sum())
        assert part == pytest.approx(moved, abs=tolerance * size)
        assert float(total) == pytest.approx(moved, abs=1e-12 * size)


@pytest.mark.parametrize("credit", ["step", "impulse"])
@pytest.mark.parametrize("which", SMOOTH)
def test_pieces_share_as_the_whole(which: str, credit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, params = begun(which, 2)
    update, state = updates.of(optimizer, params)
    grads, split = list(gradients(params, 20).values()), split_params(detached(params))
    # As of a transposed weight: in another order in memory.
    cotangents = [[v.mT.contiguous().mT for v in gradients(params, number).values()] for number in (30, 31)]
    whole, totals = update.share(split, grads, state, cotangents, credit, 1e-6)
    monkeypatch.setattr("funcghost.training.by_rules.SMALL", 0)
    monkeypatch.setattr("funcghost.training.by_rules.PIECE", 4)
    found, parts = update.share(split, grads, state, cotangents, credit, 1e-6)
    assert_close(torch.stack(parts), torch.stack(totals), 1e-12)
    for one, other in zip(found, whole, strict=True):
        for a, b in zip(one, other, strict=True):
            assert_close(a, b, 1e-14)


@given(
    st.sampled_from([name for name in OPTIMIZERS if "no memory" not in name]), st.sampled_from(["as it is", "clipped"])
)
def test_parts_are_those_of_quadrature_of_the_whole_step(which: str, how: str) -> None:
    # By the definition: the derivative of the real step in a sample's weight, by finite differences, averaged over
    # the weights of all samples from 0 to 1.
    optimizer, params = begun(which, 2)
    update, state = updates.of(optimizer, params)
    grads, part, split = gradients(params, 20), gradients(params, 21), split_params(detached(params))
    whole = compositions(update, how, params, grads)
    v = gradients(params, 30)
    [along], _ = whole.share(split, list(grads.values()), state, [list(v.values())], "step", 1e-5)
    found = sum(float((a * g).sum()) for a, g in zip(along, part.values(), strict=True))

    def moves(scale: float, more: float) -> float:
        mixed = {k: scale * g + more * part[k] for k, g in grads.items()}
        times = whole._scale(list(mixed.values()))[0] if isinstance(whole, Clipped) else 1.0
        return sum(
            float((v[k] * update.rules[k].moved(split.leaves[i], times * g, state[k], rounded=False).move).sum())
            for i, (k, g) in enumerate(mixed.items())
        )

    h, count = 1e-5, 40
    middles = [(number + 0.5) / count for number in range(count)]
    wanted = sum((moves(s, h) - moves(s, -h)) / (2 * h) for s in middles) / count
    size = sum(float((a * g).abs().sum()) for a, g in zip(along, part.values(), strict=True))
    assert found == pytest.approx(wanted, abs=1e-3 * size)


def test_the_first_step_of_adam_is_shared_by_the_limit_of_what_it_does() -> None:
    # The preconditioner 1 / (sqrt(v) + eps), held as before the step, is 1e8 here.
    params = {"w": torch.zeros(3, dtype=torch.float64, requires_grad=True)}
    update, state = updates.of(torch.optim.Adam(params.values(), lr=0.1), params)
    grad = torch.tensor([2.0, -1e-3, 0.0], dtype=torch.float64)
    [[along]], _ = update.share(
        split_params(params), [grad], state, [[torch.ones(3, dtype=torch.float64)]], "step", 1e-3
    )
    torch.testing.assert_close(along[:2], -0.1 / grad[:2].abs(), rtol=1e-4, atol=0)
    assert bool(along.isfinite().all())


def test_impulses_are_all_that_a_gradient_moves() -> None:
    # Where denominators stay as they are: run on without gradients, and add up what one gradient made different.
    makers: dict[str, Make] = {
        **{name: OPTIMIZERS[name] for name in ("SGD", "SGD, dampening", "SGD, Nesterov")},
        "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, eps=1e3, momentum=0.8, maximize=True),
        "Adam": lambda p: torch.optim.Adam(p, lr=0.1, eps=1e3, betas=(0.8, 0.999), maximize=True),
        "NAdam": lambda p: torch.optim.NAdam(p, lr=0.1, eps=1e3, betas=(0.8, 0.999), momentum_decay=0.0),
    }
    for which, make in makers.items():
        params = parameters()
        optimizer = make(list(params.values()))
        for number in range(40):
            stepped(optimizer, params, gradients(params, number))
        update, state = updates.of(optimizer, params)
        grads, v = gradients(params, 100), gradients(params, 101)
        split = split_params(detached(params))
        [along], _ = update.share(split, list(grads.values()), state, [list(v.values())], "impulse", 1e-6)
        found = sum(float((a * g).sum()) for a, g in zip(along, grads.values(), strict=True))
        still = {name: torch.zeros_like(g) for name, g in grads.items()}
        ends = []
        for scale in (1.0, 0.0):
            here, own = detached(params), state
            for number in range(100):
                first = {name: scale * g for name, g in grads.items()}
                here, own = update(here, first if number == 0 else still, own)
            ends.append(here)
        moved = sum(float((v[k] * (ends[0][k] - ends[1][k])).sum()) for k in v)
        assert found == pytest.approx(moved, rel=2e-3), which


def test_any_function_is_an_update() -> None:
    params, grads = {"w": torch.zeros(4, dtype=torch.float64)}, {"w": torch.linspace(-2, 3, 4, dtype=torch.float64)}
    update = updates.plain(lambda p, g, s: ({"w": p["w"] - torch.sinh(g["w"])}, s))
    v = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)
    [[along]], _ = update.share(split_params(params), [grads["w"]], {}, [[v]], "step", 1e-9)
    torch.testing.assert_close(along, -v * torch.sinh(grads["w"]) / grads["w"], rtol=1e-7, atol=0)
    with pytest.raises(fg.InputError, match="memory of the optimizer"):
        update.share(split_params(params), [grads["w"]], {}, [[v]], "impulse", 1e-9)
    steps = updates.plain(lambda p, g, s: ({"w": p["w"] - (g["w"] > 1).to(v.dtype) - 1e-30 * g["w"]}, s))
    with pytest.raises(fg.GhostError, match="is not smooth"):
        steps.share(split_params(params), [grads["w"]], {}, [[v]], "step", 1e-9)


# -- bad input -----------------------------------------------------------------------------------


class Other(torch.optim.SGD):
    """A subclass may do anything."""


def test_optimizers_that_are_not_known() -> None:
    params = parameters()
    for bad, match in [
        (torch.optim.Adagrad(params.values()), "Adagrad is none of SGD, Adam"),
        (Other(params.values()), "Other is none of"),
        (3, "takes optimizers"),
        (torch.optim.SGD([params["tall"]]), r"no optimizer steps \['square', 'wide'\]"),
        (torch.optim.SGD([*params.values(), torch.ones(2, requires_grad=True)]), "not among params"),
        ([torch.optim.SGD(params.values()), torch.optim.SGD(params.values())], "by two optimizers"),
    ]:
        with pytest.raises(fg.InputError, match=match):
            updates.of(bad, params)  # type: ignore[arg-type]
    hooked = torch.optim.SGD(params.values())
    hooked.register_step_post_hook(lambda *_: None)
    with pytest.raises(fg.InputError, match="has hooks"):
        updates.of(hooked, params)


def test_states_gradients_and_parameters_that_do_not_fit() -> None:
    params = parameters()
    grads = gradients(params, 0)
    update, state = updates.of(torch.optim.SGD(params.values(), lr=0.1, momentum=0.9), params)
    _, adam = updates.of(torch.optim.Adam(params.values()), params)
    with pytest.raises(fg.InputError, match="state of another one"):
        update(params, grads, adam)
    with pytest.raises(fg.InputError, match="slots for"):
        update(params, grads, {})
    wrong = {name: dict(own) | {"momentum_buffer": torch.zeros(7)} for name, own in state.items()}
    with pytest.raises(fg.InputError, match=r"\[3, 3\], found \[7\]"):
        update(params, grads, wrong)
    with pytest.raises(fg.InputError, match="grads"):
        update(params, {"tall": grads["tall"]}, state)
    with pytest.raises(fg.InputError, match="was made for"):
        update({"v": params["tall"]}, {"v": grads["tall"]}, state)
    with pytest.raises(fg.InputError, match="ScheduledState"):
        updates.scheduled(update, state, lambda count: 1.0)[0](params, grads, state)
    for call in (lambda: updates.clipped(len, 1.0), lambda: updates.clipped(update, 0.0)):  # type: ignore[arg-type]
        with pytest.raises(fg.InputError, match="clipped"):
            call()
    with pytest.raises(fg.InputError, match="learning rate"):
        updates.scheduled(update, {"w": torch.zeros(1)}, lambda count: 1.0)
    endless, state = updates.of(torch.optim.SGD(params.values(), lr=0.1, momentum=1.0), params)
    with pytest.raises(fg.InputError, match="no end"):
        endless.share(split_params(params), list(grads.values()), state, [list(grads.values())], "impulse", 1e-3)
