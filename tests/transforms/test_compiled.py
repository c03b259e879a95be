"""A compiled step gives the eager step's numbers, or raises: whatever Python the losses read, however it changes."""

from collections import Counter, OrderedDict
from contextlib import suppress
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import funcghost as fg
from tests.models.small import like
from tests.naive import assert_close, assert_scores, expected
from tests.versions import compiles, unwrapped

Params = dict[str, Tensor]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torch.*")


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def compiled(losses: Any, plan: fg.Plan | None = None, transform: Any = fg.grad_and_reduce, **how: Any) -> Any:
    options: dict[str, Any] = {"fullgraph": True, "backend": "aot_eager"} | how
    return torch.compile(transform(losses, plan=plan), **options)


def agrees(step: Any, losses: Any, params: Params, batch: Any) -> None:
    """The compiled step's losses, gradient and scores are those of autograd, with the same random numbers."""
    direction, seed = like(params), torch.initial_seed()
    torch.manual_seed(seed)
    wanted = expected(losses, params, batch, direction)
    torch.manual_seed(seed)
    eager = losses(params, batch)
    after = torch.get_rng_state()
    torch.manual_seed(seed)
    out = step(params, batch, {"dot": fg.dot(direction)})
    assert torch.equal(torch.get_rng_state(), after)
    assert_close(out.losses, eager.detach(), 1e-12)
    assert_scores(out.reduced["dot"], wanted)


def baked(graph: torch.fx.GraphModule, inputs: Any) -> Any:
    """A backend that keeps what ran while it traced, as all do but "eager"; the fastest to compile."""
    return make_fx(graph)(*inputs)


# -- the law -----------------------------------------------------------------------------------------------------------

WHERE = ("closure", "global", "module", "batch")
STATE: dict[str, Any] = {}
"""What losses read that read a global variable."""

states = st.fixed_dictionaries(
    {
        "act": st.sampled_from(["tanh", "sin"]),
        "mix": st.booleans(),
        "beta": st.sampled_from([0.0, 0.5, 2.0]),
        "shift": st.integers(0, 3),
        "order": st.permutations([0, 1, 2, 3]),
        "terms": st.lists(st.integers(1, 3), max_size=2),
        "training": st.booleans(),
        "none": st.sampled_from([None, ()]),
    }
)


class Reading(nn.Module):
    """A model whose Python state is an attribute, or is handed in."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.state: dict[str, Any] = {}
        self.scale = nn.Buffer(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, p: Params, x: Tensor, state: dict[str, Any]) -> Tensor:
        h = self.drop(x) @ p["w"]
        h = torch.tanh(h) if state["act"] == "tanh" else torch.sin(h)
        h = h.roll(state["shift"], 0)
        h = torch.cat([h[i : i + 1] for i in state["order"]])
        if state["mix"]:
            h = h + h.mean(0, keepdim=True)
        out = (h @ p["v"]).square().sum(1) + state["beta"] * torch.logsumexp(h @ h.T, 1)
        for power in state["terms"]:
            out = out + (p["b"] ** power).sum() * h.sum(1)
        return out * self.scale


@given(where=st.sampled_from(WHERE), drawn=st.lists(states, min_size=2, max_size=2), planned=st.booleans())
@settings(max_examples=max(2, settings().max_examples // 10) if settings().max_examples < 1000 else 1000)
def test_whatever_python_the_losses_read(where: str, drawn: list[dict[str, Any]], planned: bool) -> None:
    """It changes between the calls, and one call is as the first."""
    torch._dynamo.reset()
    model, held = Reading(), dict[str, Any]()
    params, x = {"w": normal(3, 4), "v": normal(4, 2), "b": normal(2)}, normal(4, 3)

    def losses(p: Params, batch: Any) -> Tensor:
        x, given = batch
        found = {"closure": held, "global": STATE, "module": model.state, "batch": given}[where]
        value: Tensor = model(p, x, found)
        return value

    def arguments(state: dict[str, Any]) -> Any:
        for place in (held, STATE, model.state):
            place.update(state)
        model.train(state["training"])
        return x, dict(state) if where == "batch" else None

    plan = fg.plan(losses, params, arguments(drawn[0])) if planned else None
    step = compiled(losses, plan, backend="aot_eager" if where == "batch" else baked)  # it may hold symbols
    for state in (*drawn, drawn[0]):
        batch = arguments(state)
        with suppress(fg.GhostError), unwrapped():
            agrees(step, losses, params, batch)


# -- what it is about --------------------------------------------------------------------------------------------------


def scaled(factor: float) -> Any:
    return lambda p, x: factor * torch.tanh(x @ p["w"]).square().sum(1)


@compiles
def test_every_step_has_graphs_of_its_own() -> None:
    """More of them in one process than a compiler makes graphs for one function."""
    torch._dynamo.reset()
    params, x = {"w": normal(3, 2)}, normal(4, 3)
    for factor in range(9):
        agrees(compiled(scaled(factor), backend="eager" if factor < 7 else "aot_eager"), scaled(factor), params, x)


@compiles
def test_steps_of_one_compiled_function() -> None:
    torch._dynamo.reset()
    params, x, direction = {"w": normal(3, 2)}, normal(4, 3), {"w": normal(3, 2)}
    steps: dict[Any, Any] = {
        factor: fg.reduce(scaled(factor), plan=fg.plan(scaled(factor), params, x)) for factor in (1.0, 3.0)
    }
    for reduction in ("sum", "mean"):
        steps[reduction] = fg.grad_and_reduce(scaled(1.0), reduction=reduction)
    run = torch.compile(lambda key, x: steps[key](params, x, fg.dot(direction)), fullgraph=True, backend="aot_eager")
    for key, step in steps.items():
        found, wanted = run(key, x), step(params, x, fg.dot(direction))
        if isinstance(key, str):
            assert_close(found.grads["w"], wanted.grads["w"], 1e-12)
            found, wanted = found.reduced, wanted.reduced
        assert_close(found, wanted, 1e-12)


@pytest.mark.parametrize("planned", ["in eval", "not at all"])
@compiles
def test_the_mode_of_a_module(planned: str) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    losses, params = fg.module_losses(model, lambda out, batch: out.square().sum(1)), dict(model.named_parameters())
    x, bn = normal(4, 3), model[1]
    model.eval()
    step = compiled(losses, None if planned == "not at all" else fg.plan(losses, params, x))
    for mode in (True, False, True):
        model.train(mode)
        before, drawn = [v.clone() for v in bn.buffers()], torch.get_rng_state()
        out = step(params, x, {"dot": fg.dot(like(params))})
        after = [v.clone() for v in bn.buffers()]
        for value, old in zip(bn.buffers(), before, strict=True):
            value.copy_(old)
        torch.set_rng_state(drawn)
        eager = fg.grad_and_reduce(losses)(params, x, {"dot": fg.dot(like(params))})
        assert_close(out.losses, eager.losses, 1e-12)
        assert_close(out.reduced["dot"], eager.reduced["dot"], 1e-10)
        for value, new in zip(bn.buffers(), after, strict=True):
            assert_close(value.double(), new.double(), 1e-12)


@compiles
def test_numbers_in_the_batch_name_the_rows() -> None:
    torch._dynamo.reset()
    params = {"w": normal(3, 4), "v": normal(4, 2)}

    def losses(p: Params, batch: Any) -> Tensor:
        rows, spans = batch
        h = torch.tanh(rows @ p["w"]) @ p["v"]
        return torch.stack([h[a:b].square().sum() for a, b in spans])

    step = compiled(losses)
    for spans in ([(0, 3), (3, 6)], [(2, 4), (4, 6)], [(4, 6), (2, 4)]):
        agrees(step, losses, params, (normal(6, 3), spans))


@pytest.mark.parametrize("dynamic", [None, True])
@compiles
def test_numbers_that_hold_for_one_size_alone(dynamic: bool | None) -> None:
    """Of six rows the two halves, of eight not."""
    torch._dynamo.reset()
    params = {"w": normal(3, 4)}

    def losses(p: Params, rows: Tensor) -> Tensor:
        h = torch.tanh(rows @ p["w"])
        return torch.stack([h[a:b].square().sum() for a, b in ((0, 3), (3, 6))])

    step = compiled(losses, dynamic=dynamic)
    for rows in (6, 8, 10):
        agrees(step, losses, params, normal(rows, 3))


@compiles
def test_conversions_by_any_name() -> None:
    """A compiler's tensors call `x.float()` another name; of values, of indices and of a parameter."""
    torch._dynamo.reset()
    params, rows = {"w": torch.randn(3, 4)}, torch.randn(6, 3)

    def losses(p: Params, rows: Tensor) -> Tensor:
        h = torch.tanh(rows.double().cpu() @ p["w"].double())
        kept = h[torch.arange(len(rows), dtype=torch.int32).long()] * (rows > 0).any(1, keepdim=True).bool().double()
        return kept.square().sum(1)

    reducer = fg.dot(like(params))
    found, wanted = (step(params, rows, reducer) for step in (compiled(losses), fg.grad_and_reduce(losses)))
    assert_close(found.losses, wanted.losses, 1e-12)
    assert_close(found.reduced, wanted.reduced, 1e-6)


@compiles
def test_rows_in_any_order() -> None:
    torch._dynamo.reset()
    params = {"w": normal(3, 4), "v": normal(4, 2)}

    def losses(p: Params, batch: Any) -> Tensor:
        x, order = batch
        return (torch.tanh(x @ p["w"])[order] @ p["v"]).square().sum(1)

    step = compiled(losses, fg.plan(losses, params, (normal(4, 3), torch.arange(4))))
    for order in ([0, 1, 2, 3], [2, 0, 3, 1], [1, 1, 0, 3]):
        agrees(step, losses, params, (normal(4, 3), torch.tensor(order)))


@compiles
def test_a_batch_made_in_the_graph_is_held_to_the_plan() -> None:
    """The sites are the same, and yet it is another program."""
    torch._dynamo.reset()
    params, x, direction, held = {"w": normal(3, 2)}, normal(4, 3), {"w": normal(3, 2)}, {"flip": False}

    def losses(p: Params, x: Tensor) -> Tensor:
        x = x.flip(0) if held["flip"] else x
        return torch.tanh(x @ p["w"]).square().sum(1)

    step = fg.reduce(losses, plan=fg.plan(losses, params, x))
    run = torch.compile(lambda x: step(params, 2 * x, fg.dot(direction)), fullgraph=True, backend="aot_eager")
    assert_scores(run(x), expected(losses, params, 2 * x, direction))
    held["flip"] = True
    with pytest.raises(fg.PlanError), unwrapped():
        run(x)
    step(params, 2 * x, fg.dot(direction))
    assert_scores(run(x), expected(losses, params, 2 * x, direction))


class Named(NamedTuple):
    x: Tensor
    seed: Tensor | None = None
    how: tuple[Any, ...] = ("sum", 1, None)


@pytest.mark.parametrize("kind", ["named tuple", "dict", "list"])
@compiles
def test_any_tree_is_a_batch(kind: str) -> None:
    torch._dynamo.reset()
    params, x = {"w": normal(3, 2)}, normal(4, 3)
    batch = {"named tuple": Named(x), "dict": {"x": x, "n": None, "s": "a"}, "list": [[x], None, (), {"k": [2, None]}]}

    def losses(p: Params, batch: Any) -> Tensor:
        x = batch.x if isinstance(batch, Named) else batch["x"] if isinstance(batch, dict) else batch[0][0]
        return torch.tanh(x @ p["w"]).square().sum(1)

    agrees(compiled(losses), losses, params, batch[kind])


@compiles
def test_a_buffer_that_is_replaced_or_changed() -> None:
    torch._dynamo.reset()
    model = nn.Linear(3, 2).double()
    model.register_buffer("scale", torch.ones(2, dtype=torch.float64))
    params: Params = dict(model.named_parameters())
    x = normal(4, 3)

    def losses(p: Params, x: Tensor) -> Tensor:
        return (torch.func.functional_call(model, p, (x,)) * model.scale).square().sum(1)

    step = compiled(losses, fg.Plan.from_json(fg.plan(losses, params, x).to_json()))
    agrees(step, losses, params, x)
    model.scale.mul_(3.0)  # type: ignore[operator]
    agrees(step, losses, params, x)
    model.scale = normal(2)
    agrees(step, losses, params, x)
    model.scale.mul_(3.0)
    agrees(step, losses, params, x)
    out = step(params, x, None)
    assert_close(out.losses, losses(params, x).detach(), 1e-12)
    model.scale.mul_(3.0)
    assert_close(step(params, x, None).losses, losses(params, x).detach(), 1e-12)


@compiles
def test_a_vmapped_loss_that_reads_a_number() -> None:
    torch._dynamo.reset()
    params, x, held = {"w": normal(3, 2)}, normal(4, 3), {"power": 2}
    losses = fg.per_example(lambda p, x: (torch.tanh(x @ p["w"]) ** held["power"]).sum())
    step = compiled(losses)
    for power in (2, 3):
        held["power"] = power
        agrees(step, losses, params, x)


def counting(calls: list[int]) -> Any:
    def losses(p: Params, x: Tensor) -> Tensor:
        calls.append(1)
        return scaled(1.0)(p, x) / min(len(calls), 1)

    return losses


class Remembers:
    last: Any = None

    def __call__(self, p: Params, x: Tensor) -> Tensor:
        self.last = torch.tanh(x @ p["w"])
        return self.last.square().sum(1)


def changing(held: Any, change: Any) -> Any:
    def losses(p: Params, x: Tensor) -> Tensor:
        change(held)
        return scaled(1.0)(p, x)

    return losses


def counted(held: dict[str, Any]) -> None:
    held["n"] += 1


def swapped(held: dict[str, Any]) -> None:
    held["a"], held["b"] = held["b"], held["a"]


def grown_and_shrunk(held: list[Any]) -> None:
    held.append(len(held))
    held.pop()


class Notes:
    n: int = 0
    last: Any = None


def written_and_put_back(held: Notes) -> None:
    """As what collects outputs in Hugging Face's models does, and context variables."""
    before = held.n, held.last
    held.n, held.last = 7, torch.ones(1)
    held.n, held.last = before


def replaced_and_put_back(held: dict[str, Any]) -> None:
    held["n"], before = 5, held["n"]
    held["new"] = None
    held["n"] = before
    del held["new"]


PLAIN = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False)).double()
KEPT = {
    "a list": changing([1, None, "a"], grown_and_shrunk),
    "attributes": changing(Notes(), written_and_put_back),
    "a dict": changing({"n": 1, "none": None}, replaced_and_put_back),
    "a dict by descent": changing(OrderedDict(n=1, none=None), replaced_and_put_back),
    "modules without bias": lambda p, x: (
        torch.func.functional_call(PLAIN, {"0.weight": p["w"].T}, (x,)).square().sum(1)
    ),
}


@pytest.mark.parametrize("what", KEPT)
@compiles
def test_what_is_put_back_has_not_changed(what: str) -> None:
    torch._dynamo.reset()
    agrees(compiled(KEPT[what], backend="eager"), KEPT[what], {"w": normal(3, 2)}, normal(4, 3))


class Opaque:
    def __init__(self, x: Tensor) -> None:
        self.x = x


def with_noise_that_is_carried(p: Params, x: Tensor) -> Tensor:
    h = nn.functional.dropout(x @ p["w"] - (x @ p["w"]).mean(0), 0.5)
    return (h - h.mean(0)).square().sum(1)


REFUSED = {
    "random numbers drawn twice": (with_noise_that_is_carried, lambda x: x, None),
    "a list that grows": (counting([]), lambda x: x, "change"),
    "a number in a dict": (changing({"n": 0}, counted), lambda x: x, "change"),
    "a number in a dict by descent": (changing(Counter(n=0), counted), lambda x: x, "change"),
    "tensors that change places": (changing({"a": torch.ones(1), "b": torch.ones(2)}, swapped), lambda x: x, "change"),
    "the order of a list": (changing([1, 2], lambda held: held.reverse()), lambda x: x, "change"),
    "an attribute": (Remembers(), lambda x: x, r"\['last'\]"),
    "an object": (lambda p, batch: scaled(1.0)(p, batch.x), Opaque, "Opaque.*register_pytree_node"),
    "a print": (lambda p, x: (print(id(x)), scaled(1.0)(p, x))[1], lambda x: x, "cannot read the losses"),
}


@pytest.mark.parametrize("what", REFUSED)
@compiles
def test_what_a_graph_cannot_repeat_is_refused(what: str) -> None:
    torch._dynamo.reset()
    losses, batch, says = REFUSED[what]
    direction = {"w": normal(3, 2)}
    with pytest.raises(fg.PlanError, match=f"(?s){says or ''}"), unwrapped():
        compiled(losses)({"w": normal(3, 2)}, batch(normal(4, 3)), fg.dot(direction))
