"""Frozen dataclasses as JSON values and back, held to their type hints.

A value read back is of exactly the types that its class declares, or there is an error that says where it is not.
"""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


class MalformedError(ValueError):
    """A JSON value is not of the type that it is read as."""


def encode(value: Any) -> Any:
    """The JSON value of dataclasses, tuples, sets, dtypes, numbers and strings, without fields with `compare=False`.

    Law: `decode(type(value), encode(value)) == value`.
    """
    if is_dataclass(value):
        return {field.name: encode(getattr(value, field.name)) for field in fields(value) if field.compare}
    if isinstance(value, tuple):
        return [encode(item) for item in value]
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value


def decode(kind: Any, value: Any, where: str = "value") -> Any:
    """The value of a type (a dataclass, tuple, frozenset, Literal, union, dtype, int, bool, str or None).

    Raises:
        MalformedError: it is something else; `where` says which part of the whole.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _decode_union(arguments, value, where)
    if origin is Literal:
        return value if type(value) is str and value in arguments else _refuse(where, f"one of {arguments}", value)
    if origin is tuple:
        items = _list(value, where)
        if arguments[-1] is not Ellipsis and len(arguments) != len(items):
            _refuse(where, f"{len(arguments)} items", value)
        kinds = [arguments[0]] * len(items) if arguments[-1] is Ellipsis else arguments
        return tuple(
            decode(each, item, f"{where}[{i}]") for i, (each, item) in enumerate(zip(kinds, items, strict=True))
        )
    if origin is frozenset:
        return frozenset(decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(_list(value, where)))
    if kind is torch.dtype:
        return DTYPES[value] if type(value) is str and value in DTYPES else _refuse(where, "a dtype", value)
    if is_dataclass(kind):
        return _decode_fields(kind, value, where)
    return value if type(value) is kind else _refuse(where, getattr(kind, "__name__", str(kind)), value)


def _decode_fields(kind: Any, value: Any, where: str) -> Any:
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind) if field.compare]
    if not isinstance(value, Mapping) or set(value) != set(names):
        _refuse(where, f"an object with the keys {names}", value)
    return kind(**{name: decode(hints[name], value[name], f"{where}.{name}") for name in names})


def _decode_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    reasons = []
    for kind in kinds:
        try:
            return decode(kind, value, where)
        except MalformedError as error:
            reasons.append(str(error))
    raise MalformedError(" or ".join(reasons))


def _list(value: Any, where: str) -> list[Any]:
    return value if isinstance(value, list) else _refuse(where, "a list", value)


def _refuse(where: str, wanted: str, value: Any) -> Any:
    shown = repr(value)
    raise MalformedError(f"{where} must be {wanted}, found {shown if len(shown) < 80 else shown[:77] + '...'}")
