"""From what was measured to the sites: where a score is tapped, and where a tangent is carried on."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from funcghost.engine.plans import Action, OutputLayout, Site
from funcghost.ops.layout import Layout, Rows
from funcghost.ops.moves import Maps, Moved, Where, resolve
from funcghost.planning.trace import Noted, Output, Record


class UnresolvedMoveError(Exception):
    """An op moves samples by the values of data, and it cannot be told where to."""


@dataclass(frozen=True, eq=False)
class Followed:
    """The values whose rows have been moved by data, and the calls that do so."""

    rows: dict[int, Rows]
    moved: tuple[Moved, ...]


def follow_moves(
    records: Sequence[Record], noted: dict[int, Noted], batch: int, *, any_order: bool = False
) -> Followed:
    """Follows the samples through ops that move them by data, in the order of the program.

    Between such ops everything is as measured: what sample an entry belongs to depends on ops and shapes alone. In
    `any_order`, rows moved by data are not taken to stay in the order that these data give them.

    Raises:
        UnresolvedMoveError: for an op whose outputs cannot be followed.
    """
    rows: dict[int, Rows] = {}
    meters = {output.value: output.meter for record in records for output in record.outputs if output.value is not None}

    def place(value: int) -> Where | None:
        meter = meters.get(value)
        layout = rows.get(value) or (meter.layout if meter is not None else None)
        return None if layout == "unused" else layout

    maps: Maps = {}
    moved: list[Moved] = []
    for record in records:
        ways = [rows[value] for value in record.inputs.values() if value in rows]
        note = noted.get(record.move) if record.move is not None else None
        if note is not None and not note.move.leaves:
            raise UnresolvedMoveError(record.op)
        kept = {output.value: _in_rows(output, ways, maps) for output in record.outputs} if ways else {}
        lost = any(where is None for where in kept.values())
        if note is not None and (lost or note.by_data):
            places = {slot: place(value) for slot, value in record.inputs.items() if slot in note.move.slots}
            known = {slot: where for slot, where in places.items() if where is not None}
            if known and (ways or _moves_by_data(note, known, batch)):
                moved.append(_resolved(record, note, known, maps, batch, any_order and not ways))
                for output, where in zip(record.outputs, moved[-1].outputs, strict=True):
                    if output.value is not None and isinstance(where, Rows):
                        rows[output.value] = where
                continue
        if lost:
            raise UnresolvedMoveError(record.op)
        rows.update({value: where for value, where in kept.items() if value is not None and isinstance(where, Rows)})
    return Followed(rows, tuple(moved))


def _moves_by_data(note: Noted, known: dict[int, Where], batch: int) -> bool:
    """Whether the op sends entries elsewhere when the data differ; its inputs have measured layouts."""
    slots = tuple(slot for slot in note.move.slots if slot in known)
    layouts = [place for slot in slots if isinstance(place := known[slot], Layout)]
    return note.by_data and note.move.of(slots).by_data(layouts, batch, note.by)


def _resolved(record: Record, note: Noted, known: dict[int, Where], maps: Maps, batch: int, any_order: bool) -> Moved:
    """Where the op's outputs are, held to what their gradients say."""
    assert record.move is not None
    move = note.move.of(tuple(slot for slot in note.move.slots if slot in known))
    used = [output.meter is not None and output.meter.base is not None for output in record.outputs]
    places = [known[slot] for slot in move.slots]
    found = resolve(move, record.move, record.op, places, used, maps, batch, any_order=any_order)
    if found is None or len(found.outputs) != len(record.outputs):
        raise UnresolvedMoveError(record.op)
    for output, place in zip(record.outputs, found.outputs, strict=True):
        meter = output.meter
        if place == "unused" or meter is None or meter.silent:
            continue
        agrees = (
            meter.in_rows(maps[place.call, place.output]) == place.axis
            if isinstance(place, Rows)
            else meter.layout == place
        )
        if not agrees:
            raise UnresolvedMoveError(record.op)
    return found


def _in_rows(output: Output, ways: Sequence[Rows], maps: Maps) -> Rows | Literal["unused"] | None:
    """The rows of an output of an op that takes rows moved before: those of one of its inputs, if it keeps them."""
    if output.meter is None or output.meter.base is None:
        return "unused"
    for rows in ways:
        axis = output.meter.in_rows(maps[rows.call, rows.output])
        if axis is not None:
            return Rows(axis, rows.call, rows.output)
    return None


def want_meters(records: Sequence[Record], params: int, *, all_of_them: bool) -> None:
    """Chooses the outputs to measure: those that will be asked for if every output that is likely to has a layout."""

    def carries(record: Record) -> bool:
        smooth = [output for output in record.outputs if output.value is not None]
        return record.bound or not all(output.meter is not None and output.meter.likely for output in smooth)

    asked = {id(output.meter) for record in _reached(records, params, carries) for output in record.outputs}
    for meter in (output.meter for record in records for output in record.outputs):
        if meter is not None:
            meter.wanted = all_of_them or id(meter) in asked


def enough_measured(records: Sequence[Record], params: int) -> bool:
    """Whether no output that was not measured is reached by a tangent."""

    def carries(record: Record) -> bool:
        return any(output_layout(output, record.bound, {}) == "carried" for output in record.outputs)

    outputs = (output for record in _reached(records, params, carries) for output in record.outputs)
    return all(output.meter is None or output.meter.wanted for output in outputs)


def _reached(records: Sequence[Record], params: int, carries: Callable[[Record], bool]) -> Iterator[Record]:
    """The ops that a tangent reaches, from the parameters and from what carries it on."""
    reached = set(range(params))
    for record in records:
        if not reached.isdisjoint(record.inputs.values()):
            yield record
            if carries(record):
                reached.update(output.value for output in record.outputs if output.value is not None)


def find_sites(
    records: Sequence[Record], names: Sequence[str], rows: dict[int, Rows], carry_all: bool = False
) -> list[Site]:
    """Decides at each op that a tangent reaches: tap where every output has a layout, otherwise carry on.

    Values reached by a tangent are the parameters, what is computed from them alone, and what is carried.
    """
    reached = {i: frozenset([name]) for i, name in enumerate(names)}
    sites = []
    for record in records:
        hot = {slot: reached[value] for slot, value in record.inputs.items() if value in reached}
        if not hot:
            continue
        origin = frozenset[str]().union(*hot.values())
        layouts = tuple(output_layout(output, record.bound, rows) for output in record.outputs)
        action: Action = "tap"
        if all(layout == "constant" for layout in layouts):
            action = "skip"
        elif carry_all or "carried" in layouts:
            action = "carry"
            reached.update({output.value: origin for output in record.outputs if output.value is not None})
        sites.append(
            Site(
                op=record.op,
                tracked=tuple(hot) if record.unseen is None else tuple(range(len(hot))),
                action=action,
                layouts=layouts,
                parameters=tuple(sorted(origin)),
                shapes=tuple(o.shape for o in record.outputs),
                written=record.written,
                random=record.random,
                way=None if record.unseen is None else "transpose",
                unseen=record.unseen,
            )
        )
    return sites


def output_layout(output: Output, bound: bool, rows: dict[int, Rows]) -> OutputLayout:
    """What the meter of an output found."""
    if output.value is None:
        return "constant"
    if output.meter is None or bound:
        return "carried"
    layout = output.meter.layout
    if output.value in rows and layout != "unused":
        return "carried" if output.meter.silent else rows[output.value]
    return layout or "carried"
