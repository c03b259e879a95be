"""Which training gradients are sums of gradients that a reducer forms sample by sample: autograd takes no others then.

On long sequences norms and Gram matrices are the cheapest by way of the gradients themselves, at the FLOPs of the
weight gradient of a plain step: a fourth product where that is taken as well, and none where it is their sum.
"""

import torch
from torch import Tensor

from funcghost.control_flow import is_traced
from funcghost.engine.hooks import is_hooked
from funcghost.engine.plans import Plan
from funcghost.problem import Problem

LEAST = 2**12
"""Of fewer entries, a gradient takes less time than it takes to think about it."""


def summed_over_samples(problem: Problem, plan: Plan) -> frozenset[int]:
    """The numbers of the parameters of which the plan says that their gradients are formed, for all of its reducers.

    None where ranks share the parameters, within a transform or while a graph is traced; not those whose gradient may
    be sparse, or has a hook.
    """
    transformed = torch._C._functorch.maybe_current_level() is not None
    if not plan.contractions or transformed or is_traced() or problem.in_step or problem.is_meta():
        return frozenset()
    routes: dict[str, set[str]] = {}
    for contraction in plan.contractions:
        routes.setdefault(contraction.parameter, set()).add(contraction.route)
    dense = {name for site in plan.sites if "embedding" not in site.op for name in site.parameters}
    return frozenset(
        number
        for number, (name, leaf) in enumerate(zip(problem.params.names, problem.params.leaves, strict=True))
        if routes.get(name) == {"materialise"} and name in dense and _is_plain(leaf)
    )


def _is_plain(leaf: Tensor) -> bool:
    """Whether a parameter is a large matrix, or more than one, of numbers in full precision, and nobody's business."""
    large = leaf.dim() > 1 and leaf.numel() >= LEAST and leaf.dtype in (torch.float32, torch.float64)
    return large and type(leaf) in (Tensor, torch.nn.Parameter) and not is_hooked(leaf)
