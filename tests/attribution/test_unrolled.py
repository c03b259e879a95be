"""Unrolled attribution against autograd through the whole training, and against finite differences of trainings."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor

import funcghost as fg
from funcghost.attribution import adjoint, unrolled
from funcghost.attribution.products import pullback
from funcghost.testing.strategies import Model, models
from funcghost.training import updates
from tests.depth import fewer
from tests.naive import assert_close
from tests.versions import differentiated_twice

D = torch.float64
Batch = tuple[Tensor, Tensor]


def start(dtype: torch.dtype = D) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(5)
    shapes = {"a": (4, 3), "b": (4,), "c": (2, 4)}
    made = {k: torch.randn(shape, generator=source, dtype=D) * 0.6 for k, shape in shapes.items()}
    return {k: value.to(dtype).requires_grad_() for k, value in made.items()}


def losses(params: Any, batch: Batch) -> Tensor:
    hidden = torch.tanh(F.linear(batch[0], params["a"], params["b"]))
    return F.cross_entropy(F.linear(hidden, params["c"]), batch[1], reduction="none")


def batch_of(size: int, seed: int, dtype: torch.dtype = D) -> Batch:
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, generator=source, dtype=D).to(dtype)
    return x, torch.randint(0, 2, (size,), generator=source)


BATCHES = [batch_of(size, seed) for seed, size in enumerate((3, 2, 3, 1, 2, 3))]
QUERIES = batch_of(3, 77)


def query(params: Any) -> Tensor:
    return losses(params, QUERIES)


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.8, nesterov=True, weight_decay=0.05),
    "dampened": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.8, dampening=0.3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05, eps=1e-3, weight_decay=0.02),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, eps=1e-3, amsgrad=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.05, eps=1e-3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.02, eps=1e-3, centered=True, momentum=0.5),
}


def through(
    update: Any,
    params: Any,
    state: Any,
    weights: list[Tensor],
    batches: list[Any] = BATCHES,
    reduction: str = "mean",
    of: Any = losses,
) -> Any:
    """The whole training as one function of the weights."""
    for batch, own in zip(batches, weights, strict=True):
        total = (own * of(params, batch)).sum() / (len(own) if reduction == "mean" else 1)
        grads = dict(zip(params, torch.autograd.grad(total, list(params.values()), create_graph=True), strict=True))
        params, state = update(params, grads, state)
    return params


def truth(update: Any, params: Any, state: Any, asked: Any = query, **more: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Scores [b, k] of every step, and the derivative in the initial parameters, by autograd through all of it."""
    weights = [torch.ones(len(batch[1]), dtype=D, requires_grad=True) for batch in more.get("batches", BATCHES)]
    value = asked(through(update, params, state, weights, **more)).reshape(-1)
    rows = [torch.autograd.grad(entry, [*weights, *params.values()], retain_graph=True) for entry in value]
    columns = [torch.stack(column) for column in zip(*rows, strict=True)]
    return [column.T for column in columns[: len(weights)]], columns[len(weights) :]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_against_autograd_through_the_training_and_finite_differences(name: str) -> None:
    params = start()
    update, state = updates.of(OPTIMIZERS[name](list(params.values())), params)
    out = unrolled.attribute(losses, update, params, state, BATCHES, query)
    wanted, initial = truth(update, params, state)
    for found, own in zip(out.scores, wanted, strict=True):
        assert found.shape == own.shape
        assert_close(found, own, 1e-9)
    for key, own in zip(params, initial, strict=True):
        assert_close(out.initial[key], own, 1e-9)
    ones = [torch.ones(len(y), dtype=D) for _, y in BATCHES]

    def moved(step: int, sample: int, by: float) -> Tensor:
        weights = [own.clone() for own in ones]
        weights[step][sample] += by
        return query(through(update, params, state, weights)).detach()

    for step, sample in ((0, 1), (3, 0), (5, 2)):
        slope = (moved(step, sample, 1e-5) - moved(step, sample, -1e-5)) / 2e-5
        assert_close(out.scores[step][sample], slope, 1e-5)
    assert all(leaf.requires_grad and leaf.grad is None for leaf in params.values())
    plain = through(update, params, state, ones)
    for key in params:
        assert_close(out.params[key], plain[key].detach(), 1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("vectorised", [True, False])
def test_reductions_scalars_and_loops(reduction: Any, vectorised: bool) -> None:
    params = start()
    update, state = updates.of(torch.optim.Adam(list(params.values()), lr=0.05, eps=1e-3), params)
    wanted, _ = truth(update, params, state, reduction=reduction)
    out = unrolled.attribute(
        losses, update, params, state, BATCHES, query, reduction=reduction, vectorised=vectorised, every=2
    )
    for found, own in zip(out.scores, wanted, strict=True):
        assert_close(found, own, 1e-9)
    alone = unrolled.attribute(losses, update, params, state, BATCHES, lambda p: query(p)[1], reduction=reduction)
    for found, own in zip(alone.scores, wanted, strict=True):
        assert_close(found, own[:, 1], 1e-9)
    assert alone.value.dim() == 0
    assert alone.initial["a"].shape == params["a"].shape


@pytest.mark.parametrize("together", [1, 2, 3])
def test_adjoints_go_through_a_step_so_many_at_a_time(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    params = start()
    update, state = updates.of(torch.optim.SGD(list(params.values()), lr=0.2, momentum=0.8), params)
    wanted, initial = truth(update, params, state)
    first = params["a"].nbytes  # the largest tensor of a step
    monkeypatch.setattr(unrolled, "CACHE", together * first // torch.get_num_threads())
    rows = set[int]()

    def counted(outputs: Any, inputs: Any, given: Any) -> list[Tensor]:
        rows.add(len(given[0]))
        return pullback(outputs, inputs, given)

    monkeypatch.setattr(adjoint, "pullback", counted)
    out = unrolled.attribute(losses, update, params, state, BATCHES, query)
    assert rows == {1: {1}, 2: {2, 1}, 3: {3}}[together]
    for found, own in zip(out.scores, wanted, strict=True):
        assert_close(found, own, 1e-9)
    assert_close(out.initial["a"], initial[0], 1e-9)


@fewer(3)
@given(models())
def test_drawn_models(model: Model) -> None:
    """Tied, reused, attended, convolved; with clipped gradients and a momentum."""
    params = {k: value.detach().requires_grad_() for k, value in model.params.items()}
    update, state = updates.of(torch.optim.SGD(list(params.values()), lr=0.01, momentum=0.5), params)
    clipped = updates.clipped(update, 5.0)
    batches = [model.batch(2, seed) for seed in range(3)]
    asked = model.batch(2, 9)
    out = unrolled.attribute(model.losses, clipped, params, state, batches, lambda p: model.losses(p, asked))
    weights = [torch.ones(2, dtype=D, requires_grad=True) for _ in batches]
    here, now = params, state
    for batch, own in zip(batches, weights, strict=True):
        with differentiated_twice():
            total = (own * model.losses(here, batch)).sum() / 2
        found = torch.autograd.grad(total, list(here.values()), create_graph=True, allow_unused=True)
        grads = {k: torch.zeros_like(here[k]) if g is None else g for k, g in zip(here, found, strict=True)}
        here, now = clipped(here, grads, now)
    value = model.losses(here, asked)
    for k in range(2):
        wanted = torch.autograd.grad(value[k], weights, retain_graph=True, allow_unused=True, materialize_grads=True)
        for ours, own in zip(out.scores, wanted, strict=True):
            size = max(float(part.abs().max()) for part in wanted) + 1e-12
            assert float((ours[:, k] - own).abs().max()) <= 1e-8 * size


def dropped(params: Any, batch: Batch) -> Tensor:
    return losses(params, (F.dropout(batch[0], 0.5), batch[1]))


@pytest.mark.parametrize("every", [1, 4, 10])
@pytest.mark.parametrize("on_disk", [True, False])
def test_kept_and_recomputed_steps_are_the_same_with_dropout(tmp_path: Path, every: int, on_disk: bool) -> None:
    params = start()
    update, state = updates.of(torch.optim.SGD(list(params.values()), lr=0.2, momentum=0.8), params)
    torch.manual_seed(4)
    before = torch.get_rng_state()
    out = unrolled.attribute(
        dropped, update, params, state, BATCHES, query, every=every, folder=tmp_path if on_disk else None
    )
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    wanted, _ = truth(update, params, state, of=dropped)
    assert torch.equal(torch.get_rng_state(), after)  # as the training alone leaves them
    for found, own in zip(out.scores, wanted, strict=True):
        assert_close(found, own, 1e-9)
    if on_disk:
        with pytest.raises(fg.InputError, match="another training"):
            unrolled.attribute(losses, update, params, state, BATCHES, query, folder=tmp_path)


def test_a_replay_that_differs_names_the_step() -> None:
    params = start()
    update, state = updates.of(torch.optim.SGD(list(params.values()), lr=0.2), params)
    calls = 0

    def counted(params: Any, batch: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        return losses(params, batch) * (1 if calls != len(BATCHES) + 3 else 1.001)

    with pytest.raises(fg.ReplayError, match="step 3"):
        unrolled.attribute(counted, update, params, state, BATCHES, query)
    calls = 0
    with pytest.raises(fg.ReplayError, match="step 2"):
        unrolled.attribute(counted, update, params, state, BATCHES, query, every=10)


def test_float32_is_near_float64() -> None:
    params, single = start(), start(torch.float32)
    found = []
    for tree, dtype in ((params, D), (single, torch.float32)):
        update, state = updates.of(torch.optim.AdamW(list(tree.values()), lr=0.05, eps=1e-3), tree)
        batches = [(x.to(dtype), y) for x, y in BATCHES]
        asked = (QUERIES[0].to(dtype), QUERIES[1])
        out = unrolled.attribute(losses, update, tree, state, batches, lambda p, q=asked: losses(p, q))  # type: ignore[misc]
        found.append(torch.cat(out.scores).double())
    assert_close(found[1], found[0], 1e-3)


def test_low_precision_is_refused() -> None:
    params = start(torch.float32)
    update, state = updates.of(torch.optim.SGD(list(params.values()), lr=0.2), params)

    def mixed(params: Any, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return losses(params, (batch[0].float(), batch[1])).float()

    with pytest.raises(fg.InputError, match="bfloat16"):
        unrolled.attribute(mixed, update, params, state, BATCHES, query)
    muon, momentum = updates.of(
        [torch.optim.Muon([params["a"], params["c"]], lr=0.02), torch.optim.SGD([params["b"]], lr=0.1)], params
    )
    single = [(x.float(), y) for x, y in BATCHES]
    with pytest.raises(fg.InputError, match=r"update compute in torch\.bfloat16"):  # torch's Muon rounds to it
        unrolled.attribute(losses, muon, params, momentum, single, query)
    half = {k: v.detach().bfloat16() for k, v in params.items()}
    with pytest.raises(fg.InputError, match=r"params\['a'\] is torch.bfloat16"):
        unrolled.attribute(losses, update, half, state, BATCHES, query)


def test_scores_by_sample_and_smoothness() -> None:
    params = start()
    update, state = updates.of(torch.optim.SGD(list(params.values()), lr=0.1), params)
    value = unrolled.smoothness(
        losses, update, params, state, BATCHES * 3, lambda p: torch.cat([leaf.flatten() for leaf in p.values()])
    )
    assert value > 0.95

    def rough(params: Any, grads: Any, state: Any) -> Any:
        """Chaotic: every step multiplies differences."""
        return {k: torch.sin(40 * p - g) for (k, p), g in zip(params.items(), grads.values(), strict=True)}, state

    broken = unrolled.smoothness(
        losses, rough, params, {}, BATCHES * 3, lambda p: torch.cat([leaf.flatten() for leaf in p.values()])
    )
    assert broken < 0.7
    found = unrolled.by_sample([torch.ones(2, 3), torch.ones(1, 3)], [torch.tensor([0, 3]), torch.tensor([3])], 4)
    assert found[:, 0].tolist() == [1, 0, 0, 2]


PARAMS = start()
UPDATE, STATE = updates.of(torch.optim.SGD(list(PARAMS.values()), lr=0.2), PARAMS)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batches": iter(BATCHES)}, "sequence"),
        ({"batches": []}, "found none"),
        ({"batches": torch.ones(2)}, "sequence"),
        ({"reduction": "max"}, "reduction"),
        ({"every": 0}, "every"),
        ({"query": lambda p: torch.ones(2)}, "does not depend"),
        ({"query": lambda p: p["a"]}, r"a scalar or \[k\]"),
        ({"update": lambda p, g, s: p}, "must return"),
        ({"update": lambda p, g, s: ({"a": p["a"]}, s)}, "tree like params"),
        ({"state": {"m": torch.ones(1, dtype=torch.float16)}}, "float16"),
    ],
)
def test_bad_arguments(change: dict[str, Any], says: str) -> None:
    given: dict[str, Any] = {
        "losses": losses,
        "update": UPDATE,
        "params": PARAMS,
        "state": STATE,
        "batches": BATCHES,
        "query": query,
    }
    with pytest.raises(fg.InputError, match=says):
        unrolled.attribute(**(given | change))
    with pytest.raises(fg.InputError, match="one number of a sample"):
        unrolled.by_sample([torch.ones(2)], [torch.tensor([0])], 3)
    with pytest.raises(fg.InputError, match="from 0 to 2"):
        unrolled.by_sample([torch.ones(1)], [torch.tensor([3])], 3)
    with pytest.raises(fg.InputError, match="size"):
        unrolled.smoothness(losses, UPDATE, PARAMS, STATE, BATCHES, query, size=0.6)
