"""What `torch.compile` is told of a step: what the losses read, so that it compiles anew where they do otherwise.

The part of the compiler that reads Python and guards what it has read, Dynamo, does not look into what a mode sees:
left to itself it would take every step for the same. So while it reads the step, it also reads the losses, for its
guards alone; their ops are dropped from the graph again. With the arguments of that call, as far as they are known,
the step is planned and verified as ever, and the traced run is held to that plan (`funcghost.ops.digest`). All tensors
that Dynamo met become inputs of the graph.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import count
from types import FunctionType
from typing import Any, NamedTuple, Protocol

import optree
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_unflatten

from funcghost.ops.call import flatten_call
from funcghost.trees import Tree

_numbers = count()


class Given(NamedTuple):
    """The arguments of a step as they reach its graph: the leaves in `places` come in anew, all others are `constants`.

    The tensors `captured` are those that the losses close over.
    """

    spec: TreeSpec
    constants: Sequence[Any]
    places: Sequence[int]
    captured: Sequence[Tensor]

    def tree(self, leaves: Sequence[Any]) -> Tree:
        """The arguments, with these in the places of those that come in anew."""
        whole = list(self.constants)
        for place, leaf in zip(self.places, leaves, strict=True):
            whole[place] = leaf
        return tree_unflatten(whole, self.spec)


class Compiled(Protocol):
    """A step that a compiler traces."""

    def prepare(self, params: Tree, batch: Tree, reducers: Tree) -> bool:
        """Sees to a plan that is verified for these arguments; says whether it may be trusted with other sizes."""

    def along_plan(self, given: Given, leaves: Sequence[Any], captured: Sequence[Tensor]) -> tuple[Any, ...]:
        """The step as the compiler traces it."""


class Replacing(TorchFunctionMode):
    """Gives ops the stand-ins of tensors, by id."""

    def __init__(self, standins: dict[int, Tensor]) -> None:
        super().__init__()
        self.standins = standins

    def __torch_function__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the op on them."""
        leaves, spec = flatten_call(args, kwargs or {})
        args, kwargs = optree.tree_unflatten(spec, [self.standins.get(id(leaf), leaf) for leaf in leaves])
        return op(*args, **kwargs)


def with_code_of_its_own(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a function that shares no compiled code with others: the compiler keeps that by code object.

    By name and line it remembers which sizes change from call to call; a code object is compiled eight times at most.
    """
    assert isinstance(function, FunctionType)
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    return FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)


def read_losses(ctx: Any) -> None:
    """Called by Dynamo while it reads a step; see `funcghost.transforms.reading`, which is imported when it is."""
    import_module("funcghost.transforms.reading").read_losses(ctx)
