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


class Passes:
    """Sees a batch once, keeping its pairs, as far as they fit; and the rest of it twice.

    In a second pass random numbers are those of the first, and what the losses write to (the running statistics of a
    batch norm) is put back.
    """

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
        self.losses, self.by, self.reduction = losses, by, reduction
        self.limit, self.options, self.expected = pairs_memory, options, 0
        self.pairs = pairs_and_losses(losses, options=options, plan=plan)
        self.score = reduce(losses, options=options, plan=plan)

    def first(self, params: Params, batch: Tree) -> Taken:
        """The training gradient, and what is left to be known of every microbatch."""
        batches = list(batch.batches) if isinstance(batch, Microbatches) else [batch]
        if not batches:
            raise InputError("Microbatches: takes one or more batches.")
        by_position = self._by_position(params)
        parts: list[Part] = []
        total: list[Tensor] = []
        held = 0
        for one in batches:
            fits = not by_position and (self.limit is None or (self.limit > 0 and held + self.expected <= self.limit))
            part, gradients = self._take(params, one, fits, held)
            held += part.pairs.nbytes if part.pairs else 0
            total = [a + b for a, b in zip(total, gradients, strict=True)] if total else list(gradients)
            parts.append(part)
        losses = torch.cat([part.losses for part in parts])
        if not len(losses):
            raise InputError("along_path: the batch has no samples.")
        weight = len(losses) if self.reduction == "mean" else 1
        return Taken(parts, [leaf / weight for leaf in total], losses, weight, self._route(parts, by_position, held))

    def second(self, params: Params, taken: Taken, along: Tree) -> Tree:
        """The products of all samples with the direction, in units of the training gradient."""
        reducer, tree = self.by(dot(along)), params.rebuild(params.leaves)
        found = []
        for part in taken.parts:
            if part.pairs is not None:
                found.append(apply(reducer, part.pairs, options=self.options))
                continue
            with untouched(Problem(self.losses, params, part.batch).devices()):
                restore(part.before)
                found.append(self.score(tree, part.batch, reducer))
        return optree.tree_map(lambda *values: torch.cat(values) / taken.weight, *found)

    def _take(self, params: Params, batch: Tree, fits: bool, held: int) -> tuple[Part, Sequence[Tensor]]:
        """A microbatch, and the gradient of the sum of its losses."""
        problem = Problem(self.losses, params, batch)
        before = snapshot(problem.devices())
        if not fits:
            outcome = run_plain(problem, "sum")
            return Part(batch, None, before, outcome.losses), outcome.gradients
        pairs, losses = self.pairs(params.rebuild(params.leaves), batch)
        gradients = optree.tree_leaves(combine(pairs, torch.ones_like(losses)))
        self.expected = pairs.nbytes
        kept = self.limit is None or held + pairs.nbytes <= self.limit
        return Part(batch, pairs if kept else None, before, losses), gradients

    def _by_position(self, params: Params) -> bool:
        reducers, _ = split_reducers(self.by(dot(params.rebuild(params.leaves))))
        parts = [part for reducer in reducers for part in reducer.parts()]
        return any(isinstance(part, Directional) and part.by_position for part in parts)

    def _route(self, parts: Sequence[Part], by_position: bool, held: int) -> str:
        again = sum(part.pairs is None for part in parts)
        if not again:
            return f"one pass: pairs are kept, {held} bytes"
        why = "values by position are those of a step" if by_position else f"pairs_memory={self.limit}"
        if self.expected:
            why += f", and the pairs of a batch have {self.expected} bytes"
        return f"two passes over {again} of {len(parts)} batches: {why}"
