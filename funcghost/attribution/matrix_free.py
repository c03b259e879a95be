"""The damped inverse of a whole Gauss-Newton matrix or Hessian by conjugate gradients, of many directions at once.

Nothing of the matrix is kept: it is a `product(direction) -> direction`, of the mean over n samples of all batches,

    gauss_newton   G = (1/n) sum_i J_i^T C_i J_i      J_i the derivative of outputs[i], C_i the Hessian of criterion
    hessian        H = (1/n) sum_i grad^2 losses[i]

and `conjugate_gradients` solves `(G + damping) x = v` to a residual that is asked for. With EK-FAC's inverse as the
preconditioner few steps do.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from funcghost.attribution.conjugate import ConjugateGradients, Solution
from funcghost.attribution.products import Leaves, Linear, Product, grads, pullback, summed_product
from funcghost.errors import InputError
from funcghost.problem import Losses, check_losses
from funcghost.trees import Params, Tree

__all__ = ["ConjugateGradients", "Product", "Solution", "conjugate_gradients", "gauss_newton", "hessian"]


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
        pulled = grads(found, leaves, dual, create_graph=True)

        def times(along: Leaves) -> list[Tensor]:
            moved = pullback(pulled, [dual], along)[0]
            bent = pullback([slope], [seen], [moved])[0]
            return pullback([found], leaves, [bent])

        return times, len(losses)

    return summed_product(linear, params, batches, hold)


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
        gradients = grads(values.sum(), leaves, None, create_graph=True)
        return (lambda along: pullback(gradients, leaves, along)), len(values)

    return summed_product(linear, params, batches, hold)


def conjugate_gradients(
    product: Product,
    damping: float,
    *,
    preconditioner: Callable[[Tree], Tree] | None = None,
    tolerance: float = 1e-5,
    most: int = 200,
) -> ConjugateGradients:
    """`precondition(direction) = (F + damping)^-1 direction` for the matrix of a `product`, by conjugate gradients.

    All directions of a stack take their steps together, each in the space that all of them have opened: many take far
    fewer steps than one alone. The residual `|v - (F + damping) x| / |v|` is brought below `tolerance`, or it is an
    error; `.solve(direction)` gives the residuals instead.

    Args:
        product: of `gauss_newton` or `hessian`.
        damping: above zero.
        preconditioner: near the inverse and positive definite, as `curvature.ekfac(...).damped(damping)`; it changes
            the number of steps alone.
        tolerance: of the residual.
        most: how many steps at most.

    Cost: in each step a product of the directions that are not done, and `10 k^2` for every parameter.

    Raises:
        InputError: the damping is not above zero, or a number is out of range.

    Example:
        >>> import torch
        >>> from funcghost.attribution import matrix_free
        >>> product = matrix_free.hessian(lambda p, x: (x * p["w"]).square(), {"w": torch.ones(())}, [torch.ones(3)])
        >>> matrix_free.conjugate_gradients(product, damping=2.0)({"w": torch.ones(())})
        {'w': tensor(0.2500)}

    Source: Hestenes, Stiefel (1952); O'Leary (1980), for many right sides; Martens, "Deep learning via Hessian-free
    optimization" (2010); Wang et al., "Better Training Data Attribution via Better Inverse Hessian-Vector Products"
    (arXiv 2507.14740), for EK-FAC as the preconditioner.
    """
    if not isinstance(product, Product):
        raise InputError(f"conjugate_gradients: takes a product of this module, found {type(product).__name__}.")
    if not isinstance(damping, int | float) or not 0 < damping < float("inf"):
        raise InputError(f"conjugate_gradients: damping must be a number above zero, found {damping!r}.")
    if not 0 < tolerance < 1 or type(most) is not int or most < 1:
        raise InputError("conjugate_gradients: tolerance must be between 0 and 1, and most a number of steps.")
    return ConjugateGradients(product, float(damping), preconditioner, tolerance, most)
