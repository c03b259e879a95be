"""Which samples models are retrained on: masks [m, n], True where a sample is kept."""

from collections.abc import Sequence

import torch
from torch import Tensor

from funcghost.errors import InputError


def random_subsets(n: int, count: int, share: float = 0.5, seed: int = 0) -> Tensor:
    """Masks [count, n] of random subsets of `round(share * n)` of n samples, each drawn evenly.

    The m-th subset is a function of (n, share, seed, m) alone: a longer bank begins with the shorter one.

    Raises:
        InputError: a number is out of range, or the share leaves no sample or all of them.

    Example:
        >>> from funcghost import evaluation
        >>> evaluation.random_subsets(4, 3).sum(1)
        tensor([2, 2, 2])
    """
    if type(n) is not int or type(count) is not int or n < 2 or count < 1:
        raise InputError(
            f"random_subsets: takes two samples or more and one subset or more, found {n!r} and {count!r}."
        )
    size = round(share * n)
    if not 0 < size < n:
        raise InputError(f"random_subsets: share={share!r} of {n} samples keeps {size}: nothing would differ.")
    source = torch.Generator("cpu").manual_seed(seed)
    masks = torch.zeros(count, n, dtype=torch.bool)
    for mask in masks:
        mask[torch.randperm(n, generator=source)[:size]] = True
    return masks


def leave_out(n: int, groups: Sequence[int] | Sequence[Sequence[int]] | Tensor) -> Tensor:
    """Masks [m, n], each of all samples but one, or but those of one group.

    Raises:
        InputError: a sample is not one of the n.

    Example:
        >>> from funcghost import evaluation
        >>> evaluation.leave_out(3, [0, 2])
        tensor([[False,  True,  True],
                [ True,  True, False]])
    """
    listed = groups.tolist() if isinstance(groups, Tensor) else list(groups)
    masks = torch.ones(len(listed), n, dtype=torch.bool)
    for mask, group in zip(masks, listed, strict=True):
        for sample in group if isinstance(group, list | tuple | range) else [group]:
            if type(sample) is not int or not 0 <= sample < n:
                raise InputError(f"leave_out: samples must be whole numbers from 0 to {n - 1}, found {sample!r}.")
            mask[sample] = False
    return masks
