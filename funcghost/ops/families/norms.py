"""Norms: scale and shift of normalised values."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from funcghost.ops.call import Call
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
know(F.batch_norm, linear=_AFFINE, when=_has_weight, product=_CHANNEL)
know(torch.batch_norm, linear=_AFFINE, when=_has_weight, arguments=("input", "weight", "bias"))
know(
    *(F.rms_norm, torch.rms_norm),
    linear=(("weight",),),
    arguments=("input", "normalized_shape", "weight"),
    product=_LAST,
)
know(F.instance_norm, samples=in_front("input"))
know(F.prelu, arguments=("input",), samples=in_front("input"))
