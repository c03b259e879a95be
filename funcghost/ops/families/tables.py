"""Tables: rows chosen by an index, and other ops that choose by data where an entry goes."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funcghost.errors import InputError
from funcghost.ops.call import Call
from funcghost.ops.known import know, named
from funcghost.ops.layout import readable
from funcghost.ops.products import Arguments, Describe, Table
from funcghost.ops.rules import Op, find_rule
from funcghost.ops.tangent import covered_by_rule

T: Any = torch.Tensor

BY_DATA: frozenset[Op] = named(
    *("index_select", "gather", "take_along_dim", "take", "masked_select", "masked_scatter", "sort", "msort", "topk"),
    *("index_add", "index_copy", "index_put", "scatter", "scatter_add", "scatter_reduce", "index_reduce", "kthvalue"),
    *("unique", "segment_reduce", "index_fill", "argwhere", "repeat_interleave"),
) | {
    *(T.__getitem__, T.__setitem__, F.embedding, F.embedding_bag, torch.embedding),
    *(torch._VF._pack_padded_sequence, torch._VF._pad_packed_sequence),
}
"""The ops that choose where an entry goes by an index or an order. Others compute in place."""

OVERWRITES = named("index_copy", "index_fill", "index_put", "masked_scatter", "scatter") | {T.__setitem__}
"""The ops that put something in the place of entries of their first argument."""


def _embedding(index_name: str) -> Describe:
    def lookup(call: Call, slots: dict[str, int], a: Arguments, name: str) -> Table | None:
        rule = find_rule(call.op)
        if name != "weight" or rule is None or not covered_by_rule(call):
            return None
        factor, arguments = rule.factor, {k: v for k, v in a.items() if not isinstance(v, Tensor)}
        shape, dtype = a["weight"].shape, a["weight"].dtype

        def values(saved: Sequence[Tensor]) -> tuple[Tensor, ...]:
            index = saved[0]
            # The weight is asked for its length and its dtype alone.
            blank = index.new_zeros((), dtype=dtype).expand(shape)
            scale = factor({**arguments, index_name: index, "weight": blank}) if factor else None
            return (index,) if scale is None else (index, scale)

        return Table((slots[index_name],), a[index_name].dim(), values)

    return lookup


def _bags(call: Call, slots: dict[str, int], a: Arguments, name: str) -> Table | None:
    """Sums or means of rows: of those along the second axis of the index, or of those from an offset to the next."""
    if name != "weight" or not covered_by_rule(call):
        return None
    mean, padding, own_weights = a.get("mode", "mean") == "mean", a.get("padding_idx"), a.get("per_sample_weights")
    dtype, length, last = a["weight"].dtype, a["weight"].shape[0], bool(a.get("include_last_offset"))

    def kept(index: Tensor) -> Tensor:
        return index.new_ones(index.shape, dtype=dtype) if padding is None else (index != padding % length).to(dtype)

    def values(saved: Sequence[Tensor]) -> tuple[Tensor, ...]:
        index, *weights = saved
        scale = kept(index)
        scale = scale / scale.sum(-1, keepdim=True).clamp(min=1) if mean else scale
        return index, (scale * weights[0] if weights else scale).unsqueeze(-1)

    def ragged(saved: Sequence[Tensor]) -> tuple[Tensor, ...]:
        index, offsets, *weights = saved
        place, scale = torch.arange(len(index), device=index.device), kept(index)
        if last:
            _check_end(offsets, len(index), dtype)
            offsets = offsets[:-1]
        bag = torch.searchsorted(offsets, place.to(offsets.dtype), right=True) - 1
        if mean:
            scale = scale / scale.new_zeros(len(offsets)).index_add(0, bag, scale).clamp(min=1)[bag]
        return index, (scale * weights[0] if weights else scale).unsqueeze(-1), bag

    even = a["input"].dim() == 2
    names = ["input", *([] if even else ["offsets"]), *([] if own_weights is None else ["per_sample_weights"])]
    needed = tuple(slots[name] for name in names)
    return Table(needed, 2, values, summed=True) if even else Table(needed, 1, ragged, ragged=True)


def _check_end(offsets: Tensor, length: int, dtype: torch.dtype) -> None:
    """Bags have to end where the index does, but in float64 on a CPU, where the last one goes to the end all the same.

    Elsewhere torch 2.13 takes other rows into the last bag for a sum, for its mean and for their gradients.

    Raises:
        InputError: they do not; on a device, where nobody waits, it is an assertion of the device's.
    """
    if not readable(offsets):
        return
    fits = offsets[-1] == length
    if offsets.device.type != "cpu":
        torch._assert_async(fits, "embedding_bag: the last offset is not the length of the input")
    elif dtype is not torch.float64 and not fits:
        raise InputError(
            f"embedding_bag: with include_last_offset=True the last offset must be the length of the input, {length}, "
            f"found {int(offsets[-1])}: torch does not say which rows are in the last bag then. Cut the input there."
        )


def _rows(call: Call, slots: dict[str, int], a: Arguments, name: str) -> Table | None:
    """Indexing the first axis by one tensor of numbers."""
    index = a["index"]
    if name != "input" or not isinstance(index, Tensor) or index.dtype != torch.int64 or a.get("dim", 0) != 0:
        return None
    size = a["input"].shape[0]
    return Table((slots["index"],), index.dim(), lambda saved: (saved[0] % size,))


def _embedding_factor(a: Arguments) -> Tensor | None:
    """What the gradient of an embedding does beyond its forward: no padding row, and a scale by frequency."""
    padding = a.get("padding_idx")
    return _lookup_factor(a, a["input"], None if padding is None else padding % a["weight"].shape[0])


def _raw_embedding_factor(a: Arguments) -> Tensor | None:
    padding = a.get("padding_idx", -1)
    return _lookup_factor(a, a["indices"], None if padding < 0 else padding)


def _lookup_factor(a: Arguments, index: Tensor, padding: int | None) -> Tensor | None:
    factor: Tensor | None = None if padding is None else (index != padding).unsqueeze(-1)
    if not a.get("scale_grad_by_freq"):
        return factor
    ones = a["weight"].new_ones(index.numel())
    count: Tensor = ones.new_zeros(a["weight"].shape[0]).index_add(0, index.flatten(), ones)[index].unsqueeze(-1)
    return 1 / count if factor is None else factor / count


def _not_renormed(a: Arguments) -> bool:
    return a.get("max_norm") is None


def _adds_rows(a: Arguments) -> bool:
    return a.get("mode", "mean") != "max" and a.get("max_norm") is None and not a.get("scale_grad_by_freq")


know(F.embedding, linear=(("weight",),), when=_not_renormed, factor=_embedding_factor, product=_embedding("input"))
know(
    torch.embedding,
    linear=(("weight",),),
    arguments=("weight", "indices", "padding_idx", "scale_grad_by_freq", "sparse"),
    factor=_raw_embedding_factor,
    product=_embedding("indices"),
)
know(F.embedding_bag, linear=(("weight",), ("per_sample_weights",)), when=_adds_rows, product=_bags)
know(T.__getitem__, linear="jointly", arguments=("input", "index"), product=_rows)
know(T.index_select, linear="jointly", arguments=("input", "dim", "index"), product=_rows)
know(torch.index_select, arguments=("input", "dim", "index"), product=_rows)
