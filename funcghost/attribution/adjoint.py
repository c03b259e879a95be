"""One step of a training backwards: the adjoints before it from those after it, and what its samples did.

    (d_params, d_grads, d_state) = a pulled through the update
    scores[i] = <grad l_i, d_grads> / b,        a = (d_params + H d_grads, d_state)

The gradient is made once, for all of k adjoints; scores and Hessian products are one backward of it.
"""

from collections.abc import Sequence

import optree
import torch
from torch import Tensor

from funcghost.attribution.replay import Moment, Training, Update
from funcghost.problem import Problem
from funcghost.side_effects import replaying
from funcghost.trees import Tree, split_params


def floats(state: Tree) -> list[Tensor]:
    """What of an optimizer's state has a derivative."""
    leaves = optree.tree_leaves(state, none_is_leaf=True)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def pulled(
    training: Training, step: int, moment: Moment, adjoint: list[Tensor], of_state: list[Tensor], vectorised: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Scores [b, k] of a step, and the adjoints of the parameters and of the state before it."""
    problem = Problem(training.losses, moment.params, training.batches[step])
    with replaying(moment.random), torch.enable_grad():
        leaves = problem.leaves()
        values, _ = problem.evaluate(leaves)
        training.verify(step, values.detach())
        weights = torch.ones_like(values, requires_grad=True)
        share = 1 / max(1, len(values)) if training.reduction == "mean" else 1.0
        total = (weights * values).sum() * share
        gradients = _gradient(total, leaves)
        d_params, d_grads, d_state = _through_update(training.update, moment, gradients, adjoint, of_state, vectorised)
        *bends, found = _products(gradients, [*leaves, weights], d_grads, vectorised)
    return found.T, [a + b for a, b in zip(d_params, bends, strict=True)], d_state


def _gradient(total: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True) if total.requires_grad else ()
    known = found or [None] * len(leaves)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(known, leaves, strict=True)]


def _through_update(
    update: Update,
    moment: Moment,
    gradients: Sequence[Tensor],
    adjoint: list[Tensor],
    of_state: list[Tensor],
    vectorised: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The adjoints [k, ...] of parameters, gradients and state before the update."""
    params = [leaf.detach().requires_grad_() for leaf in moment.params.leaves]
    grads = [leaf.detach().requires_grad_() for leaf in gradients]
    leaves, spec = optree.tree_flatten(moment.state, none_is_leaf=True)
    fresh = [
        leaf.detach().requires_grad_() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
        for leaf in leaves
    ]
    held = [leaf for leaf in fresh if isinstance(leaf, Tensor) and leaf.requires_grad]
    rebuild = moment.params.rebuild
    after, state = update(rebuild(params), rebuild(grads), optree.tree_unflatten(spec, fresh))
    outputs, cotangents = [*split_params(after).leaves, *floats(state)], [*adjoint, *of_state]
    found = _products(outputs, [*params, *grads, *held], cotangents, vectorised)
    n = len(params)
    return found[:n], found[n : 2 * n], found[2 * n :]


def _products(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], vectorised: bool
) -> list[Tensor]:
    """The pullbacks of k cotangents, [k, *shape] for each input."""
    pairs = [(out, u) for out, u in zip(outputs, cotangents, strict=True) if out.requires_grad]
    k = len(cotangents[0])
    if not pairs:
        return [leaf.new_zeros((k, *leaf.shape)) for leaf in inputs]
    outs = [out for out, _ in pairs]

    def back(rows: list[Tensor], batched: bool) -> list[Tensor]:
        found = torch.autograd.grad(outs, inputs, rows, retain_graph=True, allow_unused=True, is_grads_batched=batched)
        lead = (k,) if batched else ()
        return [
            leaf.new_zeros((*lead, *leaf.shape)) if g is None else g.detach()
            for g, leaf in zip(found, inputs, strict=True)
        ]

    if vectorised and k > 1:
        return back([u for _, u in pairs], True)
    rows = [back([u[j] for _, u in pairs], False) for j in range(k)]
    return [torch.stack(column) for column in zip(*rows, strict=True)]
