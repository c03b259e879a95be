"""Gradient scores against per-sample gradients by a backward each."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import funcghost as fg
from funcghost.algebra.cost import Means
from funcghost.algebra.pairs import Pairs
from funcghost.attribution import gradient
from funcghost.attribution.against import against
from funcghost.laws.oracle import per_sample_gradients
from funcghost.reducers.many import ManyDots
from funcghost.testing import assert_reducer_laws
from funcghost.testing.strategies import Model, models
from funcghost.testing.strategies import pairs as drawn_pairs
from tests.depth import fewer
from tests.naive import assert_close


def flat(gradients: Any) -> Tensor:
    return torch.cat([leaf.reshape(len(leaf), -1) for leaf in gradients.values()], 1)


def drawn(shapes: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(k)
    return {n: torch.randn(k, *v.shape, generator=source, dtype=torch.float64) for n, v in shapes.items()}


@given(drawn_pairs(integers=True), st.sampled_from([1, 200, 1 << 20]))
def test_many_directions_are_each_of_them_at_any_budget(kept: Pairs, budget: int) -> None:
    """On whole numbers every route is exact."""
    directions = {n: torch.randint(-3, 4, (3, *shape)).double() for n, shape, _ in kept.parameters}
    reducer = ManyDots(directions, means=Means(budget=budget))
    parts = {n: reducer.of_parameter(n, uses) for n, uses in kept.uses.items()}
    one_by_one = fg.stack([{n: v[k] for n, v in directions.items()} for k in range(3)])
    assert torch.equal(reducer.result(parts), fg.apply(fg.dot(one_by_one), kept))


def test_laws() -> None:
    assert_reducer_laws(lambda params, samples: ManyDots(drawn(params, 2)), examples=5)


@fewer(3)
@given(models(), st.integers(2, 3))
def test_dot_on_drawn_models(model: Model, b: int) -> None:
    first, second, query = model.batch(b), model.batch(b), model.batch(2)
    rows = torch.cat([flat(per_sample_gradients(model.losses, model.params, batch)) for batch in (first, second)])
    asked = flat(per_sample_gradients(model.losses, model.params, query))
    wanted = rows @ asked.T
    size = 1e-10 * float(1 + rows.square().sum().sqrt() * asked.square().sum().sqrt())
    found = gradient.dot(model.losses)(model.params, [first, second], [query])
    assert float((found - wanted).abs().max()) <= size


def losses(params: Any, x: Tensor) -> Tensor:
    return (x @ params["w"]).tanh() * params["b"]


def at(scale: float) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(3)
    return {
        "w": scale * torch.randn(3, generator=source, dtype=torch.float64),
        "b": torch.tensor(scale, dtype=torch.float64),
    }


TRAIN = [torch.randn(4, 3, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(2)]
QUERIES = [torch.randn(2, 3, generator=torch.Generator().manual_seed(i + 9), dtype=torch.float64) for i in range(2)]


def rows(params: Any, batches: list[Tensor]) -> Tensor:
    return torch.cat([flat(per_sample_gradients(losses, params, batch)) for batch in batches])


def test_a_stack_one_direction_and_a_tree_of_many() -> None:
    directions, score = drawn(at(1), 2), against(losses)
    found = score(at(1), TRAIN, directions)
    assert_close(found, rows(at(1), TRAIN) @ flat(directions).T, 1e-12)
    one, other = ({k: v[i] for k, v in directions.items()} for i in range(2))
    assert_close(score(at(1), TRAIN, fg.stack([one, other])), found, 1e-14)
    assert_close(score(at(1), TRAIN, one), found[:, 0], 1e-14)


def test_tracin_and_self_influence_over_checkpoints() -> None:
    runs, rates = [at(1.0), at(0.5), at(2.0)], [0.1, 0.2, 0.3]
    pairs = [(rows(params, TRAIN), rows(params, QUERIES)) for params in runs]
    wanted = sum(rate * g @ q.T for rate, (g, q) in zip(rates, pairs, strict=True))
    assert isinstance(wanted, Tensor)
    assert_close(gradient.tracin(losses)(iter(runs), TRAIN, QUERIES, rates), wanted, 1e-12)
    whole = gradient.tracin(losses)(runs, TRAIN, QUERIES)
    assert_close(whole, torch.stack([g @ q.T for g, q in pairs]).sum(0), 1e-12)
    unit = [(g / g.norm(dim=1, keepdim=True), q / q.norm(dim=1, keepdim=True)) for g, q in pairs]
    found = gradient.tracin(losses, normalise="cosine")(runs, TRAIN, QUERIES)
    assert_close(found, torch.stack([g @ q.T for g, q in unit]).sum(0), 1e-12)
    assert_close(gradient.cosine(losses)(runs[0], TRAIN, QUERIES), unit[0][0] @ unit[0][1].T, 1e-12)
    own = gradient.self_influence(losses)(runs, TRAIN, rates)
    sizes = torch.stack([rate * g.square().sum(1) for rate, (g, _) in zip(rates, pairs, strict=True)])
    assert_close(own, sizes.sum(0), 1e-12)


def test_queries_may_have_other_losses_and_gradients_of_zero() -> None:
    def doubled(params: Any, x: Tensor) -> Tensor:
        return 2 * losses(params, x)

    assert_close(
        gradient.dot(losses, doubled)(at(1), TRAIN, QUERIES), 2 * gradient.dot(losses)(at(1), TRAIN, QUERIES), 1e-12
    )
    none = [torch.zeros(1, 3, dtype=torch.float64)]
    assert gradient.cosine(losses)(at(1), TRAIN, none).tolist() == [[0.0]] * 8


def test_checkpoints_of_a_folder_come_by_number(tmp_path: Path) -> None:
    for step in (10, 2, 1):
        torch.save(at(step), tmp_path / f"step{step}.pt")
    found = [float(tree["b"]) for tree in gradient.checkpoints(tmp_path, at(1))]
    assert found == [1, 2, 10]
    torch.save({"w": at(1)["w"]}, tmp_path / "step3.pt")
    with pytest.raises(fg.InputError, match=r"checkpoint step3\.pt"):
        list(gradient.checkpoints(tmp_path, at(1)))
    with pytest.raises(fg.InputError, match="fits"):
        gradient.checkpoints(tmp_path, at(1), "*.ckpt")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: gradient.tracin(losses, normalise="l2"), "normalise"),  # type: ignore[arg-type]
        (lambda: gradient.tracin(losses)([], TRAIN, QUERIES), "found none"),
        (lambda: gradient.tracin(losses)([at(1)], TRAIN, QUERIES, [0.1, 0.2]), "2 rates for 1"),
        (lambda: gradient.tracin(losses)([at(1), at(2)], TRAIN, QUERIES, [0.1]), "1 rates, and more"),
        (lambda: gradient.tracin(losses)([at(1)], TRAIN[0], QUERIES), r"Pass \[batch\]"),
        (lambda: gradient.tracin(losses)([at(1)], iter(TRAIN), QUERIES), "only once"),
        (lambda: gradient.tracin(losses)([at(1)], [], QUERIES), "found none"),
        (lambda: gradient.tracin(losses)([at(1)], TRAIN, []), "found none"),
        (lambda: gradient.tracin(losses)([at(1)], TRAIN, QUERIES, ["fast"]), "numbers"),
        (lambda: against(losses)(at(1), TRAIN, {"w": torch.ones(2, 3).double()}), "missing leaves"),
        (lambda: against(losses)(at(1), TRAIN, {"w": torch.ones(2, 4).double(), "b": torch.ones(2).double()}), "shape"),
        (lambda: against(losses)(at(1), TRAIN, {"w": torch.ones(2, 3).double(), "b": torch.ones(3).double()}), "shape"),
    ],
)
def test_bad_arguments(call: Any, says: str) -> None:
    with pytest.raises(fg.InputError, match=says):
        call()
