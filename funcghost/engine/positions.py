"""Scores by position: the terms of an inner product, added up over sites for each position apart."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from funcghost.errors import SampleAxisError
from funcghost.ops.apart import Where
from funcghost.ops.layout import Placed
from funcghost.ops.rules import Op

CHANNELS_FIRST: frozenset[Op] = frozenset(
    (
        *(F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
        *(F.batch_norm, torch.batch_norm, F.instance_norm, F.group_norm, torch.group_norm, F.prelu),
    )
)
"""Ops whose first axis after the samples is that of the channels, whatever its length."""

LEAVE_OUT = "Leave the parameters that are used there out of params."


class Positions:
    """Adds up scores [b, t] in the `columns` that are wanted by position. One serves one run.

    Positions are the first axis after the samples, or after the channels of an op that has them there. At a site where
    that has another length than at most of the others, they are the one axis that has the length t of these.
    """

    def __init__(self, columns: frozenset[int]) -> None:
        """Starts empty."""
        self.columns = columns
        self.totals: dict[int, Tensor] = {}
        self.axes: dict[tuple[int, int], int] = {}
        self.seen: dict[tuple[int, int], tuple[str, tuple[int, ...], int]] = {}

    def see(self, place: tuple[int, int], where: str, op: Op, layout: Where, shape: Sequence[int], batch: int) -> None:
        """Takes note of the shape of an output of a site: `place` numbers both.

        Raises:
            SampleAxisError: the samples have no axis of their own.
        """
        if layout == "unused":
            return
        if isinstance(layout, Placed):
            raise SampleAxisError(f"per_token: {where} gives rows that data moved. {LEAVE_OUT}")
        if layout.fold == "single":
            raise SampleAxisError(
                "per_token: with one sample the axis of the samples cannot be told from that of the positions. Make "
                "plan = fg.plan(losses, params, batch) with two samples or more, and pass plan=plan."
            )
        found = tuple(layout.by_sample(torch.empty(shape, device="meta"), batch).shape)
        self.seen[place] = where, found, 2 if op in CHANNELS_FIRST else 1

    def settle(self) -> None:
        """Finds the axis of the positions at each site, once all have been seen.

        Raises:
            SampleAxisError: it cannot be told.
        """
        examples = {shape[axis : axis + 1]: (where, shape) for where, shape, axis in reversed(self.seen.values())}
        found = [axes for axes in (self._of_length(*length) for length in examples if length) if axes is not None]
        if len(found) == 1:
            [self.axes] = found
        elif self.seen:
            sites = ", ".join(f"{where} gives {list(shape)}" for where, shape in examples.values())
            raise SampleAxisError(
                "per_token: every use of a parameter must have the positions as its first axis after the samples (and "
                "the channels, for a convolution or a norm of channels) or, where most have, on the one axis of that "
                f"length. With the samples in front, {sites}. {LEAVE_OUT}"
            )

    def _of_length(self, length: int) -> dict[tuple[int, int], int] | None:
        """The axes of the positions if there are so many; None where a site has no such axis, or several."""
        axes, others = {}, 0
        for place, (_, shape, axis) in self.seen.items():
            if shape[axis : axis + 1] != (length,):
                if len(shape) < 3 or shape[axis:].count(length) != 1:
                    return None
                axis, others = shape.index(length, axis), others + 1
            axes[place] = axis
        return axes if 2 * others < len(axes) else None

    def add(self, column: int, site: int, products: Mapping[int, Tensor], dtype: torch.dtype) -> Tensor:
        """Adds products [b, ...] of a site, by output with samples in front, to a column; gives the sums [b]."""
        parts = [
            product.movedim(self.axes[site, output], 1).unsqueeze(-1).flatten(2).sum(2, dtype=dtype)
            for output, product in products.items()
        ]
        value, known = torch.stack(parts).sum(0), self.totals.get(column)
        self.totals[column] = value if known is None else known + value
        return value.sum(1)

    def results(self, scale: float) -> dict[int, Tensor]:
        """The scores [b, t] by column, of gradients that were smaller by the `scale`."""
        return {k: value * scale for k, value in self.totals.items()}
