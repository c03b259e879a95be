"""Sums of clipped per-sample gradients, as in differentially private SGD. Noise and accounting are left to the user.

Abadi et al., "Deep Learning with Differential Privacy" (arXiv 1607.00133): with every sample's gradient clipped to norm
C, their sum changes by at most C when one sample is added or left out. Gaussian noise of standard deviation `sigma C`
in every entry makes it private.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from funcghost.algebra.pair_algebra import combine
from funcghost.checking.checker import lowest_precision
from funcghost.checking.mixing import evaluated, mixing
from funcghost.engine.plans import Plan
from funcghost.errors import InputError
from funcghost.options import Options
from funcghost.problem import Losses, Problem
from funcghost.reducers.by_parameter import per_param
from funcghost.reducers.quadratic import squared_norm
from funcghost.side_effects import undone_on_failure
from funcghost.transforms.compiling import uncompiled
from funcghost.transforms.halves import apply
from funcghost.transforms.steps import Transform
from funcghost.trees import Tree, split_params

Groups = Callable[[str], str]
"""Maps the name of a parameter to that of its group."""


class Clipped(NamedTuple):
    """The sum of clipped gradients, the norms [b] before and weights [b] of clipping by group, and the losses [b]."""

    grads: Tree
    norms: dict[str, Tensor]
    weights: dict[str, Tensor]
    losses: Tensor


def together(name: str) -> str:
    """All parameters in one group, named "all": global clipping."""
    return "all"


def by_layer(name: str) -> str:
    """The parameters of one module together, `fc1.weight` and `fc1.bias` in "fc1": per-layer clipping."""
    return name.rpartition(".")[0]


def by_parameter(name: str) -> str:
    """Every parameter by itself, as in Opacus' per-layer clipping."""
    return name


def clipped_gradient(
    losses: Losses,
    *,
    groups: Groups = together,
    allow_mixing: bool = False,
    options: Options | None = None,
    plan: Plan | None = None,
) -> Callable[[Tree, Tree, float | Mapping[str, float]], Clipped]:
    """The sum over samples of clipped gradients: `sum_i min(1, max_norm / |grad_i|) grad_i`, per group of parameters.

    `step(params, batch, max_norm)` gives a `Clipped`. With groups, each is clipped by its own norm, to its own
    `max_norm[group]`, or to the same one: the whole is then of norm at most the root of the sum of their squares.

    Law: what is added up has norm at most `max_norm` for each sample and group; a gradient below it is left as it is,
    a zero one is zero. Norms are of all uses of a parameter together (tied, reused), over all parameters of the group.

    Shapes: `grads` is a tree like params, dense also where autograd's gradient is sparse; `norms[group]`,
    `weights[group]` and `losses` are [b]. Of these, only the sum of clipped gradients can be made private by noise.

    Units: a *sum*, of the gradients of the losses as they were returned: add those of micro-batches, add noise once,
    divide by the expected size of a batch. `max_norm` is in units of the losses per unit of the parameters.

    Cost: a forward and a backward without weight gradients, `fg.squared_norm`, and one product per use of a weight; no
    second backward. Memory for the inputs and output gradients of all uses. Once for each program that the losses run:
    up to `2 log2(b)` forwards, to see whether they mix samples.

    Losses that mix samples (batch norm in training mode) are clipped by what each loss depends on, but one sample then
    enters the losses of others: the sum is not private. Where this is seen it is an error, unless `allow_mixing`.

    Args:
        losses: as in `fg.grad_and_reduce`.
        groups: the group of each parameter, by its name: `together`, `by_layer`, `by_parameter`, or a function.
        allow_mixing: clip the gradients of losses that mix samples, too. They are not looked at for that.
        options: as in `fg.grad_and_reduce`.
        plan: as in `fg.grad_and_reduce`.

    Raises:
        InputError: (when used) `max_norm` is not a number above zero, or one for each group; the losses mix samples.
        UnsupportedOpError: (when used) gradients in factored form are not to be had.
        MemoryBudgetError: (when used) as in `fg.squared_norm`.

    Example:
        >>> import torch
        >>> from funcghost.training import clipping
        >>> step = clipping.clipped_gradient(lambda params, x: x @ params["w"])
        >>> out = step({"w": torch.zeros(2)}, torch.tensor([[3.0, 4.0], [0.0, 1.0]]), 1.0)
        >>> out.grads["w"], out.norms["all"], out.weights["all"]
        (tensor([0.6000, 1.8000]), tensor([5., 1.]), tensor([0.2000, 1.0000]))

    Source: Abadi et al. (arXiv 1607.00133), algorithm 1; Bu, Wang, Zha, Karypis, "Differentially Private Optimization
    on Large Model at Small Cost" (arXiv 2210.00038), for weights put on kept output gradients in place of a second
    backward; McMahan, Ramage, Talwar, Zhang, "Learning Differentially Private Recurrent Language Models" (arXiv
    1710.06963), for per-layer clipping.
    """
    transform, apart = Transform(losses, None, False, options, plan), set[int]()

    def step(params: Tree, batch: Tree, max_norm: float | Mapping[str, float]) -> Clipped:
        group_of = {name: groups(name) for name in split_params(params).names}
        limits = _limits(max_norm, list(dict.fromkeys(group_of.values())))
        problem = Problem(losses, split_params(params), batch)
        with undone_on_failure(problem.devices(), () if apart or allow_mixing else None):
            found, values = transform.pairs(params, batch)
            used = transform.plans[0]
            if not allow_mixing and used.digest not in apart:
                _refuse_mixing(problem, used)
                apart.add(used.digest)
        squares: dict[str, Tensor] = apply(per_param(squared_norm()), found, options=options)
        norms, weights = dict[str, Tensor](), dict[str, Tensor]()
        for group, limit in limits.items():
            norm = torch.stack([squares[name] for name, other in group_of.items() if other == group]).sum(0).sqrt()
            norms[group], weights[group] = norm, torch.where(norm > limit, limit / norm, 1)
        grads = combine(found, {name: weights[group] for name, group in group_of.items()})
        return Clipped(grads, norms, weights, values)

    return step


def _refuse_mixing(problem: Problem, plan: Plan) -> None:
    """Raises an error if it can be seen that the losses mix samples."""
    if problem.is_meta():
        return
    with uncompiled():
        first = evaluated(problem)
        _, eps = lowest_precision(plan, first.values.dtype, problem.devices())
        mixes, why = mixing(problem, first, eps)
    if mixes == "yes":
        raise InputError(
            f"clipped_gradient: the losses mix samples ({why}). One sample enters the losses of others, so the sum is "
            "not private. Take what mixes them out of the losses (group norm in place of batch norm, or "
            "model.eval()), or pass allow_mixing=True if no privacy is meant."
        )


def _limits(max_norm: float | Mapping[str, float], groups: list[str]) -> dict[str, float]:
    """The largest norm of each group."""
    limits = dict(max_norm) if isinstance(max_norm, Mapping) else dict.fromkeys(groups, max_norm)
    if set(limits) != set(groups):
        raise InputError(
            f"max_norm: must be a number, or one for each of the groups {groups[:5]}, found some for "
            f"{list(limits)[:5]}."
        )
    for group, limit in limits.items():
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < math.inf:
            raise InputError(f"max_norm: must be a finite number above zero, found {limit!r} for group {group!r}.")
    return limits
