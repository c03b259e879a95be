"""What a tree of reducers asks of per-sample gradients, and what it makes of the answer: the one place for both."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from funcghost.algebra.directions import Direction, LowRank
from funcghost.reducers.bases import Additive, Directional, Reducer, single_parts
from funcghost.trees import Params

Contributions = Mapping[str, Tensor]
"""What a task made of each parameter, by name."""


@dataclass(frozen=True, eq=False)
class Request:
    """What is asked for.

    `reducers`: those that ask.
    `directions`: those to score in, of all reducers, one after the other.
    `columns`: how many of them each reducer with directions has.
    `positions`: the numbers of those that are wanted by position.
    `tasks`: the reducers to which parameters contribute.
    `keep`: whether the factors themselves are wanted.
    """

    reducers: Sequence[Reducer] = ()
    directions: tuple[Direction, ...] = ()
    columns: tuple[int, ...] = ()
    positions: frozenset[int] = frozenset()
    tasks: tuple[Additive, ...] = ()
    keep: bool = False

    @property
    def factored(self) -> bool:
        """Whether per-sample gradients are needed in factored form."""
        low = (isinstance(leaf, LowRank) for direction in self.directions for leaf in direction)
        return bool(self.tasks) or self.keep or any(low)

    @property
    def empty(self) -> bool:
        """Whether nothing is asked for."""
        return not (self.directions or self.tasks or self.keep)

    def results(self, answer: "Answer", params: Params) -> list[Any]:
        """What each of the reducers makes of the answer."""
        ends = [0]
        for count in self.columns:
            ends.append(ends[-1] + count)
        spans, parts = map(range, ends, ends[1:]), iter(answer.parts)
        return [_result(reducer, answer, params, spans, parts) for reducer in self.reducers]


@dataclass(frozen=True, eq=False)
class Answer:
    """What was found for a request.

    `scores`: [b, k], along each of the directions.
    `parts`: for each task what parameters contribute.
    `positions`: the terms [b, t] of scores by position, by the number of the direction.
    """

    scores: Tensor
    parts: Sequence[Contributions] = ()
    positions: Mapping[int, Tensor] = field(default_factory=dict)

    def by_position(self, columns: range) -> Tensor:
        """[b, t, k], with zeros for directions that no use of a parameter meets."""
        known = next(iter(self.positions.values()), self.scores.new_zeros((len(self.scores), 0)))
        return torch.stack([self.positions.get(k, torch.zeros_like(known)) for k in columns], -1)


def requested(reducers: Sequence[Reducer], params: Params) -> Request:
    """What the reducers ask for, each in its turn."""
    directions, columns, positions, tasks = list[Direction](), list[int](), set[int](), list[Additive]()
    for part in (part for reducer in reducers for part in single_parts(reducer)):
        if isinstance(part, Additive):
            tasks.append(part)
            continue
        own = part.directions(params)
        if part.by_position:
            positions.update(range(len(directions), len(directions) + len(own)))
        directions += own
        columns.append(len(own))
    return Request(reducers, tuple(directions), tuple(columns), frozenset(positions), tuple(tasks))


def _result(
    reducer: Reducer, answer: Answer, params: Params, spans: Iterator[range], parts: Iterator[Contributions]
) -> Any:
    """What a reducer makes of the next columns of scores and of the next contributions."""
    if isinstance(reducer, Additive):
        return reducer.result(next(parts))
    if isinstance(reducer, Directional):
        own = next(spans)
        scores = answer.by_position(own) if reducer.by_position else answer.scores[:, own.start : own.stop]
        return reducer.result(scores, params)
    return reducer.joined([_result(part, answer, params, spans, parts) for part in reducer.parts()])
