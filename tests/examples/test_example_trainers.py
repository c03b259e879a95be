"""The recipes for trainers; each where its library is installed."""

import importlib
from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")


def example(name: str, library: str) -> Any:
    pytest.importorskip(library)
    return importlib.import_module(name)


@pytest.mark.parametrize("library", ["accelerate", "lightning"])
def test_steps_add_up(library: str) -> None:
    accounts = example(f"trainer_{library}", library).main()
    assert len(accounts) == 4
    for values, rest, change in accounts:
        assert abs(values + rest - change) < 1e-4 * abs(change)


def test_trainer_adds_up() -> None:
    accounts = example("trainer_transformers", "transformers").main()
    assert len(accounts) == 2
    for step in accounts:
        assert abs(step.values + step.rest - step.change) < 1e-2 * abs(step.change) + 1e-6


def test_trl_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    example("trainer_trl", "trl").main()
    printed = capsys.readouterr().out
    assert printed.count("SFT: values") == printed.count("DPO: values") == 3


def test_opacus_clips_to_the_same_sum() -> None:
    off, epsilon = example("opacus_numbers", "opacus").main()
    assert off < 1e-6  # Opacus clips to max_norm / (norm + 1e-6)
    assert 0 < epsilon < 2
