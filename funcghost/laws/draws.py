"""What the laws are tested with: weights of samples, directions, rounding, and how far off a sum may be."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-7, torch.float32: 3e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Relative to the sum of the sizes of the terms: rounding of a deep network, far below one parameter's share."""


def shaken(value: Tensor, size: float, seed: int) -> Tensor:
    """The value with every entry off by `size` relative to it, up or down."""
    generator = torch.Generator(value.device).manual_seed(seed)
    sign = torch.randint(0, 2, value.shape, generator=generator, device=value.device).to(value.dtype) * 2 - 1
    return value.detach() * (1 + size * sign)


def near(leaves: Sequence[Tensor], seed: int, precision: torch.dtype) -> list[Tensor]:
    """Parameters that are off by a little rounding, of the lowest precision that they come to on the way."""
    sizes = [max(rounding(leaf.dtype), rounding(precision)) for leaf in leaves]
    return [shaken(leaf, size, 1000 * seed + n) for n, (leaf, size) in enumerate(zip(leaves, sizes, strict=True), 1)]


def no_evidence(precision: torch.dtype) -> tuple[range, int]:
    """The seeds for what is `near`, and how many times the largest change that they make is no evidence.

    In half precision that may be some percent of a gradient: a few times of it must stay below the whole. So it is
    asked more often.
    """
    return (range(1, 3), 16) if precision in (torch.float64, torch.float32) else (range(1, 7), 4)


def rounding(dtype: torch.dtype) -> float:
    """How far off a number may be after some ops, relative to it."""
    return (64 if dtype in (torch.float64, torch.float32) else 1) * torch.finfo(dtype).eps


def repeated(numbers: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor of this shape, filled with the numbers over and over."""
    copies = -(-prod(shape) // len(numbers))
    return numbers.expand(copies, -1).reshape(-1)[: prod(shape)].view(tuple(shape))


def sample_weights(losses: Tensor) -> Tensor:
    """The weights c [b]: of either sign, of size 1/2 to 3/2, the same for the same b."""
    generator = torch.Generator().manual_seed(losses.shape[0])
    size = torch.rand(losses.shape, generator=generator, device="cpu") + 0.5
    sign = torch.randint(0, 2, losses.shape, generator=generator, device="cpu") * 2 - 1
    return (size * sign).to(losses)


PERIOD = 65521
"""How many numbers are drawn; a prime, so that rows of a tensor are not alike."""
