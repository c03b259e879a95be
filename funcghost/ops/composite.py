"""Ops that are programs of other ops: a mode is to see their parts, of which each has a form that is known."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from funcghost.control_flow import AS_PYTHON
from funcghost.ops.families.products import COMPOSITES
from funcghost.ops.rules import Op

_T: Any = Tensor


def _to(dtype: torch.dtype) -> Op:
    return lambda tensor, **options: tensor.to(dtype=dtype, **options)


CONVERSIONS: dict[Op, Op] = {
    _T.bool: _to(torch.bool),
    _T.byte: _to(torch.uint8),
    _T.char: _to(torch.int8),
    _T.int: _to(torch.int32),
    _T.long: _to(torch.int64),
    _T.half: _to(torch.float16),
    _T.bfloat16: _to(torch.bfloat16),
    _T.float: _to(torch.float32),
    _T.double: _to(torch.float64),
    _T.cpu: lambda tensor, **options: tensor.to(device=torch.device("cpu"), **options),
}
"""Methods that the tensors of a compiler call by another name, as its graph and the plan are of one program."""


@cache
def opened(op: Op) -> Op | None:
    """The same function, but for the question whether a mode takes it as a whole; None where it is to be one."""
    if op in AS_PYTHON:
        return AS_PYTHON[op]
    if op in CONVERSIONS:
        return CONVERSIONS[op]
    if op not in COMPOSITES or not isinstance(op, FunctionType) or "has_torch_function" not in op.__code__.co_names:
        return None
    names = {**op.__globals__, "has_torch_function": lambda _: False}
    same = FunctionType(op.__code__, names, op.__name__, op.__defaults__, op.__closure__)
    same.__kwdefaults__ = op.__kwdefaults__
    return same


@contextmanager
def seen_by(mode: TorchFunctionMode) -> Iterator[None]:
    """Lets a mode that is handling an op see the ops that run for it."""
    TorchFunctionMode.__enter__(mode)
    try:
        yield
    finally:
        TorchFunctionMode.__exit__(mode, None, None, None)


def idle(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """The input of a dropout that drops nothing, None of all else: it gives that itself, where a compiler copies it."""
    if op is not F.dropout and op is not torch.dropout:
        return None
    given = dict(zip(("input", "p", "training" if op is F.dropout else "train"), args, strict=False)) | kwargs
    drops = given.get("training", given.get("train", True)) is not False and given.get("p", 0.5) != 0
    return None if drops else given["input"]
