"""The plan: for every site its op, layout and way to `J V`; made once, printed, passed back."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from typing import Any, Literal

import torch
from torch import Tensor

from funcghost._version import __version__
from funcghost.codec import MalformedError, decode, encode
from funcghost.engine.verified import Verified
from funcghost.errors import PlanError
from funcghost.ops.digest import Sizes
from funcghost.ops.layout import Layout, Rows
from funcghost.ops.moves import Moved
from funcghost.ops.tangent import Way
from funcghost.options import Rates
from funcghost.side_effects import Memory
from funcghost.trees import Tree, tensors

FORMAT = 1
"""The version of the text form of a plan."""

Action = Literal["tap", "carry", "skip"]
OutputLayout = Layout | Rows | Literal["unused", "constant", "carried"]


@dataclass(frozen=True)
class Site:
    """One op that a parameter, or something computed from one, goes into.

    `tap`: the outputs have a layout, the score is taken in the backward. `carry`: none fits (or none is needed
    yet), the tangent goes on with the outputs. `skip`: the outputs have no derivative.

    `unseen`: it is the stretch of autograd's graph behind this many-th tensor of which no op was seen that gave it.
    """

    op: str
    tracked: tuple[int, ...]
    action: Action
    layouts: tuple[OutputLayout, ...]
    parameters: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    written: tuple[int, ...] = ()
    random: bool = False
    way: Way | None = None
    flops: int = 0
    bytes: int = 0
    unseen: int | None = None

    @cached_property
    def smooth(self) -> tuple[int, ...]:
        """The numbers of the outputs that have a derivative."""
        return tuple(i for i, layout in enumerate(self.layouts) if layout != "constant")

    @cached_property
    def arranged(self) -> tuple[Layout | Rows | None, ...]:
        """The layouts of these; None where there is no gradient."""
        found = [self.layouts[i] for i in self.smooth]
        return tuple(layout if isinstance(layout, Layout | Rows) else None for layout in found)


@dataclass(frozen=True)
class Contraction:
    """How a reducer is to contract the gradients of a parameter, predicted for the sizes of the batch planned with.

    `rejected`: the other routes with their predicted times.
    """

    reducer: str
    parameter: str
    route: str
    flops: int
    bytes: int
    seconds: float
    rejected: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What a step does at each site, for losses of a given form; serves other batch sizes and lengths.

    `batch` is the number of samples it was made with, `axes` the places in the batch where that number stands,
    `digest` the checksum of all ops, `sizes` those it was verified for, `precision` the lowest that the
    ops compute in, `moves` the ops that move samples by data. `factored` are the sizes for which the
    factors of per-sample gradients were verified, `contractions` how reducers contract them, chosen by the machine's
    `rates`. `captured` are the user's tensors that the losses close over, `written` the memory that they write to and
    the generators that they draw from: None where there are some, and this process has not seen them yet.

    Example:
        >>> import funcghost as fg, torch
        >>> plan = fg.plan(lambda params, x: x @ params["w"], {"w": torch.zeros(3)}, torch.ones(2, 3))
        >>> fg.Plan.from_json(plan.to_json()) == plan
        True
    """

    sites: tuple[Site, ...]
    batch: int
    digest: int = 0
    sizes: Verified = field(default_factory=Verified)
    precision: torch.dtype = torch.float64
    axes: tuple[tuple[int, int], ...] = ()
    verified: bool = False
    moves: tuple[Moved, ...] = ()
    rates: Rates | None = None
    factored: Verified = field(default_factory=Verified)
    contractions: tuple[Contraction, ...] = ()
    captured: tuple[Tensor, ...] | None = field(default=(), repr=False, compare=False)
    written: tuple[Memory, ...] | None = field(default=(), repr=False, compare=False)

    def batch_size(self, batch: Tree) -> int:
        """The number of samples in another batch of the same structure."""
        if self.batch <= 1:
            return self.batch
        leaves = tensors(batch)
        for leaf, axis in self.axes:
            if leaf < len(leaves) and axis < leaves[leaf].dim():
                return leaves[leaf].shape[axis]
        return self.batch

    def with_implied(self, sizes: Sizes) -> "Plan":
        """The plan, also verified for these sizes where this follows from others."""
        known, factored = self.sizes.with_implied(sizes), self.factored.with_implied(sizes)
        same = known is self.sizes and factored is self.factored
        return self if same else replace(self, sizes=known, factored=factored)

    @property
    def flops(self) -> int:
        """FLOPs that one direction adds to a step, as counted while planning."""
        return sum(site.flops for site in self.sites)

    def to_json(self) -> str:
        """The plan as text, for another process: see `from_json`."""
        content = {
            **encode(self),
            "captures": self.captured is None or bool(self.captured),
            "writes": self.written is None or bool(self.written),
        }
        versions = {"format": FORMAT, "funcghost": __version__, "torch": torch.__version__}
        return json.dumps({**versions, "checksum": _checksum(content), "plan": content}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """A plan from the text of `to_json`, for the same losses in another process.

        Law: `Plan.from_json(plan.to_json()) == plan`. With `plan=` that plan, a transform neither plans nor verifies
        the sizes that the plan was verified for. As with any plan, a run that finds other ops than it says plans anew.

        A plan that was written by another version of funcghost or torch is read, but not trusted: it is verified once
        in its first run. Tensors are not written: where the losses write to some (running statistics), the first run
        finds out to which.

        Raises:
            PlanError: the text is not what `to_json` gives, was changed since, or has another format.

        Example:
            >>> import funcghost as fg, torch
            >>> losses, params, x = lambda params, x: x @ params["w"], {"w": torch.zeros(2)}, torch.eye(2)
            >>> text = fg.plan(losses, params, x).to_json()  # write it to a file; in the next process read it:
            >>> score = fg.reduce(losses, plan=fg.Plan.from_json(text))
            >>> score(params, x, fg.dot({"w": torch.tensor([3.0, 4.0])}))
            tensor([3., 4.])
        """
        whole = _parse(text)
        content = dict(whole["plan"])
        try:
            captures, writes = (decode(bool, content.pop(name, None), name) for name in ("captures", "writes"))
            plan: Plan = decode(cls, content, "plan")
        except MalformedError as error:
            raise PlanError(f"the text is not a plan: {error}. {_REMEDY}") from None
        plan = replace(plan, captured=None if captures else (), written=None if writes else ())
        made_here = (whole["funcghost"], whole["torch"]) == (__version__, torch.__version__)
        return plan if made_here else replace(plan, sizes=Verified(), verified=False, factored=Verified())

    def __str__(self) -> str:
        """The table: one line per site that does something."""
        lines = _aligned([_HEAD, *(_row(i, site) for i, site in enumerate(self.sites) if site.action != "skip")])
        taps = sum(site.action == "tap" for site in self.sites)
        carries = sum(site.action == "carry" for site in self.sites)
        total = (
            f"{taps} sites tapped, {carries} carried; {_count(self.flops)}FLOP per direction on top of a step, "
            f"planned with {self.batch} samples, {'verified' if self.verified else 'not verified'}"
        )
        return "\n".join([*lines, total, *self._contracted()])

    def _contracted(self) -> list[str]:
        """The table of contractions, if reducers were given when the plan was made; in one row those without choice."""
        if not self.contractions:
            return []
        rows: list[tuple[str, ...]] = [("reducer", "parameter", "route", "FLOP", "bytes", "predicted", "rejected")]
        for reducer in dict.fromkeys(c.reducer for c in self.contractions):
            own = [c for c in self.contractions if c.reducer == reducer]
            rows += [_contracted_row(reducer, c.parameter, c.route, [c]) for c in own if c.rejected]
            others = [c for c in own if not c.rejected]
            rows += [_contracted_row(reducer, f"{len(others)} others", others[0].route, others)] if others else []
        flops, seconds = sum(c.flops for c in self.contractions), sum(c.seconds for c in self.contractions)
        tiles = max(c.bytes for c in self.contractions)
        total = f"{_count(flops)}FLOP and {seconds:.2g} s predicted, in tiles of {_count(tiles)}bytes at most"
        return ["", *_aligned(rows), total]


_REMEDY = "Write it again with fg.plan(...).to_json()."


def _parse(text: str) -> dict[str, Any]:
    """What is around the plan in its text, as far as it must be as it was written."""
    try:
        whole = json.loads(text)
    except (ValueError, TypeError) as error:
        raise PlanError(f"the text is not a plan: it is not JSON ({error}). {_REMEDY}") from None
    if not isinstance(whole, dict) or "format" not in whole or not isinstance(whole.get("plan"), dict):
        raise PlanError(f"the text is not a plan: it has no format and plan. {_REMEDY}")
    if whole["format"] != FORMAT:
        raise PlanError(
            f"the plan has format {whole['format']!r}, this is funcghost {__version__} with {FORMAT}. {_REMEDY}"
        )
    unchanged = whole.get("checksum") == _checksum(whole["plan"])
    if not unchanged or set(whole) != {"format", "funcghost", "torch", "checksum", "plan"}:
        raise PlanError(f"the plan was changed after it was written: its checksum does not fit. {_REMEDY}")
    return whole


def _checksum(content: dict[str, Any]) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


_HEAD = ("site", "op", "parameters", "output", "layout", "J V by", "FLOP", "bytes")


def _row(index: int, site: Site) -> tuple[str, ...]:
    names = ", ".join(site.parameters[:3]) + (f", +{len(site.parameters) - 3}" if len(site.parameters) > 3 else "")
    shapes = " ".join("x".join(map(str, shape)) or "scalar" for shape in site.shapes)
    layout = "carried" if site.action == "carry" else ", ".join(str(x) for x in site.layouts if x != "constant")
    op = site.op.removeprefix("torch.").replace("nn.functional.", "F.")
    return (str(index), op, names, shapes, layout, site.way or "?", _count(site.flops), _count(site.bytes))


def _contracted_row(reducer: str, name: str, route: str, own: Sequence[Contraction]) -> tuple[str, ...]:
    flops, size, seconds = sum(c.flops for c in own), max(c.bytes for c in own), sum(c.seconds for c in own)
    return (reducer, name, route, _count(flops), _count(size), f"{seconds:.2g} s", ", ".join(own[0].rejected))


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The rows as lines, with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _count(value: float) -> str:
    for unit in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.3g} {unit}" if unit else f"{value:.3g} "
        value /= 1000
    return f"{value:.3g} T"


def batch_axes(batch: Tree, size: int) -> tuple[tuple[int, int], ...]:
    """Where in a batch the number of samples stands: (leaf, axis), first axes first."""
    found = [(i, axis) for i, leaf in enumerate(tensors(batch)) for axis, n in enumerate(leaf.shape) if n == size]
    return tuple(sorted(found, key=lambda place: (place[1], place[0])))
