"""What reducers make of per-sample gradients, added up parameter by parameter while the backward runs.

A parameter that is used once is reduced where its site is passed; of one that is used several times the factors are
kept until the last of its sites. Nothing else is kept. One ledger serves one run.
"""

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from funcghost.algebra.contractions import summed, whole
from funcghost.algebra.cost import Sketch, sketch
from funcghost.algebra.factors import Dense, Factor
from funcghost.engine.shadows import Shadow
from funcghost.options import DEFAULT_BUDGET
from funcghost.reducers.bases import Additive

ALL = ""
"""The name under which contributions of all parameters are added up."""


class Ledger:
    """Collects the factors of every use of every parameter, for `tasks` in the streaming run, or `keep`s them all."""

    def __init__(
        self,
        names: Sequence[str],
        tasks: Sequence[Additive] = (),
        *,
        keep: bool = False,
        sketching: bool = False,
        summing: Collection[int] = (),
        budget: int = DEFAULT_BUDGET,
    ) -> None:
        """Starts empty.

        `summing` are the parameters whose gradients are formed sample by sample, within the `budget` of memory, so that
        their sum is the training gradient: no other is taken.
        """
        self.summing, self.budget, self.sums = frozenset(summing), budget, dict[int, Tensor]()
        self.names, self.tasks, self.keep = names, tasks, keep
        self.sketches: dict[int, list[Sketch]] | None = {} if sketching else None
        self.pending = [0] * len(names)
        self.factors: dict[int, list[Factor]] = {}
        self.totals: list[dict[str, Tensor]] = [{} for _ in tasks]
        each = [(task, total, task.adds_up) for task, total in zip(tasks, self.totals, strict=True)]
        self.linear = [entry for entry in each if entry[0].degree == 1]
        self.others = [entry for entry in each if entry[0].degree > 1]
        self.scale = 1.0

    def expect(self, shadows: Iterable[Shadow]) -> None:
        """One more site to come past for each of the parameters that these values come from."""
        for number in _numbers(shadows):
            self.pending[number] += 1

    def collect(self, target: Shadow, factor: Factor) -> None:
        """A factor of the gradients of what went into a site, pulled back to the parameters."""
        for number, own in target.pull(factor):
            if self.sketches is not None:
                self.sketches.setdefault(number, []).append(sketch(own))
            if self.linear:
                self._contribute(self.linear, number, [own])
            if self.keep or self.others:
                self.factors.setdefault(number, []).append(own)

    def take(self, number: int, gradients: Factor) -> None:
        """The gradients of a parameter, of all its uses together."""
        for tasks in (self.linear, self.others):
            self._contribute(tasks, number, [gradients])

    def passed(self, shadows: Iterable[Shadow]) -> None:
        """A site has been passed, into which these values went."""
        for number in _numbers(shadows):
            self.pending[number] -= 1
            if not self.pending[number] and not self.keep:
                self._reduce(number)

    def _reduce(self, number: int) -> None:
        uses = self.factors.pop(number, None)
        if uses and number in self.summing:
            gradients = whole(uses, self.budget)
            self.sums[number] = summed(uses) if gradients is None else gradients.sum(0)
            uses = uses if gradients is None else [Dense(gradients)]
        if uses:
            self._contribute(self.others, number, uses)

    def _contribute(
        self, tasks: Sequence[tuple[Additive, dict[str, Tensor], bool]], number: int, uses: list[Factor]
    ) -> None:
        name = self.names[number]
        for task, total, adds_up in tasks:
            value = task.of_parameter(name, uses)
            key = ALL if adds_up else name
            known = total.get(key)
            total[key] = value if known is None else known + value

    def close(self, tail: Shadow | None, cotangent: Tensor, scale: float) -> None:
        """Takes what was carried to the losses, after the backward.

        The gradients so far are those of `cotangent[i] losses[i]`, of size `1 / scale`.
        """
        self.scale = scale
        if tail is not None:
            self.collect(tail, Dense(torch.diag(cotangent)))
            self.passed([tail])
        for number in list(self.factors) if not self.keep else ():
            self._reduce(number)

    def sum_like(self, number: int, leaf: Tensor) -> Tensor:
        """The sum of the gradients of a parameter in its form, zero where there is none."""
        found = self.sums.get(number)
        return torch.zeros_like(leaf, requires_grad=False) if found is None else found.to(leaf.dtype)

    def results(self, losses: Tensor, dtype: torch.dtype) -> list[dict[str, Tensor]]:
        """What each task made of each parameter, with zeros for those without a gradient; of all if it adds them up."""
        found = []
        for task, total in zip(self.tasks, self.totals, strict=True):
            scale = self.scale**task.degree
            scaled = {name: value.to(dtype) * scale if scale != 1 else value.to(dtype) for name, value in total.items()}
            names = (ALL,) if task.adds_up else self.names
            if len(scaled) < len(names):
                zero = task.zero(len(losses), losses.new_zeros((), dtype=dtype))
                scaled = {name: scaled.get(name, zero) for name in names}
            found.append(scaled)
        return found

    def pairs(self, losses: Tensor, params: Sequence[Tensor]) -> dict[str, tuple[Factor, ...]]:
        """The factors kept, zeros for parameters without a gradient."""
        return {
            name: tuple(self.factors.get(number, ()))
            or (Dense(losses.new_zeros((len(losses), *param.shape), dtype=param.dtype)),)
            for number, (name, param) in enumerate(zip(self.names, params, strict=True))
        }


def _numbers(shadows: Iterable[Shadow]) -> set[int]:
    """The numbers of all parameters that the values come from."""
    return {number for shadow in shadows for number in shadow.leaves}
