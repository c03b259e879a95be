"""Reducers of inner products between the gradients of a batch: norms, Gram matrix, and training against validation."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from torch import Tensor

from funcghost.algebra.contractions import inner_products, squared_norms
from funcghost.algebra.cost import ANY, Means, Route, Sketch, choose
from funcghost.algebra.factors import Factor, samples
from funcghost.algebra.metric import Metric, known, metric_of
from funcghost.errors import InputError
from funcghost.reducers.bases import Additive, register
from funcghost.trees import Tree


@dataclass(frozen=True, eq=False)
class Quadratic(Additive):
    """A reducer of inner products, by the route that is the cheapest within the `means`."""

    means: Means = field(default=ANY, kw_only=True, repr=False)

    def within(self, means: Means) -> Self:
        """The same inner products, by these means."""
        return replace(self, means=means)


@dataclass(frozen=True, eq=False)
class SquaredNorm(Quadratic):
    """See `squared_norm`."""

    metric: Metric | None = None

    def of_parameter(self, name: str, uses: Sequence[Factor]) -> Tensor:
        """[b]."""
        if self.metric is not None:
            return known(self.metric, name).norms(uses, self.means, name)
        return squared_norms(uses, self.means, name)

    def route(self, uses: Sequence[Sketch], batch: int, name: str) -> tuple[Route, list[Route]] | None:
        """The route that `of_parameter` takes."""
        if self.metric is not None:
            return None
        return choose(uses, uses, (batch, batch), self.means, diagonal=True, same=True, name=name)

    def zero(self, batch: int, like: Tensor) -> Tensor:
        """[b]."""
        return like.new_zeros((batch,))


register(SquaredNorm, ("metric",))


def squared_norm(metric: Tree | None = None) -> SquaredNorm:
    """The squared norm of every per-sample gradient: `out[i] = |grad losses[i]|^2`, over all parameters.

    With a `metric` M it is `<grad losses[i], M grad losses[i]>`, exactly. M is a tree like params. A leaf that is a
    tensor of the parameter's shape weighs entries (with Adam's `1 / (sqrt(v) + eps)`, that is its inner product; the
    norm of its step has the square of that). A leaf `fg.Kronecker(rows, cols)` is `tr(G^T rows G cols)` for gradients
    as matrices. `metric()` of a damped curvature (`attribution.curvature`) is one, too.

    Shapes: [b].

    Units: those of the losses squared, per unit of the parameters squared. Cross terms of several uses of a parameter
    (tied, reused) are part of it. Rounding is relative to the squared sizes of the uses and of the positions: where
    these cancel to less than a thousandth, float32 has few digits left, and float64 parameters have them.

    Cost: per use with t positions, d inputs and p outputs the cheaper of `2 b t^2 (d + p)` FLOPs (ghost: products of
    positions) and `2 b t d p` (the gradients themselves, slice by slice), within `Options.memory_budget` of memory. A
    step is `6 b t d p`, and takes the sum of the gradients for its own where a plan made with the reducer says that
    they are formed.

    Raises:
        MemoryBudgetError: (when used) no tile of any route fits the budget.

    Example:
        >>> import funcghost as fg, torch
        >>> score = fg.reduce(lambda params, x: x @ params["w"])
        >>> score({"w": torch.zeros(2)}, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), fg.squared_norm())
        tensor([ 5., 25.])

    Source: Goodfellow, "Efficient Per-Example Gradient Computations" (arXiv 1510.01799), for t = 1; Li, Tramer, Liang,
    Hashimoto, "Large Language Models Can Be Strong Differentially Private Learners" (arXiv 2110.05679), section 4, for
    sequences; here for any use of a parameter, see `funcghost.ops.uses`.
    """
    return SquaredNorm(None if metric is None else metric_of(metric))


@dataclass(frozen=True, eq=False)
class Gram(Quadratic):
    """See `gram`."""

    metric: Metric | None = None

    def of_parameter(self, name: str, uses: Sequence[Factor]) -> Tensor:
        """[b, b]."""
        if self.metric is not None:
            return known(self.metric, name).products(uses, uses, self.means, name)
        return inner_products(uses, uses, self.means, name)

    def route(self, uses: Sequence[Sketch], batch: int, name: str) -> tuple[Route, list[Route]] | None:
        """The route that `of_parameter` takes."""
        if self.metric is not None:
            return None
        return choose(uses, uses, (batch, batch), self.means, same=True, name=name)

    def zero(self, batch: int, like: Tensor) -> Tensor:
        """[b, b]."""
        return like.new_zeros((batch, batch))


def gram(metric: Tree | None = None) -> Gram:
    """The inner products of all per-sample gradients of the batch: `out[i, j] = <grad losses[i], grad losses[j]>`.

    With a `metric` M, `<grad losses[i], M grad losses[j]>`, see `squared_norm`.

    Shapes: [b, b], symmetric and positive semidefinite up to rounding.

    Units: as `squared_norm`, which is its diagonal.

    Cost: per use the cheaper of `2 b^2 t^2 (d + p)` FLOPs and `2 b t d p + 2 b^2 d p`.

    Raises:
        MemoryBudgetError: (when used) no tile of any route fits the budget.

    Example:
        >>> import funcghost as fg, torch
        >>> score = fg.reduce(lambda params, x: x @ params["w"])
        >>> score({"w": torch.zeros(2)}, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), fg.gram())
        tensor([[ 5., 11.],
                [11., 25.]])

    Source: as `squared_norm`.
    """
    return Gram(None if metric is None else metric_of(metric))


@dataclass(frozen=True, eq=False)
class Cross(Quadratic):
    """See `cross`."""

    num_val: int

    def of_parameter(self, name: str, uses: Sequence[Factor]) -> Tensor:
        """[b - v, v]."""
        at = samples(uses[0]) - self.num_val
        if at < 0:
            raise InputError(
                f"cross: num_val={self.num_val} validation samples in a batch of {samples(uses[0])}. The batch must "
                "hold the training samples, followed by so many of validation."
            )
        train = [use.map(lambda value: value[:at]) for use in uses]
        validation = [use.map(lambda value: value[at:]) for use in uses]
        return inner_products(train, validation, self.means, name)

    def route(self, uses: Sequence[Sketch], batch: int, name: str) -> tuple[Route, list[Route]]:
        """The route that `of_parameter` takes."""
        return choose(uses, uses, (max(batch - self.num_val, 0), self.num_val), self.means, name=name)

    def zero(self, batch: int, like: Tensor) -> Tensor:
        """[b - v, v]."""
        return like.new_zeros((max(batch - self.num_val, 0), self.num_val))


def cross(num_val: int) -> Cross:
    """The inner products of training and validation gradients: `out[i, j] = <grad losses[i], grad losses[b - v + j]>`.

    The last `num_val` samples of the batch are validation, the others training.

    Shapes: [b - v, v], one column for each validation sample.

    Units: as `squared_norm`. The gradient of a training step that leaves validation out is that of the first losses:
    let the losses of validation samples be zero there, or take it by `fg.combine`.

    Cost: per use the cheaper of `2 (b - v) v t^2 (d + p)` FLOPs and `2 b t d p + 2 (b - v) v d p`.

    Raises:
        InputError: num_val is not 1 or more; (when used) the batch has fewer samples.
        MemoryBudgetError: (when used) no tile of any route fits the budget.

    Example:
        >>> import funcghost as fg, torch
        >>> score = fg.reduce(lambda params, x: x @ params["w"])
        >>> score({"w": torch.zeros(2)}, torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 0.0]]), fg.cross(1))
        tensor([[1.],
                [3.]])

    Source: Wang, Mittal, Song, Jia, "Data Shapley in One Training Run" (arXiv 2406.11011), section 4, per validation
    sample and for all uses together.
    """
    if type(num_val) is not int or num_val < 1:
        raise InputError(f"cross: num_val must be the number of validation samples, 1 or more, found {num_val!r}.")
    return Cross(num_val)


register(Gram, ("metric",))
register(Cross, (), ("num_val",))
