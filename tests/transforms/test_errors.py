"""Bad input: a clear error that says where and what to do, before anything is computed or changed."""

import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import funcghost as fg
from tests.models.awkward import Hidden
from tests.naive import assert_scores, assert_trees_close, expected, gradient

Params = dict[str, Tensor]
Losses = Callable[[Params, Any], Any]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(losses: Losses, params: Params, batch: Any, **given: Any) -> None:
    """Following the remedy works: the scores are right."""
    direction = {name: normal(*value.shape, seed=9).to(value) for name, value in params.items()}
    found = fg.reduce(losses, **given)(params, batch, fg.dot(direction))
    assert_scores(found, expected(losses, params, batch, direction))


class Hook(nn.Module):
    """Calls the world back between two layers."""

    def __init__(self, between: Callable[[], None]) -> None:
        super().__init__()
        self.between = between

    def forward(self, h: Tensor) -> Tensor:
        self.between()
        return h


class World:
    """A model with everything that a call might change, and a count of how often its losses run."""

    def __init__(self) -> None:
        first, last = nn.Linear(3, 4), nn.Linear(4, 2)
        layers = (first, nn.BatchNorm1d(4), nn.Dropout(0.5), Hook(self.between), last, nn.BatchNorm1d(2))
        self.model = nn.Sequential(*layers).double()
        last.weight.grad = torch.ones_like(last.weight)
        self.params: Params = dict(self.model.named_parameters())
        self.direction = {name: normal(*value.shape) for name, value in self.params.items()}
        self.x = normal(5, 3)
        self.calls = 0
        self.fail_at = 0
        self.score = fg.reduce(self.losses)

    def between(self) -> None:
        if self.calls == self.fail_at:
            raise ZeroDivisionError("of the user")

    def losses(self, params: Params, x: Tensor) -> Tensor:
        """Draws from every random stream and updates buffers; raises between two layers at the call `fail_at`."""
        self.calls += 1
        noise = random.random() + np.random.rand()
        out: Tensor = functional_call(self.model, params, (x + noise,))
        return out.sin().sum(1)

    def state(self) -> dict[str, Any]:
        model = self.model
        return {
            "params": {k: v.detach().clone() for k, v in self.params.items()},
            "direction": {k: v.clone() for k, v in self.direction.items()},
            "batch": self.x.clone(),
            "requires_grad": {k: v.requires_grad for k, v in self.params.items()},
            "grad": {k: None if v.grad is None else v.grad.clone() for k, v in self.params.items()},
            "grad_fn": {k: v.grad_fn for k, v in self.params.items()},
            "buffers": {k: v.clone() for k, v in model.named_buffers()},
            "training": [m.training for m in model.modules()],
            "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
            "tensor hooks": {k: bool(v._backward_hooks) for k, v in self.params.items()},
            "attributes": {k: sorted(vars(v)) for k, v in self.params.items()},
            "torch": torch.get_rng_state(),
            "numpy": str(np.random.get_state()),
            "python": random.getstate(),
            "grad mode": torch.is_grad_enabled(),
        }


@pytest.fixture
def world() -> World:
    random.seed(0)
    np.random.seed(0)
    return World()


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [key for key in before if not _equal(before[key], after[key])]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return bool(a == b)


def test_state_sees_every_change(world: World) -> None:
    # The guard of the tests below must itself notice: a plain step with SGD changes what it should.
    before = world.state()
    world.losses(world.params, world.x).sum().backward()
    assert differences(before, world.state()) == ["grad", "buffers", "torch", "numpy", "python"]
    with torch.no_grad():
        world.params["0.weight"].add_(1)
    world.params["0.bias"].requires_grad_()
    world.model.eval()
    world.model[0].register_forward_hook(lambda *_: None)
    assert set(differences(before, world.state())) >= {"params", "requires_grad", "training", "hooks"}


# Arguments that are wrong before anything runs: (what, the call, what the message says).


def changed(tree: Params, name: str, leaf: Any) -> dict[str, Any]:
    return {**tree, name: leaf}


def score(world: World, params: Any = None, direction: Any = None, reducers: Any = None, **given: Any) -> Any:
    params = world.params if params is None else params
    reducers = fg.dot(world.direction if direction is None else direction) if reducers is None else reducers
    return (fg.reduce(world.losses, **given) if given else world.score)(params, world.x, reducers)


def without(tree: Params, name: str) -> Params:
    return {key: value for key, value in tree.items() if key != name}


W, LAST = "0.weight", "5.bias"
ARGUMENTS: dict[str, tuple[Callable[[World], Any], str]] = {
    "no params": (lambda w: score(w, params={}), "params: the tree has no leaves. Pass at least one"),
    "a param that is a number": (
        lambda w: score(w, params=changed(w.params, W, 3.0)),
        "params['0.weight'] must be a tensor, found float. Leave it out",
    ),
    "a module for params": (lambda w: score(w, params=w.model), "params['<root>'] must be a tensor, found Sequential"),
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


def says(message: str) -> str:
    """A pattern in which only `.*` and `(a|b)` are special."""
    parts = re.split(r"(\.\*|\(layout\|dense\))", message)
    return "(?s)" + "".join(part if i % 2 else re.escape(part) for i, part in enumerate(parts))


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


# Losses that are wrong: they must run once for this to be known.

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


# The losses raise in the middle.


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


def _seed() -> None:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)


def test_a_step_changes_what_the_losses_alone_change() -> None:
    # The yardstick of the above: planning, scoring and repeated calls consume and update as the plain losses do.
    world, alone = World(), World()
    alone.model.load_state_dict(world.model.state_dict())
    step = fg.grad_and_reduce(world.losses)
    _seed()
    for _ in range(3):
        step(world.params, world.x, fg.dot(world.direction))
    found = world.state()
    _seed()
    for _ in range(3):
        alone.losses(alone.params, alone.x)
    assert differences(alone.state(), found) == []


@pytest.mark.parametrize("scoring_only", [False, True])
def test_a_generator_of_the_users_own_is_used_as_the_losses_alone_use_it(scoring_only: bool) -> None:
    # Noise for a diffusion model, a mask of one's own: planning must not draw from it, nor see other numbers each time.
    generator, params, x = torch.Generator(), {"w": normal(3, 4)}, normal(5, 3)

    def losses(params: Params, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        return ((x + noise) @ params["w"]).sin().sum(1)

    transform: Any = fg.reduce if scoring_only else fg.grad_and_reduce
    step = transform(losses)
    for seed in range(2):
        generator.manual_seed(seed)
        out = step(params, x, fg.dot(params))
        after = generator.get_state()
        generator.manual_seed(seed)
        losses(params, x)
        assert torch.equal(generator.get_state(), after)
        generator.manual_seed(seed)
        wanted = expected(losses, params, x, params)
        assert_scores(out if scoring_only else out.reduced, wanted)


class Counting(nn.Module):
    """Buffers written in place and replaced: a count, and a moving average of what passes by."""

    count: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))

    def forward(self, h: Tensor) -> Tensor:
        self.count += 1
        with torch.no_grad():
            self.mean.mul_(0.9).add_(h.mean((0, 2)), alpha=0.1)
        return h - self.mean[:, None]


STATEFUL: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm1d(4).double(),
    "batch norm without scale": lambda: nn.BatchNorm1d(4, affine=False).double(),
    "batch norm, cumulative": lambda: nn.BatchNorm1d(4, momentum=None).double(),
    "instance norm": lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True).double(),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv1d(4, 4, 1).double()),
    "own": Counting,
}


@pytest.mark.parametrize("scoring_only", [False, True])
@pytest.mark.parametrize("stateful", STATEFUL)
def test_buffers_are_updated_as_the_losses_alone_update_them(stateful: str, scoring_only: bool) -> None:
    states: list[dict[str, Tensor]] = []
    for together in (True, False):
        torch.manual_seed(4)
        model = nn.Sequential(nn.Conv1d(3, 4, 1).double(), STATEFUL[stateful](), nn.Conv1d(4, 2, 1).double())
        params: Params = dict(model.named_parameters())
        losses = fg.module_losses(model, lambda output, x: output.sin().sum((1, 2)))
        transform: Any = fg.reduce if scoring_only else fg.grad_and_reduce
        step = transform(losses)
        for seed in range(3):
            x = normal(5, 3, 6, seed=seed)
            # Twice the directions must not be twice the updates.
            step(params, x, [fg.dot(params), fg.dot(params)]) if together else losses(params, x)
        states.append(dict(model.named_buffers()))
    assert states[0].keys() == states[1].keys()
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []


def test_a_step_that_plans_anew_changes_what_the_losses_alone_change() -> None:
    # The plan turns out not to fit only after batch norm has run: its buffers must not be updated twice.
    found: list[Any] = []
    wanted: list[Any] = []
    for together, states in ((True, found), (False, wanted)):
        world = World()
        flags = {"cube": False}

        def losses(params: Params, x: Tensor, world: World = world, flags: dict[str, bool] = flags) -> Tensor:
            values = world.losses(params, x)
            return values**3 if flags["cube"] else values

        torch.manual_seed(1)
        world.model.load_state_dict({k: normal(*v.shape).abs() for k, v in world.model.state_dict().items()})
        step = fg.grad_and_reduce(losses)
        _seed()
        for cube in (False, True):
            flags["cube"] = cube
            if together:
                step(world.params, world.x, fg.dot(world.direction))
            else:
                losses(world.params, world.x)
        states.append(world.state())
    assert differences(wanted[0], found[0]) == []


# Uses of a parameter that cannot be seen or followed.


def hidden_params() -> Params:
    return {"first": normal(3, 4), "hidden": normal(4, 4), "bias": normal(4), "last": normal(4, 2)}


def hidden_losses(params: Params, x: Tensor, multiply: Any = Hidden.apply) -> Tensor:
    h = multiply((x @ params["first"]).sin(), params["hidden"]) + params["bias"]
    return (h.sin() @ params["last"]).sum(1)


@pytest.mark.parametrize("scoring_only", [False, True])
def test_parameter_hidden_in_a_custom_function_is_named(scoring_only: bool) -> None:
    params, x = hidden_params(), normal(5, 3)
    message = says("do not add up for parameters ['hidden']: .*custom autograd Function.*leave them out of params")
    transform: Any = fg.reduce if scoring_only else fg.grad_and_reduce
    with pytest.raises(fg.ConservationError, match=message):
        transform(hidden_losses)(params, x, fg.dot(params))
    # Either remedy: an ordinary op, or leaving the parameter out of params.
    exact(lambda p, x: hidden_losses(p, x, torch.matmul), params, x)
    hidden = params.pop("hidden")
    exact(lambda p, x: hidden_losses({**p, "hidden": hidden}, x), params, x)


@pytest.mark.parametrize("names", [["a"], ["c"], ["a", "b"], ["a", "c", "d"], ["a", "b", "c", "d", "e"]])
def test_all_hidden_parameters_are_named_and_no_other(names: list[str]) -> None:
    params, x = {name: normal(3, 3, seed=i) for i, name in enumerate("abcde")}, normal(4, 3)

    def losses(params: Params, x: Tensor) -> Tensor:
        for name, w in params.items():
            x = (Hidden.apply(x, w) if name in names else x @ w).sin()
        return x.sum(1)

    with pytest.raises(fg.ConservationError, match=re.escape(f"for parameters {names}:")):
        fg.reduce(losses)(params, x, fg.dot(params))


def through_a_view(params: Params, x: Tensor) -> Tensor:
    y = x @ params["w"]
    y[:, 0].add_(params["b"])
    return y.sin().sum(1)


def behind_a_copy(params: Params, x: Tensor) -> Tensor:
    w = params["w"].clone()
    w[0].mul_(params["b"])
    return (x @ w).sin().sum(1)


@pytest.mark.parametrize(
    ("losses", "names"), [(through_a_view, ["b"]), (behind_a_copy, ["b", "w"])], ids=["view", "copy"]
)
def test_change_in_place_through_a_view_is_named(losses: Losses, names: list[str]) -> None:
    params, x = {"w": normal(3, 2), "b": normal(1, seed=1)[0]}, normal(4, 3)
    before = {name: value.clone() for name, value in params.items()}
    message = says(f"for parameters {names}: .*changed in place through a view.*out of place")
    with pytest.raises(fg.ConservationError, match=message):
        fg.reduce(losses)(params, x, fg.dot(params))
    assert_trees_close(params, before, 0.0)


def test_remedies_for_views_are_exact() -> None:
    params, x = {"w": normal(3, 2), "b": normal(1, seed=1)[0]}, normal(4, 3)

    def out_of_place(params: Params, x: Tensor) -> Tensor:
        y = x @ params["w"]
        return torch.cat([y[:, :1] + params["b"], y[:, 1:]], 1).sin().sum(1)

    exact(out_of_place, params, x)
    # In place on the value itself, not on a view of it, is followed.
    exact(lambda p, x: (x @ p["w"]).add_(p["b"]).sin().sum(1), params, x)


def test_max_norm_is_refused_and_renormalising_before_the_step_works() -> None:
    params, index = {"rows": normal(5, 2)}, torch.tensor([[0, 1], [3, 1]])
    before = params["rows"].clone()

    def losses(params: Params, index: Tensor, max_norm: float | None = None) -> Tensor:
        return F.embedding(index, params["rows"], max_norm=max_norm).sin().sum((1, 2))

    with pytest.raises(
        fg.UnsupportedOpError,
        match=says("parameter 'rows' is written to by torch.nn.functional.embedding.*max_norm.*before the step"),
    ):
        fg.reduce(lambda p, x: losses(p, x, max_norm=1.0))(params, index, fg.dot(params))
    assert torch.equal(params["rows"], before)
    params["rows"] = torch.renorm(params["rows"], 2, 0, 1.0)
    exact(losses, params, index)


@pytest.mark.parametrize("options", [{"mode": "max"}, {"mode": "sum", "scale_grad_by_freq": True}])
def test_op_without_any_derivative_is_named_and_a_rule_or_other_ops_help(options: dict[str, Any]) -> None:
    params, index = {"other": normal(2), "rows": normal(5, 2)}, torch.tensor([[0, 1], [3, 2]])

    def losses(params: Params, index: Tensor, bag: Any = None) -> Tensor:
        h = F.embedding_bag(index, params["rows"], **options) if bag is None else bag(params["rows"])
        return (h * params["other"]).sin().sum(1)

    message = "parameters ['rows'] are used by torch.nn.functional.embedding_bag, whose derivative cannot be had"
    with pytest.raises(fg.UnsupportedOpError, match=says(message + ".*fg.register_rule, or write the op with others")):
        fg.reduce(losses)(params, index, fg.dot(params))

    def bag(rows: Tensor) -> Tensor:
        found = F.embedding(index, rows)
        return found.amax(1) if options["mode"] == "max" else found.sum(1)

    exact(lambda p, x: losses(p, x, bag), params, index)
    if options["mode"] == "sum":  # every index comes once: the frequencies are 1
        fg.register_rule(F.embedding_bag, linear=[["weight"]])
        exact(losses, params, index)


class Checkpointed(nn.Module):
    """Two layers, the second recomputed in the backward."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first: nn.Module = nn.Linear(3, 3).double()
        self.second = nn.Linear(3, 2).double()
        self.options: dict[str, Any] = {"use_reentrant": False, **options}

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.second, self.first(x).sin(), **self.options)


def checkpointed_losses(model: nn.Module) -> Losses:
    return fg.module_losses(model, lambda output, x: output.sin().sum(1))


def test_checkpoint_needs_its_context() -> None:
    plain, x = Checkpointed(), normal(4, 3)
    params = dict(plain.named_parameters())
    with pytest.raises(fg.UnsupportedOpError, match=says("torch.utils.checkpoint.*context_fn=fg.checkpoint_context")):
        fg.grad_and_reduce(checkpointed_losses(plain))(params, x, fg.dot(params))
    remedied = Checkpointed(context_fn=fg.checkpoint_context)
    exact(checkpointed_losses(remedied), dict(remedied.named_parameters()), x)


def test_checkpoint_needs_the_own_parameters_of_the_module() -> None:
    model, x = Checkpointed(context_fn=fg.checkpoint_context), normal(4, 3)
    params = {name: value.detach() * 2 for name, value in model.named_parameters()}
    with pytest.raises(fg.UnsupportedOpError, match=says("checkpoint.*let params be the module's own tensors")):
        fg.reduce(checkpointed_losses(model))(params, x, fg.dot(params))
    model.load_state_dict(params)
    exact(checkpointed_losses(model), dict(model.named_parameters()), x)


def test_reentrant_checkpoint_does_not_pass_for_zero() -> None:
    # Its gradients flow in .backward() alone: torch.autograd.grad sees no path to the parameters inside.
    model, x = Checkpointed(use_reentrant=True), normal(4, 3).requires_grad_()
    model.first = nn.Identity()  # so that nothing but the batch leads there
    params = dict(model.named_parameters())
    with pytest.raises(fg.GhostError, match=says("use_reentrant=False")):
        fg.grad_and_reduce(checkpointed_losses(model))(params, x, fg.dot(params))


def slope_by_autograd(params: Params, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad((x @ params["w"] + params["b"]).sin().sum(), x, create_graph=True)
    return slope.square().sum(1)


def slope_by_vmap_grad(params: Params, x: Tensor) -> Tensor:
    def potential(z: Tensor) -> Tensor:
        return (z @ params["w"] + params["b"]).sin().sum()

    return torch.func.vmap(torch.func.grad(potential))(x).square().sum(1)


def slope_by_jvp(params: Params, x: Tensor) -> Tensor:
    def potential(z: Tensor) -> Tensor:
        return (z @ params["w"] + params["b"]).sin().sum(1)

    return torch.func.jvp(potential, (x,), (torch.ones_like(x),))[1]


@pytest.mark.parametrize("losses", [slope_by_autograd, slope_by_vmap_grad, slope_by_jvp])
def test_derivatives_inside_the_losses_are_exact_or_refused(losses: Losses) -> None:
    # Gradient penalties, physics-informed losses: the inner backward uses the parameters unseen.
    params, x = {"w": normal(3, 2), "b": normal(2)}, normal(4, 3)
    direction = {"w": normal(3, 2, seed=1), "b": normal(2, seed=1)}
    try:
        found = fg.reduce(losses)(params, x, fg.dot(direction))
    except fg.GhostError as error:
        assert re.search(r"\['(b|w)'", str(error)) or "torch.func" in str(error)  # noqa: PT017
    else:
        assert_scores(found, expected(losses, params, x, direction))


# Plans that do not fit.


def by_linear(params: Params, x: Tensor) -> Tensor:
    return F.linear(x, params["w"], params["b"]).sin().sum(1)


def by_matmul(params: Params, x: Tensor) -> Tensor:
    return (x @ params["w"].T + params["b"]).sin().sum(1)


def plan_params() -> Params:
    return {"w": normal(2, 3), "b": normal(2)}


def causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def test_plan_of_another_model_is_replaced_in_eager_mode() -> None:
    params, x = plan_params(), normal(4, 3)
    exact(by_linear, params, x, plan=fg.plan(by_matmul, params, x))


@pytest.mark.parametrize("scoring_only", [False, True])
def test_plan_of_another_model_under_compile(scoring_only: bool) -> None:
    params, x = plan_params(), normal(4, 3)
    transform: Any = fg.reduce if scoring_only else fg.grad_and_reduce
    step = torch.compile(transform(by_linear, plan=fg.plan(by_matmul, params, x)), fullgraph=True, backend="eager")
    torch._dynamo.reset()
    with pytest.raises(Exception) as caught:  # noqa: PT011  (Dynamo wraps what is raised while it traces)
        step(params, x, fg.dot(params))
    own = [error for error in causes(caught.value) if isinstance(error, fg.GhostError)]
    assert isinstance(own[0], fg.PlanError)
    assert re.search(says("found torch.nn.functional.linear.*the plan has torch.Tensor.T"), str(own[0]))
    assert "fg.plan" in str(own[0])
    torch._dynamo.reset()
    remedied = torch.compile(transform(by_linear, plan=fg.plan(by_linear, params, x)), fullgraph=True, backend="eager")
    out = remedied(params, x, fg.dot(params))
    assert_scores(out if scoring_only else out.reduced, expected(by_linear, params, x, params))
    torch._dynamo.reset()


def test_compile_without_a_plan() -> None:
    params, x = plan_params(), normal(4, 3)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"PlanError.*plan = fg.plan\(...\), and pass plan=plan"):
        torch.compile(fg.reduce(by_linear), fullgraph=True, backend="eager")(params, x, fg.dot(params))
    torch._dynamo.reset()


@pytest.mark.parametrize("planned", [False, True])
def test_tracing_by_make_fx_without_the_right_plan(planned: bool) -> None:
    params, x = plan_params(), normal(4, 3)
    plan = fg.plan(by_matmul, params, x) if planned else None

    def scores(params: Params, x: Tensor) -> Tensor:
        return fg.reduce(by_linear, plan=plan)(params, x, fg.dot(params))

    with pytest.raises(fg.PlanError, match=says("linear.*the plan has torch.Tensor.T") if planned else r"fg\.plan"):
        make_fx(scores)(params, x)


def test_meta_device_needs_a_plan_that_fits() -> None:
    params, x = plan_params(), normal(4, 3)
    ghosts = {name: value.to("meta") for name, value in params.items()}
    with pytest.raises(fg.PlanError, match=says("meta device have no values to measure. Plan on a real device")):
        fg.reduce(by_linear)(ghosts, x.to("meta"), fg.dot(ghosts))
    with pytest.raises(fg.PlanError, match="meta device"):
        fg.plan(by_linear, ghosts, x.to("meta"))
    # Who passed a plan must hear why it was not taken.
    with pytest.raises(fg.PlanError, match="linear") as caught:
        fg.reduce(by_linear, plan=fg.plan(by_matmul, params, x))(ghosts, x.to("meta"), fg.dot(ghosts))
    assert "pass the plan" not in str(caught.value).split("linear")[0]
    score_there = fg.reduce(by_linear, plan=fg.plan(by_linear, params, x))
    assert score_there(ghosts, x.to("meta"), fg.dot(ghosts)).shape == (4,)


def test_losses_that_never_repeat_themselves_are_refused() -> None:
    calls: list[int] = []

    def losses(params: Params, x: Tensor) -> Tensor:
        calls.append(1)
        h = x @ params["w"].T
        return (h.sin() if len(calls) % 2 else h.cos()).sum(1)

    params = {"w": normal(2, 3)}
    with pytest.raises(fg.PlanError, match="do something else each time they run"):
        fg.reduce(losses)(params, normal(4, 3), fg.dot(params))


def test_output_that_was_not_used_when_planned_is_planned_anew() -> None:
    # The ops are the same, only another output of the LSTM is read: the plan has no layout for it.
    model = nn.LSTM(3, 2, batch_first=True).double()
    params: Params = dict(model.named_parameters())
    x, which = normal(4, 3, 3), [0]

    def losses(params: Params, x: Tensor) -> Tensor:
        _, states = functional_call(model, params, (x,))
        return states[which[0]].sum((0, 2))

    direction = {name: normal(*value.shape) for name, value in params.items()}
    score_both = fg.reduce(losses)
    for which[0] in (0, 1, 0):
        found = score_both(params, x, fg.dot(direction))
        assert_scores(found, expected(losses, params, x, direction))


def test_every_error_class_is_reached_and_is_a_ghost_error() -> None:
    # Each is raised above; here that they are told apart, and caught as what users expect.
    assert issubclass(fg.InputError, ValueError)
    for kind in (
        *(fg.UnsupportedOpError, fg.ConservationError, fg.PlanError, fg.CheckError),
        *(fg.MemoryBudgetError, fg.SampleAxisError),  # in test_contract and test_positions
    ):
        assert issubclass(kind, RuntimeError)
        assert issubclass(kind, fg.GhostError)
        assert not issubclass(kind, fg.InputError)
    named = {name for name in fg.__all__ if name.endswith("Error")}
    kinds = {"UnsupportedOpError", "ConservationError", "PlanError", "CheckError"}
    kinds |= {"MemoryBudgetError", "SampleAxisError"}
    assert named == {"GhostError", "InputError"} | kinds


# Errors of funcghost's own leave no trace, either.


def break_linear() -> None:
    sets, arguments = [["weight", "bias"], ["input", "bias"]], ["input", "weight", "bias"]
    fg.register_rule(F.linear, linear=sets, arguments=arguments, factor=lambda a: torch.tensor(2.0))


@pytest.mark.parametrize("verify", ["first", "always"])
def test_conservation_error_leaves_no_trace(world: World, verify: Any) -> None:
    break_linear()
    before = world.state()
    with pytest.raises(fg.ConservationError, match=r"'0\.weight', .*'4\.weight'"):
        score(world, options=fg.Options(verify=verify))
    assert differences(before, world.state()) == []


def test_conservation_error_of_a_later_call_leaves_no_trace(world: World) -> None:
    step = fg.grad_and_reduce(world.losses, options=fg.Options(verify="always"))
    step(world.params, world.x, fg.dot(world.direction))
    before = world.state()
    break_linear()
    with pytest.raises(fg.ConservationError, match=r"'0\.weight', .*'4\.weight'"):
        step(world.params, world.x, fg.dot(world.direction))
    assert differences(before, world.state()) == []


# NaN and inf are no errors.


def small_model() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 2)).double()


NAN_CASES: dict[str, tuple[nn.Module, Callable[[Any, Any], Tensor], Tensor]] = {
    "rows": (small_model(), lambda out, x: out.square().sum(1), normal(5, 3)),
    "tokens": (small_model(), lambda out, x: out.square().sum((1, 2)), normal(5, 4, 3)),
    "sequence first": (small_model(), lambda out, x: out.square().sum((0, 2)), normal(5, 5, 3)),
    "images": (
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU()).double(),
        lambda out, x: out.square().sum((1, 2, 3)),
        normal(5, 3, 4, 4),
    ),
    "lstm": (
        nn.LSTM(3, 2, batch_first=True).double(),
        lambda out, x: out[0].square().sum((1, 2)),
        normal(5, 4, 3),
    ),
}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("case", NAN_CASES)
def test_one_bad_sample_spoils_its_own_score_alone(case: str, bad: float, caplog: pytest.LogCaptureFixture) -> None:
    model, criterion, x = NAN_CASES[case]
    axis = 1 if case == "sequence first" else 0
    params = {name: value.detach() for name, value in model.named_parameters()}
    direction = {name: normal(*value.shape) for name, value in params.items()}
    losses = fg.module_losses(model, criterion)
    wanted = expected(losses, params, x, direction)
    sick = x.clone()
    sick.select(axis, 2).fill_(bad)
    step = fg.grad_and_reduce(losses)
    out = step(params, sick, fg.dot(direction))
    healthy = torch.tensor([0, 1, 3, 4])
    assert not bool(out.reduced[2].isfinite())
    assert_scores(out.reduced[healthy], (wanted[0][healthy], wanted[1][healthy]))
    assert not bool(out.losses[2].isfinite())
    assert "conservation law will be checked with a batch whose are" in caplog.text
    # The training gradient is what autograd says, NaN and all.
    grads, _ = gradient(losses, params, sick)
    assert all(torch.equal(out.grads[k].isnan(), grads[k].isnan()) for k in grads)
    # And the next batch is right.
    assert_scores(step(params, x, fg.dot(direction)).reduced, wanted)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_first_finite_batch_is_verified(bad: float) -> None:
    # A parameter that is hidden goes unnoticed while the data are not finite, and no longer.
    params, x = hidden_params(), normal(5, 3)
    sick = x.clone()
    sick[1] = bad
    step = fg.reduce(hidden_losses)
    for _ in range(2):
        step(params, sick, fg.dot(params))
    assert not fg.plan(hidden_losses, params, sick).verified
    with pytest.raises(fg.ConservationError, match=re.escape("['hidden']")):
        step(params, x, fg.dot(params))
    verified = fg.plan(lambda p, x: hidden_losses(p, x, torch.matmul), params, x)
    assert verified.verified


def test_whole_batch_of_nan_passes_through() -> None:
    params, x = plan_params(), torch.full((4, 3), float("nan"), dtype=torch.float64)
    out = fg.grad_and_reduce(by_linear)(params, x, fg.dot(params))
    assert bool(out.reduced.isnan().all())
    assert bool(out.losses.isnan().all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_direction_passes_through(bad: float) -> None:
    # Only the scores that it enters: a second direction in the same pass is untouched.
    params, x = plan_params(), normal(4, 3)
    spoilt = {"w": params["w"].clone(), "b": torch.full_like(params["b"], bad)}
    both = fg.reduce(by_linear)(params, x, fg.dot(fg.stack([spoilt, params])))
    assert not bool(both[:, 0].isfinite().any())
    assert_scores(both[:, 1], expected(by_linear, params, x, params))
