"""What projected methods keep of a sample: a function of it alone, `of(params, batch) -> {name: [b, dim] or [b]}`.

    Projected    phi = P grad losses[i]
    Trak         phi = P grad log(p_i / (1 - p_i)),  wrong = 1 - p_i            for losses that are -log p
    Moved        phi = P (what Adam would move along on grad losses[i] alone)
    Scaled       phi = P (grad losses[i] / sqrt(v))
    Sided        one for each parameter, phi = (P (x) Q) grad losses[i]

They are values that a manifest can describe: `corpus.keep` has those of a data set on the disk. What is made of them
is in `comparing`. Units and cost are those of `fg.project`; `Moved` and `Scaled` form gradients, b copies of the
parameters.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from funcghost.algebra.factors import Dense
from funcghost.algebra.pair_algebra import materialize
from funcghost.attribution.batches import check_batches
from funcghost.errors import InputError
from funcghost.options import Options
from funcghost.problem import Losses
from funcghost.reducers.bases import Reducer
from funcghost.reducers.by_parameter import per_param
from funcghost.reducers.projections import Kind, project
from funcghost.training.adam_rules import Adam
from funcghost.transforms.steps import pairs, reduce
from funcghost.trees import Params, Tree, match_direction, split_params

Block = Mapping[str, Tensor]
"""The features of some samples by name, [b, dim] or [b]."""
TINY = 1e-8
"""Added to roots of second moments, as Adam does."""


@dataclass(frozen=True, eq=False)
class Features:
    """`of(params, batch)`: the features of the samples of a batch."""

    losses: Losses = field(repr=False)
    dim: int
    seed: int = 0
    kind: Kind = "rademacher"
    options: Options | None = field(default=None, repr=False, kw_only=True)

    @abstractmethod
    def __call__(self, params: Tree, batch: Tree) -> Block:
        """By name, [b, dim] or [b]."""

    def all(self, params: Tree, batches: Iterable[Tree], what: str) -> list[Block]:
        """Those of every batch.

        Raises:
            InputError: there is none.
        """
        if found := [self(params, batch) for batch in check_batches(what, batches)]:
            return found
        raise InputError(f"{what}: takes one batch or more, found none.")


@dataclass(frozen=True, eq=False)
class Projected(Features):
    """`phi`, the projected gradients of the losses.

    Example:
        >>> import torch
        >>> from funcghost.attribution import features
        >>> of = features.Projected(lambda params, x: x @ params["w"], 4)
        >>> of({"w": torch.zeros(2)}, torch.eye(2))["phi"].square().sum(1)
        tensor([1., 1.])
    """

    @cached_property
    def _score(self) -> tuple[Callable[[Tree, Tree, Tree], Tree], Reducer]:
        return reduce(self.losses, options=self.options), project(self.dim, self.seed, self.kind)

    def __call__(self, params: Tree, batch: Tree) -> Block:
        """`phi` [b, dim]."""
        score, reducer = self._score
        return {"phi": score(params, batch, reducer)}


def margins(losses: Losses) -> Losses:
    """The margins `log(p / (1 - p)) = -log(exp(loss) - 1)` from losses that are `-log p`: what TRAK takes gradients of.

    Example:
        >>> import torch
        >>> from funcghost.attribution import features
        >>> features.margins(lambda params, x: -torch.log(x))({}, torch.tensor([0.5, 0.75]))
        tensor([-0.0000, 1.0986])
    """

    def of(params: Tree, batch: Tree) -> Tensor:
        found: Tensor = losses(params, batch)
        return -(found.clamp(min=torch.finfo(found.dtype).tiny).expm1()).log()

    return of


@dataclass(frozen=True, eq=False)
class Trak(Features):
    """`phi`, the projected gradients of the margins, and `wrong`, one minus the probability, for losses `-log p`."""

    @cached_property
    def _score(self) -> tuple[Callable[[Tree, Tree, Tree], Tree], Reducer]:
        return reduce(margins(self.losses), options=self.options), project(self.dim, self.seed, self.kind)

    def __call__(self, params: Tree, batch: Tree) -> Block:
        """`phi` [b, dim] and `wrong` [b]."""
        score, reducer = self._score
        with torch.no_grad():
            wrong = -torch.expm1(-self.losses(params, batch))
        return {"phi": score(params, batch, reducer), "wrong": wrong}


@dataclass(frozen=True, eq=False)
class Sided(Features):
    """For each parameter by its name the projection of its rows and columns, [b, dim]; `kind` is not asked."""

    @cached_property
    def _score(self) -> tuple[Callable[[Tree, Tree, Tree], Tree], Reducer]:
        return reduce(self.losses, options=self.options), per_param(project(self.dim, self.seed, "kronecker"))

    def __call__(self, params: Tree, batch: Tree) -> Block:
        """[b, dim] by name."""
        score, reducer = self._score
        found: Block = score(params, batch, reducer)
        return found


@dataclass(frozen=True, eq=False)
class _Formed(Features):
    """Features of gradients that are formed first, and changed entry by entry."""

    dim: int | None  # type: ignore[assignment]

    @cached_property
    def _kept(self) -> Callable[[Tree, Tree], Tree]:
        return pairs(self.losses, options=self.options)

    @abstractmethod
    def changed(self, params: Params, gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Of gradients by name, [b, *shape]."""

    def __call__(self, params: Tree, batch: Tree) -> Block:
        """`phi` [b, dim], or all entries [b, p] where `dim` is None."""
        split, found = split_params(params), split_params(materialize(self._kept(params, batch)))
        changed = self.changed(split, dict(zip(found.names, found.leaves, strict=True)))
        if self.dim is None:
            return {"phi": torch.cat([leaf.reshape(len(leaf), -1) for leaf in changed.values()], 1)}
        reducer = project(self.dim, self.seed, self.kind)
        parts = [reducer.of_parameter(name, [Dense(leaf)]) for name, leaf in changed.items()]
        return {"phi": torch.stack(parts).sum(0)}


def adam_moved(
    gradients: Mapping[str, Tensor],
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    step: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = TINY,
) -> dict[str, Tensor]:
    """What Adam would move along on each gradient alone, [b, *shape] by name: `m' / (sqrt(v') + eps)`, without rate.

    `m' = (beta1 m + (1 - beta1) g) / (1 - beta1^step)`, likewise `v'`, for the moments before and the number of this
    step.

    Example:
        >>> import torch
        >>> from funcghost.attribution import features
        >>> none = {"w": torch.zeros(1)}
        >>> features.adam_moved({"w": torch.tensor([[2.0], [-3.0]])}, none, none, step=1)["w"].round(decimals=4)
        tensor([[ 1.],
                [-1.]])
    """
    rule = Adam(*betas, eps, weight_decay=0.0, decoupled=True, amsgrad=False, maximize=True)  # along it, not against
    before, rate = torch.tensor(step - 1.0, dtype=torch.float64), torch.ones((), dtype=torch.float64)
    moved = {}
    for name, gradient in gradients.items():
        slots = {"step": before, "lr": rate, "exp_avg": -first[name], "exp_avg_sq": second[name]}
        moved[name] = rule.moved(gradient, gradient, slots).move
    return moved


@dataclass(frozen=True, eq=False)
class Moved(_Formed):
    """Gradients as Adam would move along them (`adam_moved`), its moments before the step being trees like params."""

    first: Tree = field(kw_only=True)
    second: Tree = field(kw_only=True)
    step: int = field(kw_only=True)
    betas: tuple[float, float] = field(default=(0.9, 0.999), kw_only=True)
    eps: float = field(default=TINY, kw_only=True)

    def changed(self, params: Params, gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See `adam_moved`."""
        first, second = (
            dict(zip(params.names, match_direction(tree, params, what), strict=True))
            for tree, what in ((self.first, "first"), (self.second, "second"))
        )
        return adam_moved(gradients, first, second, self.step, self.betas, self.eps)


@dataclass(frozen=True, eq=False)
class Scaled(_Formed):
    """Gradients divided by the roots of `second`, a tree like params, or as they are where that is None."""

    second: Tree | None = field(default=None, kw_only=True)

    def changed(self, params: Params, gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Entry by entry."""
        if self.second is None:
            return gradients
        roots = dict(zip(params.names, match_direction(self.second, params, "second"), strict=True))
        return {name: leaf / (roots[name].sqrt() + TINY) for name, leaf in gradients.items()}
