"""The sizes for which a plan has been verified, and which others follow from them.

Where the same ops run, sizes are all that a layout can depend on. In most programs each of them is an affine function
of a few that come with the batch: `b`, `t`, `b * t`. Runs that were verified fix these functions, as points fix a line
or a plane: sizes that lie on their affine hull are of the same program, with its axes split and merged in the same way.
"""

from dataclasses import dataclass, field, replace
from functools import reduce
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from funcghost.ops.digest import Sizes

Numbers = NDArray[Any]
"""Whole numbers of any size."""


@dataclass(frozen=True)
class Verified:
    """`checksums` are those of the sizes that were planned for, were verified, or followed from these.

    `first` are the numbers of a run, `span` those of others less these, in echelon form. `confirmed`: a run that was
    verified lay on the hull before it.

    Example:
        >>> from funcghost.ops.digest import Sizes
        >>> runs = [Sizes((t, 8, 8 * t), (1,), t) for t in (2, 3, 5, 7)]
        >>> known = Verified()
        >>> for run in runs[:3]:
        ...     known = known.verified_for(run)
        >>> Sizes((6, 8, 48), (1,), 6) in known, known.implies(Sizes((6, 8, 48), (1,), 6))
        (False, False)
        >>> known = known.verified_for(runs[3])  # as the fourth, the eighth and so on are, in any case
        >>> known.implies(Sizes((6, 8, 48), (1,), 6)), known.implies(Sizes((6, 8, 47), (1,), 47))
        (True, False)
    """

    checksums: frozenset[int] = frozenset()
    first: Sizes | None = field(default=None, repr=False, compare=False)
    span: tuple[Numbers, ...] = field(default=(), repr=False, compare=False)
    confirmed: bool = field(default=False, repr=False, compare=False)

    def __contains__(self, sizes: Sizes) -> bool:
        """Whether these very sizes are among them."""
        return sizes.checksum in self.checksums

    def __len__(self) -> int:
        """How many sizes there are."""
        return len(self.checksums)

    def implies(self, sizes: Sizes) -> bool:
        """Whether a run with these sizes is right because those with others were.

        Not where the number of sizes comes to be a power of two: so that what should not be is found out.
        """
        many = len(self) + 1
        return self.confirmed and bool(many & (many - 1)) and self._alike(sizes) and not self._off(sizes).any()

    def knows(self, sizes: Sizes) -> bool:
        """Whether a run with these sizes is known to be right, or follows to be."""
        return sizes in self or self.implies(sizes)

    def with_implied(self, sizes: Sizes) -> "Verified":
        """Also for these sizes, if the others imply them."""
        return self._with(sizes) if sizes not in self and self.implies(sizes) else self

    def verified_for(self, sizes: Sizes) -> "Verified":
        """Also for these sizes, with which a run was verified."""
        if sizes in self:
            return self
        known = self._with(sizes)
        if not self._alike(sizes):
            return replace(known, first=sizes, span=(), confirmed=False)
        off = self._off(sizes)
        return replace(known, span=(*self.span, off)) if off.any() else replace(known, confirmed=True)

    def _with(self, sizes: Sizes) -> "Verified":
        return replace(self, checksums=self.checksums | {sizes.checksum})

    def _alike(self, sizes: Sizes) -> bool:
        """Whether what is more than a size, and what is 0 or 1, as no other size is treated, is as in the first run."""
        first = self.first
        if first is None or first.fixed != sizes.fixed or len(first.numbers) != len(sizes.numbers):
            return False
        own, others = np.array(sizes.numbers, object), np.array(first.numbers, object)
        special = (own <= 1) | (others <= 1)
        special[list(sizes.fixed)] = True
        return bool((own == others)[special].all())

    def _off(self, sizes: Sizes) -> Numbers:
        """How far off the hull these sizes are, as a multiple: zeros for not at all."""
        assert self.first is not None
        off: Numbers = np.array(sizes.numbers, object) - np.array(self.first.numbers, object)
        for row in self.span:
            pivot = row.nonzero()[0][0]
            if off[pivot]:
                off = off * row[pivot] - row * off[pivot]
                off //= reduce(gcd, off) or 1
        return off
