"""What the tests hold funcghost to."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from funcghost.laws.oracle import per_sample_gradients

Params = dict[str, Tensor]


def dots(gradients: Params, direction: Params) -> Tensor:
    """<grad_i, V> from a tree of [b, *shape]."""
    return sum((g.flatten(1) if g.dim() > 1 else g[:, None]) @ direction[k].flatten() for k, g in gradients.items())  # type: ignore[return-value]


def expected(losses: Any, params: Mapping[str, Tensor], batch: Any, direction: Params) -> tuple[Tensor, Tensor]:
    """The scores, and the size of the terms they are sums of, per sample."""
    gradients = per_sample_gradients(losses, params, batch)
    sizes = {k: g.abs() for k, g in gradients.items()}
    return dots(gradients, direction), dots(sizes, {k: v.abs() for k, v in direction.items()})


def assert_scores(found: Tensor, wanted: tuple[Tensor, Tensor], tolerance: float = 1e-10) -> None:
    """Equality to a tolerance relative to the size of the terms of each sample."""
    value, size = wanted
    assert found.shape == value.shape
    # Terms may cancel inside an op before they reach the gradient: the batch's largest term bounds those.
    allowed = tolerance * (size + (size.max() if size.numel() else 0.0))
    assert bool(((found - value).abs() <= allowed + 1e-300).all()), (found, value, size)


def assert_close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Equality to a tolerance relative to the largest entry."""
    assert found.shape == wanted.shape
    scale = float(wanted.abs().max()) if wanted.numel() else 0.0
    assert bool(((found - wanted).abs() <= tolerance * scale).all()), (found, wanted)


def assert_trees_close(found: Params, wanted: Params, tolerance: float = 1e-12) -> None:
    """Equality to a tolerance relative to the largest entry of the tree, so that one leaf may be rounding alone."""
    assert found.keys() == wanted.keys()
    scale = max((float(leaf.abs().max()) for leaf in wanted.values() if leaf.numel()), default=0.0)
    for name, leaf in wanted.items():
        assert found[name].shape == leaf.shape
        assert bool(((found[name] - leaf).abs() <= tolerance * scale).all()), (name, found[name] - leaf)


def gradient(losses: Any, params: Mapping[str, Tensor], batch: Any, reduction: str = "mean") -> tuple[Params, Tensor]:
    """The training gradient and the losses by autograd alone."""
    leaves = {k: p.detach().requires_grad_() for k, p in params.items()}
    values = losses(leaves, batch)
    total = values.mean() if reduction == "mean" else values.sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    named = zip(leaves.items(), found, strict=True)
    return {k: torch.zeros_like(leaf) if g is None else g for (k, leaf), g in named}, values.detach()
