"""Products: matrices, einsum, elementwise, linear layers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funcghost.ops.call import Call
from funcghost.ops.known import in_front, know
from funcghost.ops.products import (
    Arguments,
    Describe,
    Letters,
    Product,
    from_right,
    product_of_two,
    sizes_of,
    spread,
)

T: Any = torch.Tensor
COMPOSITES = frozenset([F.multi_head_attention_forward])
"""Functions with weights of several linear layers in one call, which are seen by their parts."""
FACTORS = frozenset((torch.mul, T.mul, torch.multiply, T.multiply, T.__mul__, T.__rmul__))
"""Where an integer tensor is a factor, and a zero in it one of no meaning. Elsewhere integers may be indices."""


def _linear(call: Call, slots: dict[str, int], a: Arguments, name: str) -> Product | None:
    x, weight = a["input"], a["weight"]
    lead = tuple(range(x.dim() - 1))
    last: Letters = ("p",) if weight.dim() == 2 else ()
    if name == "bias":
        return Product(last if a["bias"].dim() else (), (), (*lead, *last))
    return product_of_two(slots, ("input", (*lead, "d"), x), ("weight", (*last, "d"), weight), (*lead, *last), name)


def _matmul_letters(x: Tensor, y: Tensor) -> tuple[Letters, Letters, Letters]:
    """The letters of two matrices (or vectors) with leading axes, and of their product."""
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


def _add_product(first: str, second: str) -> Describe:
    """A product of two matrices of these names, added to the input."""

    def product(call: Call, slots: dict[str, int], a: Arguments, name: str) -> Product | None:
        x, y = a[first], a[second]
        one, two, out = _matmul_letters(x, y)
        scale = a.get("beta" if name == "input" else "alpha", 1)
        if isinstance(scale, Tensor):
            return None
        if name == "input":
            aligned = out[len(out) - a["input"].dim() :]
            found = spread(aligned, a["input"], sizes_of((one, x), (two, y)))
            return Product(found, (), out, scale=scale)
        return product_of_two(slots, (first, one, x), (second, two, y), out, name, scale)

    return product


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


BY_MATRIX = (torch.matmul, T.matmul, torch.mm, T.mm, torch.bmm, T.bmm, torch.mv, T.mv)
know(*BY_MATRIX, linear="each", arguments=("input", "other"), product=_matmul)
know(T.__rmatmul__, linear="each", arguments=("other", "input"), product=_matmul)
know(torch.dot, torch.outer, linear="each")
know(torch.einsum, linear="each", arguments=("equation", "first", "second"), product=_einsum)
know(torch.mul, T.mul, linear="each", arguments=("input", "other"), product=_mul)
know(
    F.linear,
    linear=(("weight", "bias"), ("input", "bias")),
    arguments=("input", "weight", "bias"),
    product=_linear,
)
for _ops, _one, _two in (((torch.addmm, T.addmm), "mat1", "mat2"), ((torch.baddbmm, T.baddbmm), "batch1", "batch2")):
    know(
        *_ops,
        linear=((_two, "input"), (_one, "input")),
        arguments=("input", _one, _two),
        product=_add_product(_one, _two),
    )
know(
    *(F.grouped_mm, torch._grouped_mm),
    linear=(("mat_b", "bias"), ("mat_a", "bias")),
    arguments=("mat_a", "mat_b", "offs", "bias"),
)
know(F.bilinear, arguments=("input1", "input2"), samples=in_front("input1", "input2"))
