"""Inner products with directions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

from torch import Tensor

from funcghost.algebra.compression import certified_bound
from funcghost.algebra.directions import Direction, LowRank, Stack, match_leaves
from funcghost.reducers.bases import Directional, Reducer, register
from funcghost.reducers.by_parameter import PerParamAdditive
from funcghost.reducers.quadratic import SquaredNorm
from funcghost.trees import Params, Tree, named_leaves


@dataclass(frozen=True, eq=False)
class Dot(Directional):
    """See `dot`."""

    direction: Tree

    def directions(self, params: Params) -> list[Direction]:
        """One per member of a stack."""
        if isinstance(self.direction, Stack):
            trees = self.direction.directions
            return [match_leaves(tree, params, f"direction {k} of the stack") for k, tree in enumerate(trees)]
        return [match_leaves(self.direction, params)]

    def result(self, scores: Tensor, params: Params) -> Tensor:
        """[b], or [b, k] for a stack."""
        return scores if isinstance(self.direction, Stack) else scores.squeeze(-1)


@dataclass(frozen=True, eq=False)
class BoundedDot(Reducer):
    """See `dot`."""

    direction: Tree

    def parts(self) -> tuple[Reducer, ...]:
        """The scores, and the norms of the gradients of what has low rank."""
        trees = self.direction.directions if isinstance(self.direction, Stack) else (self.direction,)
        low = {
            name for tree in trees for name, leaf in zip(*named_leaves(tree)[:2], strict=True) if type(leaf) is LowRank
        }
        return Dot(self.direction), PerParamAdditive(SquaredNorm(), frozenset(low))

    def joined(self, results: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Scores and bounds."""
        scores, norms = results
        return scores, certified_bound(self.direction, norms)


@overload
def dot(direction: Tree, with_bound: Literal[False] = False) -> Dot: ...


@overload
def dot(direction: Tree, with_bound: bool) -> Dot | BoundedDot: ...


def dot(direction: Tree, with_bound: bool = False) -> Dot | BoundedDot:
    """The inner product of every per-sample gradient with a direction: `out[i] = <grad losses[i], direction>`.

    Shapes: `direction` is a tree like params; the result is [b]. With `fg.stack([v1, .., vK])` it is [b, k]. Leaves may
    be low-rank (`fg.compress`), and the direction may be `Pairs`: the sum of the gradients of their samples. With
    `with_bound=True` the result is a pair of the scores and of how far each may be off because of what `fg.compress`
    dropped, the sum over leaves of `|dropped| |grad_i|`, from norms taken in the same pass.

    Units: those of the losses as the user's function returned them, per unit of the direction; no factor of
    1/b. Accumulated in float32, or float64 for float64 parameters.

    Cost: per use of a weight with t positions, d inputs and p outputs one product of b t d p, as much as its
    forward, on top of the 3 b t d p of a training step: 4/3 of its FLOPs; in memory as much as the output of the use,
    or as its input where that is less than half. A leaf of rank r costs b t r (d + p). The bound costs as
    `fg.squared_norm` of the parameters with low-rank leaves.

    Raises:
        InputError: (when used) a leaf is missing or differs from its parameter in shape, dtype or device.

    Example:
        >>> import funcghost as fg, torch
        >>> def losses(params, x):
        ...     return (x @ params["w"]).square()
        >>> params, x = {"w": torch.tensor([1.0, 2.0])}, torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> fg.reduce(losses)(params, x, fg.dot({"w": torch.tensor([1.0, 1.0])}))
        tensor([2., 4.])

    Source: Wang, Mittal, Song, Jia, "Data Shapley in One Training Run" (arXiv 2406.11011), section 4, where it
    is done for linear layers; here `<grad_i, V> = sum over sample i's entries of (J V) * g` for any op.
    """
    factored = getattr(direction, "as_direction", None)
    tree = factored() if factored is not None else direction
    return BoundedDot(tree) if with_bound else Dot(tree)


register(Dot, ("direction",))
register(BoundedDot, ("direction",))
