"""Policies against their definitions, and in a training step."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcghost as fg
from funcghost.training import selection, weighting
from tests.models.small import like, rows, small_gpt
from tests.naive import assert_trees_close

SCORES = st.lists(st.integers(-3, 3), min_size=1, max_size=8).map(
    lambda found: torch.tensor(found, dtype=torch.float64)
)


@given(SCORES, st.integers(1, 9), st.floats(0.01, 1.0), st.integers(-3, 3))
def test_policies_without_redundancy(scores: torch.Tensor, k: int, share: float, least: int) -> None:
    order = sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))
    for policy, chosen in [
        (selection.top_k(k), order[:k]),
        (selection.quantile(share), order[: max(1, -int(-len(scores) * share // 1))]),
        (selection.threshold(least), [i for i in order if scores[i] > least]),
        (selection.boltzmann(len(scores), 1.0), order),
    ]:
        weights = policy(scores)
        assert set(weights.nonzero().flatten().tolist()) == set(chosen)
        assert float(weights.sum()) == pytest.approx(1.0 if chosen else 0.0)
        assert len(set(weights[chosen].tolist())) <= 1
        assert weights.dtype == scores.dtype


@given(SCORES, st.integers(1, 9), st.sampled_from([0.0, 0.5, 2.0]), st.integers(0, 9))
def test_greedy_takes_the_best_beside_what_it_has(scores: Any, k: int, redundancy: float, seed: int) -> None:
    vectors = torch.randint(-2, 3, (len(scores), 3), generator=torch.Generator().manual_seed(seed)).double()
    gram, chosen = vectors @ vectors.T, list[int]()
    for _ in range(min(k, len(scores))):
        gains = {
            i: float(scores[i]) - redundancy * float(gram[i, chosen].sum())
            for i in range(len(scores))
            if i not in chosen
        }
        chosen.append(max(gains, key=lambda i: (gains[i], -i)))
    weights = selection.greedy(k, redundancy)({"score": scores, "gram": gram})
    assert set(weights.nonzero().flatten().tolist()) == set(chosen)
    if redundancy == 0.0:
        assert torch.equal(weights, selection.top_k(k)(scores))


def test_greedy_follows_a_quadratic_utility() -> None:
    # With H = 1 and no limit on what interacts, greedy's gains are those of the utility it stands for.
    vectors, slope, lr = torch.randn(5, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64), 0.3
    gram, scores = vectors @ vectors.T, vectors @ slope

    def utility(chosen: tuple[int, ...]) -> float:
        step = lr * vectors[list(chosen)].sum(0)
        own = lr**2 / 2 * gram[list(chosen), list(chosen)].sum()
        return float(step @ slope - step @ step / 2 + own)

    weights = selection.greedy(2, lr)({"score": scores, "gram": gram})
    first = int(scores.argmax())
    gains = {i: utility((first, i)) - utility((first,)) for i in range(5) if i != first}
    assert set(weights.nonzero().flatten().tolist()) == {first, max(gains, key=lambda i: gains[i])}


def test_boltzmann_draws_with_the_probabilities_of_its_name() -> None:
    scores, temperature = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64), 1.5
    policy = selection.boltzmann(2, temperature, torch.Generator().manual_seed(0))
    counts = sum((policy(scores) > 0).double() for _ in range(4000)) / 4000
    odds = (scores / temperature).exp()
    wanted = torch.zeros(3, dtype=torch.float64)
    for a, b in itertools.permutations(range(3), 2):
        likely = odds[a] / odds.sum() * odds[b] / (odds.sum() - odds[a])
        wanted[a] += likely
        wanted[b] += likely
    assert float((counts - wanted).abs().max()) < 0.03


def test_a_step_on_what_was_chosen() -> None:
    model, losses, params = small_gpt(layers=1)
    model.double()
    (tokens,), direction = rows(6), like(params)
    reducers = {"score": fg.dot(direction), "gram": fg.gram()}
    for policy, wanted in (
        (selection.greedy(3, 0.1), reducers),
        (lambda reduced: selection.top_k(3)(reduced["score"]), reducers),
    ):
        out = weighting.weighted_gradient(losses, policy)(params, (tokens,), wanted)
        assert isinstance(out.weights, torch.Tensor)
        chosen = out.weights > 0
        assert int(chosen.sum()) == 3
        plain = fg.grad_and_reduce(losses)(params, (tokens[chosen],), ())
        assert_trees_close(out.grads, plain.grads, 1e-10)


def test_arguments() -> None:
    for bad in (
        lambda: selection.top_k(0),
        lambda: selection.top_k(2.0),  # type: ignore[arg-type]
        lambda: selection.greedy(0, 0.1),
        lambda: selection.greedy(1, -0.1),
        lambda: selection.boltzmann(0, 1.0),
        lambda: selection.boltzmann(1, 0.0),
        lambda: selection.quantile(0.0),
        lambda: selection.quantile(1.1),
        lambda: selection.threshold("x"),  # type: ignore[arg-type]
        lambda: selection.top_k(1)(torch.ones(2, 2)),
        lambda: selection.top_k(1)(torch.ones(2, dtype=torch.long)),
        lambda: selection.threshold()([1.0]),
        lambda: selection.quantile(0.5)(None),
        lambda: selection.boltzmann(1, 1.0)(None),
        lambda: selection.greedy(1, 0.1)(torch.ones(2)),
        lambda: selection.greedy(1, 0.1)({"score": torch.ones(2), "gram": torch.ones(3, 3)}),
        lambda: selection.greedy(1, 0.1)({"score": torch.ones(2), "gram": None}),
    ):
        with pytest.raises(fg.InputError):
            bad()
    policy = selection.top_k(1)
    assert policy(torch.tensor([float("nan"), -5.0])).tolist() == [0.0, 1.0]
    assert selection.threshold(9.0)(torch.ones(3)).tolist() == [0.0, 0.0, 0.0]
    assert policy(torch.ones(0)).shape == (0,)
