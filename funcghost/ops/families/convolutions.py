"""Convolutions: products over patches, and their transposes."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from funcghost.ops.known import in_front, know
from funcghost.ops.products import Arguments, Letters, Product
from funcghost.ops.tangent import Call


def _convolution(call: Call, slots: dict[str, int], a: Arguments, name: str) -> Product | None:
    x, weight = a["input"], a["weight"]
    n = weight.dim() - 2
    lead: Letters = ("b",) if x.dim() == n + 2 else ()
    where: Letters = tuple(range(n))
    if name == "bias":
        return Product(("p",), (), (*lead, "p", *where))
    if name != "weight":
        return None
    stride, dilation = (_each(a.get(key, 1), n) for key in ("stride", "dilation"))
    groups, weight_shape, kernel = a.get("groups", 1), tuple(weight.shape), tuple(weight.shape[2:])
    padding = a.get("padding", 0)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pads = [(size // 2, size - size // 2) for size in total]
    else:
        pads = [(size, size) for size in _each(0 if padding == "valid" else padding, n)]
    flat = [size for pair in reversed(pads) for size in pair]

    by_weight = (conv1d_weight, conv2d_weight, conv3d_weight)[n - 1]

    def gradients(saved: Sequence[Tensor], g: Tensor) -> Tensor:
        """The gradients of the weight, by a convolution in which every sample is a group of its own."""
        x = F.pad(saved[0], flat) if any(flat) else saved[0]
        b, shape = len(x), (len(x) * weight_shape[0], *weight_shape[1:])
        apart = (value.reshape(1, -1, *value.shape[2:]) for value in (x, g))
        found: Tensor = by_weight(next(apart), shape, next(apart), stride, 0, dilation, b * groups)
        return found.view(b, *weight_shape)

    def values(saved: Sequence[Tensor]) -> Tensor:
        patches = F.pad(saved[0], flat) if any(flat) else saved[0]
        first = patches.dim() - n
        for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
            patches = patches.unfold(first + axis, d * (k - 1) + 1, s)[..., ::d]
        # Copied in an order in which rows of the input stay rows: positions last.
        patches = patches.movedim(tuple(range(-n, 0)), tuple(range(first, first + n))).contiguous()
        return patches.unflatten(first - 1, (groups, -1)) if groups > 1 else patches

    offsets: Letters = tuple(f"k{axis}" for axis in range(n))
    inside: Letters = ("g", "c") if groups > 1 else ("c",)
    outside: Letters = ("g", "p") if groups > 1 else ("p",)
    base = (groups, weight.shape[0] // groups, *weight.shape[1:]) if groups > 1 else tuple(weight.shape)
    return Product(
        param=(*outside, "c", *offsets),
        coefficient=(*lead, *inside, *offsets, *where),
        out=(*lead, *outside, *where),
        needed=(slots["input"],),
        values=values,
        groups=groups,
        base=base,
        gradients=gradients if lead else None,
    )


def _each(value: Any, n: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    return values * n if len(values) == 1 else values


_LINEAR = (("weight", "bias"), ("input", "bias"))
know(
    *(F.conv1d, F.conv2d, F.conv3d),
    linear=_LINEAR,
    arguments=("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    product=_convolution,
)
for _dims, _op in enumerate((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), 3):
    know(_op, linear=_LINEAR, arguments=("input", "weight", "bias"), samples=in_front("input", dims=_dims))
