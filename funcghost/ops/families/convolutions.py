"""Convolutions: products over patches, and their transposes."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from funcghost.algebra.sums import SHORT, total
from funcghost.ops.call import Call
from funcghost.ops.known import in_front, know
from funcghost.ops.products import Arguments, Letters, Product


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
        around = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pads = [(size // 2, size - size // 2) for size in around]
    else:
        pads = [(size, size) for size in _each(0 if padding == "valid" else padding, n)]
    flat = [size for pair in reversed(pads) for size in pair]

    by_weight = (conv1d_weight, conv2d_weight, conv3d_weight)[n - 1]

    def gradients(saved: Sequence[Tensor], g: Tensor) -> Tensor:
        """The gradients of the weight, by a convolution in which every sample is a group of its own."""
        x, b = F.pad(saved[0], flat) if any(flat) else saved[0], len(g)
        p, d = weight_shape[0], prod(weight_shape[1:])
        enough = max(SHORT, 2 * p * d // (p + d))  # positions, for which the gradients of a band take less than it does
        rows = max(1, enough // max(1, prod(g.shape[3:]))) if g.dtype is torch.float32 else g.shape[2]

        def of_rows(start: int, count: int, rows: int) -> Tensor:
            """Those of `count` bands of rows of the output, each a group of its own, added up."""
            window = (rows - 1) * stride[0] + dilation[0] * (kernel[0] - 1) + 1
            met = x[:, :, start * stride[0] :].unfold(2, window, rows * stride[0])[:, :, :count]
            own = g[:, :, start : start + count * rows].unflatten(2, (count, rows)).movedim(2, 1)
            apart = [v.reshape(1, -1, *v.shape[3:]) for v in (met.movedim(2, 1).movedim(-1, 3), own)]
            shape = b * count * p, *weight_shape[1:]
            found: Tensor = by_weight(apart[0], shape, apart[1], stride, 0, dilation, b * count * groups)
            return found.view(b, count, *weight_shape).sum(1)

        bands, rest = divmod(g.shape[2], rows)
        parts = [of_rows(0, bands, rows)] if bands else []
        parts += [of_rows(bands * rows, 1, rest)] if rest else []
        return total(parts)

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
