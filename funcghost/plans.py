"""The plan: for every site its op, layout and way to `J V`; made once, printed, passed back."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from funcghost.layout import Layout, Rows
from funcghost.moves import Moved
from funcghost.tangent import Way
from funcghost.trees import Tree, tensors

Action = Literal["tap", "carry", "skip"]
OutputLayout = Layout | Rows | Literal["unused", "constant", "carried"]


@dataclass(frozen=True)
class Site:
    """One op that a parameter, or something computed from one, goes into.

    `tap`: the outputs have a layout, the score is taken in the backward. `carry`: none fits (or none is needed
    yet), the tangent goes on with the outputs. `skip`: the outputs have no derivative.
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


@dataclass(frozen=True)
class Plan:
    """What a step does at each site, for losses of a given form; serves other batch sizes and lengths.

    `batch` is the number of samples it was made with, `axes` the places in the batch where that number stands,
    `digest` the checksum of all ops, `sizes` those of the sizes it was verified for, `precision` the lowest that the
    ops compute in, `moves` the ops that move samples by data. `captured` are the user's tensors that the losses close
    over, `written` the memory they write to.
    """

    sites: tuple[Site, ...]
    batch: int
    digest: int = 0
    sizes: frozenset[int] = frozenset()
    precision: torch.dtype = torch.float64
    axes: tuple[tuple[int, int], ...] = ()
    verified: bool = False
    moves: tuple[Moved, ...] = ()
    captured: tuple[Tensor, ...] = field(default=(), repr=False, compare=False)
    written: tuple[torch.UntypedStorage, ...] = field(default=(), repr=False, compare=False)

    def batch_size(self, batch: Tree) -> int:
        """The number of samples in another batch of the same structure."""
        if self.batch <= 1:
            return self.batch
        leaves = tensors(batch)
        for leaf, axis in self.axes:
            if leaf < len(leaves) and axis < leaves[leaf].dim():
                return leaves[leaf].shape[axis]
        return self.batch

    @property
    def flops(self) -> int:
        """FLOPs that one direction adds to a step, as counted while planning."""
        return sum(site.flops for site in self.sites)

    def __str__(self) -> str:
        """The table: one line per site that does something."""
        rows = [_HEAD, *(_row(i, site) for i, site in enumerate(self.sites) if site.action != "skip")]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        taps = sum(site.action == "tap" for site in self.sites)
        carries = sum(site.action == "carry" for site in self.sites)
        total = (
            f"{taps} sites tapped, {carries} carried; {_count(self.flops)}FLOP per direction on top of a step, "
            f"planned with {self.batch} samples, {'verified' if self.verified else 'not verified'}"
        )
        return "\n".join([*lines, total])


_HEAD = ("site", "op", "parameters", "output", "layout", "J V by", "FLOP", "bytes")


def _row(index: int, site: Site) -> tuple[str, ...]:
    names = ", ".join(site.parameters[:3]) + (f", +{len(site.parameters) - 3}" if len(site.parameters) > 3 else "")
    shapes = " ".join("x".join(map(str, shape)) or "scalar" for shape in site.shapes)
    layout = "carried" if site.action == "carry" else ", ".join(str(x) for x in site.layouts if x != "constant")
    op = site.op.removeprefix("torch.").replace("nn.functional.", "F.")
    return (str(index), op, names, shapes, layout, site.way or "?", _count(site.flops), _count(site.bytes))


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
