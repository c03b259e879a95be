"""Scores by position: the terms of an inner product, added up over sites for each position apart."""

from collections.abc import Sequence

import torch
from torch import Tensor

from funcghost.errors import SampleAxisError
from funcghost.ops.apart import Where
from funcghost.ops.layout import Layout


class Positions:
    """Adds up scores [b, t] in the `columns` that are wanted by position. One serves one run.

    `length`: the number t of positions, once a site has been seen.
    """

    def __init__(self, columns: frozenset[int]) -> None:
        """Starts empty."""
        self.columns = columns
        self.totals: dict[int, Tensor] = {}
        self.length: int | None = None

    def add(self, column: int, value: Tensor) -> None:
        """A contribution [b, t] to a column."""
        known = self.totals.get(column)
        self.totals[column] = value if known is None else known + value

    def results(self, scale: float) -> dict[int, Tensor]:
        """The scores [b, t] by column, of gradients that were smaller by the `scale`."""
        return {k: value * scale for k, value in self.totals.items()}

    def check(self, where: str, layout: Where, shape: Sequence[int], batch: int) -> None:
        """Holds the first axis after the samples of what comes out of a site to that of the other sites.

        Raises:
            SampleAxisError: it has another length, or there is none.
        """
        if layout == "unused":
            return
        if isinstance(layout, Layout) and layout.fold == "single":
            raise SampleAxisError(
                "per_token: with one sample the axis of the samples cannot be told from that of the positions. Make "
                "plan = fg.plan(losses, params, batch) with two samples or more, and pass plan=plan."
            )
        found: tuple[int, ...] = ()
        if isinstance(layout, Layout):
            found = tuple(layout.by_sample(torch.empty(shape, device="meta"), batch).shape)
        self.length = self.length or (found[1] if len(found) > 1 else None)
        if len(found) < 2 or found[1] != self.length:
            raise SampleAxisError(
                f"per_token: every use of a parameter must have the positions as its first axis after the samples; "
                f"{where} gives {found or tuple(shape)} with the samples in front, and other sites have {self.length} "
                "positions. Leave the parameters that are used there out of params."
            )
