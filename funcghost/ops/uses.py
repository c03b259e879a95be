"""From the output gradient of a site to the factors of the per-sample gradients of what goes in there.

Where the op is known as a product, the factor is read off its letters: those that the parameter shares with the output
are rows, those that it shares with the other argument are columns, those it shares with both are blocks, and the rest
of the output are positions, the samples among them. Any other op is differentiated by autograd, once per sample, with
the gradient of the others masked: that is what all forms have to agree with.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from funcghost.algebra.factors import Dense, Factor, Lookup, Outer
from funcghost.dtypes import wide, wide_dtype
from funcghost.ops.arrangement import IN_FRONT, arrangement, axes_of
from funcghost.ops.known import slices_of
from funcghost.ops.layout import Layout, Placed
from funcghost.ops.products import Description, Product, Table, describe, itself
from funcghost.ops.slices import Slices
from funcghost.ops.tangent import Call, Outputs, physical

Where = Layout | Placed | Literal["unused"]


class Level(NamedTuple):
    """A vmapped axis: which of some tensors have it, in front, and how random numbers are drawn along it."""

    has: tuple[bool, ...]
    randomness: str

    def of(self, start: int, end: int) -> "Level":
        """The same axis for some of the tensors."""
        return Level(self.has[start:end], self.randomness)

    @property
    def has_any(self) -> bool:
        """Whether any of the tensors has it."""
        return any(self.has)

    @property
    def dims(self) -> tuple[int | None, ...]:
        """As `torch.func.vmap` wants to be told."""
        return tuple(0 if own else None for own in self.has)


Levels = tuple[Level, ...]
"""The vmapped axes of some tensors, the outermost first."""


@dataclass(frozen=True, eq=False)
class Use:
    """What a tapped call makes of the arguments in `slots`, of which it keeps the tensors in `needed`.

    `factors(saved, levels, gradients, layouts, batch)` gives the factor for each of the slots; `by_product` without a
    derivative for each sample. With `smaller`, what the parameter meets is less than half of what comes out.
    """

    slots: tuple[int, ...]
    needed: tuple[int, ...]
    factors: Callable[[Sequence[Tensor], Levels, Sequence[Tensor | None], Sequence[Where], int], list[Factor]]
    by_product: bool = True
    smaller: bool = False


def find_uses(
    call: Call, described: Description | None, layouts: Sequence[Layout | None], chosen: tuple[int, ...], vmapped: int
) -> list[Use]:
    """How to get the factors for each tracked argument: by letters where that can be done, all others by autograd."""
    known, others = list[Use](), list[int]()
    layout = layouts[0] if len(layouts) == 1 else None
    for slot in call.tracked:
        plain = layout is not None and physical(call.leaves[slot]) is call.leaves[slot]
        product = describe(call, described, slot) if described and plain else None
        use, shape = None, tuple(call.leaves[slot].shape)
        if layout is not None and isinstance(product, Product):
            use = _by_letters(product, slot, shape, layout, vmapped)
        elif layout is not None and isinstance(product, Table):
            use = _by_index(product, slot, shape, layout, vmapped)
        known += [use] if use else []
        others += [] if use else [slot]
    return [*known, *([_by_autograd(call, tuple(others), chosen)] if others else [])]


def lifted(values: Callable[[Sequence[Tensor]], Any], saved: Sequence[Tensor], levels: Levels) -> Any:
    """`values(saved)` for every index of the vmapped axes of the saved tensors, which come in front."""
    for level in reversed(levels):
        if level.has_any:
            values = _mapped(values, level)
    return values(saved)


def _mapped(values: Callable[[Sequence[Tensor]], Any], level: Level) -> Callable[[Sequence[Tensor]], Any]:
    mapped = torch.func.vmap(lambda *each: values(each), in_dims=level.dims, randomness=level.randomness)
    return lambda tensors: mapped(*tensors)


def _by_letters(product: Product, slot: int, shape: tuple[int, ...], layout: Layout, vmapped: int) -> Use | None:
    """The factor of a product, unless the samples are not among its positions."""
    known = product.param, product.coefficient, product.out, product.groups, product.base
    try:
        arranged = arrangement(*known, shape, layout, vmapped)
    except TypeError:  # sizes are symbols while a compiler traces, which cannot be looked up
        arranged = arrangement.__wrapped__(*known, shape, layout, vmapped)
    if arranged is None:
        return None
    a, form = arranged, arranged.form
    q, *sides = form.blocks
    left_size, right_size = (sides[1], sides[0]) if a.swapped else sides
    outward, in_front = axes_of(a.out, a.positions, (*a.blocks, *a.rows)), layout == IN_FRONT

    def factors(
        saved: Sequence[Tensor], levels: Levels, gradients: Sequence[Tensor | None], _: Sequence[Where], batch: int
    ) -> list[Factor]:
        g = gradients[0]
        assert g is not None
        if product.gradients is not None and in_front and not levels:
            positions = g.numel() // (batch * left_size * q)
            if left_size * right_size <= positions * (left_size + right_size):
                return [Dense(product.gradients([wide(value) for value in saved], wide(g)))]
        if product.groups > 1:
            g = g.unflatten(a.out.index("g"), (product.groups, -1))
        sizes = dict(zip(a.out, g.shape, strict=True))
        left = outward.arrange(g, sizes, a.where, batch, (q, left_size))
        if product.values is None:
            total = wide(left) if left.shape[1] == 1 else left.sum(1, dtype=wide_dtype(left.dtype))
            return [Dense(form.whole(total if product.scale == 1 else total * product.scale, batch))]
        coefficient = lifted(product.values, saved, levels)
        given = product.coefficient
        if levels:
            given = (*(name for name, level in zip(a.front, levels, strict=True) if level.has_any), *given)
        inward = axes_of(given, a.positions, (*a.blocks, *a.cols))
        right = inward.arrange(coefficient, sizes, a.where, batch, (q, right_size))
        if product.scale != 1:
            left = left * product.scale
        if not a.rows or not a.cols:
            return [Dense(form.whole((wide(left) * wide(right)).sum(1), batch))]
        return [Outer(right, left, form) if a.swapped else Outer(left, right, form)]

    fixed = isinstance(left_size, int) and isinstance(right_size, int)  # and not symbols
    smaller = fixed and product.values is itself and bool(a.cols) and left_size >= 2 * right_size
    return Use((slot,), product.needed, factors, smaller=smaller)


def _by_index(table: Table, slot: int, shape: tuple[int, ...], layout: Layout, vmapped: int) -> Use | None:
    """The rows of a table that were looked up, unless the samples are not among the places of the index."""
    places = vmapped + table.places
    if layout.fold != "single" and layout.axis >= places - table.summed:
        return None

    def factors(
        saved: Sequence[Tensor], levels: Levels, gradients: Sequence[Tensor | None], _: Sequence[Where], batch: int
    ) -> list[Factor]:
        g = gradients[0]
        assert g is not None
        index, *scale = lifted(table.values, saved, levels)
        for axis, level in enumerate(levels):
            index = index if level.has_any else index.unsqueeze(axis)
        g = g.unsqueeze(-2) if table.summed else g
        g = g * scale[0] if scale else g
        rows = layout.by_sample(index.expand(g.shape[:places]), batch).reshape(batch, -1)
        return [Lookup(rows, layout.by_sample(g, batch).reshape(batch, rows.shape[1], prod(shape[1:])), shape)]

    return Use((slot,), table.needed, factors)


def _by_autograd(call: Call, slots: tuple[int, ...], chosen: Sequence[int]) -> Use:
    """One derivative for each sample: of the op on that sample alone, or with the gradient of the others masked."""
    needed = tuple(slot for slot, leaf in enumerate(call.leaves) if isinstance(leaf, Tensor))
    slices = slices_of(call)
    places = [] if slices is None else [(Layout(slices.outputs[i]), "unused") for i in chosen]
    call = call.emptied()

    def factors(
        saved: Sequence[Tensor],
        levels: Levels,
        gradients: Sequence[Tensor | None],
        layouts: Sequence[Where],
        batch: int,
    ) -> list[Factor]:
        inputs = {slot: value.detach() for slot, value in zip(needed, saved, strict=True)}
        leaves = [inputs[slot].requires_grad_() for slot in slots]

        def op(tensors: Sequence[Tensor]) -> Outputs:
            given = dict(zip(needed, tensors, strict=True))
            found = call.evaluate([given.get(slot, leaf) for slot, leaf in enumerate(call.leaves)])
            return tuple(found[i] for i in chosen)

        def alone(slices: Slices, sample: int) -> Sequence[Tensor | None]:
            moved = [inputs.get(slot, leaf) for slot, leaf in enumerate(call.leaves)]
            with torch.enable_grad():
                found = call.evaluate(slices.of(moved, sample))
            values = [found[i] for i in chosen]
            return _pulled(values, [_narrow(g, where, sample) for g, where in pairs], leaves, keep=False)

        def masked(sample: int) -> Sequence[Tensor | None]:
            return _pulled(out, [_of_sample(g, where, sample, batch) for g, where in pairs], leaves, keep=True)

        pairs = list(zip(gradients, layouts, strict=True))
        fits = places and not levels and all(where in own for where, own in zip(layouts, places, strict=True))
        each = slices if fits else None
        if each is None:
            with torch.enable_grad():
                out = lifted(op, list(inputs.values()), levels)
        rows: list[list[Tensor]] = [[] for _ in leaves]
        for sample in range(batch):
            found = masked(sample) if each is None else alone(each, sample)
            for row, part, leaf in zip(rows, found, leaves, strict=True):
                row.append(torch.zeros_like(leaf, requires_grad=False) if part is None else part.to_dense())
        return [Dense(torch.stack(row)) for row in rows]

    return Use(slots, needed, factors, by_product=False)


def _pulled(
    values: Sequence[Tensor], cotangents: Sequence[Tensor | None], leaves: Sequence[Tensor], *, keep: bool
) -> Sequence[Tensor | None]:
    """The gradients of the leaves; None where there is none."""
    there = [(v, g) for v, g in zip(values, cotangents, strict=True) if g is not None and v.requires_grad]
    if not there:
        return [None] * len(leaves)
    ends, given = zip(*there, strict=True)
    return torch.autograd.grad(ends, leaves, given, retain_graph=keep, allow_unused=True)


def _narrow(gradient: Tensor | None, where: Where, sample: int) -> Tensor | None:
    """The gradient of the outputs for one sample alone."""
    return gradient.narrow(where.axis, sample, 1) if gradient is not None and isinstance(where, Layout) else None


def _of_sample(gradient: Tensor | None, where: Where, sample: int, batch: int) -> Tensor | None:
    """The gradient of one sample, with zeros elsewhere."""
    if gradient is None or where == "unused":
        return None
    if isinstance(where, Placed):
        rows = (where.samples == sample).view([-1 if i == where.axis else 1 for i in range(gradient.dim())])
        return torch.where(rows, gradient, 0)
    assert isinstance(where, Layout)
    masked = torch.zeros_like(gradient)
    where.by_sample(masked, batch)[sample] = where.by_sample(gradient, batch)[sample]
    return masked
