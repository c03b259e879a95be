"""What a tap does with the factors of per-sample gradients: scores along low-rank directions, and the ledger."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from funcghost.contract import along, in_dtype
from funcghost.ledger import Ledger
from funcghost.lowrank import Leaf
from funcghost.shadows import Shadow
from funcghost.uses import Levels, Use, Where


@dataclass(frozen=True, eq=False)
class Collector:
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

    @property
    def needed(self) -> tuple[int, ...]:
        """The slots of the tensors to keep."""
        return tuple(slot for use in self.uses for slot in use.needed)

    def collect(
        self,
        around: Callable[[], AbstractContextManager[None]],
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
                rounded = factor if self.dtype is None else factor.map(in_dtype(self.dtype))
                for (where, k), direction in self.low.items():
                    if where == slot:
                        score = along(rounded, direction)
                        scores[k] = scores[k] + score if k in scores else score
                if self.ledger is not None and slot in self.targets:
                    self.ledger.collect(self.targets[slot], factor)
            start = stop
        if self.ledger is not None:
            self.ledger.passed(self.sources)
        return scores


def collecting(
    uses: Sequence[Use],
    low: Mapping[tuple[int, int], Leaf],
    layouts: Sequence[Where],
    batch: int,
    ledger: Ledger | None,
    targets: Mapping[int, Shadow],
    *,
    expected: bool,
    dtype: torch.dtype | None,
) -> Collector | None:
    """A collector of the uses that are wanted; the ledger is to expect it, unless the call is run again.

    A direction is scored by factors where they are had without a derivative for each sample.
    """
    apart = {slot for use in uses if use.by_product for slot in use.slots} if low else set[int]()
    fast = {key: direction for key, direction in low.items() if key[0] in apart}
    wanted = {slot for slot, _ in fast}.union(targets)
    kept = [use for use in uses if not wanted.isdisjoint(use.slots)]
    if not kept:
        return None
    sources = frozenset[int]().union(*(target.sources for target in targets.values()))
    if ledger is not None and targets and expected:
        ledger.expect(sources)
    return Collector(kept, fast, layouts, batch, ledger, targets, sources, dtype)
