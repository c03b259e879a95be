"""Wrong arguments and wrong losses are named before anything runs, and leave no trace."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcghost as fg
from tests.models.world import Params, World, differences, exact, normal, says, score


def test_state_sees_every_change(world: World) -> None:
    # The guard of the tests below must itself notice: a plain step with SGD changes what it should.
    before = world.state()
    world.losses(world.params, world.x).sum().backward()
    assert differences(before, world.state()) == ["grad", "buffers", "torch", "numpy", "python"]
    with torch.no_grad():
        world.params["0.weight"].add_(1)
    world.params["0.bias"].requires_grad_(False)
    world.model.eval()
    world.model[0].register_forward_hook(lambda *_: None)
    assert set(differences(before, world.state())) >= {"params", "requires_grad", "training", "hooks"}


def changed(tree: Params, name: str, leaf: Any) -> dict[str, Any]:
    return {**tree, name: leaf}


def without(tree: Params, name: str) -> Params:
    return {key: value for key, value in tree.items() if key != name}


W, LAST = "0.weight", "5.bias"


ARGUMENTS: dict[str, tuple[Callable[[World], Any], str]] = {
    "no params": (lambda w: score(w, params={}), "params: the tree has no leaves. Pass at least one"),
    "a param that is a number": (
        lambda w: score(w, params=changed(w.params, W, 3.0)),
        "params['0.weight'] must be a tensor, found float. Leave it out",
    ),
    "a module for params": (lambda w: score(w, params=w.model), "params: must be a tree of tensors, found Sequential"),
    "an integer param": (
        lambda w: score(w, params=changed(w.params, LAST, torch.ones(2, dtype=torch.int64))),
        "params['5.bias'] must have a real floating-point dtype, found torch.int64.*close over",
    ),
    "a bool param": (
        lambda w: score(w, params=changed(w.params, LAST, torch.ones(2, dtype=torch.bool))),
        "params['5.bias'] must have a real floating-point dtype, found torch.bool",
    ),
    "a complex param": (
        lambda w: score(w, params=changed(w.params, LAST, torch.ones(2, dtype=torch.complex128))),
        "params['5.bias'] must have a real floating-point dtype, found torch.complex128",
    ),
    "a tied param given twice": (
        lambda w: score(w, params=changed(w.params, "tied", w.params[W])),
        "params['tied'] and params['0.weight'] are the same tensor object. Pass a tied parameter once",
    ),
    "two names that are one": (
        lambda w: score(w, params={"a": {"b": normal(2)}, "a.b": normal(2)}),
        "two leaves have the same name.*Rename",
    ),
    "a direction without a leaf": (
        lambda w: score(w, direction=without(w.direction, W)),
        "direction: must be a tree like params; missing leaves ['0.weight'], unexpected leaves [].*zeros",
    ),
    "a direction with a leaf too many": (
        lambda w: score(w, direction=changed(w.direction, "extra", normal(1))),
        "direction: must be a tree like params; missing leaves [], unexpected leaves ['extra']",
    ),
    "a direction of other nesting": (
        lambda w: score(w, direction=list(w.direction.values())),
        "missing leaves ['0.bias', '0.weight', .* unexpected leaves ['0', '1'",
    ),
    "a direction with a number": (
        lambda w: score(w, direction=changed(w.direction, W, 1.0)),
        "direction['0.weight'] must be a tensor, found float",
    ),
    "a direction of another shape": (
        lambda w: score(w, direction=changed(w.direction, W, normal(3, 4))),
        "direction['0.weight']: shape must be that of the parameter, (4, 3), found (3, 4). Convert it",
    ),
    "a direction of another dtype": (
        lambda w: score(w, direction=changed(w.direction, LAST, normal(2).float())),
        "direction['5.bias']: dtype must be that of the parameter, torch.float64, found torch.float32. Convert",
    ),
    "a direction on another device": (
        lambda w: score(w, direction=changed(w.direction, LAST, normal(2).to("meta"))),
        "direction['5.bias']: device must be that of the parameter, cpu, found meta. Convert it",
    ),
    "a sparse direction": (
        lambda w: score(w, direction=changed(w.direction, W, normal(4, 3).to_sparse())),
        "direction['0.weight'].*(layout|dense)",
    ),
    "a wrong direction in a stack": (
        lambda w: score(w, direction=fg.stack([w.direction, changed(w.direction, W, normal(1))])),
        "direction 1 of the stack['0.weight']: shape",
    ),
    "an empty stack": (lambda w: score(w, direction=fg.stack([])), "stack: takes a sequence of one or more"),
    "a stack of no sequence": (lambda w: score(w, direction=fg.stack(3)), "stack: takes.*found int"),  # type: ignore[arg-type]
    "a direction for a reducer": (
        lambda w: score(w, reducers={"v": w.direction}),
        "reducers: every leaf must be a reducer such as fg.dot(direction), found Tensor. Wrap a direction in fg.dot",
    ),
    "a reducer of no kind": (
        lambda w: score(w, reducers={"mine": fg.Reducer()}),
        "reducers: Reducer is of neither kind. Derive it from fg.Directional",
    ),
    "a name for a reducer": (lambda w: score(w, reducers=["dot"]), "reducers: every leaf must.*found str"),
    "losses that are no function": (lambda w: fg.reduce(w.x), "losses: must be a function.*found Tensor"),  # type: ignore[arg-type]
    "losses that are no function, to plan": (
        lambda w: fg.plan(w.x, w.params, w.x),  # type: ignore[arg-type]
        "losses: must be a function.*found Tensor",
    ),
    "a reducer to plan that is none": (
        lambda w: fg.plan(w.losses, w.params, w.x, w.direction),
        "reducers: every leaf must be a reducer",
    ),
    "a plan that is none": (lambda w: score(w, plan={"sites": ()}), "plan: must come from fg.plan, found dict"),
    "an unknown reduction": (
        lambda w: fg.grad_and_reduce(w.losses, reduction="max"),  # type: ignore[arg-type]
        "grad_and_reduce: reduction must be 'mean' or 'sum', found 'max'",
    ),
    "an unknown verify": (
        lambda w: score(w, options=fg.Options(verify="sometimes")),  # type: ignore[arg-type]
        "Options.verify must be one of ('first', 'always', 'never'), found 'sometimes'",
    ),
    "an unknown route": (
        lambda w: score(w, options=fg.Options(route="sideways")),  # type: ignore[arg-type]
        "Options.route must be one of ('backward', 'forward'), found 'sideways'",
    ),
    "options that are none": (
        lambda w: score(w, options={"verify": "never"}),
        "options: must be .*Options.*found dict",
    ),
    "a training step on the forward route": (
        lambda w: fg.grad_and_reduce(w.losses, options=fg.Options(route="forward")),
        "Options.route='forward' has no backward.*use it with fg.reduce",
    ),
}


@pytest.mark.parametrize("what", ARGUMENTS)
def test_wrong_argument_is_named_before_anything_runs(world: World, what: str) -> None:
    call, message = ARGUMENTS[what]
    before = world.state()
    with pytest.raises(fg.InputError, match=says(message)):
        call(world)
    assert world.calls == 0
    assert differences(before, world.state()) == []


@pytest.mark.parametrize("what", [name for name in ARGUMENTS if name.startswith(("a direction", "an integer"))])
def test_wrong_argument_of_a_later_call(world: World, what: str) -> None:
    # A plan that is there already is no reason to look less closely.
    score(world)
    calls, before = world.calls, world.state()
    call, message = ARGUMENTS[what]
    with pytest.raises(fg.InputError, match=says(message)):
        call(world)
    assert world.calls == calls
    assert differences(before, world.state()) == []


WRONG_LOSSES: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "their mean": (lambda h: h.sum(1).mean(), "losses: must return one number per sample.*shape (). Reduce over"),
    "one per token": (lambda h: h, "losses: must return one number per sample.*found shape (5, 2)"),
    "integers": (lambda h: h.sum(1).long(), "losses: must be real floating-point numbers, found torch.int64"),
    "truths": (lambda h: h.sum(1) > 0, "losses: must be real floating-point numbers, found torch.bool"),
    "complex": (lambda h: torch.complex(h[:, 0], h[:, 1]), "losses: must be real floating-point.*complex128"),
    "nothing": (lambda h: None, "losses: must return a tensor [b], found NoneType"),
    "numbers": (lambda h: h.sum(1).tolist(), "losses: must return a tensor [b], found list"),
    "aux unannounced": (lambda h: (h.sum(1), h), "losses: must return a tensor [b], found tuple. Pass has_aux=True"),
    "detached": (lambda h: h.sum(1).detach(), "losses: do not depend on params.*functional_call"),
    "constant": (lambda h: torch.ones(5, dtype=torch.float64), "losses: do not depend on params.*functional_call"),
}


@pytest.mark.parametrize("what", WRONG_LOSSES)
@pytest.mark.parametrize("scoring_only", [False, True])
def test_wrong_losses_are_named_and_leave_no_trace(world: World, what: str, scoring_only: bool) -> None:
    wrong, message = WRONG_LOSSES[what]

    def losses(params: Params, x: Tensor) -> Any:
        return wrong(world.losses(params, x)[:, None] * torch.ones(2, dtype=torch.float64))

    before = world.state()
    transform: Any = fg.reduce if scoring_only else fg.grad_and_reduce
    with pytest.raises(fg.InputError, match=says(message)):
        transform(losses)(world.params, world.x, fg.dot(world.direction))
    assert world.calls == 1
    assert differences(before, world.state()) == []


def test_aux_that_is_missing_is_named(world: World) -> None:
    before = world.state()
    with pytest.raises(fg.InputError, match=says("with has_aux=True it must return (losses, aux), found Tensor")):
        fg.grad_and_reduce(world.losses, has_aux=True)(world.params, world.x, fg.dot(world.direction))
    assert differences(before, world.state()) == []
    step = fg.grad_and_reduce(lambda p, x: (world.losses(p, x), {"n": len(x)}), has_aux=True)
    assert step(world.params, world.x, fg.dot(world.direction)).aux == {"n": 5}


def test_wrong_losses_without_reducers() -> None:
    # Nothing is scored, so nothing is planned: the losses are looked at all the same.
    with pytest.raises(fg.InputError, match="losses: must return one number per sample"):
        fg.grad_and_reduce(lambda p, x: x @ p["w"])({"w": normal(3, 2)}, normal(4, 3), {})


def test_model_that_ignores_params_and_the_remedy() -> None:
    model = nn.Linear(3, 2).double()
    params = {name: value.detach().clone() for name, value in model.named_parameters()}

    def forgot(params: Params, x: Tensor) -> Tensor:
        with torch.no_grad():
            return model(x).sum(1)

    with pytest.raises(fg.InputError, match=r"do not depend on params.*fg\.module_losses"):
        fg.reduce(forgot)(params, normal(4, 3), fg.dot(params))
    exact(fg.module_losses(model, lambda output, x: output.sin().sum(1)), params, normal(4, 3))


def test_losses_that_raise_while_planning_leave_no_trace() -> None:
    counting = World()
    fg.grad_and_reduce(counting.losses)(counting.params, counting.x, fg.dot(counting.direction))
    assert counting.calls >= 3  # measured, rehearsed, run
    for fail_at in range(1, counting.calls):
        world = World()
        before = world.state()
        world.fail_at = fail_at
        with pytest.raises(ZeroDivisionError, match="of the user"):
            fg.grad_and_reduce(world.losses)(world.params, world.x, fg.dot(world.direction))
        assert world.calls == fail_at
        assert differences(before, world.state()) == []


@pytest.mark.parametrize("scoring_only", [False, True])
@pytest.mark.parametrize("planned", [False, True])
def test_losses_that_raise_in_the_step_itself_leave_no_trace(planned: bool, scoring_only: bool) -> None:
    counting, world = World(), World()
    transform: Any = fg.reduce if scoring_only else fg.grad_and_reduce
    transform(counting.losses)(counting.params, counting.x, fg.dot(counting.direction))
    plan = fg.plan(world.losses, world.params, world.x) if planned else None
    step = transform(world.losses, plan=plan)
    world.calls, world.fail_at = 0, 1 if planned else counting.calls
    before = world.state()
    with pytest.raises(ZeroDivisionError, match="of the user"):
        step(world.params, world.x, fg.dot(world.direction))
    assert world.calls == world.fail_at
    assert differences(before, world.state()) == []
