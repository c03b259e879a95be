"""Why scores may not add up: what the graph of the losses, and its backward, say about it."""

from typing import Any

import torch
from torch import Tensor

from funcghost.dtypes import wide
from funcghost.laws.draws import TOLERANCE, sample_weights
from funcghost.problem import Problem, backward, graph_nodes
from funcghost.side_effects import untouched
from funcghost.trees import as_whole

ANY = (
    "They are used where neither a torch function mode nor the graph of autograd shows how (inside a custom autograd "
    "Function whose backward detaches what it returns or is not linear in the incoming gradient; in a Function or a "
    "derivative under torch.func.vmap), their gradient is changed by a hook that is not linear, or an op's rule is "
    "wrong. Call ordinary torch ops on these parameters, out of place; take derivatives of the whole batch, or in a "
    "loop, with torch.autograd.grad(..., create_graph=True); take the hook off; correct the rule given to "
    "fg.register_rule; or leave them out of params."
)


def causes(problem: Problem, precision: torch.dtype) -> str:
    """What is likely to be the cause, and what to do: by the kinds of nodes in the graph of the losses.

    A node that may be the cause need not be it: it is where to look first.
    """
    with untouched(problem.devices()):
        leaves = problem.leaves()
        losses, _ = problem.evaluate(leaves)
        nodes = list(graph_nodes(losses))
        weights = sample_weights(losses)
        once = [as_whole(gradient) for gradient in backward(losses, leaves, weights, keep_graph=True)]
        thrice = [as_whole(gradient) for gradient in backward(losses, leaves, 3 * weights)]
    if not all(_is_multiple(a, b, TOLERANCE[precision]) for a, b in zip(once, thrice, strict=True)):
        return (
            "The backward of the losses is not linear: three times the cotangent does not give three times the "
            "gradient. A hook changes gradients by their values (`register_hook` with a clamp), or a Function does. "
            "Leave it out of the losses, and do to the gradients of the step what it does."
        )
    said = []
    own = sorted({type(node).__name__.removesuffix("Backward") for node in nodes if _is_own(node)})
    if own:
        said.append(
            f"There are custom autograd Functions, {own[:5]}, of which the backward alone is seen: it must not hide "
            "how it depends on the incoming gradient (by detach or NumPy). Write it with torch ops that autograd can "
            "follow, or call ordinary torch ops in place of the Function."
        )
    if any("Sparse" in node.name() or "sparse" in node.name() for node in nodes):
        said.append(
            "There are sparse tensors, of which torch does not show all ops: gather and add rows, "
            "`out.index_add(0, row, value[:, None] * x[column])`, instead of a product with a sparse matrix."
        )
    return " ".join([*said, ANY if not said else "Or leave them out of params."])


def _is_own(node: Any) -> bool:
    """Whether a node is that of a Function in Python that is not ours."""
    function = getattr(type(node), "_forward_cls", None)
    return function is not None and not function.__module__.startswith(("funcghost.", "torch."))


def _is_multiple(once: Tensor, thrice: Tensor, tolerance: float) -> bool:
    off, size = (wide(thrice) / 3 - wide(once)).abs(), wide(once).abs()
    return not off.numel() or not bool(off.max() > 16 * tolerance * size.max())
