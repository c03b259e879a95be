"""The letters of a product by their roles, and how its tensors come to axes in the order of these."""

from dataclasses import dataclass, replace
from functools import cache, cached_property
from math import prod

from torch import Tensor

from funcghost.algebra.factors import Form
from funcghost.ops.layout import Layout
from funcghost.ops.products import Letter, Letters

IN_FRONT = Layout(0)


@dataclass(frozen=True)
class Arrangement:
    """The letters of a product by their roles, with the samples among the positions at `where`."""

    front: Letters
    out: Letters
    positions: Letters
    blocks: Letters
    rows: Letters
    cols: Letters
    where: Layout
    form: Form
    swapped: bool


@cache
def arrangement(
    param: Letters,
    coefficient: Letters,
    out: Letters,
    groups: int,
    base: tuple[int, ...] | None,
    shape: tuple[int, ...],
    layout: Layout,
    vmapped: int,
) -> Arrangement | None:
    """The roles of the letters of a product, unless the samples are not among its positions."""
    front: Letters = tuple(f"vmap {i}" for i in range(vmapped))
    out = (*front, *out)
    axis, sample = layout.axis, None
    if layout.fold != "single":
        if groups > 1:  # the axis of the channels is two
            channel = out.index("g")
            if axis == channel:
                return None
            axis += axis > channel
        sample = out[axis]
    letters = [letter for letter in param if letter is not None]
    wanted = {letter for letter in coefficient if letter is not None}
    if (sample is not None and sample in letters) or not set(letters) <= {*out, *wanted}:
        return None
    if not wanted <= {*out, *letters} or None in out:
        return None
    positions = tuple(letter for letter in out if letter not in letters)
    blocks = tuple(letter for letter in letters if letter in out and letter in wanted)
    rows = tuple(letter for letter in letters if letter in out and letter not in wanted)
    cols = tuple(letter for letter in letters if letter not in out)
    base = base or tuple(size for size, letter in zip(shape, param, strict=True) if letter is not None)
    plain = [letter for letter in letters if letter not in blocks]
    swapped = bool(plain) and plain[0] in cols
    q, m, n = (tuple(map(letters.index, part)) for part in (blocks, *((cols, rows) if swapped else (rows, cols))))
    where = layout if sample is None else replace(layout, axis=positions.index(sample))
    return Arrangement(front, out, positions, blocks, rows, cols, where, Form(shape, base, (q, m, n)), swapped)


@dataclass(frozen=True)
class Axes:
    """How to bring a tensor to axes in the order `(*positions, *last)`: of those `kept`, in the `order`.

    None where there is nothing to do; `there` says which of the axes it has, if not all.
    """

    positions: Letters
    kept: tuple[int, ...] | None
    order: tuple[int, ...] | None
    there: tuple[bool, ...] | None

    @cached_property
    def at_once(self) -> bool:
        """Whether there is nothing to do but to reshape."""
        return self.kept is None and self.order is None and self.there is None

    def arrange(
        self, value: Tensor, sizes: dict[Letter | None, int], where: Layout, batch: int, last: tuple[int, int]
    ) -> Tensor:
        """The tensor as [b, t, q, m]; positions that it does not have are of the same value all along."""
        if self.at_once and where == IN_FRONT and value.numel():
            return value.reshape(batch, value.numel() // (batch * last[0] * last[1]), *last)
        if self.kept is not None:
            value = value.reshape([value.shape[i] for i in self.kept])
        if self.order is not None:
            value = value.permute(self.order)
        lengths = [sizes[letter] for letter in self.positions]
        if self.there is not None:
            value = value[tuple(slice(None) if there else None for there in self.there)]
            value = value.expand(*lengths, *value.shape[len(lengths) :])
        t = prod(lengths) // batch
        if where.fold == "single":
            return value.reshape(1, t, *last)
        return where.by_sample(value, batch).reshape(batch, t, *last)


@cache
def axes_of(given: Letters, positions: Letters, last: Letters) -> Axes:
    """From axes with the letters `given`."""
    kept = [i for i, letter in enumerate(given) if letter is not None]
    names, wanted = [given[i] for i in kept], (*positions, *last)
    order = tuple(names.index(letter) for letter in wanted if letter in names)
    there = tuple(letter in names for letter in wanted)
    return Axes(
        positions,
        tuple(kept) if len(kept) < len(given) else None,
        order if order != tuple(range(len(order))) else None,
        there if not all(there) else None,
    )
