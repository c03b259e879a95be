"""The damped inverse of a whole Gauss-Newton matrix or Hessian by conjugate gradients, of many directions at once.

Nothing of the matrix is kept: it is a `product(direction) -> direction`, of the mean over n samples of all batches,

    gauss_newton   G = (1/n) sum_i J_i^T C_i J_i      J_i the derivative of outputs[i], C_i the criterion's Hessian in
    them hessian        H = (1/n) sum_i grad^2 losses[i]

and `conjugate_gradients` solves `(G + damping) x = v` to a residual that is asked for. With EK-FAC's inverse as the
preconditioner few steps do.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from funcghost.attribution.batches import check_batches, stacked
from funcghost.attribution.inverses import blank
from funcghost.errors import InputError
from funcghost.ops.tangent import differentiable_kernels
from funcghost.problem import Losses, check_losses
from funcghost.trees import Params, Tree, split_params

Leaves = Sequence[Tensor]
Linear = Callable[[Leaves], list[Tensor]]
"""From directions [k, *shape] to their products, summed over the samples of a batch."""


@dataclass(frozen=True, eq=False)
class Product:
    """`product(direction)`: a symmetric matrix over all parameters, times one direction or each of a stack.

    `parts` makes, for every batch, a linear function and the number of its samples; `held` are those that are kept.
    """

    params: Params
    parts: Callable[[], Iterator[tuple[Linear, int]]]

    def __call__(self, direction: Tree) -> Tree:
        """The product with a tree like params, or with leaves [k, *shape]."""
        leaves, many = stacked(direction, self.params)
        found = self.of_leaves(leaves)
        return self.params.rebuild(found if many is not None else [leaf.squeeze(0) for leaf in found])

    def of_leaves(self, leaves: Leaves) -> list[Tensor]:
        """The products with k directions, [k, *shape]."""
        total, count = [torch.zeros_like(leaf) for leaf in leaves], 0
        for linear, samples in self.parts():
            total = [a + b for a, b in zip(total, linear(leaves), strict=True)]
            count += samples
        if not count:
            raise InputError("matrix_free: the batches have no samples.")
        return [leaf / count for leaf in total]


def gauss_newton(
    outputs: Callable[[Tree, Tree], Tensor],
    criterion: Callable[[Tensor, Tree], Tensor],
    params: Tree,
    batches: Iterable[Tree],
    *,
    hold: bool = False,
) -> Product:
    """The Gauss-Newton matrix of the losses `criterion(outputs(params, batch), batch)`.

    Positive semidefinite where the criterion is convex in the outputs, as cross-entropy and squared errors are.

    Args:
        outputs: `outputs(params, batch)` gives a tensor, samples in front.
        criterion: `criterion(outputs, batch)` gives the losses [b].
        params: a tree of parameters.
        batches: a list of batches, or a loader.
        hold: whether to keep the graphs of all batches between products, which saves a forward and a backward in each.

    Cost: of a product with k directions, for every batch a forward and a backward, and k times two backwards.

    Raises:
        InputError: (when used) an argument is not what it must be.

    Example:
        >>> import torch
        >>> from funcghost.attribution import matrix_free
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> product = matrix_free.gauss_newton(
        ...     lambda p, x: x @ p["w"], lambda out, x: out.square() / 2, {"w": torch.zeros(2)}, [x]
        ... )
        >>> product({"w": torch.ones(2)})
        {'w': tensor([0.5000, 2.0000])}

    Source: Schraudolph, "Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent" (2002).
    """

    def linear(split: Params, batch: Tree) -> tuple[Linear, int]:
        leaves = [leaf.detach().requires_grad_() for leaf in split.leaves]
        found = outputs(split.rebuild(leaves), batch)
        if not isinstance(found, Tensor) or not found.is_floating_point():
            raise InputError(f"gauss_newton: outputs must give a floating tensor, found {type(found).__name__}.")
        seen = found.detach().requires_grad_()
        losses = criterion(seen, batch)
        check_losses(losses)
        (slope,) = torch.autograd.grad(losses.sum(), seen, create_graph=True)
        # The pullback is linear in `dual`, hence its own pullback is the derivative of the outputs.
        dual = torch.zeros_like(found, requires_grad=True)
        pulled = _grads(found, leaves, dual, create_graph=True)

        def times(along: Leaves) -> list[Tensor]:
            moved = _pullback(pulled, [dual], along)[0]
            bent = _pullback([slope], [seen], [moved])[0]
            return _pullback([found], leaves, [bent])

        return times, len(losses)

    return _product(linear, params, batches, hold)


def hessian(losses: Losses, params: Tree, batches: Iterable[Tree], *, hold: bool = False) -> Product:
    """The Hessian of the mean loss. Not positive semidefinite in general: damp it by more than its least eigenvalue.

    Arguments, cost and errors as in `gauss_newton`.

    Example:
        >>> import torch
        >>> from funcghost.attribution import matrix_free
        >>> product = matrix_free.hessian(lambda p, x: (x * p["w"]).square(), {"w": torch.ones(())}, [torch.ones(3)])
        >>> product({"w": torch.ones(())})
        {'w': tensor(2.)}
    """

    def linear(split: Params, batch: Tree) -> tuple[Linear, int]:
        leaves = [leaf.detach().requires_grad_() for leaf in split.leaves]
        values = losses(split.rebuild(leaves), batch)
        check_losses(values)
        gradients = _grads(values.sum(), leaves, None, create_graph=True)
        return (lambda along: _pullback(gradients, leaves, along)), len(values)

    return _product(linear, params, batches, hold)


def _product(
    linear: Callable[[Params, Tree], tuple[Linear, int]], params: Tree, batches: Iterable[Tree], hold: bool
) -> Product:
    split, batches = split_params(params), check_batches("matrix_free: batches", batches)
    held: list[tuple[Linear, int]] = []

    def parts() -> Iterator[tuple[Linear, int]]:
        if held:
            yield from held
            return
        for batch in batches:
            with torch.enable_grad(), differentiable_kernels():
                made = linear(split, batch)
                if hold:
                    held.append(made)
                yield made

    return Product(split, parts)


def _grads(output: Tensor, leaves: Leaves, dual: Tensor | None, create_graph: bool) -> list[Tensor]:
    if not output.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return list(
        torch.autograd.grad(output, leaves, dual, create_graph=create_graph, allow_unused=True, materialize_grads=True)
    )


def _pullback(outputs: Leaves, inputs: Leaves, cotangents: Leaves) -> list[Tensor]:
    """Of k cotangents, [k, *shape] each."""
    k = len(cotangents[0])
    pairs = [(out, u) for out, u in zip(outputs, cotangents, strict=True) if out.requires_grad]
    if not pairs:
        return [leaf.new_zeros((k, *leaf.shape)) for leaf in inputs]
    outs, rows = [out for out, _ in pairs], [u for _, u in pairs]
    if k == 1:
        found = torch.autograd.grad(outs, inputs, [u[0] for u in rows], retain_graph=True, allow_unused=True)
    else:
        found = torch.autograd.grad(outs, inputs, rows, retain_graph=True, allow_unused=True, is_grads_batched=True)
    lead = (k,)
    return [
        leaf.new_zeros((*lead, *leaf.shape)) if g is None else g.detach().reshape(*lead, *leaf.shape)
        for g, leaf in zip(found, inputs, strict=True)
    ]


class Solution(NamedTuple):
    """What was found: the direction, the norms of the residuals relative to those of the right sides, and the steps."""

    direction: Tree
    residuals: Tensor
    steps: int


@dataclass(frozen=True, eq=False)
class ConjugateGradients:
    """See `conjugate_gradients`."""

    product: Product
    damping: float
    preconditioner: Callable[[Tree], Tree] | None
    tolerance: float
    most: int

    def __call__(self, direction: Tree) -> Tree:
        """`(F + damping)^-1 v`, of one direction or of each of a stack.

        Raises:
            InputError: the residual asked for was not reached; or the matrix is not positive definite.
        """
        found = self.solve(direction)
        worst = float(found.residuals.max())
        if not worst <= self.tolerance:
            raise InputError(
                f"conjugate_gradients: after {found.steps} steps the residual is {worst:.2g}, and {self.tolerance:.2g} "
                "was asked for. Pass a larger most=, damping= or tolerance=, a preconditioner=, or params in float64; "
                "solve(...) gives what was found."
            )
        return found.direction

    def solve(self, direction: Tree) -> Solution:
        """As a call, whatever the residual is, which is told."""
        params = blank(self.product.params)
        right, many = stacked(direction, params)
        k = len(right[0])
        x, r = [torch.zeros_like(leaf) for leaf in right], list(right)
        size = _products(right, right).sqrt()
        scale = torch.where(size > 0, size, 1)
        z = self._preconditioned(params, r)
        p, rz, steps = z, _products(r, z), 0
        residuals = size / scale
        while steps < self.most and bool((residuals > self.tolerance).any()):
            bent = self.product.of_leaves(p)
            bent = [a + self.damping * b for a, b in zip(bent, p, strict=True)]
            curved = _products(p, bent)
            active = residuals > self.tolerance
            if bool((active & ~(curved > 0)).any()):
                raise InputError(
                    f"conjugate_gradients: the matrix plus damping={self.damping} is not positive definite. Raise the "
                    "damping, or use gauss_newton in place of hessian."
                )
            alpha = torch.where(active, rz / torch.where(active, curved, 1), 0)
            x = [a + _by(alpha, b) for a, b in zip(x, p, strict=True)]
            r = [a - _by(alpha, b) for a, b in zip(r, bent, strict=True)]
            z = self._preconditioned(params, r)
            now = _products(r, z)
            beta = torch.where(active & (rz > 0), now / torch.where(rz > 0, rz, 1), 0)
            p, rz = [a + _by(beta, b) for a, b in zip(z, p, strict=True)], now
            residuals, steps = _products(r, r).sqrt() / scale, steps + 1
        found = x if many is not None else [leaf.squeeze(0) for leaf in x]
        return Solution(params.rebuild(found), residuals if many is not None else residuals.reshape(k), steps)

    def _preconditioned(self, params: Params, leaves: list[Tensor]) -> list[Tensor]:
        if self.preconditioner is None:
            return leaves
        return stacked(self.preconditioner(params.rebuild(leaves)), params)[0]


def _products(a: Leaves, b: Leaves) -> Tensor:
    """`<a_k, b_k>` in float64, [k]."""
    terms = [(x.double() * y.double()).reshape(len(x), -1).sum(1) for x, y in zip(a, b, strict=True)]
    return torch.stack(terms).sum(0)


def _by(factors: Tensor, leaf: Tensor) -> Tensor:
    return leaf * factors.to(leaf.dtype).view(-1, *[1] * (leaf.dim() - 1))


def conjugate_gradients(
    product: Product,
    damping: float,
    *,
    preconditioner: Callable[[Tree], Tree] | None = None,
    tolerance: float = 1e-5,
    most: int = 200,
) -> ConjugateGradients:
    """`precondition(direction) = (F + damping)^-1 direction` for the matrix of a `product`, by conjugate gradients.

    All directions of a stack take their steps together; one that is done rests. The residual `|v - (F + damping) x| /
    |v|` is brought below `tolerance`, or it is an error; `.solve(direction)` gives the residuals instead.

    Args:
        product: of `gauss_newton` or `hessian`.
        damping: above zero.
        preconditioner: near the inverse and positive definite, as `curvature.ekfac(...).damped(damping)`; it changes
        the
            number of steps alone.
        tolerance: of the residual.
        most: how many steps at most.

    Cost: a product of all directions in each step.

    Raises:
        InputError: the damping is not above zero, or a number is out of range.

    Example:
        >>> import torch
        >>> from funcghost.attribution import matrix_free
        >>> product = matrix_free.hessian(lambda p, x: (x * p["w"]).square(), {"w": torch.ones(())}, [torch.ones(3)])
        >>> matrix_free.conjugate_gradients(product, damping=2.0)({"w": torch.ones(())})
        {'w': tensor(0.2500)}

    Source: Hestenes, Stiefel (1952); Martens, "Deep learning via Hessian-free optimization" (2010); Wang et al.,
    "Better Training Data Attribution via Better Inverse Hessian-Vector Products" (arXiv 2507.14740), for EK-FAC as the
    preconditioner.
    """
    if not isinstance(product, Product):
        raise InputError(f"conjugate_gradients: takes a product of this module, found {type(product).__name__}.")
    if not isinstance(damping, int | float) or not 0 < damping < float("inf"):
        raise InputError(f"conjugate_gradients: damping must be a number above zero, found {damping!r}.")
    if not 0 < tolerance < 1 or type(most) is not int or most < 1:
        raise InputError("conjugate_gradients: tolerance must be between 0 and 1, and most a number of steps.")
    return ConjugateGradients(product, float(damping), preconditioner, tolerance, most)
