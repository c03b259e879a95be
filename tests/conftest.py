"""Hypothesis profiles, seeds, threads, and which tests run where."""

import os
import tempfile
from collections.abc import Generator, Iterator

import pytest
import torch
from hypothesis import register_random, settings

from funcghost.ops import rules
from funcghost.transforms import one_op
from tests.depth import DEEP
from tests.versions import refused_on_older

# `dev` and `ci` draw the same examples in every run, and so pass in every run or in none; `deep` draws anew.
settings.register_profile("dev", max_examples=25, deadline=None, derandomize=True, print_blob=True)
settings.register_profile("ci", max_examples=25, deadline=None, derandomize=True, print_blob=True)
settings.register_profile("deep", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


class TorchGenerator:
    """Torch's default generator in the form that hypothesis seeds before every drawn example."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def getstate(self) -> torch.Tensor:
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


TORCH_GENERATOR = TorchGenerator()  # hypothesis keeps only a weak reference
register_random(TORCH_GENERATOR)


KERNELS = tempfile.TemporaryDirectory(prefix="funcghost-kernels-", ignore_cleanup_errors=True)
"""Where compiled code goes: what a killed run left half written in the common cache would fail to load."""


def pytest_configure() -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = KERNELS.name
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # the workers share the cores already


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not DEEP:
        left_out = [item for item in items if item.get_closest_marker("deep")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("deep")]
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    with refused_on_older(pyfuncitem):
        yield
    return True


@pytest.fixture(autouse=True)
def _rules_as_they_were() -> Iterator[None]:
    kept = rules.registered()
    yield
    rules._RULES.clear()
    rules._RULES.update(kept)


@pytest.fixture(autouse=True)
def _along_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of tests are small: taken as one op, as `test_one_op.py` has them, many would never meet the engine."""
    monkeypatch.setattr(one_op, "FEWEST_OPS", 10**9)


@pytest.fixture(autouse=True)
def _seed_torch() -> None:
    torch.manual_seed(0)
