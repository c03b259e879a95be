"""Scores by which training sets are pruned early in training: the samples of small scores can go.

Paul, Ganguli, Dziugaite, "Deep Learning on a Data Diet: Finding Important Examples Early in Training" (arXiv
2107.07075).
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from funcghost.engine.plans import Plan
from funcghost.errors import InputError
from funcghost.options import Options
from funcghost.problem import Losses
from funcghost.reducers.quadratic import squared_norm
from funcghost.transforms.steps import reduce
from funcghost.trees import Tree


def grand(
    losses: Losses, *, options: Options | None = None, plan: Plan | None = None
) -> Callable[[Iterable[Tree], Tree], Tensor]:
    """GraNd, the expected norm of a sample's gradient: `out[i] = E |grad losses[i]|`, over runs with other seeds.

    `score(runs, batch)` averages over `runs`, the parameters of each of them at the same, early time (checkpoints will
    do, and may come one at a time from a generator).

    Shapes: [b]. Units: those of the losses per unit of the parameters.

    Cost: for each run a forward, a backward without weight gradients, and `fg.squared_norm`.

    Args:
        losses: as in `fg.grad_and_reduce`.
        options: as in `fg.grad_and_reduce`.
        plan: as in `fg.grad_and_reduce`.

    Raises:
        InputError: (when used) there is no run.
        MemoryBudgetError: (when used) as in `fg.squared_norm`.

    Example:
        >>> import torch
        >>> from funcghost.attribution import pruning
        >>> score = pruning.grand(lambda params, x: (x @ params["w"]).square() / 2)
        >>> score([{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([3.0, 1.0])}], torch.eye(2))
        tensor([2.0000, 0.5000])

    Source: Paul et al. (arXiv 2107.07075), definition 2.1.
    """
    norms = reduce(losses, options=options, plan=plan)

    def score(runs: Iterable[Tree], batch: Tree) -> Tensor:
        found = [norms(params, batch, squared_norm()).sqrt() for params in runs]
        if not found:
            raise InputError("grand: takes the parameters of one run or more, found none.")
        return torch.stack(found).mean(0)

    return score


def el2n(probabilities: Tensor, labels: Tensor) -> Tensor:
    """EL2N, the expected norm of the error: `out[i] = E |probabilities[i] - onehot(labels[i])|`, over runs.

    With cross-entropy that is the norm of the gradient with respect to the logits, and to a bias added to them: GraNd
    of that bias alone.

    Shapes: `probabilities` is [.., b, c] for c classes, with any axes for runs in front; `labels` is [b] of int64; the
    result is [b]. Units: none, from 0 to the root of 2. Cost: of order of the probabilities.

    Raises:
        InputError: the shapes do not go together, or a type is another.

    Example:
        >>> import torch
        >>> from funcghost.attribution import pruning
        >>> pruning.el2n(torch.tensor([[0.6, 0.4], [0.0, 1.0]]), torch.tensor([1, 1]))
        tensor([0.8485, 0.0000])

    Source: Paul et al. (arXiv 2107.07075), definition 2.2.
    """
    tensors = isinstance(probabilities, Tensor) and isinstance(labels, Tensor)
    if not tensors or not probabilities.is_floating_point() or labels.dtype != torch.int64:
        raise InputError("el2n: takes floating probabilities [.., b, c] and int64 labels [b].")
    if probabilities.dim() < 2 or labels.shape != probabilities.shape[-2:-1]:
        raise InputError(
            f"el2n: labels must be [b] for probabilities [.., b, c], found {list(labels.shape)} for "
            f"{list(probabilities.shape)}."
        )
    hit = torch.arange(probabilities.shape[-1], device=labels.device) == labels.unsqueeze(-1)
    errors: Tensor = torch.linalg.vector_norm(probabilities - hit.to(probabilities.dtype), dim=-1)
    return errors.reshape(-1, len(labels)).mean(0)
