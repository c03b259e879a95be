"""Funcghost and autograd on the same samples, in a column of scores for each parameter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import optree
import torch
from torch import Tensor

from funcghost.algebra.factors import Dense
from funcghost.dtypes import as_written, wide
from funcghost.engine.plans import Plan
from funcghost.engine.run import run
from funcghost.laws.factored import Along
from funcghost.laws.oracle import gradient_of
from funcghost.options import Options
from funcghost.problem import Losses, Problem
from funcghost.progress import progress
from funcghost.reducers.bases import Additive, Directional
from funcghost.reducers.by_parameter import per_param
from funcghost.reducers.dots import dot
from funcghost.reducers.quadratic import squared_norm
from funcghost.side_effects import untouched
from funcghost.transforms.steps import grad_and_reduce, reduce
from funcghost.trees import Tree

TOGETHER = 8
"""How many columns are carried at once, where tangents are carried."""

Column = Sequence[Tensor | None]
"""A direction: one tensor per parameter, None for zero."""


@dataclass(frozen=True, eq=False)
class Named:
    """What is asked for: scores in a direction of each parameter alone, and what the caller's reducers ask, by name.

    `others` are the directions of those reducers that have some, `tasks` the reducers that need gradients as a whole.
    """

    along: list[Tensor]
    others: list[tuple[str, Column]]
    tasks: list[tuple[str, Additive]]

    @property
    def columns(self) -> list[Column]:
        """All directions."""
        alone = [[value if i == k else None for i in range(len(self.along))] for k, value in enumerate(self.along)]
        return [*alone, *(column for _, column in self.others)]


@dataclass(frozen=True, eq=False)
class Factored:
    """What per-sample gradients say as a whole: squared norms and scores, [s, k] by parameter and for all of them.

    `reduced` are the numbers of each task, flat.
    """

    norms: Tensor
    along: Tensor
    reduced: list[Tensor]


@dataclass(frozen=True, eq=False)
class Numbers:
    """What is compared: the scores [s, k], the gradient of the sum of the losses, and the losses [b].

    `factored` is None where such gradients are not to be had.
    """

    scores: Tensor
    gradients: list[Tensor] | None
    losses: Tensor
    factored: Factored | None


@dataclass(frozen=True, eq=False)
class Truth(Numbers):
    """What autograd says, with a backward per sample.

    `sizes` [s, k]: the sums of the sizes of the terms of each score; `task_sizes` the same for each task, whose numbers
    are NaN where samples that are not compared enter. Per parameter `largest`, the sum over samples of the largest
    entry, and whether it is `used`.
    """

    gradients: list[Tensor]
    factored: Factored
    sizes: Tensor
    task_sizes: list[Tensor]
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
        along, across = (wide(part) / _norm(part) for part in (gradient, noise))
        found.append((torch.where(along.isfinite(), along, 0) + across).to(gradient.dtype))
    return found


def by_autograd(problem: Problem, chosen: list[int], named: Named, what: str = "backward per sample") -> Truth:
    """The truth."""
    columns, gradients = named.columns, list[list[Tensor]]()
    scores, sizes, norms, largest = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()
    with untouched(problem.devices()):
        leaves = problem.leaves()
        losses = problem.evaluate(leaves)[0]
        summed: Sequence[Tensor | None] = [None] * len(leaves)
        if losses.requires_grad:
            with as_written(losses.device):
                summed = torch.autograd.grad(losses.sum(), leaves, retain_graph=True, allow_unused=True)
        for sample in progress(chosen, f"funcghost check: {what}", "samples"):
            gradient = gradient_of(losses[sample], leaves)
            largest.append(doubles([largest_entry(leaf) for leaf in gradient]))
            scores.append(doubles([_score(gradient, column, of_sizes=False) for column in columns]))
            sizes.append(doubles([_score(gradient, column, of_sizes=True) for column in columns]))
            norms.append(doubles([_square(leaf) for leaf in gradient]))
            if named.tasks:
                gradients.append(gradient)
    total = [
        torch.zeros_like(leaf, requires_grad=False) if g is None else g.to_dense()
        for g, leaf in zip(summed, leaves, strict=True)
    ]
    used = [g is not None for g in summed]
    count, names = len(leaves), problem.params.names
    along = _with_total(torch.stack(scores), count)
    reduced = [
        tuple(_by_definition(task, names, chosen, gradients, len(losses), sizes=sizes) for sizes in (False, True))
        for _, task in named.tasks
    ]
    return Truth(
        along,
        total,
        losses.detach(),
        Factored(_with_total(torch.stack(norms), count), along[:, : count + 1], [numbers for numbers, _ in reduced]),
        _with_total(torch.stack(sizes), count),
        [size for _, size in reduced],
        torch.stack(largest).sum(0).tolist(),
        used,
    )


@dataclass(frozen=True, eq=False)
class CallersStep:
    """The step as a caller gets it, along a plan if there is one, with the caller's reducers that have directions."""

    problem: Problem
    plan: Plan | None
    options: Options
    reducers: Sequence[Directional]

    def scores(self, along: list[Tensor]) -> Numbers:
        """One step by the public function, with scores [b] in the whole direction."""
        problem, options = self.problem, self.options
        rebuild = problem.params.rebuild
        params, asked = rebuild(problem.params.leaves), (dot(rebuild(along)), list(self.reducers))
        with untouched(problem.devices()):
            if options.route == "forward":
                scores = reduce(_bare(problem), options=options, plan=self.plan)(params, problem.batch, asked)[0]
                return Numbers(scores, None, problem.evaluate(problem.leaves())[0].detach(), None)
            made = grad_and_reduce(
                problem.losses, reduction="sum", has_aux=problem.has_aux, options=options, plan=self.plan
            )
            out = made(params, problem.batch, asked)
        return Numbers(out.reduced[0], [leaf.to_dense() for leaf in optree.tree_leaves(out.grads)], out.losses, None)

    def factored(self, chosen: list[int], named: Named) -> Factored:
        """What funcghost says of per-sample gradients as a whole.

        The law of factors is not checked on the way: here is what shows where they are wrong.

        Raises:
            GhostError: there are none to be had.
        """
        problem, unverified = self.problem, replace(self.options, verify="never")
        names = problem.params.names
        along = Along(dict(zip(names, named.along, strict=True)))
        asked = (per_param(squared_norm()), per_param(along), [task for _, task in named.tasks])
        with untouched(problem.devices()):
            score = reduce(_bare(problem), options=unverified, plan=self.plan)
            found, scores, reduced = score(problem.params.rebuild(problem.params.leaves), problem.batch, asked)

        def of_samples(parts: Mapping[str, Tensor]) -> Tensor:
            values = torch.stack([parts[name][chosen].double().cpu() for name in names], 1)
            return _with_total(values, len(names))

        return Factored(of_samples(found), of_samples(scores), [_flat(numbers) for numbers in reduced])


def by_funcghost(problem: Problem, plan: Plan, chosen: list[int], named: Named, step: CallersStep) -> Numbers:
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
    for group in progress(groups, "funcghost check: scores", "sums"):
        with untouched(problem.devices()):
            found = run(problem, plan, [columns[k] for k in group], reduction=None).scores
        scores[:, group] = found[chosen].double().cpu()
    taken = step.scores(named.along)
    assert taken.scores.dim() == 1
    whole = taken.scores[chosen].double().cpu()
    return replace(taken, scores=_with_total(scores, count, whole))


def _by_definition(
    task: Additive,
    names: Sequence[str],
    chosen: list[int],
    gradients: Sequence[Sequence[Tensor]],
    batch: int,
    *,
    sizes: bool,
) -> Tensor:
    """The numbers of a task from the gradients themselves, or from the sizes of their entries, flat.

    The gradients of samples that are not compared are NaN, and so is all that they enter.
    """
    parts = {}
    for k, name in enumerate(names):
        own = torch.stack([gradient[k] for gradient in gradients])
        whole = own.new_full((batch, *own.shape[1:]), torch.nan)
        whole[chosen] = own.abs() if sizes else own
        parts[name] = task.of_parameter(name, [Dense(whole)])
    return _flat(task.result(parts))


def _flat(numbers: Tree) -> Tensor:
    leaves = [leaf.detach().double().cpu().flatten() for leaf in optree.tree_leaves(numbers)]
    return torch.cat(leaves) if leaves else doubles([])


def _bare(problem: Problem) -> Losses:
    """The losses without what else they return."""
    losses = problem.losses
    return (lambda params, batch: losses(params, batch)[0]) if problem.has_aux else losses


def _with_total(values: Tensor, count: int, total: Tensor | None = None) -> Tensor:
    """Columns [s, k] with that of all parameters after those of each."""
    summed = values[:, :count].sum(1) if total is None else total
    return torch.cat([values[:, :count], summed.unsqueeze(1), values[:, count:]], 1)


def _score(gradient: Sequence[Tensor], column: Column, *, of_sizes: bool) -> float:
    """`<gradient, column>`, or the sum of the sizes of its terms."""
    terms = (wide(g) * wide(v) for g, v in zip(gradient, column, strict=True) if v is not None)
    return sum(float((term.abs() if of_sizes else term).sum(dtype=torch.float64)) for term in terms)


def doubles(values: Sequence[float]) -> Tensor:
    """In float64, on the host."""
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _square(value: Tensor) -> float:
    """The squared norm; infinite where that is no number."""
    norm = float(torch.linalg.vector_norm(wide(value), dtype=torch.float64))
    return norm * norm


def _norm(value: Tensor) -> float:
    return max(float(torch.linalg.vector_norm(wide(value), dtype=torch.float64)), 1e-30)


def largest_entry(value: Tensor) -> float:
    """The size of the largest entry."""
    return float(value.abs().max()) if value.numel() else 0.0
