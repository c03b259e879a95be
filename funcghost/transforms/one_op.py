"""The losses as one op, where they run many small ones: scores from the transpose of their own backward.

The gradient of `<c, losses>` is linear in the cotangent c [b]. With `g(c) = sum_i c_i grad_i` the score of sample i is
`<grad_i, V> = d <g(c), V> / d c_i`: a derivative of autograd's backward, which autograd takes, too. No op is looked at
on the way and nothing is planned, so that a loop over positions or samples costs as much as its ops do. Where ops are
large this takes more than a tap at each of them (a backward through the backward, and memory for both), so it is kept
to losses that are many small ops. What is made of whole gradients is made of those of a backward for each sample.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funcghost.algebra.directions import Direction, as_dense
from funcghost.algebra.factors import Dense
from funcghost.dtypes import score_dtype
from funcghost.engine.ledger import Ledger
from funcghost.engine.run import Outcome
from funcghost.errors import MismatchError, UnsupportedOpError
from funcghost.laws.conservation import check_conservation, witness
from funcghost.laws.draws import sample_weights
from funcghost.planning.planner import refuse_collective
from funcghost.planning.ways import FlopCount
from funcghost.problem import Problem, Reduction, backward, backwards, check_depends, cotangents, detached, graph_nodes
from funcghost.side_effects import Memory, undone_on_failure, untouched
from funcghost.trees import tensors

MOST_FLOPS, MOST_ENTRIES, FEWEST_OPS, MOST_PARAMETERS = 2**19, 2**14, 128, 2**22
"""The work of an op on average, in FLOPs of products and entries of outputs; how many ops are many; and what is not
even looked at, in entries of parameters."""


class _Count(FlopCount):
    """Counts ops and the entries that they give, too; notes numbers of less than so many bytes."""

    def __init__(self, itemsize: int) -> None:
        super().__init__()
        self.ops = self.entries = 0
        self.itemsize, self.narrow = itemsize, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.ops += 1
        if isinstance(out, Tensor):
            self.entries += out.numel()
            self.narrow |= out.is_floating_point() and out.dtype.itemsize < self.itemsize
        return out


class OneOp:
    """Losses as one op: whether that pays, and the sizes that it was verified for."""

    def __init__(self) -> None:
        self.known: bool | None = None
        self.written: Sequence[Memory] | None = ()
        self.verified = set[tuple[torch.Size, ...]]()

    def pays(self, problem: Problem) -> bool:
        """Whether the losses are many small ops, all of them torch's own; costs a forward, once, of small models.

        Where they compute in fewer digits than the parameters have, the way back through these ops would cost the
        scores digits that the gradients have.
        """
        if self.known is None and sum(leaf.numel() for leaf in problem.params.leaves) > MOST_PARAMETERS:
            self.known = False
        if self.known is None and not problem.is_meta():
            itemsize = max(4, *(leaf.itemsize for leaf in problem.params.leaves))
            with (
                untouched(problem.devices(), collective=refuse_collective) as changes,
                _Count(itemsize) as count,
            ):
                losses, _ = problem.evaluate(problem.leaves())
            check_depends(losses)
            small = count.total <= MOST_FLOPS * count.ops and count.entries <= MOST_ENTRIES * count.ops
            plain = not count.narrow and not any(leaf.is_complex() for leaf in problem.params.leaves)
            self.known = count.ops >= FEWEST_OPS and small and plain and _is_torchs_own(losses)
            self.written = changes.written
        return bool(self.known)

    def run(
        self,
        problem: Problem,
        directions: Sequence[Direction],
        reduction: Reduction | None,
        ledger: Ledger | None,
        budget: int,
        due: Callable[[bool], bool],
    ) -> Outcome:
        """Scores, the training gradient, and whole gradients for the ledger, which take up to `budget` bytes.

        `due(new)` says whether to verify, given whether sizes are new. If this fails in any way, it leaves no trace.

        Raises:
            UnsupportedOpError: there is a Function in the losses, which may hide how its backward depends on the
                cotangent, or a gradient is sparse, or gradients do not fit.
            MismatchError: gradients are not finite.
            ConservationError: the backward is not linear.
        """
        with undone_on_failure(problem.devices(), self.written):
            leaves = problem.leaves()
            losses, aux = problem.evaluate(leaves)
            if not _is_torchs_own(losses):
                raise UnsupportedOpError("losses: have no gradient, or a Function that is not torch's own.")
            transpose = _Transpose(losses, leaves, cotangents(losses, reduction or "sum"), score_dtype(problem.params))
            scores = transpose.scores(directions)
            sizes = (losses.shape, *(leaf.shape for leaf in tensors(problem.batch)))
            if due(sizes not in self.verified) and len(losses):
                transpose.verify(problem)
                self.verified.add(sizes)
            if ledger is not None:
                _fill(ledger, losses, leaves, budget)
            gradients = [] if reduction is None else transpose.training_gradient()
        return Outcome(scores, gradients, losses.detach(), detached(aux))


class _Transpose:
    """The gradient of `<c, losses>` at one cotangent c, with the graph of how it depends on c."""

    def __init__(self, losses: Tensor, leaves: Sequence[Tensor], cotangent: Tensor, dtype: torch.dtype) -> None:
        self.losses, self.leaves, self.dtype = losses, leaves, dtype
        self.cotangent = cotangent.requires_grad_()
        with torch.enable_grad(), backwards(losses.device):
            self.gradients = torch.autograd.grad(losses, leaves, cotangent, create_graph=True, allow_unused=True)
        if any(gradient is not None and gradient.layout is not torch.strided for gradient in self.gradients):
            raise UnsupportedOpError("losses: have sparse gradients.")

    def training_gradient(self) -> list[Tensor]:
        """The gradient at the cotangent."""
        found = zip(self.gradients, self.leaves, strict=True)
        return [torch.zeros_like(leaf) if gradient is None else gradient.detach() for gradient, leaf in found]

    def scores(self, directions: Sequence[Direction | Sequence[Tensor | None]]) -> Tensor:
        """[b, k]."""
        columns = [self._score(direction) for direction in directions]
        return torch.stack(columns, -1) if columns else self.losses.new_zeros((len(self.losses), 0), dtype=self.dtype)

    def _score(self, direction: Direction | Sequence[Tensor | None]) -> Tensor:
        there = [
            (gradient, as_dense(leaf).detach().to(gradient.dtype))
            for gradient, leaf in zip(self.gradients, direction, strict=True)
            if gradient is not None and leaf is not None and gradient.requires_grad
        ]
        if not there:
            return torch.zeros_like(self.losses, dtype=self.dtype, requires_grad=False)
        ends, given = zip(*there, strict=True)
        with backwards(self.losses.device):
            [found] = torch.autograd.grad(ends, [self.cotangent], given, retain_graph=True, materialize_grads=True)
        return found.detach().to(self.dtype)

    def verify(self, problem: Problem) -> None:
        """Holds the scores to the gradient at another cotangent."""
        weights = sample_weights(self.losses)
        gradients = backward(self.losses, self.leaves, weights, keep_graph=True)
        seen = witness(self.losses, weights, list(gradients), self.leaves, self.losses.dtype)
        if seen.finite:
            everything = [list(range(len(self.leaves)))]
            check_conservation(problem.params, self.scores, seen, everything, lambda seed: gradients, lambda: "")


def _is_torchs_own(losses: Tensor) -> bool:
    """Whether the graph has no Function of Python and no graph of a compiler, which may hide a second derivative.

    Nor a change of dtype, as of an autocast that has been turned on since.
    """
    nodes = graph_nodes(losses) if losses.requires_grad else ()
    return losses.requires_grad and not any(
        hasattr(node, "_forward_cls") or "Graph" in node.name() or "ToCopy" in node.name() for node in nodes
    )


def _fill(ledger: Ledger, losses: Tensor, leaves: Sequence[Tensor], budget: int) -> None:
    """Whole gradients for the ledger: all at once where torch can, else one after the other.

    Raises:
        UnsupportedOpError: they do not fit.
        MismatchError: they are not all finite: a zero times a number that is not would spread to all samples.
    """
    if not len(losses):
        return
    if sum(leaf.nbytes for leaf in leaves) * len(losses) > budget:
        raise UnsupportedOpError("gradients of all samples take more than Options.memory_budget.")
    ones = torch.eye(len(losses), dtype=losses.dtype, device=losses.device)

    def backward_of(cotangent: Tensor, at_once: bool) -> Sequence[Tensor | None]:
        with backwards(losses.device):
            return torch.autograd.grad(
                losses, leaves, cotangent, retain_graph=True, allow_unused=True, is_grads_batched=at_once
            )

    try:
        rows = backward_of(ones, True)
    except RuntimeError:
        each = [backward_of(one, False) for one in ones]
        rows = [None if part[0] is None else torch.stack(part) for part in zip(*each, strict=True)]
    if not all(bool(row.isfinite().all()) for row in rows if row is not None):
        raise MismatchError("gradients are not finite.")
    for number, row in enumerate(rows):
        if row is not None:
            ledger.take(number, Dense(row.detach()))
