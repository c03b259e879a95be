"""torch's operators that take functions, as the Python that they stand for: so that a mode sees the ops of a branch.

In eager mode torch compiles the functions before it calls such an operator; where compiling is left out, as it is in a
step, the operator would be given functions that close over tensors, whose gradients it loses.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.flex_attention import math_attention
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._pytree import tree_map

Function = Callable[..., Any]


def _cond(pred: Any, true_fn: Function, false_fn: Function, operands: Sequence[Any] = ()) -> Any:
    return true_fn(*operands) if pred else false_fn(*operands)


def _while_loop(test: Function, body: Function, carried: Sequence[Any], others: Sequence[Any] = ()) -> Any:
    while test(*carried, *others):
        carried = tuple(body(*carried, *others))
    return carried


def _scan(
    combine: Function, init: Sequence[Tensor], xs: Sequence[Tensor], additional_inputs: Sequence[Any] = ()
) -> Any:
    carry, rows = list(init), []
    for row in zip(*xs, strict=True):
        found = combine(*carry, *row, *additional_inputs)
        carry, kept = list(found[: len(init)]), found[len(init) :]
        rows.append(kept)
    return [*carry, *(torch.stack(column) for column in zip(*rows, strict=True))]


def _associative_scan(combine: Function, xs: Sequence[Tensor], additional_inputs: Sequence[Any] = ()) -> Any:
    first, *others = zip(*xs, strict=True)
    rows = [first]
    for row in others:
        rows.append(tuple(combine(*rows[-1], *row, *additional_inputs)))
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


def _map(function: Function, xs: Sequence[Tensor], args: Sequence[Any] = (), mutated_arg_indices: Any = None) -> Any:
    # since torch 2.14 it is told which arguments the function writes to, which here it does as it says
    rows = [function(*row, *args) for row in zip(*xs, strict=True)]
    return tree_map(lambda *values: torch.stack(values), *rows)


_ops: Any = torch.ops.higher_order
AS_PYTHON: dict[Any, Function] = {
    _ops.cond: _cond,
    _ops.while_loop: _while_loop,
    _ops.scan: _scan,
    _ops.associative_scan: _associative_scan,
    _ops.map_impl: _map,
    _ops.flex_attention: math_attention,
}
"""What to call in place of an operator."""


class AsPython(TorchFunctionMode):
    """While it is active, these operators run as Python."""

    sees_parts = True

    def __torch_function__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs every other op as it is."""
        kwargs = kwargs or {}
        if op not in AS_PYTHON:
            return op(*args, **kwargs)
        with self:  # an operator may be part of another's function
            return AS_PYTHON[op](*args, **kwargs)


@contextmanager
def as_python() -> Iterator[None]:
    """Runs these operators as Python where no mode does so already; what is called is not compiled."""
    if watching() is not None:
        yield
        return
    with torch.compiler.set_stance("force_eager"), AsPython():
        yield


def watching() -> TorchFunctionMode | None:
    """The innermost active mode that sees the parts of these operators, if there is one."""
    return next(
        (mode for mode in reversed(_get_current_function_mode_stack()) if getattr(mode, "sees_parts", False)), None
    )


def is_traced() -> bool:
    """Whether a compiler traces what runs."""
    return torch.compiler.is_compiling() or get_proxy_mode() is not None
