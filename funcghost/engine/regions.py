"""A part of the losses that runs as one op, because a compiler has made one of it, with the taps of the plan inside.

    outputs = part(probe, inputs, tangents of the inputs)

While a compiler traces it, the part is walked along the sites of the plan from where the run has come to: the scores of
them all leave it as the gradient of the probe. What the walk came past is told again to every run that calls what was
compiled, so that a plan is held to the same ops either way.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.fx.traceback
from torch import Tensor

from funcghost.algebra.directions import Leaf, LowRank
from funcghost.dtypes import as_written
from funcghost.engine.capture import Capture, Carried
from funcghost.engine.contributions import Tangents, Tapped
from funcghost.engine.plans import Site
from funcghost.engine.tap import EagerTap, Taps
from funcghost.ops.digest import Digest
from funcghost.ops.values import Value
from funcghost.trees import Params

Record = Value[Any]


class RefusedError(Exception):
    """A part is not to run as one op: why."""


def takes_parts(capture: Capture) -> bool:
    """Whether a run needs no more of a part than scores: no factors, no positions, no second look at what it runs."""
    wants_scores_alone = not capture.collecting and capture.taps.positions is None and capture.choose is None
    return wants_scores_alone and not capture.watching and not capture.traced and torch.is_grad_enabled()


class Log(Digest):
    """A checksum that remembers what it was told."""

    def __init__(self) -> None:
        """Starts before the first op."""
        super().__init__()
        self.told = list[Callable[[Digest, Callable[[Record], Record]], object]]()

    def add(self, op: Any, leaves: Sequence[Any], values: Sequence[Record | None], returned: Any) -> None:
        """As that of a checksum."""
        super().add(op, leaves, values, returned)
        kept, shape, enabled = [_shape_of(leaf) for leaf in leaves], _shape_of(returned), torch.is_grad_enabled()

        def tell(digest: Digest, now: Callable[[Record], Record]) -> None:
            with torch.set_grad_enabled(enabled):
                digest.add(op, kept, [value and now(value) for value in values], shape)

        self.told.append(tell)

    def number(self, value: Record) -> int:
        """As that of a checksum."""
        if not value.number:
            self.told.append(lambda digest, now: digest.number(now(value)))
        return super().number(value)


def _shape_of(leaf: Any) -> Any:
    """A tensor of the same shape without memory, in place of one."""
    if isinstance(leaf, Tensor):
        return torch.empty(leaf.shape, device="meta")
    return [_shape_of(part) for part in leaf] if isinstance(leaf, tuple | list) else leaf


class LateTap(EagerTap):
    """A tap whose contribution no compiler computes in the forward: its directions may be there in the backward alone.

    What depends on no gradient, as `J V` does, may else stand in either of the two graphs that it makes of one.
    """

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        """As that of a tap."""
        probe, *_ = ctx.saved_tensors
        with _in_the_backward(), as_written(probe.device):
            found: tuple[Any, ...] = EagerTap.backward(ctx, *gradients)
        return found


@contextmanager
def _in_the_backward() -> Iterator[None]:
    """Where a compiler traces, what runs inside is marked as not to be moved to the forward."""
    if not torch.fx.traceback.has_preserved_node_meta():
        yield
        return
    meta = torch.fx.traceback.current_meta
    kept = meta.get("partitioner_tag")
    try:
        meta["partitioner_tag"] = "must_be_in_backward"
        yield
    finally:
        meta["partitioner_tag"] = kept


class LateTaps(Taps):
    """Puts late taps."""

    __slots__ = ()

    def behind(self, tapped: Tapped, outputs: Sequence[Tensor], saved: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs behind one."""
        found: tuple[Tensor, ...] = LateTap.apply(self.probe, tapped, saved, *outputs)
        return found


@dataclass(eq=False)
class Walked:
    """What a walk through a part came past.

    `sites`: of the plan, without the names of their parameters.
    `log`: of its ops.
    `moving`: how many of these may move samples.
    `inputs`, `outputs`: the records of those that are tensors.
    """

    sites: tuple[Site, ...]
    log: Log
    moving: int
    inputs: Sequence[Record | None]
    outputs: Sequence[Record | None]
    fitting: dict[int, tuple[Site, ...]] = field(default_factory=dict)

    def fits(self, capture: Capture) -> bool:
        """Whether the plan has the same sites from where a run has come to."""
        start, sites = capture.position, capture.plan.sites
        if self.fitting.get(start) is not sites:
            if _anonymous(sites[start : start + len(self.sites)]) != self.sites:
                return False
            self.fitting[start] = sites
        return True

    def passed(self, capture: Capture, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Takes a run on behind the part, as if its ops had come past one by one."""
        capture.position += len(self.sites)
        capture.moving += self.moving
        known = dict[int, Record]()
        for record, own in zip((*self.inputs, *self.outputs), (*inputs, *outputs), strict=True):
            if record is not None:
                known.setdefault(id(record), capture.values.of(own))

        def now(record: Record) -> Record:
            return known.setdefault(id(record), Value(record.reference))

        for tell in self.log.told:
            tell(capture.digest, now)


def _anonymous(sites: Sequence[Site]) -> tuple[Site, ...]:
    return tuple([replace(site, parameters=()) for site in sites])


def walk_through(
    capture: Capture,
    part: Callable[..., Sequence[Any]],
    probe: Tensor,
    inputs: Sequence[Any],
    tangents: Sequence[Tangents | None],
) -> tuple[tuple[Any, ...], Walked]:
    """Runs a part along the plan from where a run has come to, which stays there; what it gives is tapped for `probe`.

    Raises:
        RefusedError: what it does reaches further than to the end of the part.
        MismatchError: it is not what the plan says.
        PlanError: it cannot be traced.
    """
    inner = Capture(capture.plan, (), (), probe, Params((), (), capture.given.spec))
    inner.taps, inner.digest, inner.traced = LateTaps(probe, None, None, capture.taps.dtype), Log(), True
    inner.position, inner.moving = capture.position, capture.moving
    given = [None if along is None else Carried(along, None) for along in tangents]
    for value, carried in zip(inputs, given, strict=True):
        if carried is not None:
            inner.values.note(value, carried)
    with inner:
        found = tuple(part(*inputs))
    inner.ended = True
    if any(capture.moving <= call < inner.moving for call in inner.moves):
        raise RefusedError("samples are moved by the values of data in it")
    after = [inner.carried_to(value) if isinstance(value, Tensor) else None for value in (*inputs, *found)]
    if any(own is not before for own, before in zip(after, (*given, *[None] * len(found)), strict=True)):
        raise RefusedError("tangents are carried out of it")
    inputs_known, outputs_known = (
        [inner.values.of(value) if isinstance(value, Tensor) else None for value in values]
        for values in (inputs, found)
    )
    sites = _anonymous(capture.plan.sites[capture.position : inner.position])
    return found, Walked(sites, inner.digest, inner.moving - capture.moving, inputs_known, outputs_known)


Forms = tuple[Any, ...]


class Known(NamedTuple):
    """The tangents of a part's inputs: `tensors`, and the `forms` of what these are in, one for all of a graph."""

    tensors: list[Tensor]
    forms: Forms


def taken_apart(tangents: Sequence[Tangents | None]) -> Known:
    """The tangents of inputs, None for those that have none."""
    leaves = [leaf for along in tangents for leaf in along or () if leaf is not None]
    tensors = [part for leaf in leaves for part in ([leaf.rows, leaf.cols] if isinstance(leaf, LowRank) else [leaf])]
    forms: list[Any] = [
        along and tuple([tuple(leaf.shape) if isinstance(leaf, LowRank) else leaf is not None for leaf in along])
        for along in tangents
    ]
    return Known(tensors, tuple(forms))


def put_together(forms: Forms, tensors: Sequence[Tensor]) -> list[Tangents | None]:
    """Tangents of these forms, of other tensors."""
    rest = iter(tensors)

    def leaf(form: Any) -> Leaf | None:
        if isinstance(form, tuple):
            rows, cols = next(rest), next(rest)
            return LowRank(rows, cols, form, rows.new_zeros(()))
        return next(rest) if form else None

    return [None if along is None else tuple([leaf(form) for form in along]) for along in forms]
