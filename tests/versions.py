"""What is expected of a test on a torch that is too old for what it asks: the error that says so."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel

import funcghost as fg
from funcghost.versions import COMPILED_STEPS, SHARDED_MODELS, TORCH

GRID_SAMPLE_FORWARD = TORCH >= (2, 13)
"""Whether `F.grid_sample` has a forward derivative, so that tangents can be carried through it."""

compiles = pytest.mark.since(COMPILED_STEPS)
"""Marks a test that compiles a step."""

SHARDS = TORCH >= SHARDED_MODELS
"""Whether steps on models under `fully_shard` run."""


@contextmanager
def differentiated_twice() -> Iterator[None]:
    """Attention by ops that have a second derivative: from 2.14 on a fused one is taken where it was not."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def refused_on_older(item: pytest.Item) -> Iterator[None]:
    """The run of a test: where it is marked `since` a later version than this, it must meet the error that names it."""
    marker = item.get_closest_marker("since")
    if marker is None or marker.args[0] <= TORCH:
        yield
        return
    major, minor = marker.args[0]
    with pytest.raises(fg.VersionError, match=rf"needs torch {major}\.{minor} or newer"), unwrapped():
        yield


@contextmanager
def unwrapped() -> Iterator[None]:
    """Raises the error of ours that a compiler has wrapped, if there is one, in its place."""
    try:
        yield
    except Exception as error:
        found: BaseException | None = error
        while found is not None and not isinstance(found, fg.GhostError):
            found = found.__cause__ or found.__context__
        if found is None:
            raise
        raise found from None
