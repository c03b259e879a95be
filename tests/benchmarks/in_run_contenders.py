"""What `bench_in_run.py` compares: ways to a training gradient and scores, and the FLOPs they cannot go below."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import funcghost as fg
from funcghost.attribution import in_run
from funcghost.training import updates
from tests.benchmarks.bench_dot import Case, Route, by_vmap, count_flops, make_plan, training_gradient
from tests.benchmarks.models import Params

PLAIN, CONCATENATED = "plain", "plain, validation concatenated"
STEPPED, STEPPED_BOTH = f"{PLAIN}, with AdamW", f"{CONCATENATED}, with AdamW"
COMPILED, COMPILED_BOTH = (f"compiled: {name}" for name in (PLAIN, CONCATENATED))
LOOKED_UP = "positions.weight"
RANKS = (16, 32, 64)


@dataclass(frozen=True)
class InRun:
    """A training batch and a validation batch of one model; `tokens` rows of each go through every matrix."""

    train: Case
    validation: Case
    both: Case
    tokens: int
    validation_tokens: int

    @classmethod
    def of(cls, case: Case, validation: Tensor) -> "InRun":
        rows = 1 if case.batch.is_floating_point() else case.batch.shape[1]
        both = torch.cat([case.batch, validation])
        return cls(
            case,
            replace(case, batch=validation),
            replace(case, batch=both),
            rows * len(case.batch),
            rows * len(validation),
        )

    @property
    def matrices(self) -> list[str]:
        """The parameters that tokens are multiplied with, each once."""
        return [name for name, leaf in self.train.params.items() if leaf.dim() == 2 and name != LOOKED_UP]


@dataclass(frozen=True)
class Contender:
    """A way to do it: its time is compared with that of `base`, its FLOPs with `floor` (None where none is known).

    `held` are the tensors that it needs beside the parameters and the batch.
    """

    route: Route
    base: str = PLAIN
    floor: int | None = None
    held: tuple[Tensor, ...] = ()


def low_rank_flops(problem: InRun, rank: int, tokens: int) -> int:
    """r (d + p) products per token and matrix, or d p where that is less."""
    shapes = (problem.train.params[name].shape for name in problem.matrices)
    return sum(2 * tokens * min(rank * (p + d), p * d) for p, d in shapes)


def dense_flops(problem: InRun, tokens: int) -> int:
    return sum(2 * tokens * problem.train.params[name].numel() for name in problem.matrices)


def tensors_of(tree: Any) -> tuple[Tensor, ...]:
    return tuple(leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


def validation_gradient(problem: InRun) -> Params:
    return dict(zip(problem.train.params, training_gradient(problem.validation), strict=True))


def cached(problem: InRun, plan: fg.Plan) -> dict[str, Contender]:
    """Along directions that are there already."""
    case = problem.train
    step, score = fg.grad_and_reduce(case.losses, plan=plan), fg.reduce(case.losses, plan=plan)
    plain, products = count_flops(lambda: training_gradient(case)), dense_flops(problem, problem.tokens)

    def along(function: Callable[..., Any], direction: Any, floor: int) -> Contender:
        reducer = fg.dot(direction)
        return Contender(lambda: function(case.params, case.batch, reducer), PLAIN, floor, tensors_of(direction))

    small = {rank: fg.compress(case.direction, rank=rank) for rank in RANKS}
    found = {"exact": along(step, case.direction, plain + products)}
    for rank, direction in small.items():
        found[f"rank {rank}"] = along(step, direction, plain + low_rank_flops(problem, rank, problem.tokens))
    found["scoring only, dense"] = along(score, case.direction, plain)
    floor = plain - products + low_rank_flops(problem, 32, problem.tokens)
    found["scoring only, rank 32"] = along(score, small[32], floor)
    for count in (2, 4):
        stack = fg.stack([{k: torch.randn_like(v) for k, v in case.direction.items()} for _ in range(count)])
        found[f"{count} directions"] = along(step, stack, plain + count * products)
    return found


def fresh(problem: InRun, plan: fg.Plan) -> dict[str, Contender]:
    """With a validation pass in every step; their time is compared with a plain step on both batches."""
    case, other = problem.train, problem.validation
    step, pairs = fg.grad_and_reduce(case.losses, plan=plan), fg.pairs(case.losses, plan=plan)
    joint = fg.grad_and_reduce(case.losses, plan=plan)
    whole = count_flops(lambda: training_gradient(problem.both))
    products, own = dense_flops(problem, problem.tokens), dense_flops(problem, problem.validation_tokens)
    low = low_rank_flops(problem, 32, problem.tokens)

    def compressed() -> Any:
        return fg.compress(validation_gradient(problem), rank=32)

    def along(direction: Callable[[], Any]) -> Route:
        return lambda: step(case.params, case.batch, fg.dot(direction()))

    def across() -> Any:
        return joint(case.params, problem.both.batch, fg.cross(len(other.batch))).reduced

    start = compressed()

    def tracked() -> Any:
        return fg.track(pairs(case.params, other.batch), start)

    followed = 2 * low_rank_flops(problem, 32, problem.validation_tokens)
    of_pairs = min(own + products, low_rank_flops(problem, problem.validation_tokens, problem.tokens))
    return {
        "fresh, exact": Contender(along(lambda: validation_gradient(problem)), CONCATENATED, whole + products),
        "fresh, rank 32": Contender(along(compressed), CONCATENATED, whole + low),
        "fresh, rank 32 tracked": Contender(along(tracked), CONCATENATED, whole - own + followed + low),
        "fresh, pairs": Contender(along(lambda: pairs(case.params, other.batch)), CONCATENATED, whole - own + of_pairs),
        "fresh, cross": Contender(across, CONCATENATED),
        "refresh of rank 32": Contender(compressed, CONCATENATED, whole - count_flops(lambda: training_gradient(case))),
    }


def others(problem: InRun) -> dict[str, Contender]:
    """Without funcghost: per-sample gradients by vmap, and scores alone in forward mode."""
    case = problem.train

    def forward() -> Tensor:
        # Fused attention on the CPU knows no forward derivative.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            scores: Tensor = torch.func.jvp(lambda p: case.losses(p, case.batch), (case.params,), (case.direction,))[1]
        return scores

    return {"vmap(grad)": Contender(lambda: by_vmap(case)), "torch.func.jvp, scores only": Contender(forward)}


def compiled(problem: InRun, plan: fg.Plan) -> dict[str, Contender]:
    """Each compiled as a whole by `torch.compile`, against plain steps whose losses are compiled."""
    case = problem.train
    losses = torch.compile(case.losses, fullgraph=True)
    step = torch.compile(fg.grad_and_reduce(case.losses, plan=plan), fullgraph=True)
    joint = torch.compile(fg.grad_and_reduce(case.losses, plan=plan), fullgraph=True)
    plain, both, across = replace(case, losses=losses), problem.both, fg.cross(len(problem.validation.batch))
    exact, small = fg.dot(case.direction), fg.dot(fg.compress(case.direction, rank=32))
    return {
        COMPILED: Contender(lambda: training_gradient(plain), COMPILED),
        "compiled: exact": Contender(lambda: step(case.params, case.batch, exact), COMPILED),
        "compiled: rank 32": Contender(lambda: step(case.params, case.batch, small), COMPILED),
        COMPILED_BOTH: Contender(lambda: training_gradient(replace(both, losses=losses)), COMPILED_BOTH),
        "compiled: fresh, cross": Contender(lambda: joint(case.params, both.batch, across), COMPILED_BOTH),
    }


def account(problem: InRun, plan: fg.Plan) -> dict[str, Contender]:
    """Steps of AdamW that account for the validation loss, with V(w) kept from the step before.

    Beside one on as many validation as training samples, and one along tracked directions of rank 32 on the validation
    batch of this benchmark. Their times are those of the whole step, parameters and moments renewed; that of a plain
    step is its gradient and `torch.optim.AdamW`.
    """
    case, other = problem.train, problem.validation
    params = {name: leaf.detach().clone().requires_grad_() for name, leaf in case.params.items()}
    optimizer = torch.optim.AdamW(params.values(), lr=1e-4)

    def stepped(batch: Case) -> Any:
        for leaf, gradient in zip(params.values(), training_gradient(batch), strict=True):
            leaf.grad = gradient
        optimizer.step()

    stepped(case)
    update, state = updates.of(optimizer, params)
    here = {name: leaf.detach().clone() for name, leaf in params.items()}

    def along(batch: Any, **options: Any) -> Route:
        step = in_run.along_path(case.losses, update, plan=plan, **options)
        before = step(here, case.batch, state=state, validation=[batch]).after
        before = step(here, case.batch, state=state, validation=[batch], before=before).after
        return lambda: step(here, case.batch, state=state, validation=[batch], before=before)

    def second() -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return reference(case.params, case.batch, lr=1e-4, validation=[case.batch])

    reference = in_run.second_order(case.losses, plan=plan)
    return {
        STEPPED: Contender(lambda: stepped(case), STEPPED),
        STEPPED_BOTH: Contender(lambda: stepped(problem.both), STEPPED_BOTH),
        "account": Contender(along(case.batch), STEPPED),
        "account, two passes": Contender(along(case.batch, pairs_memory=0), STEPPED),
        "account, Simpson": Contender(along(case.batch, rule="simpson"), STEPPED),
        "second order": Contender(second, STEPPED),
        "account, rank 32": Contender(along(other.batch, rank=32), STEPPED_BOTH),
        "account, small validation": Contender(along(other.batch), STEPPED_BOTH),
    }


GROUPS = ("cached", "fresh", "account", "others", "compiled")


def contenders(problem: InRun, groups: tuple[str, ...] = GROUPS) -> dict[str, Contender]:
    """By name, the plain steps first."""
    plan = make_plan(problem.train)
    found = {
        PLAIN: Contender(lambda: training_gradient(problem.train)),
        CONCATENATED: Contender(lambda: training_gradient(problem.both)),
    }
    found |= cached(problem, plan) if "cached" in groups else {}
    found |= fresh(problem, plan) if "fresh" in groups else {}
    found |= account(problem, plan) if "account" in groups else {}
    found |= others(problem) if "others" in groups else {}
    found |= compiled(problem, plan) if "compiled" in groups else {}
    return found


def check_agreement(problem: InRun, found: dict[str, Contender]) -> None:
    """A benchmark of wrong numbers stops: scores along a fresh direction, its pairs and across the batches agree."""
    if "fresh, exact" not in found:
        return
    count = len(problem.validation.batch)
    mean = found["fresh, exact"].route().reduced
    for other in (found["fresh, pairs"].route().reduced, found["fresh, cross"].route().sum(1)):
        if not torch.allclose(other / count, mean, rtol=1e-3, atol=1e-4 * float(mean.abs().max())):
            raise RuntimeError(f"{problem.train.name}: the routes disagree, {other / count} and {mean}.")
