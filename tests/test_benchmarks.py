"""The command for a GPU runs end to end on a CPU, as small as it can be."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.benchmarks import on_gpu
from tests.benchmarks.models import LARGE

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.deep  # takes a minute
def test_one_command_for_a_gpu_runs_here(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "tests/benchmarks/on_gpu.sh"), "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHON": sys.executable}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads((tmp_path / "on_gpu.json").read_text(encoding="utf-8"))
    assert list(found["stages"]) == [stage.name for stage in on_gpu.stages("cpu", "float32", True, tmp_path)]
    assert all(stage["status"] == "done" for stage in found["stages"].values())
    assert "step with dot, rank 32" in (tmp_path / "on_gpu.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "tests/benchmarks").glob("bench_*.py")))
def test_every_benchmark_takes_what_make_bench_passes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(f"tests.benchmarks.{name}").main(["--quick", "--out", "rows.json", "--help"])
    assert "--threads" in capsys.readouterr().out


def test_its_profile_runs_here(tmp_path: Path) -> None:
    assert on_gpu.main(["--device", "cpu", "--tiny", "--profile", "llama-tiny", "--out", str(tmp_path)]) == 0
    profile = json.loads((tmp_path / "profile_llama-tiny.json").read_text(encoding="utf-8"))
    assert profile["errors"] == {}
    assert profile["scores of step and reduce differ by"] < 1e-5
    assert {"plain step", "step with dot", "dot alone"} <= profile["rows"].keys()
    assert 0 < profile["python of a step with dot"] <= 1
    assert "step with dot, rank 32" in on_gpu.show_profile(profile)
    report = {"setting": profile["setting"], "stages": {"profile": {"status": "done", "report": profile}}}
    on_gpu.written(report, tmp_path)
    assert "by a decoder of as many thin layers" in (tmp_path / "on_gpu.md").read_text(encoding="utf-8")


def test_the_stages_of_a_gpu_fit_their_time(tmp_path: Path) -> None:
    planned = on_gpu.stages("cuda", "bfloat16", False, tmp_path)
    assert [stage.name for stage in planned][:3] == ["doctor", "profile llama1024", "profile llama4096"]
    assert {"cuda tests", "bench_dot", "bench_in_run", "bench_pairs"} <= {stage.name for stage in planned}
    assert on_gpu.LIMIT <= 480
    marked = {
        path.relative_to(ROOT / "tests").as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
        if "@pytest.mark.cuda" in path.read_text(encoding="utf-8") and path.name != Path(__file__).name
    }
    assert marked == set(on_gpu.CUDA_TESTS)


def test_what_is_late_lacks_or_fails_is_said(tmp_path: Path) -> None:
    (tmp_path / "late.json").write_text('{"of": "an earlier run"}', encoding="utf-8")
    started = time.monotonic()
    late = on_gpu.run(on_gpu.Stage("late", ("-c", "import time; time.sleep(60)"), 1), 100, tmp_path)
    assert time.monotonic() - started < 30
    assert late["status"] == "stopped after 1 s"
    assert "report" not in late
    assert on_gpu.run(on_gpu.Stage("x", (), 1, ("no_such_module",)), 100, tmp_path)["status"].startswith("left out")
    assert on_gpu.run(on_gpu.Stage("x", (), 1), 1, tmp_path)["status"] == "left out: no time left"
    failed = on_gpu.run(on_gpu.Stage("x", ("-c", "raise SystemExit(3)"), 50), 100, tmp_path)
    assert failed["status"] == "ended with 3"


@pytest.mark.parametrize("name", [name for name in LARGE if name != "llama-tiny"])
def test_large_sizes_are_consistent(name: str) -> None:
    size = LARGE[name]
    assert size["width"] % size["heads"] == 0
    assert size["heads"] % 4 == 0
