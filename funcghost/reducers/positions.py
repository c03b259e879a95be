"""Reducers of scores by position: for each token, or for each segment of packed rows."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcghost.algebra.directions import Direction
from funcghost.errors import InputError
from funcghost.reducers.bases import Directional, register
from funcghost.reducers.dots import Dot
from funcghost.trees import Params


@dataclass(frozen=True, eq=False)
class PerToken(Directional):
    """See `per_token`."""

    reducer: Directional
    by_position: ClassVar[bool] = True

    def directions(self, params: Params) -> list[Direction]:
        """The directions of the reducer."""
        return self.reducer.directions(params)

    def result(self, scores: Tensor, params: Params) -> Any:
        """[b, t]."""
        return self.reducer.result(scores, params)


def per_token(reducer: Dot) -> PerToken:
    """The terms of `fg.dot(direction)` that belong to each position: `out[i, t]`, whose sum over t is `dot`'s result.

    The inner product is a sum over uses of parameters and over the entries of their outputs; entry `[i, t, ..]` is
    counted for position t. That is what the parameters' uses *at* position t contribute to the gradient of `losses[i]`,
    not the gradient of the loss at t: a loss sends gradients to all positions that it attends to.

    Shapes: [b, t], [b, t, k] for a stack. Positions are the first axis after the samples of what comes out of a use,
    or after the channels of a convolution or a norm of channels. Where that has another length than in most uses,
    they are the axis that has their length t, if it is the only one (`w @ x` of x [b, c, t]).

    Units and cost: those of `dot`.

    Raises:
        InputError: the reducer is not `fg.dot(...)`.
        SampleAxisError: (when used) the uses of the parameters differ in the number of positions, or have none, or it
            cannot be told which axis has them.

    Example:
        >>> import funcghost as fg, torch
        >>> x, w = torch.arange(12.0).view(2, 3, 2), {"w": torch.zeros(2, 1)}
        >>> score = fg.reduce(lambda params, x: (x @ params["w"]).sum((1, 2)))
        >>> score(w, x, fg.per_token(fg.dot({"w": torch.ones(2, 1)})))
        tensor([[ 1.,  5.,  9.],
                [13., 17., 21.]])

    Source: the sum over positions in Wang et al. (arXiv 2406.11011), section 4, left open.
    """
    if not isinstance(reducer, Dot):
        raise InputError(f"per_token: takes fg.dot(direction), found {type(reducer).__name__}.")
    return PerToken(reducer)


@dataclass(frozen=True, eq=False)
class PerSegment(Directional):
    """See `per_segment`."""

    reducer: Directional
    segment_ids: Tensor
    segments: int
    by_position: ClassVar[bool] = True

    def directions(self, params: Params) -> list[Direction]:
        """The directions of the reducer."""
        return self.reducer.directions(params)

    def result(self, scores: Tensor, params: Params) -> Any:
        """[b, s]."""
        ids = self.segment_ids
        if not len(scores) and not len(ids):  # nothing has come past, and nothing says how many positions there are
            return self.reducer.result(scores.new_zeros((0, self.segments, scores.shape[-1])), params)
        if ids.shape != scores.shape[:2]:
            raise InputError(
                f"per_segment: segment_ids must be [b, t], {list(scores.shape[:2])} for this batch, found "
                f"{list(ids.shape)}."
            )
        kept = torch.where((ids < 0) | (ids >= self.segments), self.segments, ids).unsqueeze(-1).expand(scores.shape)
        total = scores.new_zeros((len(scores), self.segments + 1, scores.shape[-1])).scatter_add(1, kept, scores)
        return self.reducer.result(total[:, :-1], params)


def per_segment(reducer: Dot, segment_ids: Tensor, segments: int | None = None) -> PerSegment:
    """The terms of `fg.dot(direction)` by segment of packed rows: `out[i, s]`, the sum of `per_token` where ids are s.

    Where rows are packed of documents that do not see each other (attention is block-diagonal, the loss of a row is
    the sum over its documents), `out[i, s]` is exactly `<grad loss of document s of row i, direction>`. Where documents
    see each other it is what the positions of the document contribute to the gradient of the row's loss, see
    `per_token`.

    Shapes: `segment_ids` is [b, t] of int64 from 0, negative for positions to leave out; the result is [b, segments].

    Args:
        reducer: `fg.dot(direction)`.
        segment_ids: the segment of each position.
        segments: how many there are; by default one more than the largest id, which waits for the device once, here.
            Larger ids are left out where looking at them would mean to wait.

    Raises:
        InputError: the ids are not integers [b, t], or more than `segments`, or the reducer is not `fg.dot(...)`.
        SampleAxisError: (when used) as in `per_token`.

    Example:
        >>> import funcghost as fg, torch
        >>> x, w = torch.arange(12.0).view(2, 3, 2), {"w": torch.zeros(2, 1)}
        >>> score = fg.reduce(lambda params, x: (x @ params["w"]).sum((1, 2)))
        >>> score(w, x, fg.per_segment(fg.dot({"w": torch.ones(2, 1)}), torch.tensor([[0, 0, 1], [0, 1, 1]])))
        tensor([[ 6.,  9.],
                [13., 38.]])
    """
    if not isinstance(reducer, Dot):
        raise InputError(f"per_segment: takes fg.dot(direction), found {type(reducer).__name__}.")
    if not isinstance(segment_ids, Tensor) or segment_ids.dim() != 2 or segment_ids.dtype != torch.int64:
        found = f"{segment_ids.dtype} {list(segment_ids.shape)}" if isinstance(segment_ids, Tensor) else segment_ids
        raise InputError(f"per_segment: segment_ids must be int64 numbers [b, t], found {found}.")
    if segments is None:
        if segment_ids.is_meta:
            raise InputError("per_segment: ids on the meta device have no values: pass segments=, their number.")
        segments = int(segment_ids.max()) + 1 if segment_ids.numel() else 0
    elif segment_ids.device.type == "cpu" and segment_ids.numel() and int(segment_ids.max()) >= segments:
        raise InputError(f"per_segment: there is an id {int(segment_ids.max())}, and segments={segments} is too few.")
    return PerSegment(reducer, segment_ids, segments)


register(PerToken, ("reducer",))
register(PerSegment, ("reducer", "segment_ids"), ("segments",))
