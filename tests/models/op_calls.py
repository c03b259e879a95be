"""Calls of every op that has a rule, with arguments and what may be tracked."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import optree
import pytest
import torch
from torch import Tensor

import funcghost as fg
from funcghost.ops import rules
from funcghost.ops.call import Call, Outputs, flatten_call, is_float, outputs
from funcghost.ops.rules import Rule, registered
from funcghost.ops.tangent import Way

T: Any = torch.Tensor


Params = dict[str, Tensor]


def ints(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 17 * sum(shape))
    return torch.randint(-4, 5, shape, generator=generator).to(dtype)


@dataclass(frozen=True, eq=False)
class Sample:
    """A call of an op.

    `beyond`: the slots of floating tensors in which the rule does not say that the op is linear. `ways`: what the op
    itself offers besides the rule ("forward" is left out where it is another map than the backward's transpose,
    "transpose" where the backward cannot be differentiated). `exact`: whether integers give exact results.
    """

    name: str
    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    beyond: tuple[int, ...] = ()
    ways: tuple[Way, ...] = ("forward", "transpose")
    exact: bool = True

    @property
    def leaves(self) -> tuple[Any, ...]:
        return tuple(flatten_call(self.args, self.kwargs)[0])

    @property
    def floats(self) -> list[int]:
        return [slot for slot, leaf in enumerate(self.leaves) if is_float(leaf)]

    def call(self, tracked: tuple[int, ...]) -> Call:
        return Call(self.op, self.leaves, flatten_call(self.args, self.kwargs)[1], tracked)

    def sets(self) -> Iterator[tuple[int, ...]]:
        """Every set of arguments that may carry a tangent."""
        for size in range(1, len(self.floats) + 1):
            yield from itertools.combinations(self.floats, size)

    def covered(self) -> list[tuple[int, ...]]:
        return [slots for slots in self.sets() if not set(slots) & set(self.beyond)]

    def run(self, tangible: dict[int, Tensor]) -> Outputs:
        leaves = [tangible.get(slot, leaf) for slot, leaf in enumerate(self.leaves)]
        args, kwargs = optree.tree_unflatten(flatten_call(self.args, self.kwargs)[1], leaves)
        return outputs(self.op(*args, **kwargs), ())


F32A, F32B = ints(8, 16, dtype=torch.float32), ints(2, 16, 8, seed=1, dtype=torch.float32)


GROUPS = torch.tensor([4, 8], dtype=torch.int32)


def seen_op(sample: Sample) -> Any:
    """The op as a mode sees it: `a @ b` and `Tensor.__matmul__` come as `Tensor.matmul`."""
    seen: list[Any] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(op)
            return op(*args, **(kwargs or {}))

    with Watch():
        args, kwargs = optree.tree_unflatten(flatten_call(sample.args, sample.kwargs)[1], sample.leaves)
        sample.op(*args, **kwargs)
    return seen[0]


def broken(rule: Rule, by: float) -> Rule:
    """The rule with a result that is off by a factor."""

    def factor(arguments: Any) -> Tensor:
        own = rule.factor(arguments) if rule.factor else None
        wrong = torch.tensor(by, dtype=torch.float64)
        return wrong if own is None else own * wrong

    return replace(rule, factor=factor)


def assert_broken_rule_is_caught(
    op: Any, losses: Callable[[Params, Any], Tensor], params: Params, batch: Any, by: float = 1.01
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rules._RULES, op, broken(registered()[op], by))
        direction = {name: torch.zeros_like(value) for name, value in params.items()}
        with pytest.raises(fg.ConservationError, match=r"scores do not add up for parameters \['w'\]"):
            fg.grad_and_reduce(losses)(params, batch, fg.dot(direction))
