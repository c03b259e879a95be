"""How the gradients of a batch lie to one another: noise scale, diversity, effective rank.

Pure functions of norms, of the batch's gradient and of the Gram matrix, as a training step gives them.
"""

from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from funcghost.errors import InputError
from funcghost.trees import Tree


class NoiseScale(NamedTuple):
    """Unbiased estimates of `tr Sigma`, the variance of one sample's gradient, and of `|G|^2`, of the true gradient."""

    variance: Tensor
    signal: Tensor

    @property
    def scale(self) -> Tensor:
        """`tr Sigma / |G|^2`, in samples; the ratio of estimates is biased, and negative where `signal` is."""
        return self.variance / self.signal


def noise_scale(squared_norms: Tensor, grads: Tree) -> NoiseScale:
    """The gradient noise scale `B = tr Sigma / |G|^2`: batches far below it waste nothing, far above it almost all.

    With `S = (1/b) sum_i |grad_i|^2` and the mean gradient `g` of the same b samples,

        variance = b / (b - 1) (S - |g|^2)        signal = (b |g|^2 - S) / (b - 1)

    whose expectations over batches of independent samples are `tr Sigma` and `|G|^2`. `signal` is noisy where b is far
    below B, and may be negative: average both over steps, and then divide.

    Shapes: `squared_norms` is [b], of `fg.squared_norm()`; `grads` is the tree of the *mean* gradient, as
    `grad_and_reduce` gives it with `reduction="mean"`; scalars come out.

    Units: variance and signal are in losses squared per parameters squared, `scale` in samples.

    Cost: of order b and of the number of parameters, on top of the step that gave the norms.

    Raises:
        InputError: the norms are no floating numbers [b] of two samples or more, or `grads` holds no tensors.

    Example:
        >>> import funcghost as fg, torch
        >>> from funcghost.training import geometry
        >>> step = fg.grad_and_reduce(lambda params, x: x @ params["w"])
        >>> out = step({"w": torch.zeros(2)}, torch.tensor([[3.0, 1.0], [1.0, 1.0]]), fg.squared_norm())
        >>> found = geometry.noise_scale(out.reduced, out.grads)
        >>> found.variance, found.signal, found.scale
        (tensor(2.), tensor(4.), tensor(0.5000))

    Source: McCandlish, Kaplan, Amodei, "An Empirical Model of Large-Batch Training" (arXiv 1812.06162), equation (2.9)
    and appendix A.1, with batches of one sample and of b.
    """
    norms, leaves = _numbers(squared_norms, 1, "noise_scale: squared_norms"), optree.tree_leaves(grads)
    if len(norms) < 2:
        raise InputError(f"noise_scale: takes two samples or more, found {len(norms)}.")
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise InputError("noise_scale: grads must be a tree of tensors, the gradient of losses.mean().")
    b, mean = len(norms), norms.mean()
    whole = torch.stack([torch.linalg.vector_norm(leaf, dtype=norms.dtype).square() for leaf in leaves]).sum()
    return NoiseScale((mean - whole) * (b / (b - 1)), (b * whole - mean) / (b - 1))


def gradient_diversity(gram: Tensor) -> Tensor:
    """How far the gradients of a batch differ: `sum_i |grad_i|^2 / |sum_i grad_i|^2`.

    Between `1 / b` (all are the same) and infinity (they cancel); 1 if they are orthogonal. Times b it is the batch
    size up to which a step on the batch is worth as much as steps on its samples one by one.

    Shapes: `gram` is [b, b], of `fg.gram()`, or of `fg.cosine` for directions alone; a scalar comes out.

    Units: none. Cost: of order b^2.

    Raises:
        InputError: this is no square matrix of floating numbers with a sample or more.

    Example:
        >>> import funcghost as fg, torch
        >>> from funcghost.training import geometry
        >>> score = fg.reduce(lambda params, x: x @ params["w"])
        >>> geometry.gradient_diversity(score({"w": torch.zeros(2)}, torch.eye(2), fg.gram()))
        tensor(1.)

    Source: Yin, Pananjady, Lam, Papailiopoulos, Ramchandran, Bartlett, "Gradient Diversity: a Key Ingredient for
    Scalable Distributed Learning" (arXiv 1706.05699), definitions 1 and 2.
    """
    matrix = _square(gram, "gradient_diversity")
    return matrix.trace() / matrix.sum().clamp(min=0)


def effective_rank(gram: Tensor) -> Tensor:
    """The number of directions that the gradients of a batch fill: `exp(- sum_k p_k log p_k)`.

    With `p_k` the eigenvalues of the Gram matrix divided by their sum. Between 1 (all are parallel) and b (orthogonal,
    of the same norm); 0 if all are zero.

    Shapes: `gram` is [b, b], of `fg.gram()`, or of `fg.cosine` to count every sample alike; a scalar comes out.

    Units: directions. Cost: of order b^3, and the host waits for the device.

    Raises:
        InputError: this is no square matrix of floating numbers with a sample or more.

    Example:
        >>> import funcghost as fg, torch
        >>> from funcghost.training import geometry
        >>> score = fg.reduce(lambda params, x: x @ params["w"])
        >>> geometry.effective_rank(score({"w": torch.zeros(2)}, torch.tensor([[1.0, 0], [2, 0], [0, 1]]), fg.gram()))
        tensor(1.5692)

    Source: Roy, Vetterli, "The effective rank: a measure of effective dimensionality" (EUSIPCO 2007), of the squares of
    singular values; Friedman, Dieng, "The Vendi Score" (arXiv 2210.02410), for cosines.
    """
    matrix = _square(gram, "effective_rank")
    values = torch.linalg.eigvalsh((matrix + matrix.T) / 2).clamp(min=0)
    total = values.sum()
    shares = values / torch.where(total > 0, total, 1)
    return torch.where(total > 0, torch.special.entr(shares).sum().exp(), 0)


def _square(value: Any, what: str) -> Tensor:
    matrix = _numbers(value, 2, f"{what}: gram")
    if matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise InputError(f"{what}: gram must be [b, b] for one sample or more, found {list(matrix.shape)}.")
    return matrix


def _numbers(value: Any, axes: int, what: str) -> Tensor:
    """The value in float32 at least."""
    if not isinstance(value, Tensor) or value.dim() != axes or not value.is_floating_point():
        found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"{what} must be floating numbers {['[b]', '[b, b]'][axes - 1]}, found {found}.")
    return value.to(torch.promote_types(value.dtype, torch.float32))
