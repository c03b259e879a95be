"""How the language model example keeps its validation direction, and whether what it says of the cost is so."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import funcghost as fg
import lm_in_run_shapley as example
from funcghost.attribution import in_run
from funcghost.laws.oracle import per_sample_gradients
from lm_corpus import build_corpus
from lm_directions import BESIDE, LOW_RANK, Comparison, Keeping, compare, costs_of, spearman
from lm_findings import claims_of
from lm_model import Tree
from lm_training import Log, State, load_checkpoint
from tests.models.lm_tiny import STEPS, TINY, run, scores
from tests.models.small import like


def begun(*more: str) -> tuple[example.Run, State]:
    """A tiny run before its first step."""
    args, _ = example.parse([*TINY, *more])
    job = example.Run(args, build_corpus("email", 4, example.HELD_OUT_DOCUMENTS, seed=0))
    return job, job.begin()


def take(job: example.Run, state: State, log: Log) -> tuple[State, in_run.Account]:
    """A step: the state after it, and its account."""
    documents = torch.from_numpy(job.sampler.draw(state.step).documents)
    return job.trainer.step(state, job.batch(state.step), documents, log)


def test_a_step_is_that_of_the_optimizer_and_keeps_the_law() -> None:
    job, state = begun("--compare", "1")
    twin = {name: value.clone().requires_grad_() for name, value in state.params.items()}
    adam = torch.optim.AdamW(twin.values(), lr=5e-4, betas=(0.9, 0.99), weight_decay=0.1)
    log = Log()
    for step in range(3):
        adam.zero_grad()
        job.trainer.losses(twin, job.batch(step)).mean().backward()
        adam.param_groups[0]["lr"] = job.trainer.optimizer.rate(step)
        adam.step()
        slope = in_run.validation_gradient(job.trainer.losses, state.params, job.trainer.validation)
        state, out = take(job, state, log)
        assert float(out.values.sum() + out.rest) == pytest.approx(float(out.change), rel=0.02)
        for name, value in state.params.items():
            torch.testing.assert_close(value, twin[name].detach(), rtol=1e-4, atol=1e-6)
        kept = state.kept[0]  # every four steps: that of the first
        assert torch.equal(kept["tokens.weight"], slope["tokens.weight"]) == (step == 0)
    assert [row.step for row in log.account] == [0, 1, 2]
    assert len(log.comparisons) == 3 * len((*BESIDE, *LOW_RANK))


def test_average_forgets_by_its_decay() -> None:
    way, gradients = Keeping(refresh=3, decay=0.75), [{"w": torch.tensor([float(3**k)])} for k in range(10)]
    kept: Tree = {"w": torch.zeros(1)}
    for step, fresh in enumerate(gradients):
        before = kept["w"].clone()
        renewed = way.renew(step, kept, fresh)
        assert torch.equal(kept["w"], before)
        assert (renewed is kept) == (step % 3 != 0)
        kept = renewed
    wanted = 0.75**3 + 0.25 * (0.75**2 * 3**3 + 0.75 * 3**6 + 3**9)
    assert kept["w"].item() == pytest.approx(wanted)
    assert str(way) == "every 3 steps, averaged by 0.75"
    assert str(Keeping(rank=4)) == "every step, rank 4"


def compared(*ways: Keeping) -> tuple[list[Comparison], Tensor, list[Tree], Tree, Tree]:
    """A comparison at a state some steps into a run; gradients [b, all], the kept trees, the fresh one and P."""
    job, state = begun()
    for _ in range(3):
        state, _ = take(job, state, Log())
    here, scale = state.params, like(state.params)
    losses, batch = job.trainer.losses, job.batch(state.step)
    fresh = in_run.validation_gradient(losses, here, job.trainer.validation)
    kept = [{name: leaf + 0.3 * torch.randn_like(leaf) for name, leaf in fresh.items()} for _ in ways]
    rows = compare(fg.reduce(losses), here, batch, scale, fresh, list(zip(ways, kept, strict=True)), state.step)
    precise = {name: leaf.double() for name, leaf in here.items()}
    return rows, flat(per_sample_gradients(losses, precise, batch), 1), kept, fresh, scale


def flat(tree: Tree, keep: int = 0) -> Tensor:
    return torch.cat([leaf.double().flatten(keep) for leaf in tree.values()], keep)


def test_comparison_is_that_of_per_sample_gradients() -> None:
    ways = (Keeping(7, rank=1), Keeping(9))
    rows, gradients, kept, fresh, scale = compared(*ways)
    names = ["every 7 steps, rank 1", "every 9 steps", *map(str, LOW_RANK)]
    assert [row.name for row in rows] == names
    wanted = gradients @ flat({name: scale[name] * leaf for name, leaf in fresh.items()})
    for row, way, tree in zip(rows, (*ways, *LOW_RANK), (*kept, fresh, fresh), strict=True):
        dense = {name: scale[name] * leaf for name, leaf in tree.items()}
        small = fg.compress(dense, rank=way.rank) if way.rank else dense
        cut = {name: leaf.dense() if isinstance(leaf, fg.LowRank) else leaf for name, leaf in small.items()}
        found = gradients @ flat(cut)
        assert row.error == pytest.approx(float((found - wanted).norm() / wanted.norm()), rel=1e-3, abs=1e-6)
        ranks = [torch.argsort(torch.argsort(values)).double() for values in (found, wanted)]
        assert row.correlation == pytest.approx(float(torch.corrcoef(torch.stack(ranks))[0, 1]))
        assert row.used <= 1
        change = (found - gradients @ flat(dense)).norm() / wanted.norm()
        assert float(change) <= row.bound + 1e-6
    assert rows[0].bound > rows[1].bound == 0.0
    assert 0 < rows[0].used < 1 and rows[0].correlation < 1  # noqa: PT018


def test_a_bound_that_does_not_hold_fails_the_run(tmp_path: Path) -> None:
    summary = run(tmp_path / "lm", "--steps", "3")
    args, _ = example.parse(TINY)
    assert claims_of(args, summary.findings)[3].holds
    name, cost = next(iter(summary.findings.costs.items()))
    wrong = replace(summary.findings, costs={**summary.findings.costs, name: cost._replace(used=1.01)})
    assert not claims_of(args, wrong)[3].holds
    assert len(claims_of(args, replace(wrong, costs={}))) == 3


def test_costs_of_ways() -> None:
    rows = [Comparison(k, "a", 1 - k / 4, float(k), 10.0 * k, k / 10) for k in (0, 1, 5)]
    costs = costs_of([rows[0], Comparison(0, "b", 1.0, 0.0, 0.0, 0.0), *rows[1:]])
    assert list(costs) == ["a", "b"]
    assert costs["a"] == pytest.approx((0.5, -0.25, 1.0, 10.0, 0.5))
    assert costs_of([]) == {}


def test_spearman() -> None:
    numbers = np.array([0.1, 0.5, 0.7, 9.0])
    assert spearman(numbers, np.exp(numbers)) == 1
    assert spearman(numbers, -numbers) == -1
    assert spearman(numbers, numbers[[0, 2, 1, 3]]) == 0.8


def test_run_reports_and_resumes_what_it_compares(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", "--steps", str(STEPS))
    assert all(claim.holds for claim in whole.claims)
    assert list(whole.findings.costs) == [*map(str, (*BESIDE, *LOW_RANK))]
    own = str(LOW_RANK[0])
    cost = whole.findings.costs[own]
    line = f"kept {own}: rank correlation with fresh scores {cost.correlation:.3f} (lowest {cost.lowest:.3f})"
    assert line in str(whole)
    report = (whole.out / example.REPORT).read_text(encoding="utf-8")
    assert f"<td>{own}</td><td>{cost.correlation:.3f}</td><td>{cost.lowest:.3f}</td>" in report
    run(tmp_path / "resumed", "--steps", "3")
    run(tmp_path / "resumed", "--steps", str(STEPS), "--resume")
    assert scores(tmp_path / "resumed").equals(scores(whole.out))
    logs = [load_checkpoint(tmp_path / name / example.CHECKPOINT)[1] for name in ("whole", "resumed")]
    assert [row.step for row in logs[0].comparisons] == [2] * 5 + [5] * 5
    assert logs[0].comparisons == logs[1].comparisons
    assert logs[0].account == logs[1].account


def test_a_short_run_says_that_nothing_was_compared(tmp_path: Path) -> None:
    summary = run(tmp_path / "lm", "--steps", "1")
    assert summary.findings.costs == {}
    assert "too short for a comparison" in (summary.out / example.REPORT).read_text(encoding="utf-8")
