"""Scores of scores, against tables made by hand and against definitions."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

import funcghost as fg
from funcghost import evaluation
from funcghost.evaluation.tables import pearson, ranks, spearman


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9))
def test_ranks_average_over_every_order_of_ties(values: list[int]) -> None:
    found = ranks(torch.tensor(values, dtype=torch.float64))
    for place, value in enumerate(values):
        below = sum(other < value for other in values)
        equal = sum(other == value for other in values)
        assert float(found[place]) == below + (equal + 1) / 2


def test_correlations_of_columns() -> None:
    a, b = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    for k in range(3):
        wanted = torch.corrcoef(torch.stack([a[:, k], b[:, k]]))[0, 1]
        torch.testing.assert_close(pearson(a, b)[k], wanted)
    assert spearman(a, a.exp()).tolist() == pytest.approx([1, 1, 1])
    assert spearman(a, -a.exp()).tolist() == pytest.approx([-1, -1, -1])
    assert pearson(a, torch.ones_like(a)).tolist() == [0, 0, 0]


def test_lds_of_additive_models_is_one_and_of_their_opposite_minus_one() -> None:
    scores, masks = torch.randn(30, 3, dtype=torch.float64), evaluation.random_subsets(30, 20)
    outputs = masks.double() @ scores
    found = evaluation.lds(scores, masks, outputs * 2)
    assert found.by_query.tolist() == pytest.approx([1, 1, 1])
    assert found.errors.tolist() == pytest.approx([0, 0, 0], abs=1e-12)
    assert float(evaluation.lds(-scores, masks, outputs).mean) == pytest.approx(-1)


def test_lds_by_hand_with_jackknife() -> None:
    masks = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]], dtype=torch.bool)
    scores, outputs = column(1, 2, 4), column(1, 3, 2, 4)  # sums of scores: 1, 2, 4, 3
    found = evaluation.lds(scores, masks, outputs)
    assert float(found.mean) == pytest.approx(1 - 6 * (0 + 1 + 4 + 1) / (4 * 15))

    def without(s: int) -> float:
        kept = [k for k in range(4) if k != s]
        first, second = ([[1, 2, 4, 3][k] for k in kept], [[1, 3, 2, 4][k] for k in kept])
        return float(spearman(column(*first), column(*second)))

    parts = torch.tensor([without(s) for s in range(4)], dtype=torch.float64)
    assert float(found.errors[0]) == pytest.approx(float((parts.var(correction=0) * 3).sqrt()))
    assert float(found.error) == pytest.approx(float(found.errors[0]))


def test_the_standard_error_is_that_of_repeated_banks() -> None:
    """Noise on the outputs: over many banks the spread of the mean is what the jackknife says, roughly."""
    scores = torch.randn(30, 4, dtype=torch.float64)
    means, errors = [], []
    for seed in range(60):
        masks = evaluation.random_subsets(30, 40, seed=seed)
        source = torch.Generator().manual_seed(seed)
        noise = torch.randn(40, 4, generator=source, dtype=torch.float64) * 3
        found = evaluation.lds(scores, masks, masks.double() @ scores + noise)
        means.append(float(found.mean))
        errors.append(float(found.error))
    spread = float(torch.tensor(means).std())
    assert 0.7 < spread / float(torch.tensor(errors).mean()) < 1.4


def test_leave_one_out_by_hand() -> None:
    scores, full = column(1, -2, 3), torch.tensor([10.0])
    found = evaluation.leave_one_out(scores, torch.tensor([0, 1, 2]), full, 10 - 2 * scores)
    assert (float(found.pearson), float(found.spearman), float(found.slope)) == pytest.approx((1, 1, 2))


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=12))
def test_detection_is_that_of_scikit_learn_and_of_the_definition(samples: list[tuple[int, bool]]) -> None:
    values = torch.tensor([value for value, _ in samples], dtype=torch.float64)
    wrong = torch.tensor([bad for _, bad in samples])
    if bool(wrong.all()) or not bool(wrong.any()):
        with pytest.raises(fg.InputError, match="some of both"):
            evaluation.detection(values, wrong)
        return
    found = evaluation.detection(values, wrong)
    assert found.auroc == pytest.approx(roc_auc_score(wrong.numpy(), values.numpy()))
    assert found.average_precision == pytest.approx(average_precision_score(wrong.numpy(), values.numpy()))
    pairs = list(itertools.product(values[wrong].tolist(), values[~wrong].tolist()))
    assert found.auroc == pytest.approx(sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs))


def test_recall_and_reciprocal_rank_by_hand() -> None:
    scores = torch.tensor([[4.0, 1.0], [3.0, 1.0], [2.0, 1.0], [1.0, 1.0]])
    sources = torch.tensor([[False, True], [True, False], [True, False], [False, False]])
    assert evaluation.recall_at(1, scores, sources).tolist() == [0, 0]
    assert evaluation.recall_at(2, scores, sources).tolist() == [0.5, 0]
    assert evaluation.recall_at(4, scores, sources).tolist() == [1, 1]  # the ties of the second query come last
    assert evaluation.mean_reciprocal_rank(scores, sources) == pytest.approx((1 / 2 + 1 / 4) / 2)


def test_removal_by_hand() -> None:
    masks = evaluation.removal_masks(torch.tensor([1.0, 3.0, 3.0]), [0, 1, 2])
    assert masks.tolist() == [[True, True, True], [True, False, True], [True, False, False]]
    lowest = evaluation.removal_masks(torch.tensor([1.0, 3.0, 3.0]), [1], largest=False)
    assert lowest.tolist() == [[False, True, True]]
    area = evaluation.area_between([0, 1, 3], column(0, 2, 4), column(0, 1, 1))
    assert float(area) == pytest.approx((0.5 * 1 + 2 * 2) / 3)


def test_tail_patch_takes_every_step_from_the_same_params() -> None:
    found = evaluation.tail_patch(
        lambda p, x: p - 0.5 * x, lambda p: torch.stack([p, p**2]), torch.tensor(2.0), [torch.tensor(2.0)] * 2
    )
    assert found.tolist() == [[-1, -3], [-1, -3]]


def test_subsets_have_their_size_and_do_not_change_with_their_number() -> None:
    masks = evaluation.random_subsets(20, 6, 0.3, seed=4)
    assert masks.sum(1).tolist() == [6] * 6
    assert torch.equal(masks[:2], evaluation.random_subsets(20, 2, 0.3, seed=4))
    assert not torch.equal(masks, evaluation.random_subsets(20, 6, 0.3, seed=5))
    assert evaluation.leave_out(3, [[0, 1], [2]]).tolist() == [[False, False, True], [True, True, False]]


MASKS = torch.tensor([[True, False], [False, True], [True, True]])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: evaluation.lds(torch.ones(3, 1), MASKS, torch.ones(3, 1)), "samples n"),
        (lambda: evaluation.lds(torch.ones(2, 1), MASKS, torch.ones(2, 1)), "subsets m"),
        (lambda: evaluation.lds(torch.ones(2, 1), MASKS, torch.ones(3, 2)), "queries q"),
        (lambda: evaluation.lds(torch.ones(2, 1), MASKS[:2], torch.ones(2, 1)), "three subsets"),
        (lambda: evaluation.lds(torch.ones(2, 1), MASKS, torch.ones(3, 1)), "nothing to rank"),
        (lambda: evaluation.lds(torch.ones(2, 1), MASKS.float(), torch.ones(3, 1)), "of bool"),
        (lambda: evaluation.lds(torch.full((2, 1), torch.nan), MASKS, torch.ones(3, 1)), "must be finite"),
        (lambda: evaluation.lds(torch.ones(2), MASKS, torch.ones(3, 1)), r"must be \[n, q\]"),
        (
            lambda: evaluation.leave_one_out(torch.ones(2, 1), torch.tensor([0, 2]), torch.ones(1), torch.ones(2, 1)),
            "between",
        ),
        (
            lambda: evaluation.leave_one_out(torch.ones(2, 1), torch.tensor([0.0]), torch.ones(1), torch.ones(1, 1)),
            "int64",
        ),
        (lambda: evaluation.recall_at(0, torch.ones(2, 1), torch.ones(2, 1).bool()), "1 or more"),
        (lambda: evaluation.recall_at(1, torch.ones(2, 1), torch.zeros(2, 1).bool()), "no source"),
        (lambda: evaluation.removal_masks(torch.ones(2), [2]), "from 0 to 1"),
        (lambda: evaluation.area_between([1, 0], torch.ones(2, 1), torch.ones(2, 1)), "rising order"),
        (lambda: evaluation.tail_patch(lambda p, x: p, lambda p: p, torch.ones(1), []), "none"),
        (lambda: evaluation.tail_patch(lambda p, x: p, lambda p: 1.0, torch.ones(1), [1]), "query"),  # type: ignore[arg-type,return-value]
        (lambda: evaluation.random_subsets(4, 2, 0.05), "nothing would differ"),
        (lambda: evaluation.random_subsets(1, 2), "two samples"),
        (lambda: evaluation.leave_out(3, [3]), "from 0 to 2"),
    ],
)
def test_tables_that_do_not_go_together(call: object, says: str) -> None:
    with pytest.raises(fg.InputError, match=says):
        call()  # type: ignore[operator]
