"""Norms: scale and shift of normalised values."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from funcghost.ops.call import Call, physical
from funcghost.ops.known import in_front, know
from funcghost.ops.products import Arguments, Describe, Product
from funcghost.ops.tangent import covered_by_rule, pushforward


def _norm(channel: bool) -> Describe:
    """Scale and shift of normalised values, whose axes are the last ones or the second, the channel."""

    def scale(call: Call, slots: dict[str, int], a: Arguments, name: str) -> Product | None:
        x, own = a["input"], a[name]
        letters = tuple(range(x.dim()))
        param = (letters[1],) if channel else letters[x.dim() - own.dim() :]
        if name == "bias":
            return Product(param, (), letters)
        if not covered_by_rule(call):
            return None
        alone = replace(call, tracked=(slots[name],))
        push = pushforward(alone, "rule")
        shape, dtype = own.shape, own.dtype

        def values(saved: Sequence[Tensor]) -> Tensor:
            return push.evaluate(saved, [saved[0].new_ones(shape, dtype=dtype)])[0]

        return Product(param, letters, letters, push.needed, values)

    return scale


def _has_weight(a: Arguments) -> bool:
    return a.get("weight") is not None


def _batch_norm(a: Arguments, tangents: Mapping[str, Tensor]) -> Tensor:
    """The derivative of a batch norm: one pass forward, one backward.

    Normalising a channel, `x -> (x - mean) / std`, has a symmetric Jacobian, with the statistics of the batch, too. So
    along `dx` it is what the backward makes of `dx` as the gradient of the output; along the scale and the shift it is
    the op with these in their places.
    """
    x, weight, training, eps = a["input"], a.get("weight"), a.get("training", False), a.get("eps", 1e-5)
    running = (None, None) if training else (a["running_mean"], a["running_var"])
    scale, shift = tangents.get("weight"), tangents.get("bias")
    if scale is None and shift is not None:
        scale = torch.zeros_like(shift)
    affine: Tensor
    affine, mean, invstd = torch.ops.aten.native_batch_norm(x, scale, shift, *running, training, 0.0, eps)
    if "input" not in tangents:
        return affine
    given = (tangents["input"], x, weight, *running, mean, invstd, training, eps, (True, False, False))
    along: Tensor = torch.ops.aten.native_batch_norm_backward(*given)[0]
    if scale is None:
        return along
    return along.add_(affine) if physical(along) is along and physical(affine) is affine else along + affine


_AFFINE, _LAST, _CHANNEL = (("weight", "bias"),), _norm(channel=False), _norm(channel=True)
know(
    *(F.layer_norm, torch.layer_norm),
    linear=_AFFINE,
    when=_has_weight,
    arguments=("input", "normalized_shape", "weight", "bias"),
    product=_LAST,
)
know(
    *(F.group_norm, torch.group_norm),
    linear=_AFFINE,
    when=_has_weight,
    arguments=("input", "num_groups", "weight", "bias"),
    product=_CHANNEL,
)
know(F.batch_norm, linear=_AFFINE, when=_has_weight, product=_CHANNEL, derivative=_batch_norm)
know(
    torch.batch_norm,
    linear=_AFFINE,
    when=_has_weight,
    arguments=("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
    derivative=_batch_norm,
)
know(
    *(F.rms_norm, torch.rms_norm),
    linear=(("weight",),),
    arguments=("input", "normalized_shape", "weight"),
    product=_LAST,
)
know(F.instance_norm, samples=in_front("input"))
know(F.prelu, arguments=("input",), samples=in_front("input"))
