"""Losses whose gradients make a Fisher matrix: labels drawn from the model, all labels with their weight, or one's own.

A curvature here is `(1/n) sum_i sum_l (grad l_i)(grad l_i)^T` over losses `l`. With the data's own losses that is the
empirical Fisher; with those of labels drawn from the model it is the Fisher matrix in expectation, and with all labels
the Fisher matrix itself, which for cross-entropy is the Gauss-Newton matrix.
"""

from collections.abc import Callable
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from funcghost.errors import InputError
from funcghost.problem import Losses
from funcghost.trees import Tree

Outputs = Callable[[Tree, Tree], Tensor]
"""`outputs(params, batch)` gives logits [b, ..., c], or whatever else the losses are made of, samples in front."""


def sampled_labels(logits: Outputs, draws: int = 1, weights: Callable[[Tree], Tensor] | None = None) -> list[Losses]:
    """Losses of labels `y ~ softmax(logits)` from the model: `l_i = sum_t w_it CE(logits_it, y_it) / sqrt(draws)`.

    In expectation their curvature is the Gauss-Newton matrix of the losses `sum_t w_it CE(logits_it, .)`. Drawn from
    torch's own random numbers: `torch.manual_seed` makes it repeatable.

    Args:
        logits: gives [b, ..., c] for c classes.
        draws: how many labels for each place.
        weights: gives w [b, ...] from a batch, as the losses have it: 1/t for a mean over t positions, 0 for padding.

    Example:
        >>> import torch
        >>> from funcghost.attribution import labels
        >>> [losses] = labels.sampled_labels(lambda params, x: x @ params)
        >>> losses(torch.zeros(2, 3), torch.eye(2))
        tensor([1.0986, 1.0986])
    """
    if type(draws) is not int or draws < 1:
        raise InputError(f"sampled_labels: draws must be 1 or more, found {draws!r}.")

    def losses(params: Tree, batch: Tree) -> Tensor:
        logs = _logits(logits, params, batch).log_softmax(-1)
        # The largest of logits with Gumbel noise is a draw from their softmax.
        noise = -torch.empty_like(logs).exponential_().log()
        drawn = (logs.detach() + noise).argmax(-1, keepdim=True)
        return _weighted(-logs.gather(-1, drawn).squeeze(-1), weights, batch) / sqrt(draws)

    return [losses] * draws


def all_labels(logits: Outputs, classes: int) -> list[Losses]:
    """The losses `l_i = sqrt(p_i(c)) CE(logits_i, c)` for each class c, with `p` held: exactly the Gauss-Newton matrix.

    For one place a sample, logits [b, c]. Cost: of everything, one for each class.

    Example:
        >>> import torch
        >>> from funcghost.attribution import labels
        >>> len(labels.all_labels(lambda params, x: x @ params, 3))
        3
    """
    if type(classes) is not int or classes < 2:
        raise InputError(f"all_labels: classes must be 2 or more, found {classes!r}.")

    def of(label: int) -> Losses:
        def losses(params: Tree, batch: Tree) -> Tensor:
            found = _logits(logits, params, batch)
            if found.dim() != 2 or found.shape[1] != classes:
                raise InputError(f"all_labels: logits must be [b, {classes}], found {list(found.shape)}.")
            log = found.log_softmax(-1)[:, label]
            return -(log.detach() / 2).exp() * log

        return losses

    return [of(label) for label in range(classes)]


def _logits(logits: Outputs, params: Tree, batch: Tree) -> Tensor:
    found: Any = logits(params, batch)
    if not isinstance(found, Tensor) or found.dim() < 2 or not found.is_floating_point():
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(f"labels: logits(params, batch) must be floating numbers [b, ..., c], found {shape}.")
    return found


def _weighted(terms: Tensor, weights: Callable[[Tree], Tensor] | None, batch: Tree) -> Tensor:
    if weights is not None:
        scale = weights(batch)
        if scale.shape != terms.shape:
            raise InputError(f"labels: weights must be {list(terms.shape)}, found {list(scale.shape)}.")
        terms = terms * scale
    return torch.sum(terms.flatten(1), 1) if terms.dim() > 1 else terms
