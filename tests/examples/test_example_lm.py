"""The language model example, run for real on a tiny model: what it writes, how it resumes, what it refuses."""

import html
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import lm_in_run_shapley as example
from funcghost import store
from lm_corpus import DOMAINS, PROSE, WindowSampler, build_corpus
from lm_findings import claims_of, remark_of
from lm_report import write_report
from lm_scores import auroc, record_scores, tally
from lm_training import UNFINISHED, Log, State, load_checkpoint, save_checkpoint
from tests.depth import thinned
from tests.models.lm_tiny import BATCH, STEPS, TINY, run, scores
from tests.models.pages import Page

ROOT = Path(__file__).parents[2]
EPS = float(np.finfo(np.float32).eps)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> example.Summary:
    return run(tmp_path_factory.mktemp("runs") / "lm", "--steps", str(STEPS))


def assert_complete(table: pa.Table, steps: int) -> None:
    """Every step up to `steps` is there, with its whole batch, once."""
    assert table.schema.names == ["step", "sample_id", "value", "document", "domain"]
    np.testing.assert_array_equal(table["step"].to_numpy(), np.repeat(np.arange(steps), BATCH))
    assert len(set(zip(table["step"].to_pylist(), table["document"].to_pylist(), strict=True))) == steps * BATCH


def test_scores_are_those_of_the_windows_drawn(finished: example.Summary) -> None:
    table = scores(finished.out)
    assert_complete(table, STEPS)
    corpus = build_corpus("email", 4, example.HELD_OUT_DOCUMENTS, seed=0)
    sampler = WindowSampler(corpus.training, 16, BATCH, (0, 0))
    for step in range(STEPS):
        rows = table.filter(pa.compute.equal(table["step"], step))
        drawn = sampler.draw(step)
        order = np.argsort(drawn.windows)
        assert rows["sample_id"].to_pylist() == drawn.windows[order].tolist()
        documents = [corpus.training[index] for index in drawn.documents[order]]
        assert rows["document"].to_pylist() == [document.name for document in documents]
        assert rows["domain"].to_pylist() == [document.domain for document in documents]


def test_values_sum_to_what_the_account_says(finished: example.Summary) -> None:
    table = scores(finished.out)
    _, log, _ = load_checkpoint(finished.out / example.CHECKPOINT)
    assert [row.step for row in log.account] == list(range(STEPS))
    assert [check.step for check in log.checks] == [0, 2, 4]
    assert [sorted(probe) for probe in log.seconds] == [["account", "plain"]]
    for row in log.account:
        rows = table.filter(pa.compute.equal(table["step"], row.step))
        assert rows["value"].to_numpy().sum() == pytest.approx(row.values, rel=1e-4)
        # The change is a difference of two losses in float32.
        assert row.values + row.rest == pytest.approx(row.change, rel=1e-4, abs=8 * EPS * row.validation_loss)
    for check in log.checks:
        row = log.account[check.step]
        assert check.change == pytest.approx(row.change, abs=8 * EPS * row.validation_loss)
        assert check.account == pytest.approx(row.values + row.rest, rel=1e-6)
        assert check.trapezoid == pytest.approx(check.account, rel=0.02)
        assert check.simpson == pytest.approx(check.change, abs=2e-3 * (abs(row.values) + abs(row.rest)))


def test_summary_and_claims(finished: example.Summary) -> None:
    found = finished.findings
    assert all(claim.holds for claim in finished.claims)
    assert found.law_error < 1e-4
    assert found.account_error < 5e-3  # the changes that it goes by are of losses in float32
    assert found.simpson_error < found.trapezoid_error < found.first_order_error
    assert found.oracle_error < 1e-3
    assert found.overhead > 1
    whole = found.whole
    assert whole["values"] + whole["rest"] == pytest.approx(whole["change"], rel=0.02)
    assert whole["impulse"] < whole["values"] < 0  # a gradient has moved a part of what it will
    assert set(found.auroc_by_corruption) == {"shuffled bytes", "wrong-domain noise"}
    assert f"{STEPS} steps" in str(finished)


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with example.Progress(1000, 0) as progress:
        for _ in range(999):
            progress.update({"loss": "1"})
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(example.Progress, "EVERY", 0.0)
        progress.update({"loss": "2"})
    assert capsys.readouterr().err == "step 1000 of 1000: loss 2\n"


def test_report_is_one_file_with_plots_and_documents(finished: example.Summary) -> None:
    text = (finished.out / example.REPORT).read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert len(page.sources) == 6
    assert all(source.startswith("data:image/png;base64,iVBORw0KGgo") for source in page.sources)
    assert not page.seen.keys() & {"link", "iframe"}
    for claim in finished.claims:
        assert html.escape(claim.measured) in text
    corpus = build_corpus("email", 4, example.HELD_OUT_DOCUMENTS, seed=0)
    sums = tally(finished.out / example.SCORES, corpus.training, STEPS)
    order = [index for index in np.argsort(sums.values) if sums.drawn[index]]
    shown = [corpus.training[index] for index in (*order[:10], *order[:-11:-1])]
    assert len(page.passages) == len(shown) == 20
    for document, passage in zip(shown, page.passages, strict=True):
        assert document.name in text
        if not document.corruption and document.text.isascii() and b"\f" not in document.text:
            assert passage.strip() == document.text.decode().strip()


def test_report_escapes_documents(finished: example.Summary, tmp_path: Path) -> None:
    corpus = build_corpus("email", 4, example.HELD_OUT_DOCUMENTS, seed=0)
    hostile = tuple(replace(document, text=b"<script>a && b</script>\n&lt;\x00\xff") for document in corpus.training)
    sums = tally(finished.out / example.SCORES, corpus.training, STEPS)
    _, log, _ = load_checkpoint(finished.out / example.CHECKPOINT)
    facts = {"<b>": "<i>"}
    where = tmp_path / "report.html"
    write_report(where, replace(corpus, training=hostile), sums, log, finished.findings, finished.claims, "<u>", facts)
    page = Page(where.read_text(encoding="utf-8"))
    assert not page.seen.keys() & {"i", "u"}
    assert page.seen["script"] == 1
    assert set(page.passages) == {"<script>a && b</script>\n&lt;\\x00\\xff"}


@pytest.mark.parametrize("dropout", thinned(["0", "0.3"], ["0.3"]))
def test_resumed_run_is_the_run_without_a_break(tmp_path: Path, dropout: str, finished: example.Summary) -> None:
    whole = finished if dropout == "0" else run(tmp_path / "whole", "--steps", str(STEPS), "--dropout", dropout)
    out = tmp_path / "resumed"
    run(out, "--steps", "3", "--dropout", dropout)
    older = (out / example.CHECKPOINT).read_bytes()
    run(out, "--steps", "5", "--dropout", dropout, "--resume")
    (out / example.CHECKPOINT).write_bytes(older)  # as if killed between writing scores and the checkpoint
    (out / example.SCORES / "unfinished" / "0-part.parquet").write_bytes(b"PAR1")
    (out / f"{UNFINISHED}{example.CHECKPOINT}").write_bytes(b"half")
    summary = run(out, "--steps", str(STEPS), "--dropout", dropout, "--resume")
    assert summary.findings.oracle_error < 1e-3
    assert_complete(scores(out), STEPS)
    assert scores(out).equals(scores(whole.out))
    assert [*out.rglob(f"{UNFINISHED}*"), *(out / example.SCORES / "unfinished").iterdir()] == []


def test_no_checkpoint_is_ahead_of_its_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_and_stop(path: Path, state: State, log: Log, origin: dict[str, Any]) -> None:
        save_checkpoint(path, state, log, origin)
        if state.step:
            raise KeyboardInterrupt

    monkeypatch.setattr(example, "save_checkpoint", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "lm", "--steps", str(STEPS))
    monkeypatch.undo()
    run(tmp_path / "lm", "--steps", str(STEPS), "--resume")
    assert_complete(scores(tmp_path / "lm"), STEPS)


def test_seed_decides_the_scores(tmp_path: Path, finished: example.Summary) -> None:
    other = run(tmp_path / "other", "--steps", str(STEPS), "--seed", "1")
    assert scores(other.out)["sample_id"] != scores(finished.out)["sample_id"]


@pytest.mark.slow
def test_scores_are_readable_after_a_kill(tmp_path: Path) -> None:
    out = tmp_path / "lm"
    script = str(ROOT / "examples" / "lm_in_run_shapley.py")
    command = [sys.executable, script, *TINY, "--out", str(out), "--steps", "1000000", "--flush", "1"]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        steps = 0
        while steps < 9:
            assert process.poll() is None
            assert time.monotonic() < deadline
            if (out / example.SCORES / "manifest.json").exists():
                steps = store.open_record(out / example.SCORES).steps  # at any time, while it is being written too
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    table = scores(out)
    assert_complete(table, len(table) // BATCH)
    state, _, _ = load_checkpoint(out / example.CHECKPOINT)
    assert 8 <= state.step <= len(table) // BATCH <= state.step + 1
    summary = run(out, "--flush", "1", "--resume", "--steps", str(state.step + 2))
    assert_complete(scores(out), summary.steps)


def test_overwrite_replaces_a_run(tmp_path: Path) -> None:
    run(tmp_path / "lm", "--steps", "2")
    (tmp_path / "lm" / example.SCORES / "values" / "part-old.parquet").write_bytes(b"old")
    run(tmp_path / "lm", "--steps", "1", "--overwrite")
    assert_complete(scores(tmp_path / "lm"), 1)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--steps", "0"], "--steps: must be a whole number of at least 1, found '0'"),
        (["--steps", "many"], "--steps: must be a whole number of at least 1, found 'many'"),
        (["--seed", "-1"], "--seed: must be a whole number of at least 0, found '-1'"),
        (["--batch-size", "1"], "--batch-size: must be a whole number of at least 2"),
        (["--validation-domain", "poetry"], "--validation-domain: invalid choice: 'poetry'"),
        (["--lr", "nan"], "--lr: must be a number in"),
        (["--check", "0"], "--check: must be a whole number of at least 1, found '0'"),
        (["--compare", "0"], "--compare: must be a whole number of at least 1, found '0'"),
        (["--dropout", "1"], "--dropout: must be a number in [0, 1), found '1'"),
        (["--context", "512"], "--context 512: must be less than 512"),
        (["--width", "10"], "--width 10: must be a multiple of 4"),
        (["--resume", "--overwrite"], "not allowed with"),
        (["--out", "taken"], "--out taken: exists. Name another folder, or pass --resume or --overwrite"),
        (["--out", "taken/kept.txt", "--overwrite"], "kept.txt: is a file. Name a folder"),
        (["--out", "taken", "--overwrite"], "--overwrite: taken holds 'kept.txt', which is no part of a run"),
        (["--out", "taken", "--resume"], "--resume: there is no checkpoint.pt in taken"),
        (["--out", "new", "--resume"], "--resume: there is no checkpoint.pt in new"),
    ],
)
def test_refuses(
    arguments: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "kept.txt").write_text("kept")
    with pytest.raises(SystemExit) as error:
        example.main(arguments)
    assert error.value.code == 2
    assert complaint in capsys.readouterr().err
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["taken", "kept.txt"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--seed", "3"], "has --seed 0, not 3"),
        (["--batch-size", "8"], "has --batch-size 4, not 8"),
        (["--lr", "0.5"], "has --lr 0.0005, not 0.5"),
        (["--steps", "2"], "has come to step 6 already"),
    ],
)
def test_resume_refuses_another_run(
    arguments: list[str], complaint: str, finished: example.Summary, capsys: pytest.CaptureFixture[str]
) -> None:
    before = scores(finished.out)
    with pytest.raises(SystemExit):
        run(finished.out, "--resume", *arguments)
    assert complaint in capsys.readouterr().err
    assert scores(finished.out).equals(before)


def test_claim_that_fails_is_said_and_raised(tmp_path: Path) -> None:
    with pytest.raises(example.ClaimError, match=r"not so: values and rests are within 0\.00%"):
        run(tmp_path / "lm", "--steps", "1", "--max-change-error", "0")
    assert '<td class="fails">' in (tmp_path / "lm" / example.REPORT).read_text(encoding="utf-8")


def test_low_auroc_is_put_down_to_the_method_where_the_values_are_exact(finished: example.Summary) -> None:
    args, _ = example.parse(["--min-auroc", "0.9"])
    low = replace(finished.findings, auroc=0.3)
    assert "the method's own answer" in remark_of(args, low, claims_of(args, low))
    wrong = replace(low, oracle_error=0.5)
    assert remark_of(args, wrong, claims_of(args, wrong)) == ""
    none = replace(low, auroc=float("nan"))
    assert not claims_of(args, none)[1].holds
    assert "no corrupted document was drawn" in remark_of(args, none, claims_of(args, none))
    assert finished.remark == ""


@pytest.mark.parametrize("domain", ["json", PROSE])
def test_corpus(domain: str) -> None:
    corpus = build_corpus(domain, per_domain=10, held_out=5, seed=1)
    names = [document.name for document in (*corpus.training, *corpus.validation)]
    assert len(set(names)) == len(names)
    assert {document.domain for document in corpus.training} == set(DOMAINS)
    assert {document.domain for document in corpus.validation} == {domain}
    assert all(not document.corruption for document in corpus.validation)
    sources = [{document.name.split("#")[0] for document in part} for part in (corpus.training, corpus.validation)]
    assert not sources[0] & sources[1]
    spoilt = [document for document in corpus.training if document.corruption]
    assert len(spoilt) == round(0.1 * len(corpus.training))
    ways = [document.corruption for document in spoilt]
    assert abs(ways.count("shuffled bytes") - ways.count("wrong-domain noise")) <= 1
    assert corpus.digest() == build_corpus(domain, 10, 5, 1).digest() != build_corpus(domain, 10, 5, 2).digest()


def test_sampler_visits_all_documents_equally_often() -> None:
    corpus = build_corpus("email", per_domain=5, held_out=5, seed=0)
    count = len(corpus.training)
    sampler = WindowSampler(corpus.training, 64, 7, (0,))
    draws = [sampler.draw(step) for step in range(3 * count)]
    times = np.bincount(np.concatenate([draw.documents for draw in draws]), minlength=count)
    assert set(times) == {21}
    for draw in draws[:5]:
        for index, tokens in zip(draw.documents, draw.tokens, strict=True):
            assert bytes(tokens.tolist()) in corpus.training[index].text


def test_tally_means_over_windows_less_their_batch(tmp_path: Path) -> None:
    documents = build_corpus("email", per_domain=4, held_out=5, seed=0).training
    with record_scores(tmp_path / "scores", {}, 0) as kept:
        for step, chosen, values in ((0, [0, 1], [2.0, 4.0]), (1, [0, 2], [0.0, 8.0])):
            extras = {name: [getattr(documents[index], name) for index in chosen] for name in ("name", "domain")}
            more = {"document": extras["name"], "domain": extras["domain"]}
            kept.add(step, [0, 1], {"value": values}, more)
    sums = tally(tmp_path / "scores", documents, steps=2)
    assert sums.drawn[:4].tolist() == [2, 1, 1, 0]
    assert sums.values[:3].tolist() == [-2.5, 1.0, 4.0]
    assert np.isnan(sums.values[3])
    assert sums.by_group.shape == (len(DOMAINS) + 1, 2)
    assert np.nansum(sums.by_group) > 0


def test_auroc() -> None:
    scores = np.array([0.1, 0.4, 0.35, 0.8])
    assert auroc(scores, np.array([False, False, True, True])) == 0.75
    assert auroc(-scores, np.array([False, False, True, True])) == 0.25
    assert np.isnan(auroc(scores, np.zeros(4, dtype=bool)))
