"""Losses that never hold what dominates the memory of a step: the logits of a large vocabulary."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from funcghost.dtypes import wide_dtype
from funcghost.errors import InputError
from funcghost.losses import head
from funcghost.versions import is_autocast

ENTRIES = 2**23
"""How many logits a chunk has by default: 32 MiB in float32."""


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    chunk: int | None = None,
    reduction: Literal["none", "mean", "sum"] = "none",
    ignore_index: int = -100,
) -> Tensor:
    """The cross-entropy of a linear head, in chunks of tokens: `[tokens, v]` logits never exist at once.

        z = x @ weight.T + bias
        losses[n] = logsumexp_v(z[n]) - z[n, targets[n]],   and 0 where targets[n] == ignore_index

    Law: equals `F.cross_entropy(F.linear(x, weight, bias), targets, reduction="none")` in value and in all gradients,
    to rounding. Twice differentiable, in reverse mode and with forward mode in it.

    Shapes: x [..., d], targets [...] (int64), weight [v, d], bias [v]; the result is [...] with `reduction="none"`.
    "sum" and "mean" leave the first axis, that of the samples: [b] from targets [b, ...]. The mean is over the tokens
    of the sample that are not ignored, NaN if there is none. In the loss of one example (`fg.per_example`) the first
    axis is another: use "none" and reduce, or `linear_cross_entropy(x[None], weight, targets[None], ...)[0]`.

    Units and dtypes: nats per token. The softmax is taken in float32 at least, of logits in the dtype of x, which the
    result has, too. Under autocast, x, weight and bias are cast as `F.linear` casts them, and the losses are float32,
    as those of `F.cross_entropy` are there.

    In a step of funcghost it is one site, whatever the chunks. The plan shows it by its forward derivative, which is
    taken in chunks as well.

    Cost, in products of `2 tokens d v` FLOPs, of which the unchunked head has 3 (forward, gradients of x and weight):
    2 in the forward if x needs a gradient, which is taken there but for a factor per token, and 1 otherwise; 2 in the
    backward, which computes the logits again for the gradient of weight, and none where that is not asked for.
    `fg.dot` adds 2 per direction, where the unchunked head has 1: a training step with it has 6 in all (4), scoring
    alone 4 (3). Inside derivatives of `torch.func` a gradient has 5. Memory: three times `chunk * v` entries, one
    tensor like x for the backward, and the gradient of weight, which is added up in float32 at least.

    Args:
        x: what the head is applied to.
        weight: of the head; may be that of the embedding.
        targets: the class of each token.
        bias: of the head.
        chunk: tokens at a time; by default as many as have 8 million logits. Larger ones are faster on a GPU.
        reduction: "none", "mean" or "sum".
        ignore_index: tokens with this target have loss 0, and no gradient.

    Raises:
        InputError: shapes, dtypes or devices do not fit, before anything is computed. Other targets out of range are
            not looked for, since that would wait for the device: indexing raises on the CPU, CUDA fails an assertion.

    Example:
        >>> import funcghost as fg, torch
        >>> weight = torch.zeros(50257, 16)
        >>> fg.functional.linear_cross_entropy(torch.ones(2, 3, 16), weight, torch.zeros(2, 3).long(), reduction="mean")
        tensor([10.8249, 10.8249])

    Source of the idea not to keep logits: Wijmans, Huval, Hertzberg, Koltun, Krähenbühl, "Cut Your Losses in
    Large-Vocabulary Language Models" (arXiv 2411.09009).
    """
    given = (x, weight, targets) if bias is None else (x, weight, targets, bias)
    if has_torch_function(given):
        options: dict[str, Any] = {"bias": bias, "chunk": chunk, "reduction": reduction, "ignore_index": ignore_index}
        seen: Tensor = handle_torch_function(linear_cross_entropy, given, x, weight, targets, **options)
        return seen
    _check(x, weight, targets, bias, chunk, reduction)
    dtype, operands = _autocast((x, weight) if bias is None else (x, weight, bias))
    valid = targets != ignore_index
    index = torch.where(valid, targets, 0).reshape(-1)
    tokens = chunk or max(1, ENTRIES // weight.shape[0])
    evaluate = head.traced_head_losses if torch.compiler.is_dynamo_compiling() else head.head_losses
    losses = evaluate((operands[0].reshape(-1, x.shape[-1]), *operands[1:]), index, tokens)
    losses = torch.where(valid, losses.reshape(targets.shape), 0)
    if reduction != "none":
        axes = tuple(range(1, targets.dim() + 1))  # one more, since no axes at all would stand for all of them
        losses, valid = losses.unsqueeze(-1).sum(axes), valid.unsqueeze(-1)
        losses = losses / valid.sum(axes) if reduction == "mean" else losses
    return losses.to(dtype)


def _check(x: Any, weight: Any, targets: Any, bias: Any, chunk: Any, reduction: Any) -> None:
    where = "linear_cross_entropy"
    named = {"x": x, "weight": weight, "targets": targets} | ({} if bias is None else {"bias": bias})
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise InputError(f"{where}: {name} must be a tensor, found {type(value).__name__}.")
        if value.device != x.device:
            raise InputError(f"{where}: {name} is on {value.device}, x on {x.device}. Move them to one device.")
        if name != "targets" and not value.is_floating_point():
            raise InputError(f"{where}: {name} must have real floating-point numbers, found {value.dtype}.")
    if targets.dtype != torch.int64:
        raise InputError(
            f"{where}: targets must be int64, the class of each token, found {targets.dtype}. Use .long()."
        )
    if weight.dim() != 2 or not weight.shape[0]:
        raise InputError(f"{where}: weight must be [v, d] with v > 0, found shape {tuple(weight.shape)}.")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise InputError(
            f"{where}: x must be [..., d] with the d of weight [v, d], found {tuple(x.shape)} for weight "
            f"{tuple(weight.shape)}. Pass the weight as F.linear takes it."
        )
    if targets.shape != x.shape[:-1]:
        raise InputError(
            f"{where}: targets must have the shape of x without its last axis, {tuple(x.shape[:-1])}, found "
            f"{tuple(targets.shape)}. Shift both for the next token: x[:, :-1] and targets[:, 1:]."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(f"{where}: bias must be [v], here [{weight.shape[0]}], found shape {tuple(bias.shape)}.")
    if chunk is not None and not (type(chunk) is int and chunk > 0):
        raise InputError(f"{where}: chunk must be a positive number of tokens, found {chunk!r}.")
    if reduction not in ("none", "mean", "sum"):
        raise InputError(f"{where}: reduction must be 'none', 'mean' or 'sum', found {reduction!r}.")
    if reduction != "none" and not targets.dim():
        raise InputError(
            f"{where}: reduction={reduction!r} leaves the first axis, and targets have none. Use reduction='none'."
        )
    dtypes = {name: value.dtype for name, value in named.items() if name != "targets"}
    if len(set(dtypes.values())) > 1 and not is_autocast(x.device):
        raise InputError(f"{where}: dtypes differ: {dtypes}. Cast them to one, or use torch.autocast.")


def _autocast(operands: tuple[Tensor, ...]) -> tuple[torch.dtype, tuple[Tensor, ...]]:
    """The dtype of the losses, and the operands as `F.linear` would cast them, which leaves float64 as it is."""
    x = operands[0]
    if not is_autocast(x.device):
        return x.dtype, operands
    low = torch.get_autocast_dtype(x.device.type)
    return wide_dtype(x.dtype), tuple(value if value.dtype == torch.float64 else value.to(low) for value in operands)
