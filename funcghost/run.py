"""One forward and one backward of the losses along a plan."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import optree
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from funcghost.capture import Capture, Choose
from funcghost.errors import InputError, MismatchError, UnsupportedOpError
from funcghost.factors import Factor
from funcghost.ledger import Ledger
from funcghost.lowrank import Direction, as_dense
from funcghost.plans import Plan
from funcghost.trees import Params, Tree, tensors

Losses = Callable[[Tree, Tree], Any]
Reduction = Literal["mean", "sum"]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a run gives: scores [b, k] in units of the losses, the training gradient if asked for, losses, aux.

    `sizes` is the checksum of the sizes its ops ran with, `positions` the scores by position [b, t], by column.
    `parts` is what the tasks of the ledger made of each parameter, `pairs` the factors it kept.
    """

    scores: Tensor
    gradients: list[Tensor]
    losses: Tensor
    aux: Any
    sizes: int = 0
    positions: Mapping[int, Tensor] = field(default_factory=dict)
    parts: Sequence[Mapping[str, Tensor]] = ()
    pairs: Mapping[str, tuple[Factor, ...]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Problem:
    """What is to be differentiated: the losses at given parameters on a given batch.

    `point`: other values to take the derivative at, in place of those of the parameters.
    """

    losses: Losses
    params: Params
    batch: Tree
    has_aux: bool = False
    point: tuple[Tensor, ...] | None = None

    def devices(self) -> list[torch.device]:
        """The devices of the parameters and of the batch."""
        return list({tensor.device for tensor in (*self.params.leaves, *tensors(self.batch))})

    def is_meta(self) -> bool:
        """Whether there are no values to measure."""
        return any(leaf.is_meta for leaf in self.params.leaves)

    def leaves(self) -> list[Tensor]:
        """Fresh leaves that share memory with the parameters, so that nothing of the user's is touched."""
        return [leaf.detach().requires_grad_() for leaf in self.point or self.params.leaves]

    def evaluate(self, leaves: Sequence[Tensor]) -> tuple[Tensor, Any]:
        """The losses [b] and the auxiliary output."""
        with torch.enable_grad():
            out = self.losses(self.params.rebuild(leaves), self.batch)
        if self.has_aux and not (isinstance(out, tuple) and len(out) == 2):
            raise InputError(f"losses: with has_aux=True it must return (losses, aux), found {type(out).__name__}.")
        values, aux = out if self.has_aux else (out, None)
        check_losses(values)
        return values, aux


def check_losses(values: Any) -> None:
    """Losses must be one real number per sample."""
    if not isinstance(values, Tensor):
        hint = " Pass has_aux=True if it returns (losses, aux)." if isinstance(values, tuple) else ""
        raise InputError(f"losses: must return a tensor [b], found {type(values).__name__}.{hint}")
    if values.dim() != 1:
        raise InputError(
            f"losses: must return one number per sample, a tensor [b], found shape {tuple(values.shape)}. "
            "Reduce over everything but the samples, e.g. reduction='none' and .flatten(1).mean(1)."
        )
    if not values.is_floating_point():
        raise InputError(f"losses: must be real floating-point numbers, found {values.dtype}.")


def score_dtype(params: Params) -> torch.dtype:
    """The dtype in which scores are added up: float32 at least."""
    dtype = torch.float32
    for leaf in params.leaves:
        dtype = torch.promote_types(dtype, leaf.dtype)
    return dtype


def run(
    problem: Problem,
    plan: Plan,
    directions: Sequence[Direction],
    *,
    reduction: Reduction | None,
    choose: Choose | None = None,
    standins: dict[int, Tensor] | None = None,
    ledger: Ledger | None = None,
    dtype: torch.dtype | None = None,
) -> Outcome:
    """Scores along the plan; with a `reduction` also the gradient of the reduced losses, from the same backward.

    Factors of the gradients of the losses go to the `ledger`; products for scores are computed in the `dtype`.

    Raises:
        MismatchError: the call does not fit the plan.
    """
    batch = plan.batch_size(problem.batch)
    if batch == 0:
        return _run_empty(problem, len(directions), reduction)
    leaves = problem.leaves()
    probe = leaves[0].new_zeros((batch, len(directions)), dtype=score_dtype(problem.params)).requires_grad_()
    capture = Capture(plan, leaves, directions, probe, problem.params.leaves, choose, standins, ledger, dtype)
    with capture:
        losses, aux = problem.evaluate(leaves)
    if losses.shape[0] != batch:
        raise MismatchError(
            f"the losses are of {losses.shape[0]} samples where the plan expects {batch} from the batch."
        )
    capture.finish()
    tail = capture.shadows.get(id(losses))
    if ledger is not None and tail is not None:
        ledger.expect(tail.sources)
    wanted = [probe] if reduction is None else [probe, *leaves]
    cotangent = cotangents(losses, reduction or "sum")
    scores, *gradients = backward(losses, wanted, cotangent, keep_graph=ledger is not None and tail is not None)
    if not problem.is_meta():
        capture.check_moves(at_once=standins is None)
    if directions:
        scores = scores / cotangent.to(scores.dtype).unsqueeze(1)
    positions: Mapping[int, Tensor] = {}
    if ledger is not None:
        positions = ledger.close(tail, cotangent, losses.shape[0] if reduction == "mean" else 1)
    carried = capture.tangents_of(losses)
    if carried:
        tails = [torch.zeros_like(losses) if tangent is None else as_dense(tangent) for tangent in carried]
        scores = scores + torch.stack(tails, -1).to(scores.dtype)
    return Outcome(scores, gradients, losses.detach(), detached(aux), capture.digest.sizes, positions)


def run_plain(problem: Problem, reduction: Reduction | None) -> Outcome:
    """The losses, and with a `reduction` the training gradient: nothing is scored."""
    leaves = problem.leaves()
    losses, aux = problem.evaluate(leaves)
    gradients = [] if reduction is None else backward(losses, leaves, cotangents(losses, reduction))
    return Outcome(losses.new_zeros((losses.shape[0], 0)), gradients, losses.detach(), detached(aux))


def _run_empty(problem: Problem, columns: int, reduction: Reduction | None) -> Outcome:
    """A batch without samples has no sites worth a look, and no scores."""
    outcome = run_plain(problem, reduction)
    if outcome.losses.shape[0]:
        raise MismatchError(f"the losses are of {outcome.losses.shape[0]} samples where the plan expects none.")
    return replace(outcome, scores=outcome.losses.new_zeros((0, columns), dtype=score_dtype(problem.params)))


def cotangents(losses: Tensor, reduction: Reduction) -> Tensor:
    """The gradient of the reduced losses with respect to the losses, [b]."""
    return torch.full_like(losses, 1 / losses.shape[0] if reduction == "mean" and losses.shape[0] else 1.0)


def backward(losses: Tensor, wanted: Sequence[Tensor], cotangent: Tensor, keep_graph: bool = False) -> list[Tensor]:
    """The gradient of `<losses, cotangent>`; zeros where the losses do not depend on something."""
    if not losses.requires_grad:
        return [torch.zeros_like(leaf, requires_grad=False) for leaf in wanted]
    try:
        found = torch.autograd.grad(losses, wanted, cotangent, retain_graph=keep_graph, allow_unused=True)
    except CheckpointError as error:
        raise UnsupportedOpError(
            "torch.utils.checkpoint recomputed a region differently. Pass context_fn=fg.checkpoint_context to "
            "checkpoint(..., use_reentrant=False), and let params be the module's own tensors "
            "(dict(model.named_parameters())), since that is what a recomputed module sees."
        ) from error
    return [
        torch.zeros_like(leaf, requires_grad=False) if gradient is None else gradient.detach()
        for gradient, leaf in zip(found, wanted, strict=True)
    ]


def detached(aux: Tree) -> Tree:
    """The auxiliary output without its graph."""
    if aux is None:
        return None
    return optree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, aux)
