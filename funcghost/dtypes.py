"""In which dtype products and sums are taken: that of their terms, float32 at least."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from funcghost.trees import Params

_WIDE = (torch.float32, torch.float64)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float32 at least, for numbers that can have a derivative."""
    known = dtype in _WIDE or not (dtype.is_floating_point or dtype.is_complex)
    return dtype if known else torch.promote_types(dtype, torch.float32)


def wide(value: Tensor) -> Tensor:
    """In float32 at least."""
    return value if value.dtype in _WIDE else value.to(wide_dtype(value.dtype))


def score_dtype(params: Params) -> torch.dtype:
    """The dtype in which scores are added up: float32 at least."""
    dtype = torch.float32
    for leaf in params.leaves:
        dtype = torch.promote_types(dtype, leaf.dtype)
    return dtype


def as_written(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which products have the dtype of their factors, also within a user's autocast.

    The losses run in what the user has on, and so does `J V` of an op, which is that of the op as it ran. All else does
    not: backwards, as torch advises, and contractions, whose precision is `Options.compute_dtype` alone.
    """
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)
