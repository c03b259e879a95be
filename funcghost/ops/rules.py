"""Which operations are linear in which of their arguments.

A rule says: the op is *jointly linear* in each of these sets of arguments, the others held fixed. Its
derivative in the direction of some tangents is then the op itself with the tangents in place of the
arguments of the set (and zeros for those of the set without a tangent), added up over the sets. A rule is
never needed for a right result: it saves the work of differentiating the op.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from funcghost.errors import InputError

Op = Callable[..., Any]
Arguments = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Rule:
    """The op is jointly linear in each set of arguments in `linear`.

    `linear` is `"each"` (linear in every tensor argument by itself: a product), `"jointly"` (linear in all
    tensor arguments at once: a sum or a view) or sets of argument names. `factor` multiplies the result:
    1 where the op's backward is that of the forward, 0 where it leaves something out.
    """

    linear: Literal["each", "jointly"] | tuple[tuple[str, ...], ...]
    arguments: tuple[str, ...] = ()
    when: Callable[[Arguments], bool] | None = None
    factor: Callable[[Arguments], Tensor | None] | None = None

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name; those not given are absent."""
        return {**dict(zip(self.arguments, args, strict=False)), **kwargs}


_RULES: dict[Op, Rule] = {}


def register_rule(
    op: Op,
    *,
    linear: Literal["each", "jointly"] | Sequence[Sequence[str]],
    arguments: Sequence[str] | None = None,
    when: Callable[[Arguments], bool] | None = None,
    factor: Callable[[Arguments], Tensor | None] | None = None,
) -> None:
    """States that `op` is linear in some of its arguments, so that `J V` costs one call of it.

    Law: for every set `S` in `linear`, `op` with the arguments in `S` replaced by `a u + b v` equals
    `a op(u) + b op(v)`; and the derivative is the one that the op's own backward is the transpose of.

    Args:
        op: the function as `torch.overrides` shows it, e.g. `torch.nn.functional.linear`.
        linear: `"each"`, `"jointly"`, or sets of argument names (see `Rule`).
        arguments: the positional order of the argument names; by default read from the signature.
        when: says whether the rule holds for a call, given its arguments by name.
        factor: a tensor that multiplies the result (or None for one), given the arguments by name.

    Raises:
        InputError: an argument named in `linear` is not among `arguments`.

    Example:
        >>> import funcghost as fg, torch
        >>> fg.register_rule(torch.bmm, linear="each")  # a product of two tensors

    A wrong rule is found by the conservation law on the first call that uses it (`ConservationError`).
    """
    if linear == "each" or linear == "jointly":
        _RULES[op] = Rule(linear, tuple(arguments or ()), when, factor)
        return
    if isinstance(linear, str):
        raise InputError(f"register_rule({op}): linear must be 'each', 'jointly' or sets of names, found {linear!r}.")
    names = _signature(op) if arguments is None else tuple(arguments)
    unknown = {name for group in linear for name in group} - set(names)
    if unknown:
        raise InputError(f"register_rule({op}): no arguments {sorted(unknown)} among {names}. Pass arguments=[...].")
    _RULES[op] = Rule(tuple(tuple(group) for group in linear), names, when, factor)


def find_rule(op: Op) -> Rule | None:
    """The rule of an op, if it has one."""
    return _RULES.get(op)


def registered() -> dict[Op, Rule]:
    """Every op that has a rule."""
    return dict(_RULES)


def _signature(op: Op) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(op).parameters)
    except ValueError:
        raise InputError(f"register_rule({op}): the op shows no signature. Pass arguments=[...].") from None


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


def _all_float(a: Arguments) -> bool:
    return all(tensor.is_floating_point() or tensor.is_complex() for tensor in a["tensors"])


def _unrounded(a: Arguments) -> bool:
    return a.get("rounding_mode") is None


def _has_weight(a: Arguments) -> bool:
    return a.get("weight") is not None


T: Any = torch.Tensor
_JOINT = (("input", "other"),)
_AFFINE = (("weight", "bias"),)
_WEIGHT_OR_INPUT = (("weight", "bias"), ("input", "bias"))

_PRODUCTS = (
    *(torch.mm, T.mm, torch.bmm, T.bmm, torch.mv, T.mv, torch.dot, torch.outer, torch.einsum),
    *(torch.matmul, T.matmul, T.__rmatmul__, torch.mul, T.mul),
)
_SUMS_AND_VIEWS = (
    *(torch.clone, T.clone, T.contiguous, T.to, T.float, T.double, T.bfloat16, T.type_as),
    *(torch.sum, T.sum, torch.mean, T.mean, torch.neg, T.neg, T.__neg__),
    *(torch.t, T.t, T.T.__get__, T.mT.__get__, torch.transpose, T.transpose, torch.permute, T.permute, T.movedim),
    *(T.view, torch.reshape, T.reshape, torch.flatten, T.flatten, T.unflatten, T.expand, T.expand_as, T.repeat),
    *(torch.squeeze, T.squeeze, torch.unsqueeze, T.unsqueeze, T.__getitem__, T.narrow, T.index_select, T.select),
    *(torch.chunk, T.chunk, torch.split, T.split, torch.unbind, T.unbind),
)
_ADDITIONS = (torch.add, T.add, torch.sub, T.sub, T.__rsub__)
_CONVOLUTIONS = (
    *(F.conv1d, F.conv2d, F.conv3d),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
)

for _op in _PRODUCTS:
    register_rule(_op, linear="each")
for _op in _SUMS_AND_VIEWS:
    register_rule(_op, linear="jointly")
for _op in _ADDITIONS:
    register_rule(_op, linear=_JOINT, arguments=("input", "other"))
for _op in (torch.cat, torch.stack):
    register_rule(_op, linear="jointly", arguments=("tensors", "dim"), when=_all_float)
for _op in (torch.div, T.div):
    register_rule(_op, linear=(("input",),), arguments=("input", "other"), when=_unrounded)
register_rule(F.linear, linear=_WEIGHT_OR_INPUT, arguments=("input", "weight", "bias"))
for _op in (torch.addmm, T.addmm):
    register_rule(_op, linear=(("mat2", "input"), ("mat1", "input")), arguments=("input", "mat1", "mat2"))
for _op in (torch.baddbmm, T.baddbmm):
    register_rule(_op, linear=(("batch2", "input"), ("batch1", "input")), arguments=("input", "batch1", "batch2"))
for _op in _CONVOLUTIONS:
    register_rule(_op, linear=_WEIGHT_OR_INPUT, arguments=("input", "weight", "bias"))
for _op in (F.grouped_mm, torch._grouped_mm):
    register_rule(_op, linear=(("mat_b", "bias"), ("mat_a", "bias")), arguments=("mat_a", "mat_b", "offs", "bias"))
register_rule(F.embedding, linear=(("weight",),), when=_not_renormed, factor=_embedding_factor)
register_rule(
    torch.embedding,
    linear=(("weight",),),
    arguments=("weight", "indices", "padding_idx", "scale_grad_by_freq", "sparse"),
    factor=_raw_embedding_factor,
)
register_rule(F.embedding_bag, linear=(("weight",), ("per_sample_weights",)), when=_adds_rows)
for _op in (F.layer_norm, F.group_norm, F.batch_norm):
    register_rule(_op, linear=_AFFINE, when=_has_weight)
for _op, _arguments in (
    (torch.layer_norm, ("input", "normalized_shape", "weight", "bias")),
    (torch.group_norm, ("input", "num_groups", "weight", "bias")),
    (torch.batch_norm, ("input", "weight", "bias")),
):
    register_rule(_op, linear=_AFFINE, arguments=_arguments, when=_has_weight)
for _op in (F.rms_norm, torch.rms_norm):
    register_rule(_op, linear=(("weight",),), arguments=("input", "normalized_shape", "weight"))
