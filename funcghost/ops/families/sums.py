"""Sums and views: what is linear in all its tensors at once."""

from typing import Any

import torch
from torch import Tensor

from funcghost.ops.call import Call
from funcghost.ops.known import know, named
from funcghost.ops.products import Arguments, Describe, Product, from_right, sizes_of, spread

T: Any = torch.Tensor

BY_SHAPE = named(
    *("cat", "stack", "split", "chunk", "unbind", "tensor_split", "narrow", "select", "flip", "roll"),
    *("view", "reshape", "flatten", "unflatten", "transpose", "permute", "movedim", "squeeze", "unsqueeze"),
    *("expand", "expand_as", "repeat", "t", "contiguous", "clone"),
)
"""The ops that rearrange entries, whatever their values: followed where samples have been moved before."""


def _add(sign_of_input: float, sign_of_other: float) -> Describe:
    def shift(call: Call, slots: dict[str, int], a: Arguments, name: str) -> Product | None:
        x, y, alpha = a["input"], a["other"], a.get("alpha", 1)
        if isinstance(alpha, Tensor | complex):
            return None
        scale = sign_of_input if name == "input" else sign_of_other
        # The argument that alpha multiplies: `self` in a reflected subtraction, `other` elsewhere.
        scale = scale * (alpha if scale < 0 or (name == "other" and sign_of_input > 0) else 1)
        own = a[name]
        sizes = sizes_of(*((from_right(v.dim()), v) for v in (x, y) if isinstance(v, Tensor)))
        out = max((from_right(v.dim()) for v in (x, y) if isinstance(v, Tensor)), key=len)
        return Product(spread(from_right(own.dim()), own, sizes), (), out, scale=scale)

    return shift


def _all_float(a: Arguments) -> bool:
    return all(tensor.is_floating_point() or tensor.is_complex() for tensor in a["tensors"])


def _unrounded(a: Arguments) -> bool:
    return a.get("rounding_mode") is None


know(
    *(torch.clone, T.clone, T.contiguous, T.to, T.type_as),
    *(torch.sum, T.sum, torch.mean, T.mean, torch.neg, T.neg, T.__neg__),
    *(torch.t, T.t, T.T.__get__, T.mT.__get__, torch.transpose, T.transpose, torch.permute, T.permute, T.movedim),
    *(T.view, torch.reshape, T.reshape, torch.flatten, T.flatten, T.unflatten, T.expand, T.expand_as, T.repeat),
    *(torch.squeeze, T.squeeze, torch.unsqueeze, T.unsqueeze, T.narrow, T.select),
    *(torch.chunk, T.chunk, torch.split, T.split, torch.unbind, T.unbind),
    linear="jointly",
)
know(torch._VF._make_dual, linear="jointly", arguments=("input", "tangent", "level"))  # what jvp makes of its inputs
know(torch.cat, torch.stack, linear="jointly", arguments=("tensors", "dim"), when=_all_float)
for _ops, _signs in (((torch.add, T.add), (1, 1)), ((torch.sub, T.sub), (1, -1)), ((T.__rsub__,), (-1, 1))):
    know(*_ops, linear=(("input", "other"),), arguments=("input", "other"), product=_add(*_signs))
know(torch.div, T.div, linear=(("input",),), arguments=("input", "other"), when=_unrounded)
