"""The table of awkward models: exact, or refused as stated."""

import logging
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import funcghost as fg
from tests.models.awkward import CASES, SEQUELS
from tests.naive import assert_scores, assert_trees_close, expected, gradient


@pytest.mark.parametrize("name", CASES)
def test_exact_or_refused(name: str) -> None:
    made = CASES[name]()
    step: Any = fg.grad_and_reduce(made.losses)
    if made.outcome is not None:
        with pytest.raises(made.outcome, match=re.escape(made.says)):
            step(made.params, made.batch, fg.dot(made.params))
        return
    direction = {k: torch.randn_like(p) for k, p in made.params.items()}
    state = torch.get_rng_state()
    wanted = expected(made.losses, made.params, made.batch, direction)
    grads, losses = gradient(made.losses, made.params, made.batch)
    after = torch.get_rng_state()
    for _ in range(2):  # the first call plans, the second runs along the plan
        torch.set_rng_state(state)
        out = step(made.params, made.batch, fg.dot(direction))
        assert_scores(out.reduced, wanted, made.tolerance)
        assert torch.equal(out.losses, losses)
        assert_trees_close({k: g.to_dense() for k, g in out.grads.items()}, {k: g.to_dense() for k, g in grads.items()})
        assert torch.equal(torch.get_rng_state(), after)
    other = CASES[name]().batch  # other values, and the plan of the first
    torch.set_rng_state(state)
    wanted_then = expected(made.losses, made.params, other, direction)
    assert_scores(step(made.params, other, fg.dot(direction)).reduced, wanted_then, made.tolerance)
    torch.set_rng_state(state)
    both = fg.reduce(made.losses, plan=step.__self__.plans[-1])(
        made.params, made.batch, fg.dot(fg.stack([direction, direction]))
    )
    assert_scores(both[:, 1], wanted, made.tolerance)
    if made.forward_route:
        torch.set_rng_state(state)
        forward = fg.reduce(made.losses, options=fg.Options(route="forward"))
        assert_scores(forward(made.params, made.batch, fg.dot(direction)), wanted, made.tolerance)


REMEDIES = [(name, remedy) for name, make in CASES.items() if (remedy := make().remedy)]


@pytest.mark.parametrize(("name", "remedy"), REMEDIES)
def test_remedy_has_the_same_losses(name: str, remedy: str) -> None:
    """And is exact, by its own row."""
    values = []
    for known in (name, remedy):
        torch.manual_seed(0)
        made = CASES[known]()
        params = {k: v.requires_grad_(v.is_floating_point() or v.is_complex()) for k, v in made.params.items()}
        values.append(made.losses(params, made.batch))
    torch.testing.assert_close(*values, rtol=1e-12, atol=0)
    assert CASES[remedy]().outcome is None


def test_every_refusal_says_what_it_is() -> None:
    assert [name for name, make in CASES.items() if (made := make()).outcome and not made.says] == []
    assert len(CASES) >= 80


@pytest.mark.parametrize("name", SEQUELS)
def test_steps_that_follow_one_another(name: str, caplog: pytest.LogCaptureFixture) -> None:
    made = SEQUELS[name]()
    direction = {k: torch.randn_like(p) for k, p in made.params.items()}
    step = fg.grad_and_reduce(made.losses)
    with caplog.at_level(logging.INFO, "funcghost"):
        for batch in made.batches:
            state = torch.get_rng_state()
            wanted = expected(made.losses, made.params, batch, direction)
            torch.set_rng_state(state)
            assert_scores(step(made.params, batch, fg.dot(direction)).reduced, wanted)
    plans = [record for record in caplog.records if record.message.startswith("planned ")]
    assert made.plans in (None, len(plans))


def test_memory_bank_is_written_once_for_each_step() -> None:
    bank, params = torch.randn(6, 3, dtype=torch.float64), {"w": torch.randn(6, 3, dtype=torch.float64)}

    def losses(p: dict[str, Tensor], x: Tensor) -> Tensor:
        h = torch.nn.functional.normalize(x @ p["w"], dim=1)
        scores = (h @ torch.cat([h.detach(), bank.clone()]).T).log_softmax(1).diagonal()
        with torch.no_grad():
            bank.mul_(0.9)[: len(x)].add_(h, alpha=0.1)
        return -scores

    step, direction = fg.grad_and_reduce(losses), {"w": torch.randn(6, 3, dtype=torch.float64)}
    for _ in range(3):
        x, before = torch.randn(4, 6, dtype=torch.float64), bank.clone()
        wanted = expected(losses, params, x, direction)
        assert_scores(step(params, x, fg.dot(direction)).reduced, wanted)
        after = bank.clone()
        bank.copy_(before)
        losses(params, x)
        assert torch.equal(bank, after)
        assert not torch.equal(bank, before)


FOR_ANY_BATCH = [
    *("tied_in_three_ways", "decay_inside_the_loss", "unused_and_dead_ends", "written_into_an_activation"),
    *("views_of_views", "a_kernel_for_each_sample", "expanded_over_the_batch", "long_convolution_by_fft"),
    *("shared_over_time_and_depth", "recursion_over_a_tree", "noise_of_many_kinds", "variational_autoencoder"),
    *("samples_on_the_last_axis", "convolution_on_token_major_rows", "heads_folded_into_the_batch", "experts_top_two"),
    *("experts_by_argmax", "contrastive", "gradient_reversal", "ema_teacher"),
    *("convolutions", "rotary_attention", "normalising_flow", "spatial_transformer", "per_example_tied_and_shared"),
    "normalised_over_the_batch",  # a constant, whose gradient is of rounding alone
]


@pytest.mark.parametrize("name", FOR_ANY_BATCH)
def test_one_sample(name: str) -> None:
    """All of it is of the one sample, there is nothing to measure; then more of them, and one along their plan."""
    made = CASES[name]()
    direction = {k: torch.randn_like(p) for k, p in made.params.items()}
    for sizes in ((1, 1, 4), (4, 1, 1)):
        step = fg.grad_and_reduce(made.losses)
        for size in sizes:
            batch, state = made.batch[:size], torch.get_rng_state()
            wanted = expected(made.losses, made.params, batch, direction)
            torch.set_rng_state(state)
            assert_scores(step(made.params, batch, fg.dot(direction)).reduced, wanted)


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
