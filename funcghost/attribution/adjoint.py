"""One step of a training backwards: the adjoints before it from those after it, and what its samples did.

    w = 1/b (mean) or 1 (sum), for every sample
    (params, state)' = update(params, sum_i w_i grad l_i(params), state)
    (a, d_w) = a' pulled back through all of this,        scores[i] = w_i d_w_i

Everything is one graph, made once for all of k adjoints: the Hessian products are a part of its backward. So many of
them go through it together, by `torch.func.vmap`.
"""

from collections.abc import Sequence

import optree
import torch
from torch import Tensor

from funcghost.attribution.replay import Moment, Training
from funcghost.problem import Problem, cotangents
from funcghost.side_effects import replaying
from funcghost.trees import Tree, split_params


def floats(state: Tree) -> list[Tensor]:
    """What of an optimizer's state has a derivative."""
    leaves = optree.tree_leaves(state, none_is_leaf=True)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def pulled(
    training: Training, step: int, moment: Moment, adjoint: list[Tensor], of_state: list[Tensor], together: int
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Scores [b, k] of a step, and the adjoints of the parameters and of the state before it."""
    problem = Problem(training.losses, moment.params, training.batches[step])
    with replaying(moment.random), torch.enable_grad():
        leaves = problem.leaves()
        values, _ = problem.evaluate(leaves)
        training.verify(step, values.detach())
        weights = cotangents(values.detach(), training.reduction)
        state, held = _held(moment.state)
        rebuild = moment.params.rebuild
        gradients = _gradient(values, leaves, weights.requires_grad_())
        after, last = training.update(rebuild(leaves), rebuild(gradients), state)
        outputs, inputs = [*split_params(after).leaves, *floats(last)], [weights, *leaves, *held]
        found, *before = _pullbacks(outputs, inputs, [*adjoint, *of_state], together)
    return found.T * weights.detach().unsqueeze(1), before[: len(leaves)], before[len(leaves) :]


def _held(state: Tree) -> tuple[Tree, list[Tensor]]:
    """A state whose floating-point tensors can be differentiated in, and these."""
    leaves, spec = optree.tree_flatten(state, none_is_leaf=True)
    fresh = [
        leaf.detach().requires_grad_() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
        for leaf in leaves
    ]
    held = [leaf for leaf in fresh if isinstance(leaf, Tensor) and leaf.requires_grad]
    return optree.tree_unflatten(spec, fresh), held


def _gradient(values: Tensor, leaves: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    """Of the losses times their weights; zeros where they do not depend on a leaf."""
    if not values.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(values, leaves, weights, create_graph=True, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


def _pullbacks(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], together: int
) -> list[Tensor]:
    """Of k cotangents, so many at a time, [k, *shape] for each input."""
    pairs = [(out, u) for out, u in zip(outputs, cotangents, strict=True) if out.requires_grad]
    k = len(cotangents[0])
    if not pairs:
        return [leaf.new_zeros((k, *leaf.shape)) for leaf in inputs]
    outs = [out for out, _ in pairs]
    parts = [_back(outs, inputs, [u[j : j + together] for _, u in pairs]) for j in range(0, k, together)]
    return parts[0] if len(parts) == 1 else [torch.cat(column) for column in zip(*parts, strict=True)]


def _back(outputs: Sequence[Tensor], inputs: Sequence[Tensor], rows: Sequence[Tensor]) -> list[Tensor]:
    some = len(rows[0])
    batched, given = some > 1, rows if some > 1 else [u[0] for u in rows]
    found = torch.autograd.grad(outputs, inputs, given, retain_graph=True, allow_unused=True, is_grads_batched=batched)
    return [
        leaf.new_zeros((some, *leaf.shape)) if g is None else g.detach().view(some, *leaf.shape)
        for g, leaf in zip(found, inputs, strict=True)
    ]
