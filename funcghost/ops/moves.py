"""Ops that move entries from sample to sample by the values of data, and where each entry then belongs.

Rows gathered for an expert, segments of packed rows added up: which sample an entry belongs to changes with the data
while shapes and ops stay the same, so a layout measured once would not hold again. Such an op is found out by applying
it to sample numbers instead of values, once as it was called and once with the index shuffled: if an entry's sample
changes, the op moves samples. A plan notes it, and every run applies it to sample numbers again, to know the samples of
what came out, or to see that they are still where the plan says.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import optree
import torch
from torch import Tensor

from funcghost.errors import MismatchError
from funcghost.ops.call import is_float
from funcghost.ops.families.recurrent import ALIKE
from funcghost.ops.families.sums import BY_SHAPE
from funcghost.ops.families.tables import BY_DATA
from funcghost.ops.layout import Layout, Rows, candidates, spread
from funcghost.ops.rules import Op

_T: Any = torch.Tensor


REARRANGE = BY_DATA | BY_SHAPE
"""The ops that put entries elsewhere as they are, or sums of them."""
MOVES = REARRANGE | ALIKE.keys()
IN_PLACE = frozenset(op for op in MOVES if op is _T.__setitem__ or op.__name__.rstrip("_") + "_" == op.__name__)

Where = Layout | Rows
Maps = dict[tuple[int, int], Tensor]
"""The sample of each row, by the call that moved the rows and the number of its output."""


class Sources(NamedTuple):
    """Per entry of an output: how many entries of the inputs it adds up, and the sum of their samples and squares."""

    number: Tensor
    total: Tensor
    squares: Tensor

    def pure(self) -> Tensor:
        """Whether no entry adds up several samples: equality in the Cauchy-Schwarz inequality."""
        return (self.squares * self.number == self.total.square()).all()

    def samples(self) -> Tensor:
        """The sample of every entry; 0 where there is none."""
        return self.total / self.number.clamp_min(1)


@dataclass(frozen=True, eq=False)
class Move:
    """A call of such an op, with `slots` those of the tensors whose samples matter; their values are not looked at."""

    op: Op
    leaves: tuple[Any, ...]
    spec: optree.PyTreeSpec
    slots: tuple[int, ...]

    def apply(self, numbers: Sequence[Tensor]) -> list[Tensor]:
        """What comes out of the op for these numbers in the slots, with zeros in the other floating tensors."""
        filled = dict(zip(self.slots, numbers, strict=True))
        given = [
            (filled[slot].clone() if self.op in IN_PLACE else filled[slot])
            if slot in filled
            else (leaf.new_zeros(leaf.shape, dtype=torch.float64) if is_float(leaf) else leaf)
            for slot, leaf in enumerate(self.leaves)
        ]
        nest: Any = optree.tree_unflatten(self.spec, given)
        with torch.no_grad():
            returned = ALIKE.get(self.op, self.op)(*nest[0], **nest[1])
        found = [value for value in optree.tree_leaves(returned) if isinstance(value, Tensor)]
        if self.op is _T.__setitem__:
            found.append(given[0])
        return [value for value in found if value.is_floating_point()]

    def sources(self, numbers: Sequence[Tensor]) -> list[Sources]:
        """Where the entries of each output come from, for an op that adds up entries of its inputs."""
        powers = ([value**power for value in numbers] for power in range(3))
        return [Sources(*parts) for parts in zip(*map(self.apply, powers), strict=True)]

    def adds_entries(self) -> bool:
        """Whether every output entry is a sum of input entries with weights that are not negative."""
        u, v = (self._drawn(seed) for seed in (0, 1))
        combined = self.apply([a - 2 * b for a, b in zip(u, v, strict=True)])
        linear = all(torch.equal(a - 2 * b, c) for a, b, c in zip(self.apply(u), self.apply(v), combined, strict=True))
        ones = [torch.ones_like(value) for value in u]
        alone = [[one * (i == k) for i, one in enumerate(ones)] for k in range(len(ones))]
        return linear and all(bool((value >= 0).all()) for numbers in alone for value in self.apply(numbers))

    def _drawn(self, seed: int) -> list[Tensor]:
        """Whole numbers for the slots."""
        generator = torch.Generator().manual_seed(seed)
        shapes = (self.leaves[slot].shape for slot in self.slots)
        return [
            torch.randint(-99, 99, shape, generator=generator, device="cpu").to(self.like().device).double()
            for shape in shapes
        ]

    def of(self, slots: tuple[int, ...]) -> "Move":
        """The same call where the samples in these slots alone matter."""
        return Move(self.op, self.leaves, self.spec, slots)

    def like(self) -> Tensor:
        """One of the tensors whose samples matter."""
        like: Tensor = self.leaves[self.slots[0]]
        return like

    def narrowed(self, axis: int) -> "Move":
        """The same call on one entry of each row of its floating tensors."""
        leaves = tuple(
            leaf[tuple(slice(None) if i == axis else slice(0, 1) for i in range(leaf.dim()))]
            if is_float(leaf)
            else leaf
            for leaf in self.leaves
        )
        return Move(self.op, leaves, self.spec, self.slots)

    def by_data(self, layouts: Sequence[Layout], batch: int, index: Sequence[int]) -> bool:
        """Whether other data in the slots of the index, or other values, would send an entry to another sample."""
        numbers = [
            1 + layout.numbers(self.leaves[slot].shape, batch, self.like().device)
            for slot, layout in zip(self.slots, layouts, strict=True)
        ]
        plain = self._attempt(numbers)
        if plain is None:
            return True
        shuffled = (
            self._with_index(index, lambda leaf: leaf.roll(1))._attempt(numbers),
            self._with_index(index, lambda leaf: leaf.flip(0))._attempt(numbers),
            [-value for value in self._attempt([-value for value in numbers]) or []],
        )
        return any(other is None or not _same(plain, other) for other in shuffled)

    def _attempt(self, numbers: Sequence[Tensor]) -> list[Tensor] | None:
        """What comes out, and what was written to; None where the op does not take such numbers."""
        try:
            return self.apply(numbers)
        except (RuntimeError, IndexError):
            return None

    def _with_index(self, index: Sequence[int], order: Any) -> "Move":
        """The same call with the entries of the index in another order, which keeps it valid."""
        leaves = tuple(
            order(leaf.flatten()).view(leaf.shape) if slot in index else leaf for slot, leaf in enumerate(self.leaves)
        )
        return Move(self.op, leaves, self.spec, self.slots)


@dataclass(frozen=True)
class Moved:
    """What a plan knows of the call number `call` of these ops: where the samples are in its slots and outputs.

    `narrow`: it treats rows as wholes, so that one entry of each tells all.
    """

    call: int
    op: str
    slots: tuple[int, ...]
    inputs: tuple[Where, ...]
    outputs: tuple[Where | Literal["unused"], ...]
    narrow: bool

    def follow(self, move: Move, maps: Maps, batch: int) -> Tensor:
        """Notes in `maps` where the rows go; says whether the samples are where the plan says they always are."""
        try:
            move = move.narrowed(self.inputs[0].axis) if self.narrow else move
            found = move.sources(number_rows(move, self.inputs, maps, batch))
        except (RuntimeError, IndexError) as error:
            raise MismatchError(f"{self.op} moves samples in another way than when the plan was made.") from error
        if len(found) != len(self.outputs):
            raise MismatchError(f"{self.op} gave {len(found)} outputs, the plan has {len(self.outputs)}.")
        fine = [torch.ones((), dtype=torch.bool, device=move.like().device)]
        for number, (sources, where) in enumerate(zip(found, self.outputs, strict=True)):
            if where == "unused":
                continue
            samples = sources.samples()
            if isinstance(where, Rows):
                rows = along(samples, where.axis)
                maps[self.call, number] = rows
                expected = spread(rows, where.axis, samples.shape)
            elif where.fits(samples.shape, batch):
                expected = where.numbers(samples.shape, batch, samples.device)
            else:
                raise MismatchError(f"{self.op} gave shape {tuple(samples.shape)}, which is not {where}.")
            fine += [sources.pure(), ((samples == expected) | (sources.number == 0)).all()]
        return torch.stack(fine).all()


def by_chance(moved: Moved) -> bool:
    """Whether it may be these data alone that left the samples where a layout says they are."""
    fixed = all(isinstance(where, Layout) for where in moved.inputs)
    return fixed and any(isinstance(where, Layout) for where in moved.outputs)


def number_rows(move: Move, inputs: Sequence[Where], maps: Maps, batch: int) -> list[Tensor]:
    """The sample numbers of what is in the slots of a call."""
    for where, slot in zip(inputs, move.slots, strict=True):
        if isinstance(where, Layout) and not where.fits(move.leaves[slot].shape, batch):
            raise MismatchError(f"an input of shape {tuple(move.leaves[slot].shape)} is not {where}.")
    return [
        spread(maps[where.call, where.output], where.axis, shape)
        if isinstance(where, Rows)
        else where.numbers(shape, batch, move.like().device)
        for where, shape in zip(inputs, (move.leaves[slot].shape for slot in move.slots), strict=True)
    ]


def along(numbers: Tensor, axis: int) -> Tensor:
    """One number for each index of an axis."""
    rows: Tensor = numbers.movedim(axis, 0).flatten(1)[:, 0] if numbers.dim() > 1 else numbers
    return rows


def resolve(
    move: Move,
    call: int,
    name: str,
    inputs: Sequence[Where],
    used: Sequence[bool],
    maps: Maps,
    batch: int,
    *,
    any_order: bool = False,
) -> Moved | None:
    """Where the samples of a call's outputs are, given those of its inputs; None if this cannot be told.

    In `any_order`: what has a layout may have it by chance, so that its rows are followed all the same.
    """
    try:
        if not move.adds_entries():
            return None
        full = move.sources(number_rows(move, inputs, maps, batch))
    except (RuntimeError, IndexError):
        return None
    if len(full) != len(used):
        return None
    known: list[Where | Literal["unused"]] = []
    for number, (sources, wanted) in enumerate(zip(full, used, strict=True)):
        where = _where(sources, call, number, batch, any_order) if wanted else None
        if wanted and where is None:
            return None
        known.append(where or "unused")
    for narrow in (True, False):
        moved, found = Moved(call, name, move.slots, tuple(inputs), tuple(known), narrow), dict(maps)
        try:
            fine = bool(moved.follow(move, found, batch))
        except MismatchError:
            continue
        if fine and all(
            torch.equal(found[call, number], along(full[number].samples(), where.axis))
            for number, where in enumerate(known)
            if isinstance(where, Rows)
        ):
            maps.update(found)
            return moved
    return None


def _where(sources: Sources, call: int, number: int, batch: int, any_order: bool) -> Where | None:
    """The layout that the samples of an output have, or the axis in whose rows they are."""
    samples, some = sources.samples(), sources.number > 0
    if not bool(sources.pure()):
        return None
    for layout in [] if any_order else candidates(samples.shape, batch):
        if bool(((samples == layout.numbers(samples.shape, batch, samples.device)) | ~some).all()):
            return layout
    for axis in range(samples.dim()):
        if bool(((samples == spread(along(samples, axis), axis, samples.shape)) | ~some).all()):
            return Rows(axis, call, number)
    return None


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True))
