"""Planned steps never wait for the device: no value comes to the host, in any reducer or anything built on them.

They run on the `meta` device, whose tensors have no values: what asks for one fails. What lies on the CPU there, such
as the learning rates of an optimizer's state, lies there beside a GPU, too, and may be read.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import optree
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import funcghost as fg
from funcghost.algebra.directions import LowRank
from funcghost.attribution import in_run
from funcghost.training import clipping, geometry, selection, updates, weighting
from tests.models.small import Params, like, rows, small_gpt
from tests.naive import assert_close

WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "equal.default")
Case = Callable[["World"], Any]


class NoWaiting(TorchDispatchMode):
    """Fails on ops that need a value of a tensor beside the CPU, and on copies between it and the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        given: Any = (args, kwargs)
        tensors: list[Tensor] = [leaf for leaf in optree.tree_leaves(given) if isinstance(leaf, Tensor)]
        away = [tensor.device.type != "cpu" for tensor in tensors]
        if any(away) and any(wait in name for wait in WAITS):
            raise AssertionError(f"{name} waits for a value")
        copied = "_to_copy" in name or "copy_.default" in name
        ends = [*tensors, out] if isinstance(out, Tensor) else tensors
        if copied and any(away) and any(end.device.type == "cpu" for end in ends):
            raise AssertionError(f"{name} copies to the host")
        return out


class World:
    """A small GPT without values, planned before it lost them."""

    def __init__(self) -> None:
        model, self.losses, params = small_gpt(layers=1)
        batch, validation = rows(6), rows(3)
        self.plan = fg.plan(self.losses, params, batch, {"norm": fg.squared_norm(), "dot": fg.dot(like(params))})
        small = fg.compress(like(params), rank=1)
        model.to("meta")
        self.params: Params = dict(model.named_parameters())
        self.batch, self.validation = ((tokens[0].to("meta"),) for tokens in (batch, validation))
        self.direction = {name: torch.empty_like(value) for name, value in self.params.items()}
        self.small = optree.tree_map(self._away, small, is_leaf=lambda leaf: isinstance(leaf, LowRank))

    def _away(self, leaf: Any) -> Any:
        if not isinstance(leaf, LowRank):
            return leaf.to("meta")
        parts: Any = (value.to("meta") if isinstance(value, Tensor) else value for value in vars(leaf).values())
        return LowRank(*parts)

    def kept(self, batch: Any) -> fg.Pairs:
        never = fg.Options(verify="never")
        return fg.pairs(self.losses, plan=self.plan, options=never)(self.params, batch)


def _project(kind: Any, world: World) -> Any:
    return fg.project(8, kind=kind)


REDUCERS: dict[str, Callable[[World], Any]] = {
    "dot": lambda w: fg.dot(w.direction),
    "low rank": lambda w: fg.dot(w.small),
    "stack": lambda w: fg.dot(fg.stack([w.direction, w.small])),
    "bound": lambda w: fg.dot(w.small, with_bound=True),
    "norm": lambda w: fg.squared_norm(),
    "gram": lambda w: fg.gram(),
    "cross": lambda w: fg.cross(2),
    "norms by parameter": lambda w: fg.per_param(fg.squared_norm()),
    "scores by parameter": lambda w: fg.per_param(fg.dot(w.direction)),
    **{f"project, {kind}": partial(_project, kind) for kind in ("rademacher", "gaussian", "kronecker", "sjlt", "mask")},
}


def account(optimizer: Any, credit: Any, max_norm: float | None) -> Case:
    def run(w: World) -> Any:
        update, state = updates.of(optimizer(w.params.values()), w.params)
        used = update if max_norm is None else updates.clipped(update, max_norm)
        step = in_run.along_path(w.losses, used, credit=credit, plan=w.plan)
        with NoWaiting():
            return step(w.params, w.batch, state=state, validation=[w.validation])

    return run


def weigh(w: World) -> Any:
    step = weighting.weighted_gradient(w.losses, selection.quantile(0.5), plan=w.plan)
    return step(w.params, w.batch, fg.dot(w.direction))


def policies(w: World) -> Any:
    scores, gram = torch.empty(6, device="meta"), torch.empty(6, 6, device="meta")
    simple = (selection.top_k(2), selection.threshold(), selection.boltzmann(2, 1.0), weighting.rectified)
    found = [policy(scores) for policy in simple]
    return [*found, weighting.tempered(scores, 1.0), selection.greedy(2, 0.5)({"score": scores, "gram": gram})]


def clip(groups: Any) -> Case:
    return lambda w: clipping.clipped_gradient(w.losses, groups=groups, plan=w.plan)(w.params, w.batch, 1.0)


BUILT: dict[str, Case] = {
    "pairs": lambda w: w.kept(w.batch),
    "combine": lambda w: fg.combine(w.kept(w.batch), w.batch[0].new_empty(6, dtype=torch.float32)),
    "cross_dots": lambda w: fg.cross_dots(w.kept(w.batch), w.kept(w.validation)),
    "cosine": lambda w: fg.cosine(w.kept(w.batch), w.kept(w.validation)),
    "materialize": lambda w: fg.materialize(w.kept(w.batch)),
    "track": lambda w: fg.track(w.kept(w.validation), w.small),
    "clip together": clip(clipping.together),
    "clip by parameter": clip(clipping.by_parameter),
    "weigh": weigh,
    "policies": policies,
    "first order": lambda w: in_run.first_order(w.losses, plan=w.plan)(
        w.params, w.batch, lr=0.1, validation=[w.validation]
    ),
    "second order": lambda w: in_run.second_order(w.losses, plan=w.plan)(
        w.params, w.batch, lr=0.1, validation=[w.validation]
    ),
    "noise scale": lambda w: geometry.noise_scale(torch.empty(6, device="meta"), w.direction),
    "effective rank": lambda w: geometry.effective_rank(torch.empty(4, 4, device="meta")),
    "diversity": lambda w: geometry.gradient_diversity(torch.empty(4, 4, device="meta")),
}
ACCOUNTS: dict[str, Case] = {
    "SGD": account(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "step", None),
    "AdamW, clipped": account(lambda p: torch.optim.AdamW(p, lr=0.1), "step", 1.0),
    "AdamW, impulse, clipped": account(lambda p: torch.optim.AdamW(p, lr=0.1), "impulse", 1.0),
    "NAdam": account(lambda p: torch.optim.NAdam(p, lr=0.1), "step", None),
    "RMSprop": account(lambda p: torch.optim.RMSprop(p, lr=0.1), "impulse", None),
}


@pytest.fixture(scope="module")
def world() -> World:
    torch.manual_seed(0)
    return World()


@pytest.mark.parametrize("transform", [fg.grad_and_reduce, fg.reduce])
def test_reducers_wait_for_nothing(world: World, transform: Any) -> None:
    step = transform(world.losses, plan=world.plan, options=fg.Options(verify="never"))
    reducers = {name: reducer(world) for name, reducer in REDUCERS.items()}
    with NoWaiting():
        out = step(world.params, world.batch, reducers)
    assert all(leaf.is_meta for leaf in optree.tree_leaves(out) if isinstance(leaf, Tensor))


def test_reducers_over_pairs_wait_for_nothing(world: World) -> None:
    with NoWaiting():
        fg.apply({name: reducer(world) for name, reducer in REDUCERS.items()}, world.kept(world.batch))


@pytest.mark.parametrize("name", BUILT)
def test_what_is_built_on_reducers_waits_for_nothing(world: World, name: str) -> None:
    with NoWaiting():
        BUILT[name](world)


@pytest.mark.parametrize("name", ACCOUNTS)
def test_accounts_wait_for_nothing(world: World, name: str) -> None:
    ACCOUNTS[name](world)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: bool((x > 0).any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: torch.zeros(3).copy_(x),
    ],
)
def test_waiting_is_found(wait: Callable[[Tensor], Any]) -> None:
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), NoWaiting():
        wait(torch.empty(3, device="meta"))


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["dot", "low rank", "norm", "gram"])
def test_a_planned_step_is_captured_in_a_cuda_graph(kind: str) -> None:
    model, losses, params = small_gpt()
    model.cuda()
    params = dict(model.named_parameters())
    small = fg.compress(like(params), rank=1)
    along: dict[str, Any] = {"dot": fg.dot(like(params)), "low rank": fg.dot(small)}
    along |= {"norm": fg.squared_norm(), "gram": fg.gram()}
    reducer, batch = along[kind], (rows()[0].cuda(),)
    options = fg.Options(verify="never")
    step = fg.grad_and_reduce(losses, plan=fg.plan(losses, params, batch, reducer), options=options)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(params, batch, reducer)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step(params, batch, reducer)
    batch[0].copy_(rows()[0])
    graph.replay()
    wanted = step(params, batch, reducer)
    assert_close(held.reduced, wanted.reduced, 1e-4)
    assert_close(held.losses, wanted.losses, 1e-5)
