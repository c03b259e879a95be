"""The factors of any op: one derivative for each sample.

Of the op on that sample alone, where it is known to treat samples apart, else with the output gradient of the others
masked. That is what the faster ways to factors (see `funcghost.ops.uses`) have to agree with.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from funcghost.algebra.factors import Dense, Factor
from funcghost.dtypes import as_written
from funcghost.ops.call import Call, Outputs, is_operand
from funcghost.ops.known import Slices, of_one, slices_of
from funcghost.ops.layout import Layout, Placed

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


class Passed(NamedTuple):
    """What there is when the backward passes a call.

    `saved`: the tensors that are needed, in the order of their slots.
    `levels`: the vmapped axes of these.
    `gradients`: those of the outputs, None for zero.
    `layouts`: where the samples are in each output.
    `batch`: the number of samples.
    """

    saved: Sequence[Tensor]
    levels: Levels
    gradients: Sequence[Tensor | None]
    layouts: Sequence[Where]
    batch: int


@dataclass(frozen=True, eq=False)
class Use:
    """How the factors of some arguments of a call are had.

    `slots`: the arguments.
    `needed`: the slots of the tensors that it takes.
    `factors(passed)`: gives the factor for each of the slots.
    `by_product`: whether that is without a derivative for each sample.
    `outer`: whether they are products of rows and columns at every position.
    `smaller`: whether scores are had by factors for less: what the parameter meets is less than half of what comes out.
    """

    slots: tuple[int, ...]
    needed: tuple[int, ...]
    factors: Callable[[Passed], list[Factor]]
    by_product: bool = True
    smaller: bool = False
    outer: bool = False


def lifted(values: Callable[[Sequence[Tensor]], Any], saved: Sequence[Tensor], levels: Levels) -> Any:
    """`values(saved)` for every index of the vmapped axes of the saved tensors, which come in front."""
    for level in reversed(levels):
        if level.has_any:
            values = _mapped(values, level)
    return values(saved)


def _mapped(values: Callable[[Sequence[Tensor]], Any], level: Level) -> Callable[[Sequence[Tensor]], Any]:
    mapped = torch.func.vmap(lambda *each: values(each), in_dims=level.dims, randomness=level.randomness)
    return lambda tensors: mapped(*tensors)


def by_autograd(call: Call, slots: tuple[int, ...], chosen: Sequence[int]) -> Use:
    """One derivative for each sample: of the op on that sample alone, or with the gradient of the others masked."""
    needed = tuple(slot for slot, leaf in enumerate(call.leaves) if is_operand(leaf))
    slices = slices_of(call)
    axes = [] if slices is None else [slices.outputs[i] for i in chosen]
    places = [(Layout(axis), Layout(axis, "high"), "unused") for axis in axes]
    call = call.emptied()

    def factors(passed: Passed) -> list[Factor]:
        saved, levels, gradients, layouts, batch = passed
        inputs = {slot: value.detach() for slot, value in zip(needed, saved, strict=True)}
        leaves = [inputs[slot].requires_grad_() for slot in slots]

        def op(tensors: Sequence[Tensor]) -> Outputs:
            given = dict(zip(needed, tensors, strict=True))
            found = call.evaluate([given.get(slot, leaf) for slot, leaf in enumerate(call.leaves)])
            return tuple(found[i] for i in chosen)

        def alone(slices: Slices, sample: int) -> Sequence[Tensor | None]:
            moved = [inputs.get(slot, leaf) for slot, leaf in enumerate(call.leaves)]
            with torch.enable_grad():
                found = call.evaluate(slices.of(moved, sample, batch))
            values = [found[i] for i in chosen]
            return _pulled(values, [_narrow(g, where, sample, batch) for g, where in pairs], leaves, keep=False)

        def masked(sample: int) -> Sequence[Tensor | None]:
            return _pulled(out, [of_sample(g, where, sample, batch) for g, where in pairs], leaves, keep=True)

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
    with as_written(ends[0].device):
        return torch.autograd.grad(ends, leaves, given, retain_graph=keep, allow_unused=True)


def _narrow(gradient: Tensor | None, where: Where, sample: int, batch: int) -> Tensor | None:
    """The gradient of the outputs for one sample alone."""
    if gradient is None or not isinstance(where, Layout):
        return None
    return of_one(gradient, where.axis, sample, batch)


def of_sample(gradient: Tensor | None, where: Where, sample: int, batch: int) -> Tensor | None:
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
