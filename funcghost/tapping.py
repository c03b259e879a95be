"""Puts a tap behind a planned call: what it keeps, and what is made of it when the gradients of the outputs come."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcghost.collector import Collector, collecting
from funcghost.contract import in_dtype
from funcghost.errors import MismatchError
from funcghost.layout import Layout, Placed, Rows
from funcghost.ledger import Ledger
from funcghost.lowrank import Leaf, LowRank, as_dense
from funcghost.moves import Maps
from funcghost.plans import OutputLayout, Site
from funcghost.shadows import Shadow
from funcghost.state import RandomState, replaying
from funcghost.tangent import Call, Outputs, Pushforward
from funcghost.tap import Scorer, Slopes, tap
from funcghost.uses import Where, find_uses

Tangents = tuple[Leaf | None, ...]
"""One tangent per direction, None for zero; that of a parameter may be low-rank."""
Around = Callable[[], AbstractContextManager[None]]


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

    `low_rank` says whether a leaf of a direction is; products for scores are computed in the `dtype`, if there is one.
    """

    probe: Tensor
    ledger: Ledger | None
    dtype: torch.dtype | None
    low_rank: bool

    def put(
        self, planned: Planned, maps: Maps, push: Callable[[int, Call, Site], Pushforward], ready: Callable[[], bool]
    ) -> dict[int, Tensor]:
        """The outputs behind a tap, by the id of what they replace; none where there is nothing to score or collect.

        `maps` say where data moved the samples, `push` gives `J V` of a call at a site. Before `ready()`, backwards are
        those of the losses themselves.
        """
        number, site, call, found, tangents, targets, drawn = planned
        chosen, name = site.smooth, f"site {number} ({site.op})"
        values, batch = [found[i] for i in chosen], len(self.probe)
        layouts = tuple([placed(number, site, found[i], site.layouts[i], maps, batch) for i in chosen])
        around = ambient(values[0].device.type, drawn)
        ledger = self.ledger
        positions = self._positions(ledger, name, values, layouts) if ledger and ledger.positions else {}
        collector = self._collector(planned, layouts, positions, ready) if self.low_rank or targets else None
        low: Mapping[tuple[int, int], Any] = {} if collector is None else collector.low
        if low:
            tangents = [
                tuple(None if (slot, k) in low else tangent for k, tangent in enumerate(known))
                for slot, known in zip(call.tracked, tangents, strict=True)
            ]
        columns = tuple(
            [k for k, along in enumerate(zip(*tangents, strict=True)) if any(leaf is not None for leaf in along)]
        )
        if not columns and collector is None:
            return {}
        pushed = push(number, call, site) if columns else None
        saved = [call.leaves[slot].detach() for slot in pushed.needed] if pushed else []
        along = [tangent for k in columns for tangent in filled(call, [known[k] for known in tangents])]
        rounded = in_dtype(self.dtype) if self.dtype is not None and site.way == "rule" and site.flops else None
        picked = None if len(chosen) == len(site.layouts) else chosen
        kept = [call.leaves[slot].detach() for slot in collector.needed] if collector else []
        scorer = Scorer(
            name=name,
            slopes=slopes_of(pushed, len(call.tracked), picked, around, rounded) if pushed else no_slopes,
            columns=columns,
            layouts=layouts,
            ready=ready,
            collect=partial(collector.collect, around) if collector else None,
            kept=len(kept),
            positions=positions,
        )
        tapped = tap(self.probe, scorer, values, [*kept, *saved, *along])
        return {id(value): behind for value, behind in zip(values, tapped, strict=True)}

    def _positions(
        self, ledger: Ledger, name: str, values: Sequence[Tensor], layouts: Sequence[Where]
    ) -> dict[int, Callable[[int, Tensor], None]]:
        """Where scores by position go, for the columns of which these are wanted."""
        for value, layout in zip(values, layouts, strict=True):
            ledger.check_positions(name, layout, batched_shape(value), len(self.probe))
        return dict.fromkeys(ledger.positions, ledger.add_positions)

    def _collector(
        self, planned: Planned, layouts: Sequence[Where], positions: Mapping[int, Any], ready: Callable[[], bool]
    ) -> Collector | None:
        """What takes the factors of the gradients of what went into a call, if they are asked for."""
        _, site, call, found, tangents, targets, _ = planned
        columns = [k for k, leaves in enumerate(zip(*tangents, strict=True)) if any(type(v) is LowRank for v in leaves)]
        low: dict[tuple[int, int], Leaf] = {
            (slot, k): leaf
            for slot, known in zip(call.tracked, tangents, strict=True)
            for k in columns
            if (leaf := known[k]) is not None and k not in positions
        }
        if not low and not targets:
            return None
        first, batch = found[site.smooth[0]], len(self.probe)
        uses = find_uses(call, layouts, site.smooth, len(batched_shape(first)) - first.dim())
        # What is run again has been expected.
        return collecting(uses, low, layouts, batch, self.ledger, targets, expected=not ready(), dtype=self.dtype)


def slopes_of(
    push: Pushforward,
    count: int,
    chosen: tuple[int, ...] | None,
    around: Around,
    rounded: Callable[[Tensor], Tensor] | None,
) -> Slopes:
    """`J V` of all outputs or of those `chosen`, from the tensors that `push` needs and `count` tangents per direction.

    All of these are `rounded` first.
    """

    def slopes(*tensors: Tensor) -> list[Outputs]:
        if rounded is not None:
            tensors = tuple(map(rounded, tensors))
        own, flat = tensors[: len(push.needed)], tensors[len(push.needed) :]
        pushed = []
        for start in range(0, len(flat), count):
            with around():
                pushed.append(push.evaluate(own, flat[start : start + count]))
        return pushed if chosen is None else [tuple([slope[i] for i in chosen]) for slope in pushed]

    return slopes


def no_slopes(*_: Tensor) -> list[Outputs]:
    """Those of a tap that scores no direction by `J V`."""
    return []


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


def filled(call: Call, along: Sequence[Leaf | None]) -> list[Tensor]:
    """The tangents of a call in one direction, with zeros where some of them are."""
    slots = zip(call.tracked, along, strict=True)
    return [torch.zeros_like(call.leaves[slot]) if tangent is None else as_dense(tangent) for slot, tangent in slots]


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
