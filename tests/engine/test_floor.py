"""No wasted work: what transforms cost, what they keep, what they wait for, and that they compile once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import funcghost as fg
from funcghost.algebra.contractions import along
from funcghost.algebra.factors import Outer
from funcghost.engine import contributions
from tests.engine.test_flops import (
    MODELS,
    Losses,
    Params,
    drawn,
    flops,
    perceptron,
    plain_step,
    problem,
    weight_products,
)
from tests.models.small import like, rows, small_gpt
from tests.naive import assert_close, assert_scores, expected
from tests.versions import compiles

WIDTHS = (20, 24, 28, 16)
BATCH = 3


def mlp(bias: bool = True) -> tuple[Losses, Params, Tensor]:
    model = perceptron(*WIDTHS)
    losses, params = problem(model)
    if not bias:
        constants = {name: value.detach() for name, value in params.items() if name.endswith("bias")}
        weights = {name: value for name, value in params.items() if name not in constants}
        return (lambda p, x: losses({**p, **constants}, x)), weights, torch.randn(BATCH, WIDTHS[0])
    return losses, params, torch.randn(BATCH, WIDTHS[0])


def stepping(losses: Losses, params: Params, batch: Any, **options: Any) -> Any:
    """A planned step that verifies nothing, so that its FLOPs are its own."""
    chosen = fg.Options(verify="never", **options)
    return fg.grad_and_reduce(losses, plan=fg.plan(losses, params, batch), options=chosen)


def scoring(losses: Losses, params: Params, batch: Any, **options: Any) -> Any:
    chosen = fg.Options(verify="never", **options)
    return fg.reduce(losses, plan=fg.plan(losses, params, batch, fg.squared_norm()), options=chosen)


USES = [2 * BATCH * d * p for d, p in pairwise(WIDTHS)]
ACTIVATIONS = sum(USES[1:])
"""The gradients of the activations: the first layer's input has none."""


# -- FLOPs -------------------------------------------------------------------------------------------------------------


def test_a_step_is_four_thirds_where_the_input_has_a_gradient() -> None:
    """An embedding comes first, so that every product has its three in training, and the direction is one more."""
    build, draw = MODELS["gpt"]
    (losses, params), batch = problem(build()), draw()
    weights = weight_products(losses, params, batch)
    step = stepping(losses, params, batch)
    plain = flops(plain_step(losses), params, batch)
    attention = plain - 3 * weights
    assert 3 * (flops(step, params, batch, fg.dot(drawn(params))) - attention) == 4 * (plain - attention)


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("transform", ["step", "score"])
def test_a_low_rank_direction_costs_its_rank(rank: int, transform: str) -> None:
    """r (d + p) per token and weight, twice, as FLOPs go."""
    losses, params, batch = mlp()
    small = fg.compress(drawn(params), rank=rank)
    assert sum(isinstance(leaf, fg.LowRank) for leaf in small.values()) == len(WIDTHS) - 1
    low = sum(2 * BATCH * rank * (d + p) for d, p in pairwise(WIDTHS))
    assert low == sum(2 * BATCH * leaf.cost for leaf in small.values() if isinstance(leaf, fg.LowRank))
    if transform == "step":
        found = flops(stepping(losses, params, batch), params, batch, fg.dot(small))
        assert found == 2 * sum(USES) + ACTIVATIONS + low
    else:
        found = flops(scoring(losses, params, batch), params, batch, fg.dot(small))
        assert found == sum(USES) + ACTIVATIONS + low


def test_a_low_rank_direction_costs_its_rank_in_a_gpt() -> None:
    """The tied leaf is multiplied with at the head, and one of its factors where it is looked up.

    What is added to activations, such as positions, has to be written out: 2 m n r, once.
    """
    build, draw = MODELS["gpt"]
    (losses, params), batch = problem(build()), draw()
    small = fg.compress(drawn(params), rank=1)
    step = stepping(losses, params, batch)
    extra = flops(step, params, batch, fg.dot(small)) - flops(plain_step(losses), params, batch)
    names = [n for n, leaf in small.items() if isinstance(leaf, fg.LowRank) and n != "positions"]
    assert len(names) == 9
    looked_up = small["tokens.weight"].cols.numel()
    tokens, written_out = batch.numel(), 2 * params["positions"].numel()
    assert extra == 2 * tokens * (sum(small[n].cost for n in names) + looked_up) + written_out


def test_several_directions_cost_the_sum() -> None:
    losses, params, batch = mlp()
    step = stepping(losses, params, batch)
    dense, small = drawn(params), fg.compress(drawn(params), rank=2)
    plain = flops(plain_step(losses), params, batch)
    low = sum(2 * BATCH * 2 * (d + p) for d, p in pairwise(WIDTHS))
    for several, cost in (([dense, small], sum(USES) + low), ([small, small], 2 * low), ([dense] * 3, 3 * sum(USES))):
        assert flops(step, params, batch, fg.dot(fg.stack(several))) == plain + cost
        assert flops(step, params, batch, [fg.dot(v) for v in several]) == plain + cost


def test_pairs_cost_a_forward_and_the_gradients_of_the_activations() -> None:
    losses, params, batch = mlp()
    keep = fg.pairs(losses, plan=fg.plan(losses, params, batch), options=fg.Options(verify="never"))
    assert flops(keep, params, batch) == sum(USES) + ACTIVATIONS
    pairs = keep(params, batch)
    assert flops(fg.combine, pairs, torch.randn(BATCH)) == sum(USES)
    assert flops(fg.materialize, pairs) == sum(USES)
    assert flops(pairs.as_direction) == 0  # three positions: every leaf is cheaper as it is
    assert flops(pairs.weighted, torch.randn(BATCH)) == 0


@pytest.mark.parametrize("route", ["ghost", "materialise"])
def test_quadratic_reducers_cost_what_they_say(route: Any) -> None:
    losses, params, batch = mlp(bias=False)
    score = scoring(losses, params, batch, inner_products=route)
    forward = sum(USES) + ACTIVATIONS
    sides = sum(d + p for d, p in pairwise(WIDTHS))
    areas = sum(d * p for d, p in pairwise(WIDTHS))
    costs: dict[str, tuple[Any, int, int]] = {
        "norm": (fg.squared_norm(), 0, 2 * BATCH * areas),  # with one position: squares of sizes, no products
        "gram": (fg.gram(), 2 * BATCH**2 * sides, 2 * BATCH * areas + 2 * BATCH**2 * areas),
        "cross": (fg.cross(1), 2 * (BATCH - 1) * sides, 2 * BATCH * areas + 2 * (BATCH - 1) * areas),
    }
    for reducer, ghost, materialise in costs.values():
        wanted = ghost if route == "ghost" else materialise
        assert flops(score, params, batch, reducer) == forward + wanted


# -- memory ------------------------------------------------------------------------------------------------------------


@contextmanager
def saved_storages() -> Iterator[dict[int, int]]:
    """The memory that autograd keeps, by storage."""
    found: dict[int, int] = {}
    alive: list[Any] = []

    def pack(value: Tensor) -> Tensor:
        memory = value.untyped_storage()
        alive.append(memory)
        found[memory._cdata] = memory.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        yield found


@pytest.mark.parametrize("kind", ["dense", "low rank", "norms"])
def test_what_is_saved_is_shared_with_autograd(kind: str) -> None:
    """Beside what a plain step keeps there are the direction and the probe: no activation is kept twice."""
    build, draw = MODELS["gpt"]
    (losses, params), batch = problem(build()), draw()
    direction = drawn(params) if kind == "dense" else fg.compress(drawn(params), rank=1)
    reducer: Any = fg.squared_norm() if kind == "norms" else fg.dot(direction)
    step = stepping(losses, params, batch)
    with saved_storages() as plain:
        plain_step(losses)(params, batch)
    with saved_storages() as ours:
        step(params, batch, reducer)
    leaves = [] if kind == "norms" else torch.utils._pytree.tree_leaves(direction)
    probe = 4 * len(batch) * (kind != "norms")
    # What the lookup needs is its index, and a scale of positions their number: the input of the batch and no more.
    given = batch.untyped_storage().nbytes()
    assert sum(ours.values()) <= sum(plain.values()) + sum(leaf.nbytes for leaf in leaves) + probe + given


class Sizes(TorchDispatchMode):
    """Counts the results of so many entries that are no views."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.entries, self.count = entries, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        fresh = isinstance(out, Tensor) and not any(value.alias_info for value in func._schema.returns)
        self.count += fresh and out.numel() == self.entries
        return out


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_directions_of_a_wide_head_make_nothing_of_the_size_of_its_output(bias: bool, count: int) -> None:
    """`g V` in place of `J V`, at the same FLOPs: beside the outputs and their gradients there are no such tensors."""
    b, t, d, p = 3, 5, 6, 40
    model = torch.nn.Linear(d, p, bias=bias).double()
    params: Params = dict(model.named_parameters())
    x = torch.randn(b, t, d, dtype=torch.float64)
    losses = fg.module_losses(model, lambda out, _: torch.logsumexp(out, -1).sum(1))
    directions: list[Any] = [drawn(params) for _ in range(count)]
    step = stepping(losses, params, x)
    with Sizes(b * t * p) as plain:
        plain_step(losses)(params, x)
    with Sizes(b * t * p) as ours:
        found = step(params, x, fg.dot(fg.stack(directions))).reduced
    assert ours.count == plain.count > 1
    extra = flops(step, params, x, fg.dot(fg.stack(directions))) - flops(plain_step(losses), params, x)
    assert 2 * b * t * d * p == step.__self__.plans[0].flops
    # Many are scored by the gradients of samples.
    assert extra == 2 * b * d * p * (t * count if count < 3 else t + count)
    for k, direction in enumerate(directions):
        assert_scores(found[:, k], expected(losses, params, x, direction))


WIDE: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = {
    "linear": ((12, 4), F.linear),
    "matmul": ((4, 12), torch.matmul),
    "einsum": ((4, 12), lambda x, w: torch.einsum("bti,io->bto", x, w)),
    "heads": ((4, 3, 4), lambda x, w: torch.einsum("bti,iho->bhto", x, w)),
    "blocks": ((2, 2, 7), lambda x, w: torch.einsum("btqi,qio->btqo", x.unflatten(-1, (2, 2)), w)),
    "from the left": ((12, 5), lambda x, w: w @ x),
    "transposed": ((12, 4), lambda x, w: x @ w.T),
    "addmm": ((4, 12), lambda x, w: torch.addmm(w[0], x.flatten(0, 1), w, alpha=0.5).unflatten(0, (3, 5))),
    "bmm": ((3, 4, 12), lambda x, w: torch.bmm(x.transpose(0, 1)[:3].contiguous(), w).transpose(0, 1)),
    "twice": ((4, 12), lambda x, w: F.linear(x @ w, w)),
}


@pytest.mark.parametrize("name", WIDE)
def test_wide_products_of_any_form_score_by_factors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, op = WIDE[name]
    params = {"w": torch.randn(shape, dtype=torch.float64)}
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    met = list[Any]()

    def seen(use: Any, direction: Any) -> Tensor:
        met.append(use)
        return along(use, direction)

    monkeypatch.setattr(contributions, "along", seen)
    losses = lambda p, x: op(x, p["w"]).sin().flatten(1).sum(1)  # noqa: E731
    score, direction = fg.reduce(losses), like(params)
    for _ in range(2):
        assert_scores(score(params, x, fg.dot(direction)), expected(losses, params, x, direction))
    assert any(isinstance(use, Outer) for use in met)


def test_a_wide_product_beside_what_is_none_costs_one_product() -> None:
    """A parameter with a row for each sample has no factors: `J V` is of both together, not of each by itself."""
    b, d, p = 4, 3, 12
    params = {"rows": torch.randn(b, p, dtype=torch.float64), "w": torch.randn(d, p, dtype=torch.float64)}
    x, direction = torch.randn(b, d, dtype=torch.float64), like(params)

    def losses(p: Params, x: Tensor) -> Tensor:
        return torch.addmm(p["rows"], x, p["w"]).sin().sum(1)

    step = stepping(losses, params, x)
    extra = flops(step, params, x, fg.dot(direction)) - flops(plain_step(losses), params, x)
    assert extra == 2 * b * d * p
    assert_scores(step(params, x, fg.dot(direction)).reduced, expected(losses, params, x, direction))


# -- compilers ---------------------------------------------------------------------------------------------------------


@compiles
def test_nothing_is_compiled_again_when_directions_and_values_change() -> None:
    torch._dynamo.reset()
    _, losses, params = small_gpt(layers=1)
    step = fg.grad_and_reduce(losses, plan=fg.plan(losses, params, rows()))
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    kinds: Sequence[Callable[[], Any]] = (lambda: like(params), lambda: fg.compress(like(params), rank=1))
    for make in kinds:
        compiled(params, rows(), fg.dot(make()))
        torch._dynamo.utils.counters.clear()
        with torch._dynamo.config.patch(error_on_recompile=True):
            for number in range(50):
                for value in params.values():
                    value.detach().add_(0.01 * torch.randn_like(value))
                batch, direction = rows(), make()
                found = compiled(params, batch, fg.dot(direction)).reduced
                if number % 49 == 0:
                    assert_close(found, step(params, batch, fg.dot(direction)).reduced, 1e-4)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
        assert not torch._dynamo.utils.counters["recompiles"]


WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "equal.default")


class Ops(TorchDispatchMode):
    """Notes the names of the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def by_token(params: Params) -> Any:
    along: Any = fg.dot(like(params))
    return fg.per_token(along)


def reducers(params: Params) -> dict[str, Any]:
    small = fg.compress(like(params), rank=1)
    return {
        "dot": fg.dot(like(params)),
        "low rank": fg.dot(small),
        "stack": fg.dot(fg.stack([like(params), small])),
        "bound": fg.dot(small, with_bound=True),
        "norm": fg.squared_norm(),
        "gram": fg.gram(),
        "cross": fg.cross(1),
        "project": fg.project(8),
        "per token": by_token(params),
    }


@pytest.mark.parametrize("kind", ["dot", "gram", "per token"])  # all of them in test_no_waiting
def test_a_planned_step_waits_for_no_value(kind: str) -> None:
    """It runs on tensors without values, and of its ops none depends on any."""
    _, losses, params = small_gpt(layers=1)
    reducer, batch = reducers(params)[kind], rows()
    if kind == "per token":  # the positions' own embedding has no samples
        params = {name: value for name, value in params.items() if name != "positions.weight"}
        reducer = by_token(params)
        whole = losses
        fixed = {"positions.weight": small_gpt(layers=1)[2]["positions.weight"].detach()}

        def losses(p: Params, b: Any) -> Tensor:
            return whole({**p, **fixed}, b)

    step = fg.grad_and_reduce(losses, plan=fg.plan(losses, params, batch, reducer))
    with Ops() as ops:
        step(params, batch, reducer)
    assert len(ops.names) > 50
    assert not [name for name in ops.names if any(wait in name for wait in WAITS)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        graph = make_fx(lambda tokens: step(params, (tokens,), reducer).reduced, tracing_mode="fake")(batch[0])
    targets = [str(node.target) for node in graph.graph.nodes]
    assert len(targets) > 50
    assert not [name for name in targets if any(wait in name for wait in WAITS)]


# -- lower precision for scores ----------------------------------------------------------------------------------------

NARROW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("kind", ["dot", "low rank", "stack", "norm", "gram", "cross"])
def test_compute_dtype_leaves_gradients_alone_and_costs_its_rounding(kind: str, dtype: torch.dtype) -> None:
    """The operands of products are off by eps / 2 each, so a score by the size of its terms times their number."""
    _, losses, params = small_gpt(width=32, layers=1)
    batch = rows(8)
    reducer = reducers(params)[kind]
    plain = fg.grad_and_reduce(losses)(params, batch, reducer)
    found = fg.grad_and_reduce(losses, options=fg.Options(compute_dtype=dtype))(params, batch, reducer)
    assert torch.equal(found.losses, plain.losses)
    for name, gradient in plain.grads.items():
        assert torch.equal(found.grads[name], gradient)
    assert found.reduced.dtype == plain.reduced.dtype == torch.float32
    off = found.reduced - plain.reduced
    eps = torch.finfo(dtype).eps
    relative = float(off.norm() / plain.reduced.norm())
    assert 0 < relative <= 4 * eps, (kind, relative / eps)


@pytest.mark.parametrize("dtype", NARROW)
def test_compute_dtype_is_within_the_rounding_of_two_operands(dtype: torch.dtype) -> None:
    """|error_i| <= eps sum |terms_i|: half an eps for the activation, half for the direction."""
    _, losses, params = small_gpt(width=32, layers=1)
    batch, direction = rows(8), like(params)
    wanted = expected(losses, params, batch, direction)
    found = fg.reduce(losses, options=fg.Options(compute_dtype=dtype))(params, batch, fg.dot(direction))
    assert_scores(found, wanted, torch.finfo(dtype).eps)


def test_a_plan_for_low_rank_directions_has_verified_their_factors() -> None:
    """A compiler verifies nothing, so the plan made before has to."""
    losses, params, batch = mlp()
    assert fg.plan(losses, params, batch, fg.dot(fg.compress(drawn(params), rank=1))).factored
    assert not fg.plan(losses, params, batch, fg.dot(drawn(params))).factored
