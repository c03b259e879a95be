"""In-Run Data Shapley: what each sample of a training batch did to the validation loss in this very step.

Wang, Mittal, Song, Jia, "Data Shapley in One Training Run" (arXiv 2406.11011). The utility of a subset S of the batch
is the change of the validation loss by a step on S,

    U(S) = l_val(w - eta sum_{j in S} grad l_j) - l_val(w),

and its Shapley values are, to first and to second order in eta,

    phi_i = - eta <grad l_val, grad l_i>                                                     (first order)
    phi_i = - eta <grad l_val, grad l_i> + eta^2 / 2 <grad l_i, H_val sum_j grad l_j>         (second order)

They sum to the change of the validation loss by the step on the whole batch, to that order. Hence a sample with a
negative value has lowered the validation loss: it helped. The values of a run are the sums over its steps.

With `reduction="mean"` the step is `w - lr mean_j grad l_j`, so `eta = lr / b`; with "sum" `eta = lr`. An elementwise
preconditioner P (Adam's `1 / (sqrt(v_hat) + eps)`, held as it is before the step) makes the step `w - lr P * grad`:
every direction above is then multiplied by P.

Both are about the gradient's part of a step that is linear in it. `along_path` accounts for the whole step of any
optimizer, to higher order and at the price of first order: use it where the step is known. The others take a direction
as it is, and serve as its reference.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from funcghost.algebra.directions import Stack
from funcghost.attribution.passes import Microbatches
from funcghost.attribution.path import Account, along_path
from funcghost.attribution.validation import Validation, check_batches, some, validation_at, validation_gradient
from funcghost.engine.plans import Plan
from funcghost.errors import InputError
from funcghost.ops.tangent import differentiable_kernels
from funcghost.options import Options
from funcghost.problem import Losses, Problem, Reduction, backward
from funcghost.reducers.dots import dot
from funcghost.transforms.steps import Step, grad_and_reduce, reduce
from funcghost.trees import Params, Tree, in_short, match_direction, split_params

__all__ = [
    "Account",
    "Microbatches",
    "Validation",
    "Values",
    "along_path",
    "first_order",
    "hessian_vector_product",
    "second_order",
    "validation_at",
    "validation_gradient",
]


class Values(NamedTuple):
    """In-run values [b] of a batch, their first-order part [b], and the step's training gradient and losses [b]."""

    values: Tensor
    first: Tensor
    grads: Tree
    losses: Tensor

    def __repr__(self) -> str:
        """The fields in short: tensors by their shapes."""
        return in_short(self)


def hessian_vector_product(losses: Losses, params: Tree, batches: Sequence[Tree], vector: Tree) -> Tree:
    """`H v` for the Hessian H of the mean validation loss, as in `validation_gradient`.

    Forward over reverse (`torch.func.jvp` of the gradient); reverse over reverse where an op has no forward derivative.
    Cost: two to three times that of the gradient.

    Raises:
        InputError: there is no batch, or `vector` is not a tree like params.

    Example:
        >>> import torch
        >>> from funcghost.attribution import in_run
        >>> p, v = {"w": torch.zeros(2)}, {"w": torch.tensor([1.0, 2.0])}
        >>> in_run.hessian_vector_product(lambda p, x: (x @ p["w"]).square(), p, [torch.eye(2)], v)["w"]
        tensor([1., 2.])
    """
    split = split_params(params)
    along = match_direction(vector, split, "vector")
    total, count = [torch.zeros_like(leaf, requires_grad=False) for leaf in split.leaves], 0
    for batch in check_batches(batches):
        product, samples = _hvp(Problem(losses, split, batch), along)
        total = [a + b for a, b in zip(total, product, strict=True)]
        count += samples
    return split.rebuild([leaf / some(count) for leaf in total])


def first_order(
    losses: Losses,
    *,
    reduction: Reduction = "mean",
    compress: Callable[[Tree], Tree] | None = None,
    options: Options | None = None,
    plan: Plan | None = None,
) -> Callable[..., Values]:
    """First-order in-run values, in the same forward and backward as the training gradient.

    `step(params, batch, *, lr, validation=None, direction=None, preconditioner=None) -> Values`, with
    `values[i] = -eta <grad losses[i], P * V>`.

    Args:
        losses: as in `fg.grad_and_reduce`.
        reduction: of the training loss; sets `eta` (see the module).
        compress: makes `P * V` cheaper before it is contracted, at a cost in precision, as
            `functools.partial(fg.compress, rank=16)` does; called at every step, because P changes.
        options: as in `fg.grad_and_reduce`.
        plan: as in `fg.grad_and_reduce`.

    The step takes either `validation`, a list of batches, or `direction`, their gradient V kept from before
    (`validation_gradient`); `preconditioner` is a tree like params. Without one, a direction may be whatever `fg.dot`
    takes for one, `fg.track(...)` or the `fg.Pairs` of validation samples (whose direction is the sum, not the mean).

    Units: those of the validation loss. Cost: that of `fg.dot`, and of the validation gradient if it is not given.

    Raises:
        InputError: both or neither of validation and direction are given, or a tree does not fit params.

    Example:
        >>> import torch
        >>> from funcghost.attribution import in_run
        >>> step = in_run.first_order(lambda p, x: (x @ p["w"]).square(), reduction="sum")
        >>> step({"w": torch.tensor([1.0, 2.0])}, torch.eye(2), lr=0.1, validation=[torch.ones(1, 2)]).values
        tensor([-1.2000, -2.4000])
    """
    score = grad_and_reduce(losses, reduction=reduction, options=options, plan=plan)

    def step(
        params: Tree,
        batch: Tree,
        *,
        lr: float,
        validation: Sequence[Tree] | None = None,
        direction: Tree | None = None,
        preconditioner: Tree | None = None,
    ) -> Values:
        if (validation is None) == (direction is None):
            raise InputError("first_order: pass either validation=[batches] or direction=their gradient.")
        split = split_params(params)
        value = direction if validation is None else validation_gradient(losses, params, validation)
        along = value
        if preconditioner is not None or isinstance(value, Stack):  # needs one dense direction, and says so
            along = split.rebuild(_scaled(split, match_direction(value, split), preconditioner))
        out = score(params, batch, dot(compress(along) if compress else along))
        first = -_eta(lr, reduction, out) * out.reduced
        return Values(first, first, out.grads, out.losses)

    return step


def second_order(
    losses: Losses,
    *,
    reduction: Reduction = "mean",
    compress: Callable[[Tree], Tree] | None = None,
    options: Options | None = None,
    plan: Plan | None = None,
) -> Callable[..., Values]:
    """Second-order in-run values: the sum of a batch follows the true change of the validation loss more closely.

    `step(params, batch, *, lr, validation, direction=None, preconditioner=None) -> Values`, with
    `values[i] = <grad losses[i], P * (-eta V + eta^2/2 H_val (P * sum_j grad_j))>` and `first` its first-order part.

    Arguments and units as in `first_order`; `validation` is needed for the Hessian, also where `direction` is given.
    `compress` is about the first-order part: the Hessian's direction is another at every step, and is taken as it is.

    Cost: a training step with `fg.dot`, a Hessian-vector product on the validation batches, and a scoring pass: the
    product needs the batch's gradient before the samples can be contracted with it.

    Raises:
        InputError: a tree does not fit params, or there is no validation batch.

    Example:
        >>> import torch
        >>> from funcghost.attribution import in_run
        >>> step = in_run.second_order(lambda p, x: (x @ p["w"]).square(), reduction="sum")
        >>> step({"w": torch.tensor([1.0, 2.0])}, torch.eye(2), lr=0.1, validation=[torch.ones(1, 2)]).values
        tensor([-1.0800, -2.1600])
    """
    train = first_order(losses, reduction=reduction, compress=compress, options=options, plan=plan)
    curve = reduce(losses, options=options, plan=plan)

    def step(
        params: Tree,
        batch: Tree,
        *,
        lr: float,
        validation: Sequence[Tree],
        direction: Tree | None = None,
        preconditioner: Tree | None = None,
    ) -> Values:
        split = split_params(params)
        if direction is None:
            direction = validation_gradient(losses, params, validation)
        out = train(params, batch, lr=lr, direction=direction, preconditioner=preconditioner)
        move = split.rebuild(_scaled(split, match_direction(out.grads, split, "grads"), preconditioner))
        bend = match_direction(hessian_vector_product(losses, params, validation, move), split)
        samples = out.losses.shape[0]
        # grads is the sum of the samples' gradients, or their mean: eta^2 sum_j = (lr / b) lr mean_j.
        half = 0.5 * lr * (lr / samples if reduction == "mean" and samples else lr)
        second = half * curve(params, batch, dot(split.rebuild(_scaled(split, bend, preconditioner))))
        return Values(out.values + second, out.values, out.grads, out.losses)

    return step


def _eta(lr: float, reduction: Reduction, out: Step) -> float:
    samples = out.losses.shape[0]
    return lr / samples if reduction == "mean" and samples else lr


def _scaled(params: Params, leaves: Sequence[Tensor], preconditioner: Tree | None) -> list[Tensor]:
    if preconditioner is None:
        return list(leaves)
    scales = match_direction(preconditioner, params, "preconditioner")
    return [leaf * scale for leaf, scale in zip(leaves, scales, strict=True)]


def _hvp(problem: Problem, along: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    """`H v` of the summed losses of one batch, and the number of its samples."""
    samples = 0

    def total(leaves: list[Tensor]) -> Tensor:
        nonlocal samples
        values, _ = problem.evaluate(leaves)
        samples = values.shape[0]
        return values.sum()

    leaves = [leaf.detach() for leaf in problem.params.leaves]
    with differentiable_kernels():
        try:
            product = torch.func.jvp(torch.func.grad(total), (leaves,), (list(along),))[1]
        except RuntimeError:
            return _reverse_over_reverse(problem, along)
    return [leaf.detach() for leaf in product], samples


def _reverse_over_reverse(problem: Problem, along: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    leaves = problem.leaves()
    values, _ = problem.evaluate(leaves)
    gradients = torch.autograd.grad(values.sum(), leaves, create_graph=True, allow_unused=True)
    products = [(g * v).sum() for g, v in zip(gradients, along, strict=True) if g is not None and g.requires_grad]
    total = torch.stack(products).sum() if products else values.new_zeros(())
    return backward(total, leaves, torch.ones_like(total)), values.shape[0]
