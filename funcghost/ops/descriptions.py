"""Which ops are products, and of what: the axes of their arguments by letter, op by op (see `products.py`)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from funcghost.ops.products import (
    Arguments,
    Describe,
    Description,
    Letters,
    Product,
    Table,
    from_right,
    product_of_two,
    sizes_of,
    spread,
)
from funcghost.ops.rules import Op, find_rule
from funcghost.ops.tangent import Call, covered_by_rule, pushforward

_DESCRIPTIONS: dict[Op, Description] = {}


def description(op: Op) -> Description | None:
    """That of an op, if it has one."""
    return _DESCRIPTIONS.get(op)


def _linear(call: Call, slots: dict[str, int], a: Arguments, name: str) -> Product | None:
    x, weight = a["input"], a["weight"]
    lead = tuple(range(x.dim() - 1))
    last: Letters = ("p",) if weight.dim() == 2 else ()
    if name == "bias":
        return Product(last if a["bias"].dim() else (), (), (*lead, *last))
    return product_of_two(slots, ("input", (*lead, "d"), x), ("weight", (*last, "d"), weight), (*lead, *last), name)


def _matmul_letters(x: Tensor, y: Tensor) -> tuple[Letters, Letters, Letters]:
    """Those of two matrices (or vectors) with leading axes, and of their product."""
    xs, ys = from_right(max(x.dim() - 2, 0)), from_right(max(y.dim() - 2, 0))
    row: Letters = ("m",) if x.dim() > 1 else ()
    col: Letters = ("p",) if y.dim() > 1 else ()
    return (*xs, *row, "d"), (*ys, "d", *col), (*max(xs, ys, key=len), *row, *col)


def _matmul(call: Call, slots: dict[str, int], a: Arguments, name: str) -> Product | None:
    x, y = a["input"], a["other"]
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return None
    one, two, out = _matmul_letters(x, y)
    return product_of_two(slots, ("input", one, x), ("other", two, y), out, name)


def _addmm(call: Call, slots: dict[str, int], a: Arguments, name: str) -> Product | None:
    x, y = a["mat1"], a["mat2"]
    one, two, out = _matmul_letters(x, y)
    scale = a.get("beta" if name == "input" else "alpha", 1)
    if isinstance(scale, Tensor):
        return None
    if name == "input":
        aligned = out[len(out) - a["input"].dim() :]
        found = spread(aligned, a["input"], sizes_of((one, x), (two, y)))
        return Product(found, (), out, scale=scale)
    return product_of_two(slots, ("mat1", one, x), ("mat2", two, y), out, name, scale)


def _einsum(call: Call, slots: dict[str, int], a: Arguments, name: str) -> Product | None:
    tensors = [slot for slot, leaf in enumerate(call.leaves) if isinstance(leaf, Tensor)]
    equation = call.leaves[0]
    if not isinstance(equation, str) or len(tensors) != 2:
        return None
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != 2:
        return None
    letters = []
    for term, slot in zip(terms, tensors, strict=True):
        before, dots, after = term.partition("...")
        rest = from_right(call.leaves[slot].dim() - len(before) - len(after)) if dots else ()
        letters.append((*before, *rest, *after))
    most = max((tuple(x for x in term if isinstance(x, int)) for term in letters), key=len)
    if arrow:
        before, dots, after = right.partition("...")
        out: Letters = (*before, *(most if dots else ()), *after)
    else:
        once = sorted(x for x in set(left) if x.isalpha() and left.count(x) == 1)
        out = (*most, *once)
    if any(len(set(term)) < len(term) for term in (*letters, out)):
        return None
    one, two = ((str(slot), term, call.leaves[slot]) for slot, term in zip(tensors, letters, strict=True))
    return product_of_two({str(slot): slot for slot in tensors}, one, two, out, str(slots[name]))


def _mul(call: Call, slots: dict[str, int], a: Arguments, name: str) -> Product | None:
    x, y = a["input"], a["other"]
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        own = x if isinstance(x, Tensor) else y
        number = y if own is x else x
        letters = from_right(own.dim())
        return None if isinstance(number, complex) else Product(letters, (), letters, scale=number)
    out = max(from_right(x.dim()), from_right(y.dim()), key=len)
    return product_of_two(slots, ("input", from_right(x.dim()), x), ("other", from_right(y.dim()), y), out, name)


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
        """Those of a convolution in which every sample is a group of its own."""
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
    """Sums or means of rows, where all bags have the same length: the index has two axes."""
    if name != "weight" or a["input"].dim() != 2 or not covered_by_rule(call):
        return None
    mean, padding, weights = a.get("mode", "mean") == "mean", a.get("padding_idx"), a.get("per_sample_weights")
    dtype, length = a["weight"].dtype, a["weight"].shape[0]

    def values(saved: Sequence[Tensor]) -> tuple[Tensor, ...]:
        index, *weights = saved
        kept = index.new_ones(index.shape, dtype=dtype) if padding is None else (index != padding % length).to(dtype)
        scale = kept / kept.sum(-1, keepdim=True).clamp(min=1) if mean else kept
        return index, (scale * weights[0] if weights else scale).unsqueeze(-1)

    needed = (slots["input"],) if weights is None else (slots["input"], slots["per_sample_weights"])
    return Table(needed, 2, values, summed=True)


def _rows(call: Call, slots: dict[str, int], a: Arguments, name: str) -> Table | None:
    """Indexing the first axis by one tensor of numbers."""
    index = a["index"]
    if name != "input" or not isinstance(index, Tensor) or index.dtype != torch.int64 or a.get("dim", 0) != 0:
        return None
    size = a["input"].shape[0]
    return Table((slots["index"],), index.dim(), lambda saved: (saved[0] % size,))


def _describe(names: tuple[str, ...], product: Describe, *ops: Op) -> None:
    for op in ops:
        _DESCRIPTIONS[op] = (names, product)


T: Any = torch.Tensor
_describe(("input", "weight", "bias"), _linear, F.linear)
_describe(("input", "other"), _matmul, torch.matmul, T.matmul, torch.mm, T.mm, torch.bmm, T.bmm, torch.mv, T.mv)
_describe(("other", "input"), _matmul, T.__rmatmul__)
_describe(("input", "mat1", "mat2"), _addmm, torch.addmm, T.addmm)
_describe(("input", "mat1", "mat2"), _addmm, torch.baddbmm, T.baddbmm)
_describe(("equation", "first", "second"), _einsum, torch.einsum)
_describe(("input", "other"), _mul, torch.mul, T.mul)
_describe(("input", "other"), _add(1, 1), torch.add, T.add)
_describe(("input", "other"), _add(1, -1), torch.sub, T.sub)
_describe(("input", "other"), _add(-1, 1), T.__rsub__)
_describe(("input", "normalized_shape", "weight", "bias"), _norm(channel=False), F.layer_norm, torch.layer_norm)
_describe(("input", "normalized_shape", "weight"), _norm(channel=False), F.rms_norm, torch.rms_norm)
_describe(("input", "num_groups", "weight", "bias"), _norm(channel=True), F.group_norm, torch.group_norm)
_describe(("input", "running_mean", "running_var", "weight", "bias"), _norm(channel=True), F.batch_norm)
_describe(
    ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    _convolution,
    *(F.conv1d, F.conv2d, F.conv3d),
)
_describe(("input", "weight", "padding_idx"), _embedding("input"), F.embedding)
_describe(("weight", "indices", "padding_idx", "scale_grad_by_freq"), _embedding("indices"), torch.embedding)
_describe(("input", "weight"), _bags, F.embedding_bag)
_describe(("input", "index"), _rows, T.__getitem__)
_describe(("input", "dim", "index"), _rows, torch.index_select, T.index_select)
