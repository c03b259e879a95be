"""A batch seen once for its gradient, which goes to `.grad`, and again for its samples along a direction."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import optree
import torch
from torch import Tensor

from funcghost.attribution import passes
from funcghost.attribution.passes import Keeping
from funcghost.errors import InputError, SampleAxisError
from funcghost.options import Options
from funcghost.problem import Losses, Problem, graph_nodes
from funcghost.reducers.dots import dot
from funcghost.reducers.positions import per_segment
from funcghost.side_effects import untouched
from funcghost.transforms.halves import plan
from funcghost.transforms.steps import grad_and_reduce, reduce
from funcghost.trees import Params, Tree


@dataclass(frozen=True)
class Part:
    """A batch whose gradient is in `.grad`: its samples, and what it takes to know their scores, or these."""

    ids: Tensor
    segments: Tensor | None
    seen: passes.Part | passes.Taken | None
    scores: Tensor | None = None


class Passes:
    """Passes over the batches of a step, on live parameters.

    Args:
        losses: `losses(params, batch) -> [b]`, or [1] where the samples are packed in one row.
        params: the parameters, which may be used by the losses as they are.
        limit: bytes of pairs that a step may keep; None for any number.
        options: as in `fg.grad_and_reduce`.
    """

    def __init__(self, losses: Losses, params: Params, limit: int | None, options: Options | None) -> None:
        self.losses, self.params = losses, params
        self._keeping = Keeping(losses, limit, options)
        self._step = grad_and_reduce(losses, reduction="sum", options=options)
        self._options = options
        self._of_one_row: tuple[Callable[..., Any], Callable[..., Any]] | None = None

    @property
    def tree(self) -> Tree:
        """The parameters, as the losses take them."""
        return self.params.rebuild(self.params.leaves)

    def scored(self, batch: Tree, ids: Tensor, segments: Tensor | None, along: Tree) -> tuple[Part, Tensor]:
        """A batch with the scores of its samples along a direction that is known, and its losses."""
        reducer = _reducer(along, segments, len(ids))
        step = self._step if segments is None else self._packed(batch)[0]
        out = step(self.tree, batch, reducer)
        self._add(batch, optree.tree_leaves(out.grads))
        return Part(ids, segments, None, _flat(out.reduced, ids)), out.losses

    def first(self, batch: Tree, ids: Tensor, segments: Tensor | None) -> tuple[Part, Tensor]:
        """A batch that is kept for the direction that its step will give, and its losses."""
        seen, gradients = self._keeping.first(self.params, batch, keep=segments is None)  # by position: in a step alone
        self._add(batch, gradients)
        return Part(ids, segments, seen), seen.losses

    def again(self, part: Part, along: Tree) -> Tensor:
        """The scores [n] of a batch's samples along a direction."""
        assert isinstance(part.seen, passes.Part)
        score = None if part.segments is None else self._packed(part.seen.batch)[1]
        reducer = _reducer(along, part.segments, len(part.ids))
        return _flat(self._keeping.again(self.params, part.seen, reducer, score), part.ids)

    def forget(self) -> None:
        """The step is settled: nothing is held any more."""
        self._keeping.forget()

    def _add(self, batch: Tree, gradients: Sequence[Tensor]) -> None:
        fresh = [g for p, g in zip(self.params.leaves, gradients, strict=True) if p.grad is None]
        still = fresh and not all(torch.stack([g.any() for g in fresh]).tolist())
        reached = self._reached(batch) if still else None
        for leaf, gradient in zip(self.params.leaves, gradients, strict=True):
            if leaf.grad is not None:
                leaf.grad.add_(gradient)
            elif reached is None or id(leaf) in reached:  # an optimizer passes over what has no gradient
                leaf.grad = gradient

    def _reached(self, batch: Tree) -> set[int]:
        """The parameters that the losses depend on, by identity."""
        problem = Problem(self.losses, self.params, batch)
        with untouched(problem.devices()):
            losses, _ = problem.evaluate(problem.leaves())
        return {id(node.variable) for node in graph_nodes(losses) if hasattr(node, "variable")}

    def _packed(self, batch: Tree) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Step and scores for one packed row.

        Which axis has the positions is seen with two rows, on first use. One row runs the same ops, but that some of
        them have nothing to copy, which the checksum of ops counts: it is that of one row.
        """
        if self._of_one_row is None:
            twice = optree.tree_map(lambda leaf: torch.cat([leaf, leaf]) if _is_row(leaf) else leaf, batch)
            two, one = (plan(self.losses, self.tree, rows, options=self._options) for rows in (twice, batch))
            if [site.op for site in two.sites] != [site.op for site in one.sites]:
                raise SampleAxisError("packed rows: the losses run other ops with two rows than with one.")
            made = replace(two, digest=one.digest)
            self._of_one_row = (
                grad_and_reduce(self.losses, reduction="sum", options=self._options, plan=made),
                reduce(self.losses, options=self._options, plan=made),
            )
        return self._of_one_row


def _reducer(along: Tree, segments: Tensor | None, count: int) -> Any:
    return dot(along) if segments is None else per_segment(dot(along), segments, count)


def _is_row(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == 1


def _flat(scores: Tensor, ids: Tensor) -> Tensor:
    """[n] of [n], or of packed samples [1, n]."""
    if scores.numel() != len(ids):
        raise InputError(f"the losses are of {list(scores.shape)} samples, and there are {len(ids)} ids.")
    return scores.reshape(-1)
