"""One step of a training backwards: the adjoints before it from those after it, and what its samples did.

    w = 1/b (mean) or 1 (sum), for every sample
    (params, state)' = update(params, sum_i w_i grad l_i(params), state)
    (a, d_w) = a' pulled back through all of this,        scores[i] = w_i d_w_i

Everything is one graph, made once for all of k adjoints: the Hessian products are a part of its backward. So many of
them go through it together, by `torch.func.vmap`.
"""

import optree
import torch
from torch import Tensor

from funcghost.attribution.products import grads, pullback
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
        gradients = grads(values, leaves, weights.requires_grad_(), create_graph=True)
        after, last = training.update(rebuild(leaves), rebuild(gradients), state)
        outputs, inputs = [*split_params(after).leaves, *floats(last)], [weights, *leaves, *held]
        given = [*adjoint, *of_state]
        parts = [
            pullback(outputs, inputs, [u[j : j + together] for u in given]) for j in range(0, len(given[0]), together)
        ]
        found, *before = parts[0] if len(parts) == 1 else [torch.cat(column) for column in zip(*parts, strict=True)]
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
