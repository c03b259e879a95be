"""What the losses of examples need beyond `torch.func.vmap`: attention without a loop, and Python that reads values.

PyTorch has no batching rule for some of its attention kernels and loops over the examples with a warning. But
attention has a batch axis of its own: the vmapped axis is folded into it.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import TransformType, _add_batch_dim, _unwrap_batched, get_interpreter_stack
from torch._functorch.pyfunctorch import VmapInterpreter, retrieve_current_functorch_interpreter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

from funcghost.errors import InputError
from funcghost.ops.call import physical
from funcghost.ops.digest import op_name

READS = (Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.item)


class Batching(TorchFunctionMode):
    """While it is active, attention runs as `attention`, which modes around it see in its place.

    Python may read a value on which all examples agree.
    """

    def __torch_function__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs every other op as it is; one that calls attention out of a mode's sight, with kernels vmap knows."""
        kwargs = kwargs or {}
        if op is F.scaled_dot_product_attention:
            return attention(*args, **kwargs)
        if op is F.multi_head_attention_forward:
            with sdpa_kernel(SDPBackend.MATH):
                return op(*args, **kwargs)
        if op in READS:
            return op(agreed(op, args[0]))
        return op(*args, **kwargs)


def agreed(op: Any, value: Tensor) -> Tensor:
    """The value of all examples; costs the wait for it.

    Raises:
        InputError: the examples differ in it.
    """
    whole = physical(value)
    if whole is value or value.numel() != 1 or not whole.numel():
        return value
    values = whole.detach().flatten()
    if not bool((values == values[0]).all()):
        raise InputError(
            f"per_example: Python reads a value by {op_name(op)} (as `if`, `int(...)` and `.item()` do) in which the "
            f"examples differ: {values[:8].tolist()}. Choose with torch.where instead, or batch examples that agree in "
            "it. Models of transformers with sdpa attention do so for a padding mask: pass the mask with four axes, "
            "[1, 1, t, t], that says which key each query sees, or load the model with attn_implementation='eager'."
        )
    return values[0]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention`, with every vmapped axis of its arguments folded into the op's batch axis.

    Shapes: as that op; in one example `[..., heads, t, d]` with any leading axes, also none. Where the examples share
    an argument it is expanded, a mask stays as it is. Autograd, autocast, dropout and the choice of a kernel are those
    of the op on the folded batch.

    Inside derivatives of `torch.func` that are taken for each example, and for random numbers that all examples are
    to share, it is the plain form of the op, which `torch.func` knows in every way.
    """
    operands = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    options: dict[str, Any] = {
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "scale": scale,
        "enable_gqa": enable_gqa,
    }
    if has_torch_function(operands):
        attended: Tensor = handle_torch_function(attention, operands, *operands, **options)
        return attended
    transforms = [interpreter.key() for interpreter in get_interpreter_stack() or ()]
    if TransformType.Vmap not in transforms and TransformType.Jvp not in transforms:
        return F.scaled_dot_product_attention(*operands, **options)
    vmapped = retrieve_current_functorch_interpreter()
    if not isinstance(vmapped, VmapInterpreter) or (dropout_p > 0 and vmapped.randomness() != "different"):
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(*operands, **options)
    unwrapped, axes = zip(*(_unwrap_batched(tensor, vmapped.level()) for tensor in operands), strict=True)
    shared = all(axis is None for axis in axes) and dropout_p == 0
    with vmapped.lower():
        if shared:
            return attention(*operands, **options)
        attended = _folded(unwrapped, axes, vmapped.batch_size(), options)
    return _add_batch_dim(attended, 0, vmapped.level())


def _folded(operands: Sequence[Tensor], axes: Sequence[int | None], batch: int, options: dict[str, Any]) -> Tensor:
    """The op on operands of which some have the examples on an axis; the result has them on axis 0."""
    leading = max(t.dim() - (axis is not None) for t, axis in zip(operands, axes, strict=True)) - 2
    depth = max(leading, 1)
    aligned = [_aligned(t, axis, depth) for t, axis in zip(operands, axes, strict=True)]
    rows = torch.broadcast_shapes((batch, *[1] * (depth - 1)), *(t.shape[:depth] for t in aligned))
    one = (1,) * depth
    folded: list[Any] = [
        t.expand(*(one if is_mask and t.shape[:depth] == one else rows), *t.shape[depth:]).flatten(0, depth - 1)
        for is_mask, t in zip((False, False, False, True), aligned, strict=False)
    ]
    attended: Tensor = attention(*folded, **options).unflatten(0, rows)
    return attended if leading else attended.squeeze(1)


def _aligned(operand: Tensor, axis: int | None, depth: int) -> Tensor:
    """A view [b or 1, ..., heads, t, d] with `depth` axes before the heads: the examples first, then ones, the rest."""
    front = operand.unsqueeze(0) if axis is None else operand.movedim(axis, 0)
    missing = depth + 3 - front.dim()
    return front[(slice(None), *[None] * missing)] if missing else front
