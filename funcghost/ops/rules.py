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
