"""Recurrent layers, run again step by step: the gradients at every step of every sequence, from one backward.

Sequences are rows [n, *] as packed ones have them: those of step 0, then those of step 1, the longest sequences first;
padded ones have as many rows at each step. Of a layer in one direction, with gates `a = w_in x + w_across h' + biases`
of the row `x` and of the state `h'` before it, the gradients of the weights are

    sum over rows  delta_in (x) x   and   sum over rows  delta_across (x) h'

where the deltas are those of `w_in x` and of `w_across h'`. A state gets gradients from its row of the output and from
the step after it, so the deltas come one step after the other, backwards; all that they are multiplied with is had for
all steps at once. Cost: a forward, the half of one (and the other half but for the first layer), elementwise work.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from funcghost.algebra.sums import total

Kind = Literal["lstm", "gru", "tanh", "relu"]


class Weights(NamedTuple):
    """Those of a layer in one direction: of its input and of its state, [gates * h, *], and their biases."""

    inward: Tensor
    across: Tensor
    bias: Tensor | None = None
    bias_across: Tensor | None = None


class Deltas(NamedTuple):
    """What a layer's weights get in one direction, row by row, and the gradients of its first states.

    `rows`, `before`: what `inward` and `across` were multiplied with.
    """

    inward: Tensor
    rows: Tensor
    across: Tensor
    before: Tensor
    first: tuple[Tensor, ...]


def sequences_of(counts: Tensor, rows: int) -> Tensor:
    """The sequence of every row of packed ones, from how many there are at each step: [t] -> [n]."""
    row, ends = torch.arange(rows, device=counts.device), counts.cumsum(0)
    step = torch.searchsorted(ends, row, right=True)
    return row - (ends - counts)[step]


@dataclass(frozen=True, eq=False)
class Steps:
    """How many sequences there are at each step, in an order in which none comes after a longer one that ended."""

    counts: tuple[int, ...]

    @cached_property
    def rows(self) -> list[slice]:
        """The rows of each step."""
        ends = list(accumulate(self.counts))
        return [slice(end - count, end) for end, count in zip(ends, self.counts, strict=True)]

    @cached_property
    def sequence(self) -> Tensor:
        """The sequence of each row."""
        return sequences_of(torch.tensor(self.counts, device="cpu"), sum(self.counts))

    @cached_property
    def backwards(self) -> Tensor:
        """The row in whose place each comes where every sequence is turned around; the same for the way back."""
        counts = torch.tensor(self.counts, device="cpu")
        starts = counts.cumsum(0) - counts
        step = torch.repeat_interleave(torch.arange(len(counts), device="cpu"), counts)
        return starts[torch.bincount(self.sequence)[self.sequence] - 1 - step] + self.sequence

    def before(self, first: Tensor, states: Tensor) -> Tensor:
        """The state before each row: the first one [s, h], or that of the row before it."""
        parts = [first[: self.counts[0]]]
        parts += [states[own.start : own.start + n] for own, n in zip(self.rows, self.counts[1:], strict=False)]
        return torch.cat(parts)


def unrolled(
    kind: Kind,
    steps: Steps,
    rows: Tensor,
    first: Sequence[Tensor],
    weights: Sequence[Weights],
    ways: int,
    out: Tensor | None,
    last: Sequence[Tensor | None],
) -> list[Deltas]:
    """The deltas of each layer in each of so many `ways`, forwards and maybe backwards, in the order of the `weights`.

    `first` are the states [layers * ways, s, h], of an LSTM h and c; `out` and `last` the gradients of what the last
    layer gives [n, ways * h] and of the last states, None for zero.
    """
    runs, below = list[_Run](), rows
    for place, given in enumerate(weights):
        way = place % ways
        runs.append(RUNS[kind](steps, _turned(below, steps, way), [state[place] for state in first], given))
        if way == ways - 1:
            own = enumerate(runs[-ways:])
            below = (
                torch.cat([_turned(run.states, steps, turn) for turn, run in own], 1) if ways > 1 else runs[-1].states
            )
    found, above = list[Deltas](), torch.zeros_like(below) if out is None else out
    for depth in reversed(range(len(runs) // ways)):
        inward = list[Tensor]()
        for way in reversed(range(ways)):
            place = depth * ways + way
            part = _turned(above.tensor_split(ways, 1)[way], steps, way)
            delta = runs[place].deltas(part, [None if end is None else end[place] for end in last])
            found.insert(0, delta)
            if depth:
                inward.append(_turned(delta.inward @ weights[place].inward, steps, way))
        above = total(inward) if depth else above
    return found


def _turned(rows: Tensor, steps: Steps, way: int) -> Tensor:
    """The rows in the order in which a direction comes to them."""
    return rows[steps.backwards.to(rows.device)] if way else rows


class _Run(ABC):
    """A layer in one direction that has been run."""

    def __init__(self, steps: Steps, rows: Tensor, first: Sequence[Tensor], weights: Weights) -> None:
        """Runs it."""
        self.steps, self.rows, self.first, self.weights = steps, rows, first, weights
        self.width = weights.across.shape[1]
        self.states = rows.new_empty(len(rows), self.width)
        self.run()
        self.before = steps.before(first[0], self.states)

    def inward(self, with_across: bool) -> Tensor:
        """The gates [n, gates * h] without what comes from states; also with their bias, if so."""
        w = self.weights
        bias = w.bias if w.bias is None or w.bias_across is None or not with_across else w.bias + w.bias_across
        return F.linear(self.rows, w.inward, bias)

    def forwards(self) -> Iterator[tuple[slice, Tensor]]:
        """The rows of each step, and the states before them."""
        before = self.first[0]
        for own, count in zip(self.steps.rows, self.steps.counts, strict=True):
            yield own, before[:count]
            before = self.states[own]

    def ends(self, last: Tensor | None, like: Tensor) -> Tensor:
        """Where the gradients of states are, by sequence."""
        return torch.zeros_like(like) if last is None else last.clone()

    @abstractmethod
    def run(self) -> None:
        """Fills the states."""

    @abstractmethod
    def deltas(self, out: Tensor, last: Sequence[Tensor | None]) -> Deltas:
        """Those that follow from gradients of the states of each row, and of the last states."""


class _Plain(_Run):
    """`h = tanh(a)`."""

    def activation(self, gates: Tensor) -> Tensor:
        """What the gates become, in their place."""
        return gates.tanh_()

    def slope(self) -> Tensor:
        """Of the activation, where the states are."""
        return 1 - self.states.square()

    def run(self) -> None:
        """Fills the states."""
        gates = self.inward(with_across=True)
        for own, before in self.forwards():
            self.states[own] = self.activation(gates[own].addmm_(before, self.weights.across.T))

    def deltas(self, out: Tensor, last: Sequence[Tensor | None]) -> Deltas:
        """Those of the gates."""
        slope, found, state = self.slope(), torch.empty_like(self.states), self.ends(last[0], self.first[0])
        for own, count in zip(reversed(self.steps.rows), reversed(self.steps.counts), strict=True):
            torch.mul(state[:count].add_(out[own]), slope[own], out=found[own])
            torch.mm(found[own], self.weights.across, out=state[:count])
        return Deltas(found, self.rows, found, self.before, (state,))


class _Relu(_Plain):
    """`h = relu(a)`."""

    def activation(self, gates: Tensor) -> Tensor:
        """What the gates become, in their place."""
        return gates.relu_()

    def slope(self) -> Tensor:
        """Of the activation, where the states are."""
        return (self.states > 0).to(self.states.dtype)


class _Gru(_Run):
    """`r, z = sigmoid(a), n = tanh(a_in + r a_across), h = n + z (h' - n)`."""

    def run(self) -> None:
        """Fills the states."""
        self.inner = self.inward(with_across=False).unflatten(1, (3, self.width))
        self.outer = torch.empty_like(self.inner)  # r and z, and what r is multiplied with
        self.new = torch.empty_like(self.states)
        for own, before in self.forwards():
            inner, outer, new = self.inner[own], self.outer[own], self.new[own]
            across = F.linear(before, self.weights.across, self.weights.bias_across)
            outer.copy_(across.view_as(outer))
            outer[:, :2].add_(inner[:, :2]).sigmoid_()
            torch.addcmul(inner[:, 2], outer[:, 0], outer[:, 2], out=new).tanh_()
            torch.lerp(new, before, outer[:, 1], out=self.states[own])

    def deltas(self, out: Tensor, last: Sequence[Tensor | None]) -> Deltas:
        """Those of the gates: the same but for what r is multiplied with."""
        r, z, across = self.outer.unbind(1)
        new = (1 - z) * (1 - self.new.square())
        slopes = torch.stack([new * across * r * (1 - r), (self.before - self.new) * z * (1 - z), new * r], 1)
        found, keep = torch.empty_like(slopes), z.contiguous()
        state = self.ends(last[0], self.first[0])
        grown = torch.empty_like(self.states)
        for own, count in zip(reversed(self.steps.rows), reversed(self.steps.counts), strict=True):
            here = torch.add(state[:count], out[own], out=grown[own])
            torch.mul(slopes[own], here.unsqueeze(1), out=found[own])
            torch.addmm(here * keep[own], found[own].flatten(1), self.weights.across, out=state[:count])
        inward = torch.cat([found[:, :2], (grown * new).unsqueeze(1)], 1)
        return Deltas(inward.flatten(1), self.rows, found.flatten(1), self.before, (state,))


class _Lstm(_Run):
    """`i, f, o = sigmoid(a), g = tanh(a), c = f c' + i g, h = o tanh(c)`."""

    def run(self) -> None:
        """Fills the states."""
        h, across = self.width, self.weights.across.T
        self.gates = self.inward(with_across=True)
        self.cells, self.bent = torch.empty_like(self.states), torch.empty_like(self.states)
        cell = self.first[1]
        for own, before in self.forwards():
            gates = self.gates[own].addmm_(before, across)
            gates[:, : 2 * h].sigmoid_()
            gates[:, 2 * h : 3 * h].tanh_()
            gates[:, 3 * h :].sigmoid_()
            i, f, g, o = gates.unflatten(1, (4, h)).unbind(1)
            cell = torch.addcmul(i * g, f, cell[: len(i)], out=self.cells[own])
            torch.mul(o, torch.tanh(cell, out=self.bent[own]), out=self.states[own])

    def deltas(self, out: Tensor, last: Sequence[Tensor | None]) -> Deltas:
        """Those of the gates."""
        i, f, g, o = self.gates.unflatten(1, (4, self.width)).unbind(1)
        cells = self.steps.before(self.first[1], self.cells)
        slopes = torch.stack([g * i * (1 - i), cells * f * (1 - f), i * (1 - g.square())], 1)
        of_o, of_cell, keep = self.bent * o * (1 - o), o * (1 - self.bent.square()), f.contiguous()
        found = slopes.new_empty(len(slopes), 4, self.width)
        state, cell = (self.ends(end, like) for end, like in zip(last, self.first, strict=True))
        for own, count in zip(reversed(self.steps.rows), reversed(self.steps.counts), strict=True):
            here = state[:count].add_(out[own])
            inner = cell[:count].addcmul_(here, of_cell[own])
            torch.mul(slopes[own], inner.unsqueeze(1), out=found[own, :3])
            torch.mul(here, of_o[own], out=found[own, 3])
            torch.mm(found[own].flatten(1), self.weights.across, out=here)
            inner.mul_(keep[own])
        return Deltas(found.flatten(1), self.rows, found.flatten(1), self.before, (state, cell))


RUNS: dict[Kind, type[_Run]] = {"lstm": _Lstm, "gru": _Gru, "tanh": _Plain, "relu": _Relu}
