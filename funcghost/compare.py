"""Funcghost and autograd on the same samples, in a column of scores for each parameter."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import optree
import torch
from torch import Tensor

from funcghost.mixing import distances
from funcghost.oracle import gradient_of
from funcghost.planning import Options
from funcghost.plans import Plan
from funcghost.progress import progress
from funcghost.reducers import dot
from funcghost.report import Row
from funcghost.run import Problem, run
from funcghost.state import untouched
from funcghost.transforms import grad_and_reduce, reduce
from funcghost.trees import Tree
from funcghost.verify import shaken

TOGETHER = 8
"""How many columns are carried at once, where tangents are carried."""
NOT_FINITE = "gradient is not finite"
NOT_COMPARED = "not compared"

Column = Sequence[Tensor | None]
"""A direction: one tensor per parameter, None for zero."""


@dataclass(frozen=True, eq=False)
class Named:
    """The directions to score in: one of each parameter alone, and those of the caller's reducers with their names."""

    along: list[Tensor]
    others: list[tuple[str, Column]]

    @property
    def columns(self) -> list[Column]:
        """All of them."""
        alone = [[value if i == k else None for i in range(len(self.along))] for k, value in enumerate(self.along)]
        return [*alone, *(column for _, column in self.others)]


@dataclass(frozen=True, eq=False)
class Numbers:
    """What is compared: the scores [s, k], the gradient of the sum of the losses, and the losses [b]."""

    scores: Tensor
    gradients: list[Tensor] | None
    losses: Tensor


@dataclass(frozen=True, eq=False)
class Truth(Numbers):
    """What autograd says, with a backward per sample.

    `sizes` [s, k]: the sums of the sizes of the terms of each score. Per parameter `largest`, the sum over samples of
    the largest entry, and whether it is `used`.
    """

    gradients: list[Tensor]
    sizes: Tensor
    largest: list[float]
    used: list[bool]


def direction(problem: Problem, chosen: list[int], seed: int) -> list[Tensor]:
    """For each parameter along its gradients and across, so that every sample has a share in every score."""
    with untouched(problem.devices()):
        leaves = problem.leaves()
        losses = problem.evaluate(leaves)[0]
        generator = torch.Generator("cpu").manual_seed(seed)
        weights = torch.rand(len(chosen), generator=generator, device="cpu") + 0.5
        weights *= torch.randint(0, 2, weights.shape, generator=generator, device="cpu") * 2 - 1
        gradients = gradient_of((losses[chosen] * weights.to(losses)).sum(), leaves)
    found = []
    for number, gradient in enumerate(gradients):
        generator = torch.Generator(gradient.device).manual_seed(seed + number)
        noise = torch.randn(gradient.shape, generator=generator, device=gradient.device, dtype=torch.float32)
        along, across = (_wide(part) / _norm(part) for part in (gradient, noise))
        found.append((torch.where(along.isfinite(), along, 0) + across).to(gradient.dtype))
    return found


def by_autograd(problem: Problem, chosen: list[int], named: Named, what: str = "backward per sample") -> Truth:
    """The truth."""
    columns, scores, sizes, largest = named.columns, [], [], []
    with untouched(problem.devices()):
        leaves = problem.leaves()
        losses = problem.evaluate(leaves)[0]
        summed: Sequence[Tensor | None] = [None] * len(leaves)
        if losses.requires_grad:
            summed = torch.autograd.grad(losses.sum(), leaves, retain_graph=True, allow_unused=True)
        for sample in progress(chosen, f"funcghost check: {what}"):
            gradient = gradient_of(losses[sample], leaves)
            largest.append(_column([_largest(leaf) for leaf in gradient]))
            scores.append(_column([_score(gradient, column, of_sizes=False) for column in columns]))
            sizes.append(_column([_score(gradient, column, of_sizes=True) for column in columns]))
    total = [
        torch.zeros_like(leaf, requires_grad=False) if g is None else g.to_dense()
        for g, leaf in zip(summed, leaves, strict=True)
    ]
    used = [g is not None for g in summed]
    return Truth(
        _with_total(torch.stack(scores), len(leaves)),
        total,
        losses.detach(),
        _with_total(torch.stack(sizes), len(leaves)),
        torch.stack(largest).sum(0).tolist(),
        used,
    )


def by_funcghost(
    problem: Problem, plan: Plan, chosen: list[int], named: Named, options: Options, reducers: Tree
) -> Numbers:
    """What the engine says along the plan, and the whole step as a caller gets it.

    Raises:
        GhostError: the plan does not fit.
    """
    columns, count = named.columns, len(named.along)
    numbers = {name: k for k, name in enumerate(problem.params.names)}
    carried = {numbers[name] for site in plan.sites if site.action == "carry" for name in site.parameters}
    tapped = [k for k in range(count) if k not in carried]
    others = [*sorted(carried), *range(count, len(columns))]
    groups = [tapped] * bool(tapped) + [others[i : i + TOGETHER] for i in range(0, len(others), TOGETHER)]
    scores = torch.zeros(len(chosen), len(columns), dtype=torch.float64, device="cpu")
    for group in progress(groups, "funcghost check: scores"):
        with untouched(problem.devices()):
            found = run(problem, plan, [columns[k] for k in group], reduction=None).scores
        scores[:, group] = found[chosen].double().cpu()
    step = _step(problem, plan, named.along, options, reducers)
    assert step.scores.dim() == 1
    whole = step.scores[chosen].double().cpu()
    return replace(step, scores=_with_total(scores, count, whole))


def _step(problem: Problem, plan: Plan, along: list[Tensor], options: Options, reducers: Tree) -> Numbers:
    """One step by the public function, with scores [b] in the whole direction."""
    rebuild, losses = problem.params.rebuild, problem.losses
    params, asked = rebuild(problem.params.leaves), (dot(rebuild(along)), reducers)
    with untouched(problem.devices()):
        if options.route == "forward":
            bare = (lambda params, batch: losses(params, batch)[0]) if problem.has_aux else losses
            scores = reduce(bare, options=options, plan=plan)(params, problem.batch, asked)[0]
            return Numbers(scores, None, problem.evaluate(problem.leaves())[0].detach())
        step = grad_and_reduce(losses, reduction="sum", has_aux=problem.has_aux, options=options, plan=plan)
        out = step(params, problem.batch, asked)
    return Numbers(out.reduced[0], [leaf.to_dense() for leaf in optree.tree_leaves(out.grads)], out.losses)


def _with_total(values: Tensor, count: int, total: Tensor | None = None) -> Tensor:
    """Columns [s, k] with that of all parameters after those of each."""
    summed = values[:, :count].sum(1) if total is None else total
    return torch.cat([values[:, :count], summed.unsqueeze(1), values[:, count:]], 1)


# -- verdicts ----------------------------------------------------------------------------------


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
        off, scales = (found.scores - truth.scores).abs(), self._score_scales(truth)
        off_gradients, gradient_scales = self._gradient_errors(truth, found)
        spread, gradient_spread = torch.zeros_like(off), [0.0] * len(off_gradients)
        if bool((off > self.tolerance * scales).any()) or any(
            error > self.tolerance * scale for error, scale in zip(off_gradients, gradient_scales, strict=True)
        ):
            spread, gradient_spread = self._rounding(truth)
        known = truth.scores.isfinite()
        agrees = ((off <= self.tolerance * scales) | (off <= spread) | ~known).all(0).tolist()
        for k, row in enumerate(rows):
            row["dots"] = _ratio(off[:, k][known[:, k]], scales[:, k][known[:, k]])
            notes = [] if agrees[k] else ["dots"]
            finite = bool(known[:, k].all())
            if k < len(off_gradients):
                finite = finite and bool(truth.gradients[k].isfinite().all())
                row["grads"] = _ratio(_column([off_gradients[k]]), _column([gradient_scales[k]]))
                within = off_gradients[k] <= max(self.tolerance * gradient_scales[k], gradient_spread[k])
                notes += [] if within or not bool(truth.gradients[k].isfinite().all()) else ["grads"]
            if not finite:
                notes.append(NOT_FINITE)
            row["ok"] = not notes
            if not notes and max(row["dots"] or 0.0, row["grads"] or 0.0) > self.tolerance:
                notes.append("rounding")
            if not notes and k < len(truth.used) and not truth.largest[k]:
                notes.append("zero gradient" if truth.used[k] else "unused")
            row["note"] = ", ".join(notes)

    def same_losses(self, truth: Truth, found: Numbers) -> bool:
        """Whether the step gives the losses that the function gives."""
        size = truth.losses.abs().double().nan_to_num(0, 0, 0)
        return bool((distances(truth.losses, found.losses) <= self.tolerance * (size + size.max())).all())

    def _score_scales(self, truth: Truth) -> Tensor:
        """The size of the terms of each score; terms that cancel within an op are bounded by those of other samples."""
        sizes = truth.sizes.nan_to_num(0, 0, 0)
        scales: Tensor = sizes + sizes.amax(0) + self.small * float(sizes[:, : len(truth.used)].max())
        return scales

    def _gradient_errors(self, truth: Truth, found: Numbers) -> tuple[list[float], list[float]]:
        """The largest error in the training gradient of each parameter, and what it is relative to."""
        if found.gradients is None:
            return [], []
        sizes = [_largest(gradient) + size for gradient, size in zip(truth.gradients, truth.largest, strict=True)]
        floor = self.small * max((size for size in sizes if size < float("inf")), default=0.0)
        errors = [_largest(a - b) for a, b in zip(found.gradients, truth.gradients, strict=True)]
        return errors, [size + floor for size in sizes]

    def _rounding(self, truth: Truth) -> tuple[Tensor, list[float]]:
        """What a change of the parameters by rounding does to scores and gradients, times 16."""
        near = [
            by_autograd(nearby(self.problem, self.eps, seed), self.chosen, self.named, "rounding") for seed in (1, 2)
        ]
        moved = torch.stack([(other.scores - truth.scores).abs() for other in near]).amax(0)
        pairs = zip(truth.gradients, *(other.gradients for other in near), strict=True)
        return 16 * moved, [16 * max(_largest(a - b), _largest(a - c)) for a, b, c in pairs]


def nearby(problem: Problem, eps: float, seed: int) -> Problem:
    """The same problem with every parameter off by a little rounding."""
    size = eps * (64 if eps < 1e-5 else 1)
    leaves = enumerate(problem.params.leaves)
    return replace(problem, point=tuple(shaken(leaf, size, 1000 * seed + number) for number, leaf in leaves))


def blank_rows(problem: Problem, plan: Plan | None, named: Named) -> list[Row]:
    """The rows of the report, before anything is compared."""
    nothing = {"uses": None, "layout": "", "way": "", "grads": None, "dots": None, "ok": False, "note": NOT_COMPARED}
    leaves = zip(problem.params.names, problem.params.leaves, strict=True)
    rows: list[Row] = [
        {"kind": "parameter", "name": name, "shape": list(leaf.shape), **nothing, **_uses(name, plan)}
        for name, leaf in leaves
    ]
    names = [("all", "all parameters"), *(("reducer", name) for name, _ in named.others)]
    return rows + [{"kind": kind, "name": name, "shape": None, **nothing} for kind, name in names]


def _uses(name: str, plan: Plan | None) -> dict[str, Any]:
    """What the plan does with a parameter."""
    if plan is None:
        return {}
    sites = [site for site in plan.sites if name in site.parameters and site.action != "skip"]
    layouts = ["carried" if s.action == "carry" else str(x) for s in sites for x in s.layouts if x != "constant"]
    ways = [site.way or "?" for site in sites]
    return {"uses": len(sites), "layout": ", ".join(dict.fromkeys(layouts)), "way": ", ".join(dict.fromkeys(ways))}


def _score(gradient: Sequence[Tensor], column: Column, *, of_sizes: bool) -> float:
    """`<gradient, column>`, or the sum of the sizes of its terms."""
    terms = (_wide(g) * _wide(v) for g, v in zip(gradient, column, strict=True) if v is not None)
    return sum(float((term.abs() if of_sizes else term).sum(dtype=torch.float64)) for term in terms)


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _wide(value: Tensor) -> Tensor:
    """In float32 at least."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _norm(value: Tensor) -> float:
    return max(float(torch.linalg.vector_norm(_wide(value), dtype=torch.float64)), 1e-30)


def _largest(value: Tensor) -> float:
    """The size of the largest entry."""
    return float(value.abs().max()) if value.numel() else 0.0


def _ratio(errors: Tensor, scales: Tensor) -> float | None:
    """The largest relative error; None where that is not a number, or there are none."""
    if not len(errors):
        return None
    found = float(torch.where(errors == 0, 0.0, errors / scales).max())
    return found if found < float("inf") else None
