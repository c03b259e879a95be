"""Hooks of the user on leaves (`register_hook`), which have a say in the gradients of parameters."""

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from funcghost.dtypes import as_written
from funcghost.engine.shadows import Computed, Shadow
from funcghost.errors import UnsupportedOpError


def is_hooked(leaf: Tensor) -> bool:
    """Whether the user has a say in the gradient of a leaf, by `register_hook`."""
    return leaf.is_leaf and bool(leaf._backward_hooks)


def hooked(shadow: Shadow) -> Shadow:
    """The shadow of a leaf whose hooks have a say in its gradient."""
    with torch.enable_grad():
        alias = shadow.value.view_as(shadow.value)
    return Computed(shadow.value, shadow.leaves, get_gradient_edge(alias))


def before_hooks(leaf: Tensor, name: str, tangent: Tensor) -> Tensor:
    """The tangent `H^T V` of a leaf whose hooks make `H g` of its gradient: `<H g, V>` is `<g, H^T V>`.

    Raises:
        UnsupportedOpError: a hook is no function of the gradient that autograd can differentiate.
    """
    with torch.enable_grad(), as_written(leaf.device):
        alias, dual = leaf.view_as(leaf), torch.zeros_like(leaf, requires_grad=True)
        try:
            (pulled,) = torch.autograd.grad(alias, leaf, dual.clone(), create_graph=True)
            (slope,) = torch.autograd.grad(pulled, dual, tangent)
        except RuntimeError as error:
            raise UnsupportedOpError(
                f"parameter {name!r} has a hook (register_hook) that autograd cannot differentiate "
                f"({str(error).splitlines()[0]}). Write it with torch ops that are linear in the gradient, such as a "
                "product with a mask, or take it off for the step."
            ) from error
    return slope
