"""Heads: a product that goes straight into a loss, each row by itself."""

from collections.abc import Mapping, Sequence
from typing import Any

from funcghost import versions
from funcghost.ops.known import Slices, know


def _rows(slots: Mapping[str, Any], leaves: Sequence[Any]) -> Slices | None:
    """A loss for each row, of rows of numbers and of classes."""
    hidden, target, reduction = slots["input"], slots["target"], slots.get("reduction")
    if leaves[hidden].dim() != 2 or reduction is None or leaves[reduction] != "none":
        return None
    return Slices({hidden: 0, target: 0}, (0,))


if versions.LINEAR_CROSS_ENTROPY is not None:
    # In chunks (`options=`) it has neither a forward nor a second derivative, but a backward for the rows of each
    # sample costs what one for all costs. `fg.functional.linear_cross_entropy` has both derivatives, so that tangents
    # can be carried to it and second-order values taken, and its factors are products of rows: no gradient of the whole
    # vocabulary for each sample. So it does not give way to this.
    know(versions.LINEAR_CROSS_ENTROPY, samples=_rows)
