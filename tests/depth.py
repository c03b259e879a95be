"""How deep the tests go: the `deep` profile runs every case, the others a slice that meets every mechanism.

A test, or one of its cases, that carries the mark `deep` is more of what others run already: it is left out elsewhere
(`tests/conftest.py`). `thinned` marks the cases of a table, `fewer` draws fewer examples where each takes long.
"""

import os
from collections.abc import Collection, Iterable
from typing import Any

import pytest
from hypothesis import settings

DEEP = os.environ.get("HYPOTHESIS_PROFILE") == "deep"


def thinned(cases: Iterable[Any], kept: Collection[Any]) -> list[Any]:
    """The cases for `parametrize`, with all that are not among those kept left to the deep profile."""
    known = list(cases)
    if unknown := [case for case in kept if case not in known]:
        raise ValueError(f"no cases {unknown}")
    return [case if case in kept else left(case) for case in known]


def left(case: Any) -> Any:
    """A case for the deep profile alone."""
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.deep)


def fewer(parts: int, least: int = 3) -> settings:
    """Draws that part of the examples of the profile: for what plans or compiles once for each of them."""
    return settings(max_examples=max(least, settings().max_examples // parts))
