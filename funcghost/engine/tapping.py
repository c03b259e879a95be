"""Puts a tap behind a planned call: what it keeps, and what is made of it when the gradients of the outputs come."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from funcghost.algebra.directions import Leaf, as_dense
from funcghost.engine.collector import Around, Collector
from funcghost.engine.ledger import Ledger
from funcghost.engine.plans import OutputLayout, Site
from funcghost.engine.prepared import Manner, prepared, tried
from funcghost.engine.shadows import Shadow
from funcghost.engine.tap import Scorer, tap
from funcghost.errors import MismatchError
from funcghost.ops.descriptions import description
from funcghost.ops.layout import Layout, Placed, Rows
from funcghost.ops.moves import Maps
from funcghost.ops.tangent import Call, Outputs, Pushforward
from funcghost.ops.uses import Where
from funcghost.side_effects import RandomState, replaying

Tangents = tuple[Leaf | None, ...]
"""One tangent per direction, None for zero; that of a parameter may be low-rank."""


class Planned(NamedTuple):
    """A call at the site of this number, which the plan taps, and what came out of it.

    `tangents` are those that come in, for each tracked slot; `targets` the shadows of what is there, by slot, if
    factors are wanted; `drawn` the random numbers from which the call drew.
    """

    number: int
    site: Site
    call: Call
    found: Outputs
    tangents: Sequence[Tangents]
    targets: Mapping[int, Shadow]
    drawn: RandomState | None


@dataclass(frozen=True, eq=False, slots=True)
class Taps:
    """Puts the taps of one run, which send scores to the `probe`, and factors and scores by position to the `ledger`.

    Products for scores are computed in the `dtype`, if there is one.
    """

    probe: Tensor
    ledger: Ledger | None
    dtype: torch.dtype | None

    def put(
        self, planned: Planned, maps: Maps, push: Callable[[int, Call, Site], Pushforward], ready: Callable[[], bool]
    ) -> dict[int, Tensor]:
        """The outputs behind a tap, by the id of what they replace; none where there is nothing to score or collect.

        `maps` say where data moved the samples, `push` gives `J V` of a call at a site. Before `ready()`, backwards are
        those of the losses themselves.
        """
        number, site, call, found, tangents, targets, drawn = planned
        values, batch = [found[i] for i in site.smooth], len(self.probe)
        layouts = tuple([placed(number, site, found[i], site.layouts[i], maps, batch) for i in site.smooth])
        apart = self.ledger.positions if self.ledger else frozenset[int]()
        if self.ledger and apart:
            for value, layout in zip(values, layouts, strict=True):
                self.ledger.check_positions(f"site {number} ({site.op})", layout, batched_shape(value), batch)
        manner = Manner(
            site.smooth,
            tuple([layout if isinstance(layout, Layout) else None for layout in layouts]),
            len(batched_shape(values[0])) - values[0].dim(),
            tuple([tuple(map(type, known)) for known in tangents]),
            bool(targets),
            apart,
            self.dtype if site.way == "rule" and site.flops else None,
        )
        described = description(call.op)
        if site.way is None:
            todo = tried(call, manner, described, push(number, call, site))
        else:
            todo = prepared(call, manner, described, site.way)
        if not todo.columns and not todo.uses:
            return {}
        collector = None
        if todo.uses:
            known = dict(zip(call.tracked, tangents, strict=True))
            low = {(slot, k): leaf for slot, k in todo.factored if (leaf := known[slot][k]) is not None}
            sources = frozenset[int]().union(*[target.sources for target in targets.values()])
            collector = Collector(todo.uses, low, layouts, batch, self.ledger, targets, sources, self.dtype)
            if self.ledger and sources and not ready():  # what is run again has been expected
                self.ledger.expect(sources)
        around = ambient(values[0].device.type, drawn)
        along = [tangent for k in todo.columns for tangent in filled(call, tangents, k, todo.factored)]
        kept = [call.leaves[slot].detach() for slot in (*todo.kept, *todo.saved)]
        scorer = Scorer(
            (number, site.op),
            partial(todo.slopes, around),
            todo.columns,
            layouts,
            ready,
            around,
            collector,
            len(todo.kept),
            apart=dict.fromkeys(apart, self.ledger.add_positions) if self.ledger and apart else {},
        )
        tapped = tap(self.probe, scorer, values, [*kept, *along])
        return {id(value): behind for value, behind in zip(values, tapped, strict=True)}


def placed(number: int, site: Site, value: Tensor, layout: OutputLayout, maps: Maps, batch: int) -> Where:
    """Where the samples of an output are in this run.

    Raises:
        MismatchError: the output has not the shape that the plan takes it to have.
    """
    shape = batched_shape(value)
    if isinstance(layout, Layout):
        if layout.fits(shape, batch):
            return layout
    elif layout == "unused":
        return layout
    elif isinstance(layout, Rows):
        rows = maps.get((layout.call, layout.output))
        if rows is not None and layout.axis < len(shape) and shape[layout.axis] == len(rows):
            return Placed(layout.axis, rows.long())
    raise MismatchError(f"site {number}: {site.op} gave shape {tuple(value.shape)}, which is not {layout}.")


def batched_shape(value: Tensor) -> tuple[int, ...]:
    """The shape with all vmapped axes in front, the outer before the inner: that of the gradients a tap sees."""
    if torch._C._functorch.maybe_current_level() is None:
        return value.shape
    vmapped, inner = list[int](), value
    while torch._C._functorch.is_functorch_wrapped_tensor(inner):
        axis, inner = torch._C._functorch.maybe_get_bdim(inner), torch._C._functorch.get_unwrapped(inner)
        if axis >= 0:
            vmapped.insert(0, inner.shape[axis])
    return (*vmapped, *value.shape)


def filled(call: Call, tangents: Sequence[Tangents], k: int, apart: Collection[tuple[int, int]] = ()) -> list[Tensor]:
    """The tangents of a call in one direction, with zeros where there are none, or they are scored apart."""
    found = []
    for slot, known in zip(call.tracked, tangents, strict=True):
        leaf = None if (slot, k) in apart else known[k]
        found.append(torch.zeros_like(call.leaves[slot]) if leaf is None else as_dense(leaf))
    return found


def ambient(device: str, drawn: RandomState | None) -> Around:
    """A context for the backward that repeats what surrounded the forward: autocast, and the random numbers drawn."""
    autocast = torch.is_autocast_enabled(device) if torch.amp.is_autocast_available(device) else False
    if not autocast and drawn is None:
        return nullcontext
    dtype = torch.get_autocast_dtype(device) if autocast else None

    @contextmanager
    def around() -> Iterator[None]:
        with torch.autocast(device, dtype, enabled=autocast), replaying(drawn):
            yield

    return around
