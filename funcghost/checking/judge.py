"""Verdicts: what funcghost says, held to what autograd says, with a tolerance and an eye for rounding."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funcghost.checking.compare import Named, Numbers, Truth, by_autograd, doubles, largest_entry
from funcghost.checking.mixing import distances
from funcghost.checking.report import Row
from funcghost.dtypes import score_dtype
from funcghost.engine.plans import Plan
from funcghost.laws.draws import shaken
from funcghost.problem import Problem

NOT_FINITE = "gradient is not finite"
NOT_COMPARED = "not compared"
OUT_OF_RANGE = "norms out of range"


@dataclass(frozen=True, eq=False)
class Measured:
    """Errors of a column of numbers and what they are relative to; `spread` is what rounding does to the numbers.

    What is not `known` is taken for right. `held`: which numbers their dtype has the range for.
    """

    off: Tensor
    scale: Tensor
    known: Tensor
    spread: Tensor | float
    tolerance: float
    held: Tensor | bool = True

    @property
    def agrees(self) -> bool:
        """Whether every error is as small as it should be, or as rounding is."""
        return not bool(self._wrong().any())

    @property
    def out_of_range(self) -> bool:
        """Whether what does not agree are numbers alone that their dtype has no range for."""
        wrong = self._wrong()
        return bool(wrong.any()) and not bool((wrong & self.held).any())

    def _wrong(self) -> Tensor:
        return ~((self.off <= self.tolerance * self.scale) | (self.off <= self.spread) | ~self.known)

    @property
    def ratio(self) -> float | None:
        """The largest relative error; None where that is not a number, or there are none."""
        errors, scales = self.off[self.known], self.scale[self.known]
        if not len(errors):
            return None
        found = float(torch.where(errors == 0, 0.0, errors / scales).max())
        return found if found < float("inf") else None


class Judge:
    """Holds numbers to the truth, with a tolerance relative to the size of terms, and another for rounding.

    Where an error is too large, `nearby` (the truth at parameters off by rounding, twice) says whether that is
    rounding: a sum whose terms cancel inside an op is nothing else.
    """

    def __init__(self, problem: Problem, chosen: list[int], named: Named, eps: float, tolerance: float) -> None:
        self.problem, self.chosen, self.named = problem, chosen, named
        self.eps, self.tolerance = eps, tolerance
        self.small = eps ** (1 / 3)  # times the tolerance: the rounding of the largest terms of all parameters

    def judge(self, rows: list[Row], truth: Truth, found: Numbers) -> None:
        """Fills in the errors and verdicts of the rows."""
        measured = self._measured(truth, found, ())
        if not all(column.agrees for of_row in measured for column in of_row.values()):
            near = list(map(self._near, (1, 2)))
            measured = self._measured(truth, found, near)
        for k, (row, columns) in enumerate(zip(rows, measured, strict=True)):
            known = any(bool(column.known.any()) or not len(column.known) for column in columns.values())
            if not known and "dots" not in columns:
                continue  # what a reducer makes of whole gradients is not known, or there are none
            for name, column in columns.items():
                if name in row:
                    row[name] = column.ratio
            notes = [
                OUT_OF_RANGE if column.out_of_range else name for name, column in columns.items() if not column.agrees
            ]
            if not all(bool(columns[name].known.all()) for name in ("dots", "grads") if name in columns):
                notes.append(NOT_FINITE)
            row["ok"] = not notes
            if not notes and any((column.ratio or 0.0) > column.tolerance for column in columns.values()):
                notes.append("rounding")
            if not notes and k < len(truth.used) and not truth.largest[k]:
                notes.append("zero gradient" if truth.used[k] else "unused")
            row["note"] = ", ".join(notes)

    def _near(self, seed: int) -> Truth:
        """What autograd says where all differs by rounding."""
        with self.problem.at(nearby(self.problem.params.leaves, self.eps, seed)) as moved:
            return by_autograd(moved, self.chosen, self.named, "rounding")

    def same_losses(self, truth: Truth, found: Numbers) -> bool:
        """Whether the step gives the losses that the function gives."""
        size = truth.losses.abs().double().nan_to_num(0, 0, 0)
        return bool((distances(truth.losses, found.losses) <= self.tolerance * (size + size.max())).all())

    def _measured(self, truth: Truth, found: Numbers, near: Sequence[Truth]) -> list[dict[str, Measured]]:
        """What was measured for each row, by the name of the column; "factors" has none of its own."""
        count, rest = len(truth.used), len(self.named.others)
        scales, sizes = self._score_scales(truth), truth.factored.norms.nan_to_num(0, 0, 0)
        floor = self.small * float(sizes[:, :count].max())
        rows: list[dict[str, Measured]] = [{} for _ in range(count + 1 + rest + len(self.named.tasks))]
        for k, row in enumerate(rows[: count + 1 + rest]):
            others = [other.scores[:, k] for other in near]
            row["dots"] = _measured(found.scores[:, k], truth.scores[:, k], scales[:, k], others, self.tolerance)
        for row, measured in zip(rows, self._gradients(truth, found, near), strict=False):
            row["grads"] = measured
        if found.factored is None:
            return rows
        ours, theirs, tolerance = found.factored, truth.factored, self.tolerance
        kind = torch.finfo(score_dtype(self.problem.params))
        for k, row in enumerate(rows[: count + 1]):
            scale, others = sizes[:, k] + sizes[:, k].max() + floor, [other.factored.norms[:, k] for other in near]
            row["norms"] = _measured(ours.norms[:, k], theirs.norms[:, k], scale, others, tolerance, kind)
            others = [other.factored.along[:, k] for other in near]
            row["factors"] = _measured(ours.along[:, k], theirs.along[:, k], scales[:, k], others, tolerance)
        for k, row in enumerate(rows[count + 1 + rest :]):
            wanted = theirs.reduced[k]
            terms = torch.maximum(wanted.abs(), truth.task_sizes[k].abs()).nan_to_num(0, 0, 0)
            scale = terms + (terms.max() if len(terms) else 0)
            others = [other.factored.reduced[k] for other in near]
            row["norms"] = _measured(ours.reduced[k], wanted, scale, others, tolerance, kind)
        return rows

    def _score_scales(self, truth: Truth) -> Tensor:
        """The size of the terms of each score; terms that cancel within an op are bounded by those of other samples."""
        sizes = truth.sizes.nan_to_num(0, 0, 0)
        scales: Tensor = sizes + sizes.amax(0) + self.small * float(sizes[:, : len(truth.used)].max())
        return scales

    def _gradients(self, truth: Truth, found: Numbers, near: Sequence[Truth]) -> Iterator[Measured]:
        """The largest error in the training gradient of each parameter."""
        if found.gradients is None:
            return
        sizes = [largest_entry(g) + size for g, size in zip(truth.gradients, truth.largest, strict=True)]
        floor = self.small * max((size for size in sizes if size < float("inf")), default=0.0)
        for k, (own, wanted) in enumerate(zip(found.gradients, truth.gradients, strict=True)):
            spread = 16 * max((largest_entry(other.gradients[k] - wanted) for other in near), default=0.0)
            known = torch.tensor([bool(wanted.isfinite().all())], device="cpu")
            yield Measured(
                doubles([largest_entry(own - wanted)]), doubles([sizes[k] + floor]), known, spread, self.tolerance
            )


def _measured(
    found: Tensor,
    wanted: Tensor,
    scale: Tensor,
    near: Sequence[Tensor],
    tolerance: float,
    kind: torch.finfo | None = None,
) -> Measured:
    """Of `kind` are numbers that are squares of what autograd gives: its range may be too narrow for them."""
    spread = 16 * torch.stack([(other - wanted).abs() for other in near]).amax(0) if near else 0.0
    held = kind is None or (wanted.abs() <= kind.max) & (found.abs().maximum(wanted.abs()) >= kind.tiny / kind.eps)
    return Measured((found - wanted).abs(), scale, wanted.isfinite(), spread, tolerance, held)


def nearby(leaves: Sequence[Tensor], eps: float, seed: int) -> list[Tensor]:
    """Parameters, every one off by a little rounding."""
    size = eps * (64 if eps < 1e-5 else 1)
    return [shaken(leaf, size, 1000 * seed + number) for number, leaf in enumerate(leaves)]


def blank_rows(problem: Problem, plan: Plan | None, named: Named) -> list[Row]:
    """The rows of the report, before anything is compared."""
    nothing = {
        "uses": None,
        "layout": "",
        "way": "",
        "grads": None,
        "dots": None,
        "norms": None,
        "ok": False,
        "note": NOT_COMPARED,
    }
    leaves = zip(problem.params.names, problem.params.leaves, strict=True)
    rows: list[Row] = [
        {"kind": "parameter", "name": name, "shape": list(leaf.shape), **nothing, **_uses(name, plan)}
        for name, leaf in leaves
    ]
    names = [("all", "all parameters"), *(("reducer", name) for name, _ in [*named.others, *named.tasks])]
    return rows + [{"kind": kind, "name": name, "shape": None, **nothing} for kind, name in names]


def _uses(name: str, plan: Plan | None) -> dict[str, Any]:
    """What the plan does with a parameter."""
    if plan is None:
        return {}
    sites = [site for site in plan.sites if name in site.parameters and site.action != "skip"]
    layouts = ["carried" if s.action == "carry" else str(x) for s in sites for x in s.layouts if x != "constant"]
    ways = [site.way or "?" for site in sites]
    return {"uses": len(sites), "layout": ", ".join(dict.fromkeys(layouts)), "way": ", ".join(dict.fromkeys(ways))}
