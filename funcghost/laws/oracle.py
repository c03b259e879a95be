"""The slow truth: per-sample gradients one by one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from funcghost.problem import Losses, Problem, backwards
from funcghost.side_effects import untouched
from funcghost.trees import Tree, split_params


def per_sample_gradients(losses: Losses, params: Tree, batch: Tree) -> Tree:
    """The gradients of `losses[i]` by one call of `torch.autograd.grad` each, stacked: leaves [b, *param.shape].

    Cost: b backward passes over one graph, and a copy of the parameters per sample. This is what every fast result of
    funcghost is held to.

    Example:
        >>> import torch
        >>> from funcghost.laws.oracle import per_sample_gradients
        >>> per_sample_gradients(lambda p, x: (x @ p["w"]).square(), {"w": torch.ones(2)}, torch.eye(2))["w"]
        tensor([[2., 0.],
                [0., 2.]])
    """
    problem = Problem(losses, split_params(params), batch)
    leaves = problem.leaves()
    with untouched(problem.devices()):
        values, _ = problem.evaluate(leaves)
        rows = [gradient_of(value, leaves) for value in values]
    stacked = [
        torch.stack([row[k] for row in rows]) if rows else leaf.detach().new_zeros((0, *leaf.shape))
        for k, leaf in enumerate(leaves)
    ]
    return problem.params.rebuild(stacked)


def gradient_of(value: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of one number, dense, with zeros where it does not depend on a leaf; its graph is kept."""
    if not value.requires_grad:
        return [torch.zeros_like(leaf, requires_grad=False) for leaf in leaves]
    with backwards(value.device):
        found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
    return [
        torch.zeros_like(leaf, requires_grad=False) if g is None else g.to_dense()
        for g, leaf in zip(found, leaves, strict=True)
    ]
