"""What a tap does with the factors of per-sample gradients: scores along directions, and the ledger."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from funcghost.algebra.contractions import along, in_dtype
from funcghost.algebra.directions import Leaf, LowRank
from funcghost.engine.ledger import Ledger
from funcghost.engine.shadows import Shadow
from funcghost.ops.uses import Levels, Use, Where

Around = Callable[[], AbstractContextManager[None]]
"""What repeats in a backward what surrounded the forward."""


class Collector(NamedTuple):
    """Takes the factors of what went into one tapped call.

    `low` are the directions to score along by factors, by slot and column. With `targets`, the shadows of what is in
    each slot, factors go to the ledger. Products for scores are computed in the `dtype`, if there is one.
    """

    uses: Sequence[Use]
    low: Mapping[tuple[int, int], Leaf]
    layouts: Sequence[Where]
    batch: int
    ledger: Ledger | None
    targets: Mapping[int, Shadow]
    sources: frozenset[int]
    dtype: torch.dtype | None

    def _rounded(self, leaf: Leaf) -> Leaf:
        if self.dtype is None:
            return leaf
        to = in_dtype(self.dtype)
        return replace(leaf, rows=to(leaf.rows), cols=to(leaf.cols)) if isinstance(leaf, LowRank) else to(leaf)

    def collect(
        self,
        around: Around,
        tensors: Sequence[Tensor],
        levels: Levels,
        gradients: Sequence[Tensor | None],
    ) -> dict[int, Tensor]:
        """Hands the factors on; gives the scores [b] by column."""
        start, scores = 0, dict[int, Tensor]()
        for use in self.uses:
            stop = start + len(use.needed)
            own = tuple(has[start:stop] for has in levels) if levels else ()
            with around():
                factors = use.factors(tensors[start:stop], own, gradients, self.layouts, self.batch)
            for slot, factor in zip(use.slots, factors, strict=True):
                wanted = [(k, direction) for (where, k), direction in self.low.items() if where == slot]
                rounded = factor.map(in_dtype(self.dtype)) if wanted and self.dtype is not None else factor
                for k, direction in wanted:
                    score = along(rounded, self._rounded(direction))
                    scores[k] = scores[k] + score if k in scores else score
                if self.ledger is not None and slot in self.targets:
                    self.ledger.collect(self.targets[slot], factor)
            start = stop
        if self.ledger is not None:
            self.ledger.passed(self.sources)
        return scores
