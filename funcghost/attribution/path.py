"""The account of a step: what each sample, and what the optimizer by itself, did to the validation loss.

A step takes the parameters w to `w' = update(w, G, state)`, G being the training gradient. By the fundamental theorem

    L(w') - L(w) = <V_bar, w' - w>,        V_bar = integral_0^1 grad L(w + s (w' - w)) ds,

and by the same theorem along the gradients from 0 to G (`funcghost.training.path_average`) the part of the step that
the gradient makes is shared out over the samples that G is the mean of. What is left is the `rest`: what momentum and
weight decay did. Nothing is linear here but G in the samples; no second derivative of the losses is taken.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import optree
import torch
from torch import Tensor

from funcghost.algebra.compression import compress
from funcghost.algebra.directions import as_dense, match_leaves, stack
from funcghost.algebra.tracking import track
from funcghost.attribution.passes import Passes, Taken
from funcghost.attribution.validation import Batches, Lookout, Sets, Validation, check_sets
from funcghost.engine.plans import Plan
from funcghost.errors import InputError
from funcghost.options import Options
from funcghost.problem import Losses, Reduction
from funcghost.training.by_rules import ByRules
from funcghost.training.path_average import Leaves, inner
from funcghost.training.update_kinds import Clipped, Credit, Function, Plain, Scheduled
from funcghost.training.updates import plain
from funcghost.trees import Params, Tree, match_direction, split_params, tensors

Rule = Literal["trapezoid", "simpson", "discrete"]
RULES: Mapping[str, tuple[float, ...]] = {
    "trapezoid": (1 / 2, 1 / 2),
    "simpson": (1 / 6, 2 / 3, 1 / 6),
    "discrete": (1 / 2, 1 / 2),
}
"""The weights of validation gradients at equal distances on the way."""


class Account(NamedTuple):
    """What a step did to the validation loss.

    `values` [b], or [b, k] for k validation sets, are the parts of the samples; `rest` and `change` are numbers, or
    [k]: what the optimizer did without these gradients, and the true change of the loss. `params` and `state` are those
    after the step; `after` is the next step's `before`; `grads` and `losses` [b] are those of the training step.
    `route` says how the batch was taken.
    """

    values: Tree
    rest: Tensor
    change: Tensor
    params: Tree
    state: Tree
    after: Validation
    grads: Tree
    losses: Tensor
    route: str


def along_path(
    losses: Losses,
    update: ByRules | Clipped | Scheduled | Plain | Function,
    *,
    rule: Rule = "trapezoid",
    credit: Credit = "step",
    reduction: Reduction = "mean",
    validation_losses: Losses | None = None,
    by: Callable[[Any], Any] | None = None,
    rank: int | None = None,
    tolerance: float = 1e-3,
    pairs_memory: int | None = None,
    options: Options | None = None,
    plan: Plan | None = None,
) -> Callable[..., Account]:
    """In-run values that account for the change of the validation loss by a step of any optimizer.

    `step(params, batch, *, state, validation, before=None) -> Account`, a pure function, with

        values[i] = 1/b <grad losses[i], A^T V_bar>         (b is 1 with reduction="sum")
        rest      = <V_bar, w' - w> - <V_bar, A G>
        change    = L(w') - L(w)

    where A is the Jacobian of the update in its gradient, averaged from no gradient to G: `A G = u(G) - u(0)`.

    Law, with `credit="step"`: `values.sum() + rest == change`, up to the quadrature of V_bar: of third order in the
    size of the step with the trapezoid, of fifth with Simpson's rule, and none with a discrete gradient. For SGD
    without momentum the values are those of `second_order` to third order in the learning rate. They are linear in the
    validation loss; a sample whose gradient is zero has the value 0; equal samples have equal values.

    With `credit="impulse"` a sample is credited with all that its gradient will ever move through the optimizer's
    memory, along the present V_bar and with the present denominators: for momentum 1 / (1 - momentum) of what it moves
    without one, for Adam the whole gradient in place of 1 - beta1 of it. Then `values.sum() + rest` is the change only
    because `rest` takes away again what has not been moved yet, and has what earlier gradients move now: of a whole run
    the values explain what the gradients did, and the rests add up to decay, and to what V_bar and denominators did
    not keep still.

    Args:
        losses: as in `fg.grad_and_reduce`, of the training batch.
        update: from `funcghost.training.updates`, or any pure and differentiable function
            `update(params, grads, state) -> (params, state)`.
        rule: "trapezoid" takes one validation gradient a step, at w', which is the next step's `before`; "simpson"
            another one in the middle. "discrete" takes those of the trapezoid, and moves their mean V along the step
            d = w' - w to the discrete gradient `V + (change - <V, d>) / <d, d> d`: at the same cost the law holds to
            the rounding of the losses, and each value to the trapezoid's order. Not for steps so small that the change
            is rounding.
        credit: see above.
        reduction: the training gradient that `update` is given is that of the mean or the sum of the losses.
        validation_losses: if they differ from the losses (no dropout, say).
        by: `fg.per_param` for values by parameter, or `fg.per_token` for [b, t]; their sums are the plain values.
        rank: validation gradients and directions of this rank, tracked from step to step (`fg.track`), which leaves out
            the products for a validation gradient and most of the contraction. The values are off by what is not of
            that rank, and so is their sum: compare it with `change`.
        tolerance: how far the sum of the values may be off `<V_bar, A G>`, relative to it, where A takes quadrature:
            for Muon and for functions of one's own. Elsewhere it is exact.
        pairs_memory: bytes of pairs that may be kept; without a limit by default. What does not fit is seen twice: a
            plain gradient first, and scored in a second pass, on the same random numbers. The first call measures how
            large pairs are; 0 keeps none.
        options: as in `fg.grad_and_reduce`.
        plan: as in `fg.grad_and_reduce`, for the training losses.

    The step takes `state` as the update does; `validation`, a list of batches, or a dict of such lists for several
    sets, whose results are columns in the order of the dict; and `before`, the `after` of the step before: without it
    the validation gradient at `params` is taken anew. `batch` may be `Microbatches([...])`.

    Units: those of the validation loss. Cost: 4/3 of a plain step, where pairs are kept, and a validation gradient, two
    with Simpson's rule; 2 plain steps in two passes. Memory: the pairs, or nothing of the size of activations in two
    passes; and validation gradients before and after, their mean, and the direction, each like `params`.

    Raises:
        InputError: an argument is not what it must be; the update changes shapes, writes into what it is given or does
            not repeat; `before` is of other sets.
        GhostError: the update is not smooth, see `tolerance`.

    Example:
        >>> import torch
        >>> from funcghost.attribution import in_run
        >>> from funcghost.training import updates
        >>> params = {"w": torch.tensor([1.0, 2.0], dtype=torch.float64)}
        >>> update, state = updates.of(torch.optim.SGD(params.values(), lr=0.1, momentum=0.9), params)
        >>> step = in_run.along_path(lambda p, x: (x @ p["w"]).square(), update, reduction="sum")
        >>> out = step(params, torch.eye(2, dtype=torch.float64), state=state, validation=[params["w"][None]])
        >>> out.values, float(out.change)
        (tensor([-1.8000, -7.2000], dtype=torch.float64), -9.0)

    Source: Wang, Mittal, Song, Jia, "Data Shapley in One Training Run" (arXiv 2406.11011), for values of steps; Aumann,
    Shapley, "Values of Non-Atomic Games" (1974); Sundararajan, Taly, Yan (arXiv 1703.01365), for shares along a path;
    Gonzalez, "Time Integration and Discrete Hamiltonian Systems" (1996), for discrete gradients.
    """
    if rule not in RULES:
        raise InputError(f"along_path: rule must be one of {[*RULES]}, found {rule!r}.")
    if credit not in ("step", "impulse"):
        raise InputError(f"along_path: credit must be 'step' or 'impulse', found {credit!r}.")
    if reduction not in ("mean", "sum"):
        raise InputError(f"along_path: reduction must be 'mean' or 'sum', found {reduction!r}.")
    if not isinstance(tolerance, int | float) or not tolerance > 0:
        raise InputError(f"along_path: tolerance must be a positive number, found {tolerance!r}.")
    for name, count, least in (("rank", rank, 1), ("pairs_memory", pairs_memory, 0)):
        if count is not None and (type(count) is not int or count < least):
            raise InputError(f"along_path: {name} must be a whole number of {least} or more, or None, found {count!r}.")
    if rule == "discrete" and rank is not None:
        raise InputError(
            "along_path: rule='discrete' makes the sum law hold by what is left, and with a rank this would hide what "
            "is not of that rank. Use rule='trapezoid', or no rank."
        )
    known = isinstance(update, ByRules | Clipped | Scheduled | Plain)
    settings = Settings(rule, credit, tolerance, rank)
    lookout = Lookout(validation_losses or losses, rank, options)
    passes = Passes(losses, by or (lambda reducer: reducer), reduction, pairs_memory, options, plan)
    return Path(update if known else plain(update), settings, lookout, passes).step


@dataclass(frozen=True)
class Settings:
    """The arguments of `along_path`."""

    rule: Rule
    credit: Credit
    tolerance: float
    rank: int | None


class Looks(Protocol):
    """What takes losses and gradients of validation sets."""

    def at(self, params: Params, sets: Sequence[Batches], previous: Validation | None) -> Validation:
        """At these parameters; `previous` is from near them."""


class Sees(Protocol):
    """What sees a batch twice: for its gradient, and for the products of its samples once the step is known."""

    def first(self, params: Params, batch: Tree) -> Taken:
        """The training gradient, and what is left to be known of the batch."""

    def second(self, params: Params, taken: Taken, along: Tree) -> Tree:
        """The products of all samples with the direction, in units of the training gradient."""


class Path:
    """The step of `along_path`; what it keeps between calls are plans, and that the update was seen to repeat."""

    def __init__(
        self,
        update: Any,
        settings: Settings,
        lookout: Looks,
        passes: Sees,
        product: Callable[[Leaves, Leaves], Tensor] = inner,
    ) -> None:
        self.update, self.settings, self.lookout, self.passes = update, settings, lookout, passes
        self.product = product
        self.repeats = not isinstance(update, Plain)

    def step(
        self, params: Tree, batch: Tree, *, state: Tree, validation: Sets, before: Validation | None = None
    ) -> Account:
        """The function that `along_path` returns."""
        split = split_params(params)
        split = Params(split.names, tuple(leaf.detach() for leaf in split.leaves), split.spec)
        sets = check_sets(validation)
        if before is not None:
            _check_before(before, split, len(sets))
        taken = self.passes.first(split, batch)
        grads, tree = taken.grads, split.rebuild(taken.grads)
        after, new_state = self._updated(split, tree, state)
        here = before or self.lookout.at(split, sets, None)
        there = self.lookout.at(after, sets, here)
        moves = [new - old for new, old in zip(after.leaves, split.leaves, strict=True)]
        slopes = self._mean_slopes(split, moves, sets, here, there)
        with torch.no_grad():
            shared = self.update.share(split, grads, state, slopes, self.settings.credit, self.settings.tolerance)
            rest = torch.stack([self.product(v, moves) - parts for v, parts in zip(slopes, shared.parts, strict=True)])
            del slopes, moves
        along = self._directions(split, grads, shared.along, here.along)
        one = not isinstance(validation, Mapping)
        values = self.passes.second(split, taken, along[0] if one else stack(along))
        change = there.loss - here.loss
        kept = there._replace(along=along if self.settings.rank else None).squeezed(validation)
        return Account(
            values,
            rest[0] if one else rest,
            change[0] if one else change,
            after.rebuild(after.leaves),
            new_state,
            kept,
            tree,
            taken.losses,
            taken.route,
        )

    def _updated(self, params: Params, grads: Tree, state: Tree) -> tuple[Params, Tree]:
        """The parameters and the state after the step, with all that a function of the user's has to keep."""
        given = [*params.leaves, *tensors(grads), *tensors(state)]
        versions = [tensor._version for tensor in given]
        tree = params.rebuild(params.leaves)
        with torch.no_grad():
            found = self.update(tree, grads, state)
            if not isinstance(found, tuple) or len(found) != 2:
                raise InputError(f"update: must return (params, state), found {type(found).__name__}.")
            after = match_direction(found[0], params, "update(...)[0]")
            again = None if self.repeats else match_direction(self.update(tree, grads, state)[0], params)
        if versions != [tensor._version for tensor in given]:
            raise InputError("update: must be pure, and has written into its params, grads or state. Return new ones.")
        if again is not None and not all(map(_same, after, again)):
            raise InputError("update: must be pure, and gave other params from the same arguments a second time.")
        self.repeats = True
        return Params(params.names, tuple(leaf.detach() for leaf in after), params.spec), found[1]

    def _mean_slopes(
        self, params: Params, moves: Leaves, sets: Sequence[Any], here: Validation, there: Validation
    ) -> list[list[Tensor]]:
        """`V_bar` for every set."""
        points = [here, there]
        if self.settings.rule == "simpson":
            middle = tuple(leaf + move / 2 for leaf, move in zip(params.leaves, moves, strict=True))
            points.insert(1, self.lookout.at(Params(params.names, middle, params.spec), sets, here))
        found, changes = [], (there.loss - here.loss).reshape(-1)
        for place in range(len(sets)):
            trees = [[as_dense(leaf) for leaf in optree.tree_leaves(point.gradients[place])] for point in points]
            found.append(mean_slope(self.settings.rule, trees, moves, changes[place], self.product))
        return found

    def _directions(
        self, params: Params, grads: list[Tensor], along: list[list[Tensor]], last: tuple[Tree, ...] | None
    ) -> tuple[Tree, ...]:
        """What the samples are contracted with: as it is, or at the rank asked for."""
        if self.settings.rank is None:
            return tuple(params.rebuild(leaves) for leaves in along)
        # Where no sample has a gradient, the share may be as large as 1 / eps, and is not worth a rank.
        masked = [[torch.where(g == 0, 0, leaf) for g, leaf in zip(grads, leaves, strict=True)] for leaves in along]
        trees = [params.rebuild(leaves) for leaves in masked]
        if last is None:
            return tuple(compress(tree, rank=self.settings.rank) for tree in trees)
        return tuple(track(tree, old) for tree, old in zip(trees, last, strict=True))


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def mean_slope(
    rule: Rule,
    points: Sequence[Sequence[Tensor]],
    moves: Leaves,
    change: Tensor,
    product: Callable[[Leaves, Leaves], Tensor] = inner,
) -> list[Tensor]:
    """`V_bar` by a rule, from the gradients at the points of a step of these moves, which made this change."""
    found = [_mixed(leaves, RULES[rule]) for leaves in zip(*points, strict=True)]
    if rule != "discrete":
        return found
    size, off = product(moves, moves), change - product(found, moves)
    scale = torch.where(size > 0, off / size, 0)  # no step, no change
    return [slope.add_(scale.to(slope.dtype) * move) for slope, move in zip(found, moves, strict=True)]


def _mixed(leaves: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum of tensors."""
    total = weights[0] * leaves[0]
    for leaf, weight in zip(leaves[1:], weights[1:], strict=True):
        total.add_(leaf, alpha=weight)
    return total


def _check_before(before: Any, params: Params, count: int) -> None:
    if not isinstance(before, Validation) or len(before.gradients) != count:
        found = f"of {len(before.gradients)} sets" if isinstance(before, Validation) else type(before).__name__
        raise InputError(f"before: must be the `after` of the step before, of {count} validation sets, found {found}.")
    for gradient in before.gradients:
        match_leaves(gradient, params, "before")
