"""What a tree of reducers asks of a run: directions to score in, scores by position, and tasks for the ledger."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from funcghost.algebra.cost import Means
from funcghost.algebra.directions import Direction, LowRank
from funcghost.engine.ledger import Ledger
from funcghost.engine.run import Outcome
from funcghost.reducers.bases import Additive, Directional, Reducer
from funcghost.trees import Params


@dataclass(frozen=True, eq=False)
class Request:
    """What is asked for: `positions` are the columns wanted by position, `keep` says that factors are.

    `columns` says how many of the directions each reducer with directions has.
    """

    directions: tuple[Direction, ...] = ()
    positions: frozenset[int] = frozenset()
    tasks: tuple[Additive, ...] = ()
    keep: bool = False
    columns: tuple[int, ...] = ()

    @property
    def factored(self) -> bool:
        """Whether per-sample gradients are needed in factored form."""
        low = (isinstance(leaf, LowRank) for direction in self.directions for leaf in direction)
        return bool(self.tasks) or self.keep or any(low)

    @property
    def empty(self) -> bool:
        """Whether nothing is asked for."""
        return not (self.directions or self.tasks or self.keep)

    def ledger(self, params: Params, means: Callable[[], Means]) -> Ledger | None:
        """What collects it, if scores are not all; `means`, which may have to be measured, are not asked for before."""
        if not (self.tasks or self.keep or self.positions):
            return None
        return Ledger(params.names, self.tasks, means(), keep=self.keep, positions=self.positions)

    def results(self, reducers: Sequence[Reducer], params: Params, outcome: Outcome) -> list[Any]:
        """What each of the reducers makes of the outcome."""
        results, start, tasks = list[Any](), 0, iter(outcome.parts)
        columns = iter(self.columns)
        for reducer in reducers:
            own = list[Any]()
            for part in reducer.parts():
                if isinstance(part, Directional):
                    stop = start + next(columns)
                    scores = outcome.scores[:, start:stop]
                    if part.by_position:
                        scores = _by_position(outcome, range(start, stop))
                    own.append(part.result(scores, params))
                    start = stop
                elif isinstance(part, Additive):
                    own.append(part.result(next(tasks)))
            results.append(reducer.joined(own))
        return results


def _by_position(outcome: Outcome, columns: range) -> torch.Tensor:
    """[b, t, k], with zeros for directions that no use of a parameter meets."""
    known = next(iter(outcome.positions.values()), outcome.scores.new_zeros((len(outcome.scores), 0)))
    found = [outcome.positions.get(k, torch.zeros_like(known)) for k in columns]
    return torch.stack(found, -1)


def requested(reducers: Sequence[Reducer], params: Params) -> Request:
    """What the reducers ask for, each in its turn."""
    directions, positions, tasks, columns = list[Direction](), set[int](), list[Additive](), list[int]()
    for part in (part for reducer in reducers for part in reducer.parts()):
        if isinstance(part, Directional):
            own = part.directions(params)
            columns.append(len(own))
            if part.by_position:
                positions.update(range(len(directions), len(directions) + len(own)))
            directions += own
        elif isinstance(part, Additive):
            tasks.append(part)
    return Request(tuple(directions), frozenset(positions), tuple(tasks), columns=tuple(columns))
