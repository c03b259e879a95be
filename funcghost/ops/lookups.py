"""The factors of tables whose rows are looked up: an index of rows, and the gradient of each."""

from functools import partial
from math import prod

import torch
from torch import Tensor

from funcghost.algebra.factors import Dense, Factor, Lookup
from funcghost.algebra.sums import added_rows
from funcghost.dtypes import wide
from funcghost.ops.apart import Passed, Use, lifted
from funcghost.ops.layout import Layout, Placed, Rows, readable, samples_along, spread
from funcghost.ops.products import Table


def by_index(table: Table, slot: int, shape: tuple[int, ...], layout: Layout | Rows, vmapped: int) -> Use | None:
    """The rows of a table that were looked up, unless the samples are not among the places of the index."""
    places, rows = vmapped + table.places, isinstance(layout, Rows)
    single = isinstance(layout, Layout) and layout.fold == "single"
    if not (single or layout.axis < places - table.summed) or (vmapped and (rows or table.ragged)):
        return None
    if table.ragged:
        return Use((slot,), table.needed, partial(_in_bags, table, shape), by_product=not rows)

    def factors(passed: Passed) -> list[Factor]:
        saved, levels, gradients, layouts, batch = passed
        g, where = gradients[0], layouts[0]
        assert g is not None
        assert not isinstance(where, str)
        index, *others = lifted(table.values, saved, levels)
        for axis, level in enumerate(levels):
            index = index if level.has_any else index.unsqueeze(axis)
        g = g.unsqueeze(-2) if table.summed else g
        g = g * others[0] if others else g
        index = index.expand(g.shape[:places])
        if isinstance(where, Placed) and not _at_hand(g):
            return [_added(index, g, where, batch, shape)]
        own, cols = (where.by_sample(value, batch) for value in (index, g))
        own = own.reshape(batch, prod(own.shape[1:]))
        return [Lookup(own, cols.reshape(batch, own.shape[1], prod(shape[1:])), shape)]

    return Use((slot,), table.needed, factors, by_product=not rows)


def _in_bags(table: Table, shape: tuple[int, ...], passed: Passed) -> list[Factor]:
    """The rows of a table whose sums over places are on the first axis of the output."""
    saved, _, (g,), (where,), batch = passed
    assert g is not None
    assert not isinstance(where, str)
    index, scale, bag = table.values(saved)
    owner = samples_along(where, 0, g.shape, batch, g.device)
    assert owner is not None
    placed = Placed(0, owner[bag])
    if not _at_hand(g):
        return [_added(index, g[bag] * scale, placed, batch, shape)]
    # What is narrow is arranged; there is a row of zeros for where a sample has no more.
    own, scales, bags = (placed.by_sample(value, batch) for value in (index, scale, bag + 1))
    cols = torch.cat([torch.zeros_like(g[:1]), g])[bags]
    return [Lookup(own, cols.mul_(scales), shape)]


def _at_hand(value: Tensor) -> bool:
    """Whether it costs no wait to ask for numbers of rows."""
    return readable(value) and value.device.type == "cpu"


def _added(index: Tensor, g: Tensor, where: Placed, batch: int, shape: tuple[int, ...]) -> Factor:
    """The gradients of a table [b, *shape], added up row by row: without a wait for how many rows a sample has."""
    columns = prod(shape[1:])
    samples = spread(where.samples, where.axis, index.shape)
    rows = (samples * shape[0] + index).flatten()
    found = added_rows(rows, wide(g).reshape(len(rows), columns), batch * shape[0], len(rows))
    return Dense(found.view(batch, *shape))
