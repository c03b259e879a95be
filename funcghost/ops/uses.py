"""From the output gradient of a site to the factors of the per-sample gradients of what goes in there.

Where the op is known as a product, the factor is read off its letters: those that the parameter shares with the output
are rows, those that it shares with the other argument are columns, those it shares with both are blocks, and the rest
of the output are positions, the samples among them. Any other op is differentiated by autograd, once per sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from math import prod

from torch import Tensor

from funcghost.algebra.factors import Dense, Factor, Form, Outer
from funcghost.algebra.sums import LONG
from funcghost.dtypes import as_written, wide, wide_dtype
from funcghost.ops.apart import Passed, Use, by_autograd, lifted
from funcghost.ops.call import Call, physical
from funcghost.ops.layout import Layout, Placed, Rows, readable
from funcghost.ops.lookups import by_index
from funcghost.ops.products import Description, Letter, Letters, Product, Table, describe, itself
from funcghost.ops.unrolled import by_steps

IN_FRONT = Layout(0)


def find_uses(
    call: Call,
    described: Description | None,
    layouts: Sequence[Layout | Rows | None],
    chosen: tuple[int, ...],
    vmapped: int,
) -> list[Use]:
    """How to get the factors for each tracked argument: by letters where that can be done, all others by autograd."""
    recurrent = by_steps(call, layouts, chosen, vmapped)
    known, others = [recurrent] if recurrent else list[Use](), list[int]()
    layout = layouts[0] if len(layouts) == 1 else None
    for slot in call.tracked:
        if recurrent and slot in recurrent.slots:
            continue
        # 1. What the op is in this argument: a product, a lookup, or nothing that is known.
        plain = layout is not None and physical(call.leaves[slot]) is call.leaves[slot]
        product = describe(call, described, slot) if described and plain else None
        # 2. How the factor is read off that; not at all where the samples are not among its positions.
        use, shape = None, tuple(call.leaves[slot].shape)
        if layout is not None and isinstance(product, Product):
            use = _by_letters(product, slot, shape, layout, vmapped)
            if use is not None and isinstance(layout, Rows):
                use = None if vmapped else _where_readable(use, by_autograd(call, (slot,), chosen))
        elif layout is not None and isinstance(product, Table):
            use = by_index(product, slot, shape, layout, vmapped)
        # 3. All arguments that are left are differentiated together.
        if use is None:
            others.append(slot)
        else:
            known.append(use)
    return [*known, by_autograd(call, tuple(others), chosen)] if others else known


def _where_readable(use: Use, apart: Use) -> Use:
    """The use of rows that data have moved, or the one for each sample apart where their samples cannot be read."""
    places = [apart.needed.index(slot) for slot in use.needed]

    def factors(passed: Passed) -> list[Factor]:
        where = passed.layouts[0]
        if isinstance(where, Placed) and readable(where.samples):
            return use.factors(passed._replace(saved=[passed.saved[place] for place in places]))
        return apart.factors(passed)

    return Use(use.slots, apart.needed, factors, by_product=False)


def _by_letters(product: Product, slot: int, shape: tuple[int, ...], layout: Layout | Rows, vmapped: int) -> Use | None:
    """The factor of a product, unless the samples are not among its positions."""
    known = product.param, product.coefficient, product.out, product.groups, product.base
    at = Layout(layout.axis) if isinstance(layout, Rows) else layout
    try:
        arranged = arrangement(*known, shape, at, vmapped)
    except TypeError:  # sizes are symbols while a compiler traces, which cannot be looked up
        arranged = arrangement.__wrapped__(*known, shape, at, vmapped)
    if arranged is None:
        return None
    a, form = arranged, arranged.form
    q, *sides = form.blocks
    left_size, right_size = (sides[1], sides[0]) if a.swapped else sides
    outward, in_front = axes_of(a.out, a.positions, (*a.blocks, *a.rows)), layout == IN_FRONT

    def factors(passed: Passed) -> list[Factor]:
        saved, levels, gradients, layouts, batch = passed
        g, placed = gradients[0], layouts[0]
        assert g is not None
        where = Placed(a.where.axis, placed.samples) if isinstance(placed, Placed) else a.where
        if product.gradients is not None and in_front and not levels:
            positions = g.numel() // (batch * left_size * q)
            if left_size * right_size <= positions * (left_size + right_size):
                with as_written(g.device):
                    return [Dense(product.gradients([wide(value) for value in saved], wide(g)))]
        if product.groups > 1:
            g = g.unflatten(a.out.index("g"), (product.groups, -1))
        sizes = dict(zip(a.out, g.shape, strict=True))
        left = outward.arrange(g, sizes, where, batch, (q, left_size))
        if product.values is None:
            total = wide(left) if left.shape[1] == 1 else left.sum(1, dtype=wide_dtype(left.dtype))
            return [Dense(form.whole(total if product.scale == 1 else total * product.scale, batch))]
        coefficient = lifted(product.values, saved, levels)
        given = product.coefficient
        if levels:
            given = (*(name for name, level in zip(a.front, levels, strict=True) if level.has_any), *given)
        inward = axes_of(given, a.positions, (*a.blocks, *a.cols))
        right = inward.arrange(coefficient, sizes, where, batch, (q, right_size))
        if product.scale != 1:
            left = left * product.scale
        if not a.rows or not a.cols:
            return [Dense(form.whole((wide(left) * wide(right)).sum(1), batch))]
        return [Outer(right, left, form) if a.swapped else Outer(left, right, form)]

    fixed = isinstance(left_size, int) and isinstance(right_size, int)  # and not symbols
    smaller = fixed and product.values is itself and bool(a.cols) and (left_size >= 2 * right_size or right_size > LONG)
    outer = product.values is not None and product.gradients is None and bool(a.rows) and bool(a.cols)
    return Use((slot,), product.needed, factors, smaller=smaller, outer=outer)


@dataclass(frozen=True)
class Arrangement:
    """The letters of a product by their roles.

    `front`: the vmapped axes of the output.
    `out`: all axes of the output.
    `positions`: those that the parameter does not have.
    `blocks`: those of the parameter that the output and the other argument have, too.
    `rows`: those of the parameter that the output alone has, too.
    `cols`: those of the parameter that the other argument alone has, too.
    `where`: where the samples are among the positions.
    `form`: the parameter as blocks of matrices.
    `swapped`: whether the matrices of the form have `cols` as rows.
    """

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
    # 1. The axes of the output, of which one may be two, and which letter the samples have.
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
    # 2. Every letter must be had from the output or from the other argument, and that of the samples is no parameter's.
    letters = [letter for letter in param if letter is not None]
    wanted = {letter for letter in coefficient if letter is not None}
    if (sample is not None and sample in letters) or not set(letters) <= {*out, *wanted}:
        return None
    if not wanted <= {*out, *letters} or None in out:
        return None
    # 3. The roles: what the parameter shares with the output, with the other argument, with both.
    positions = tuple(letter for letter in out if letter not in letters)
    blocks = tuple(letter for letter in letters if letter in out and letter in wanted)
    rows = tuple(letter for letter in letters if letter in out and letter not in wanted)
    cols = tuple(letter for letter in letters if letter not in out)
    # 4. The form: the first axis of the parameter that is in no block is among the rows.
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
        self, value: Tensor, sizes: dict[Letter | None, int], where: Layout | Placed, batch: int, last: tuple[int, int]
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
        if isinstance(where, Placed):
            apart = where.by_sample(value, batch)
            return apart.reshape(batch, prod(apart.shape[1 : 1 + len(lengths)]), *last)
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
