"""What reducers make of per-sample gradients, added up parameter by parameter while the backward runs.

A parameter that is used once is reduced where its site is passed; of one that is used several times the factors are
kept until the last of its sites. Nothing else is kept. One ledger serves one run.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from funcghost.algebra.cost import Sketch, sketch
from funcghost.algebra.factors import Dense, Factor, Form, Outer
from funcghost.engine.shadows import Shadow
from funcghost.errors import SampleAxisError
from funcghost.ops.layout import Layout
from funcghost.ops.uses import Where
from funcghost.reducers.bases import Additive

ALL = ""
"""The name under which contributions of all parameters are added up."""


class Ledger:
    """Collects the factors of every use of every parameter, for `tasks` in the streaming run, or `keep`s them all.

    `positions`: the columns of scores that are wanted for each position.
    """

    def __init__(
        self,
        names: Sequence[str],
        tasks: Sequence[Additive] = (),
        *,
        keep: bool = False,
        sketching: bool = False,
        positions: frozenset[int] = frozenset(),
    ) -> None:
        """Starts empty."""
        self.names, self.tasks, self.keep = names, tasks, keep
        self.sketches: dict[int, list[Sketch]] | None = {} if sketching else None
        self.pending = [0] * len(names)
        self.factors: dict[int, list[Factor]] = {}
        self.totals: list[dict[str, Tensor]] = [{} for _ in tasks]
        each = [(task, total, task.adds_up) for task, total in zip(tasks, self.totals, strict=True)]
        self.linear = [entry for entry in each if entry[0].degree == 1]
        self.others = [entry for entry in each if entry[0].degree > 1]
        self.positions = positions
        self.by_position: dict[int, Tensor] = {}
        self.length: int | None = None
        self.scale = 1.0

    @property
    def wants_factors(self) -> bool:
        """Whether anything but scores by position is collected."""
        return bool(self.tasks) or self.keep

    def expect(self, indices: Iterable[int]) -> None:
        """One more site to come past for each of these parameters."""
        for index in indices:
            self.pending[index] += 1

    def collect(self, target: Shadow, factor: Factor) -> None:
        """A factor of the gradients of what went into a site, pulled back to the parameters."""
        for index, own in pulled_back(target, factor):
            self._take(index, own)

    def _take(self, index: int, factor: Factor) -> None:
        """A factor of a parameter's gradients."""
        if self.sketches is not None:
            self.sketches.setdefault(index, []).append(sketch(factor))
        if self.linear:
            self._contribute(self.linear, index, [factor])
        if self.keep or self.others:
            self.factors.setdefault(index, []).append(factor)

    def passed(self, indices: Iterable[int]) -> None:
        """The site has been passed."""
        for index in indices:
            self.pending[index] -= 1
            if not self.pending[index] and not self.keep:
                self._reduce(index)

    def _reduce(self, index: int) -> None:
        uses = self.factors.pop(index, None)
        if uses:
            self._contribute(self.others, index, uses)

    def _contribute(
        self, tasks: Sequence[tuple[Additive, dict[str, Tensor], bool]], index: int, uses: list[Factor]
    ) -> None:
        name = self.names[index]
        for task, total, adds_up in tasks:
            value = task.of_parameter(name, uses)
            key = ALL if adds_up else name
            known = total.get(key)
            total[key] = value if known is None else known + value

    def close(self, tail: Shadow | None, cotangent: Tensor, scale: float) -> dict[int, Tensor]:
        """Takes what was carried to the losses, after the backward; gives the scores by position, in units of losses.

        The gradients so far are those of `cotangent[i] losses[i]`, of size `1 / scale`.
        """
        self.scale = scale
        if tail is not None:
            for index, factor in tail.derivatives(torch.diag(cotangent).unbind(0)):
                self._take(index, factor)
            self.passed(tail.sources)
        for index in list(self.factors) if not self.keep else ():
            self._reduce(index)
        return {k: value * scale for k, value in self.by_position.items()}

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
            name: tuple(self.factors.get(index, ()))
            or (Dense(losses.new_zeros((len(losses), *param.shape), dtype=param.dtype)),)
            for index, (name, param) in enumerate(zip(self.names, params, strict=True))
        }

    def add_positions(self, column: int, value: Tensor) -> None:
        """A contribution [b, t] to a column of scores by position."""
        known = self.by_position.get(column)
        self.by_position[column] = value if known is None else known + value

    def check_positions(self, where: str, layout: Where, shape: Sequence[int], batch: int) -> None:
        """Holds the first axis after the samples of what comes out of a site to that of the others.

        Raises:
            SampleAxisError: it has another length, or there is none.
        """
        if layout == "unused":
            return
        if isinstance(layout, Layout) and layout.fold == "single":
            raise SampleAxisError(
                "per_token: with one sample the axis of the samples cannot be told from that of the positions. Make "
                "plan = fg.plan(losses, params, batch) with two samples or more, and pass plan=plan."
            )
        found: tuple[int, ...] = ()
        if isinstance(layout, Layout):
            found = tuple(layout.by_sample(torch.empty(shape, device="meta"), batch).shape)
        self.length = self.length or (found[1] if len(found) > 1 else None)
        if len(found) < 2 or found[1] != self.length:
            raise SampleAxisError(
                f"per_token: every use of a parameter must have the positions as its first axis after the samples; "
                f"{where} gives {found or tuple(shape)} with the samples in front, and other sites have {self.length} "
                "positions. Leave the parameters that are used there out of params."
            )


def pulled_back(target: Shadow, factor: Factor) -> list[tuple[int, Factor]]:
    """The factors of the parameters that a value was computed from, given one of the value itself."""
    if not target.sources:
        return []
    if target.axes is not None:
        (index,) = target.sources
        moved = permuted(factor, target.axes)
        if moved is not None:
            return [(index, moved)]
    if target.edge is None:
        (index,) = target.sources
        return [(index, factor)]
    return target.pull(factor)


def permuted(factor: Factor, axes: tuple[int, ...]) -> Factor | None:
    """The factor of a parameter from one of `parameter.permute(axes)`; None where it takes a dense one."""
    if axes == tuple(range(len(axes))):
        return factor
    back = [axes.index(i) for i in range(len(axes))]
    if isinstance(factor, Dense):
        return Dense(factor.value.permute(0, *(1 + i for i in back)))
    if isinstance(factor, Outer) and factor.form.base == factor.form.shape:
        shape = tuple(factor.form.shape[i] for i in back)
        q, m, n = (tuple(axes[i] for i in part) for part in factor.form.roles)
        if m and n and min(n) < min(m):
            return Outer(factor.cols, factor.rows, Form(shape, shape, (q, n, m)))
        return Outer(factor.rows, factor.cols, Form(shape, shape, (q, m, n)))
    return None
