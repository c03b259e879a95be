"""Facts about the losses alone: whether they repeat, and whether they mix samples."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any, Literal, NamedTuple

import optree
import torch
from torch import Tensor

from funcghost.errors import InputError
from funcghost.problem import Problem
from funcghost.side_effects import random_state, untouched
from funcghost.trees import Tree, tensors

NO_GROUPED_PRODUCT = "Expected mat_a to be"
"""How torch refuses a dtype in `grouped_mm`."""
Mixing = Literal["yes", "no", "unknown"]


class Evaluated(NamedTuple):
    """The losses [b], and whether random streams ended where those of another evaluation did."""

    values: Tensor
    drawn: list[Tensor]


def evaluated(problem: Problem) -> Evaluated:
    """The losses with the random numbers that the caller would get, who is left with all streams as they were.

    Raises:
        InputError: they have products of groups in a dtype that torch has none for; what else they raise is theirs.
    """
    with untouched(problem.devices()):
        try:
            values = problem.evaluate(problem.leaves())[0].detach()
        except RuntimeError as error:
            if NO_GROUPED_PRODUCT not in str(error):
                raise
            raise InputError(
                f"the losses raise by themselves: {error}. These are experts multiplied by torch's grouped_mm, the "
                "default of transformers, which takes float32, bfloat16 and float16 alone. Set "
                "model.set_experts_implementation('batched_mm'), which takes float64 and forward derivatives, or check "
                "in float32, where the default is exact."
            ) from error
        return Evaluated(values, [state for _, state in random_state(problem.devices())])


def rounding(values: Tensor, eps: float) -> Tensor:
    """What losses computed in another order of summation may differ by."""
    size = values.abs().double().nan_to_num(0, 0, 0)
    return 8 * eps * (size + (size.max() if len(size) else 0.0))


def distances(values: Tensor, others: Tensor) -> Tensor:
    """How much each loss differs; infinite where one of two is no number, or there is none."""
    if values.shape != others.shape:
        return torch.full_like(values, float("inf"), dtype=torch.float64)
    a, b = values.double(), others.double()
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0.0, (a - b).abs().nan_to_num(float("inf"), float("inf")))


def repeats(problem: Problem, first: Evaluated, eps: float) -> bool:
    """Whether the losses are the same, to rounding, for the same random state."""
    again = evaluated(problem).values
    return bool((distances(first.values, again) <= rounding(first.values, eps)).all())


def mixing(problem: Problem, first: Evaluated, eps: float) -> tuple[Mixing, str]:
    """Whether `losses[i]` changes when other samples do, and how that is known.

    Half of the samples give their places to others, in all tensors of the batch that have an axis as long as there are
    samples. A loss that stays while those change does not see them. The halves are those of the bits of the sample
    numbers, so that each sample meets every other one: at most `2 log2(b)` forwards.
    """
    size = len(first.values)
    if size == 1:
        return "no", "there is one sample"
    leaves = tensors(problem.batch)
    places = [[axis for axis, n in enumerate(leaf.shape) if n == size] for leaf in leaves]
    if not any(places):
        return "unknown", f"no tensor in the batch has an axis of {size}"
    several = max(map(len, places))
    left = sum(leaf.dim() > 0 and not axes for leaf, axes in zip(leaves, places, strict=True))
    try:
        verdicts = [_exchanged(problem, first, places, choice, eps) for choice in range(several)]
    except Exception as error:  # a function may refuse a batch that is none of its caller's
        return "unknown", f"the losses raise {type(error).__name__} when samples are exchanged"
    if "no" in verdicts:
        rest = f"; {left} tensors without an axis of {size} were left as they are" if left else ""
        return "no", "a loss stays when other samples are exchanged" + rest
    if several > 1:
        return "unknown", f"a tensor in the batch has several axes of {size}"
    if verdicts == ["yes"] and left:
        return "unknown", f"a tensor in the batch has no axis of {size}"
    if verdicts == ["yes"]:
        return "yes", "losses change when other samples are exchanged, as with batch norm in training mode"
    return "unknown", str(verdicts[0])


def _exchanged(problem: Problem, first: Evaluated, places: list[list[int]], choice: int, eps: float) -> str:
    """Whether samples mix, or why that cannot be told; with samples on the axes of this number."""
    size = len(first.values)
    number = torch.arange(size, device=first.values.device)
    allowed, among_kept, among_others = rounding(first.values, eps), 0.0, 0.0
    for bit, side in product(range((size - 1).bit_length()), (0, 1)):
        kept, other = (number >> bit) % 2 == side, number ^ (1 << bit)
        source = torch.where(kept, number, torch.where(other < size, other, (number + 1) % size))
        values, drawn = evaluated(replace(problem, batch=taken(problem.batch, source, places, choice)))
        if not all(a.equal(b) for a, b in zip(first.drawn, drawn, strict=True)):
            return "how many random numbers are drawn depends on the samples"
        off = distances(first.values, values) / allowed.clamp_min(1e-300)
        among_kept = max(among_kept, float(off[kept].max()))
        among_others = max(among_others, float(off[~kept].max()))
        if among_kept > 1:
            return "yes"
    if not among_others:
        return "no loss changes when samples are exchanged"
    return "no" if among_kept < among_others / 16 else "losses change by rounding alone when samples are exchanged"


def taken(batch: Tree, source: Tensor, places: Sequence[Sequence[int]], choice: int = 0) -> Tree:
    """The batch with sample `source[i]` at the place of sample i, on the axes at `places` of each tensor."""
    remaining = iter(places)

    def take(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        axes = next(remaining)
        return leaf.index_select(axes[min(choice, len(axes) - 1)], source.to(leaf.device)) if axes else leaf

    return optree.tree_map(take, batch)
