"""In which dtype sums are taken: float32 at least."""

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
