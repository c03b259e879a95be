"""The two things that a batch is needed for: its gradient, and the products of its samples once the step is known."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from funcghost.algebra.pair_algebra import combine
from funcghost.algebra.pairs import Pairs
from funcghost.engine.plans import Plan
from funcghost.engine.run import run_plain
from funcghost.errors import InputError
from funcghost.options import Options
from funcghost.problem import Losses, Problem, Reduction
from funcghost.reducers.bases import Directional, split_reducers
from funcghost.reducers.dots import dot
from funcghost.side_effects import Snapshot, restore, snapshot, untouched
from funcghost.transforms.halves import apply
from funcghost.transforms.steps import pairs_and_losses, reduce
from funcghost.trees import Params, Tree


@dataclass(frozen=True)
class Microbatches:
    """Batches that make one step together, taken one after the other: gradients are accumulated."""

    batches: Sequence[Tree]


class Part(NamedTuple):
    """A microbatch after the first pass: its pairs, or what it takes to see it again; and its losses [b]."""

    batch: Tree
    pairs: Pairs | None
    before: Snapshot
    losses: Tensor


@dataclass(frozen=True)
class Taken:
    """A batch after the first pass: its microbatches, its gradient, and why they were taken as they were."""

    parts: Sequence[Part]
    grads: list[Tensor]
    losses: Tensor
    weight: int
    route: str


class Keeping:
    """Sees batches once, keeping their pairs, as far as `limit` bytes hold those of a step; and the rest of them twice.

    In a second pass random numbers are those of the first, and what the losses write to (the running statistics of a
    batch norm) is put back. How large pairs are is known from the first that there were.
    """

    def __init__(self, losses: Losses, limit: int | None, options: Options | None, plan: Plan | None = None) -> None:
        self.losses, self.limit, self.options = losses, limit, options
        self.held = self.expected = 0
        self._pairs = pairs_and_losses(losses, options=options, plan=plan)
        self._score = reduce(losses, options=options, plan=plan)

    def first(self, params: Params, batch: Tree, *, keep: bool = True) -> tuple[Part, Sequence[Tensor]]:
        """A batch, and the gradient of the sum of its losses; `keep` says whether pairs are of use."""
        problem = Problem(self.losses, params, batch)
        before = snapshot(problem.devices())
        room = self.limit is None or (self.limit > 0 and self.held + self.expected <= self.limit)
        if not (keep and room):
            outcome = run_plain(problem, "sum")
            return Part(batch, None, before, outcome.losses), outcome.gradients
        pairs, losses = self._pairs(params.rebuild(params.leaves), batch)
        gradients = optree.tree_leaves(combine(pairs, torch.ones_like(losses)))
        self.expected = pairs.nbytes
        kept = self.limit is None or self.held + pairs.nbytes <= self.limit
        self.held += pairs.nbytes if kept else 0
        return Part(batch, pairs if kept else None, before, losses), gradients

    def again(self, params: Params, part: Part, reducer: Any, score: Callable[..., Any] | None = None) -> Tree:
        """What a reducer makes of its samples; `score` in place of `fg.reduce` of the losses where it is seen twice."""
        if part.pairs is not None:
            return apply(reducer, part.pairs, options=self.options)
        with untouched(Problem(self.losses, params, part.batch).devices()):
            restore(part.before)
            return (score or self._score)(params.rebuild(params.leaves), part.batch, reducer)

    def forget(self) -> None:
        """A new step begins: nothing is held any more."""
        self.held = 0


class Passes:
    """Sees the batches of a step, as `Keeping` does."""

    def __init__(
        self,
        losses: Losses,
        by: Callable[[Any], Any],
        reduction: Reduction,
        pairs_memory: int | None,
        options: Options | None,
        plan: Plan | None,
    ) -> None:
        """What is kept between calls are plans, and how large pairs were."""
        self.by, self.reduction = by, reduction
        self.keeping = Keeping(losses, pairs_memory, options, plan)

    def first(self, params: Params, batch: Tree) -> Taken:
        """The training gradient, and what is left to be known of every microbatch."""
        batches = list(batch.batches) if isinstance(batch, Microbatches) else [batch]
        if not batches:
            raise InputError("Microbatches: takes one or more batches.")
        by_position = self._by_position(params)
        parts: list[Part] = []
        total: list[Tensor] = []
        self.keeping.forget()
        for one in batches:
            part, gradients = self.keeping.first(params, one, keep=not by_position)
            total = [a + b for a, b in zip(total, gradients, strict=True)] if total else list(gradients)
            parts.append(part)
        losses = torch.cat([part.losses for part in parts])
        if not len(losses):
            raise InputError("along_path: the batch has no samples.")
        weight = len(losses) if self.reduction == "mean" else 1
        return Taken(parts, [leaf / weight for leaf in total], losses, weight, self._route(parts, by_position))

    def second(self, params: Params, taken: Taken, along: Tree) -> Tree:
        """The products of all samples with the direction, in units of the training gradient."""
        found = [self.keeping.again(params, part, self.by(dot(along))) for part in taken.parts]
        return optree.tree_map(lambda *values: torch.cat(values) / taken.weight, *found)

    def _by_position(self, params: Params) -> bool:
        reducers, _ = split_reducers(self.by(dot(params.rebuild(params.leaves))))
        parts = [part for reducer in reducers for part in reducer.parts()]
        return any(isinstance(part, Directional) and part.by_position for part in parts)

    def _route(self, parts: Sequence[Part], by_position: bool) -> str:
        again, keeping = sum(part.pairs is None for part in parts), self.keeping
        if not again:
            return f"one pass: pairs are kept, {keeping.held} bytes"
        why = "values by position are those of a step" if by_position else f"pairs_memory={keeping.limit}"
        if keeping.expected:
            why += f", and the pairs of a batch have {keeping.expected} bytes"
        return f"two passes over {again} of {len(parts)} batches: {why}"
