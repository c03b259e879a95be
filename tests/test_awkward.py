"""The table of awkward models: exact, or refused as stated."""

import pytest
import torch

import funcghost as fg
from tests.awkward import CASES
from tests.naive import assert_scores, assert_trees_close, expected, gradient


@pytest.mark.parametrize("name", CASES)
def test_exact_or_refused(name: str) -> None:
    made = CASES[name]()
    direction = {k: torch.randn_like(p) for k, p in made.params.items()}
    step = fg.grad_and_reduce(made.losses)
    if made.outcome is not None:
        with pytest.raises(made.outcome):
            step(made.params, made.batch, fg.dot(direction))
        return
    state = torch.get_rng_state()
    wanted = expected(made.losses, made.params, made.batch, direction)
    grads, losses = gradient(made.losses, made.params, made.batch)
    after = torch.get_rng_state()
    for _ in range(2):  # the first call plans, the second runs along the plan
        torch.set_rng_state(state)
        out = step(made.params, made.batch, fg.dot(direction))
        assert_scores(out.reduced, wanted)
        assert torch.equal(out.losses, losses)
        assert_trees_close({k: g.to_dense() for k, g in out.grads.items()}, {k: g.to_dense() for k, g in grads.items()})
        assert torch.equal(torch.get_rng_state(), after)
    torch.set_rng_state(state)
    both = fg.reduce(made.losses)(made.params, made.batch, fg.dot(fg.stack([direction, direction])))
    assert_scores(both[:, 1], wanted)
    if made.forward_route:
        torch.set_rng_state(state)
        forward = fg.reduce(made.losses, options=fg.Options(route="forward"))
        assert_scores(forward(made.params, made.batch, fg.dot(direction)), wanted)


def test_packed_rows_of_other_lengths_are_not_taken_for_the_planned_ones() -> None:
    # Equal lengths look like a layout; the next batch's do not have it, with the same shapes and ops.
    losses, params, (rows, _), *_ = CASES["packed_segments"]()
    score, direction = fg.reduce(losses), {k: torch.randn_like(p) for k, p in params.items()}
    for segments in ([0, 0, 0, 1, 1, 1], [0, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 0]):
        batch = (rows, torch.tensor(segments))
        assert_scores(score(params, batch, fg.dot(direction)), expected(losses, params, batch, direction))


def test_split_at_other_places_is_planned_anew() -> None:
    def losses(p: dict[str, torch.Tensor], batch: tuple[torch.Tensor, list[int]]) -> torch.Tensor:
        rows, lengths = batch
        return torch.stack([part.square().mean() for part in torch.tanh(rows @ p["w"]).split(lengths)])

    params, rows = {"w": torch.randn(3, 2, dtype=torch.float64)}, torch.randn(6, 3, dtype=torch.float64)
    score, direction = fg.reduce(losses), {"w": torch.randn(3, 2, dtype=torch.float64)}
    for lengths in ([3, 3], [2, 4], [3, 3], [5, 1]):
        batch = (rows, lengths)
        assert_scores(score(params, batch, fg.dot(direction)), expected(losses, params, batch, direction))


def test_routing_that_changes_with_the_data() -> None:
    losses, params, *_ = CASES["experts_by_argmax"]()
    score, direction = fg.reduce(losses), {k: torch.randn_like(p) for k, p in params.items()}
    for seed in range(6):
        batch = torch.randn(4, 1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert_scores(score(params, batch, fg.dot(direction)), expected(losses, params, batch, direction))


def test_train_and_eval_of_a_model_do_not_share_a_plan() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4, affine=False), torch.nn.Linear(4, 2)
    ).double()
    losses = fg.module_losses(model, lambda out, batch: out.square().sum(1))
    params, x = dict(model.named_parameters()), torch.randn(5, 6, dtype=torch.float64)
    score, direction = fg.reduce(losses), {k: torch.randn_like(p) for k, p in params.items()}
    for training in (False, True, False, True):
        model.train(training)
        wanted = expected(losses, params, x, direction)
        assert_scores(score(params, x, fg.dot(direction)), wanted)
