"""What `torch.compile` is told of a step: what the losses read, so that it compiles anew where they do otherwise.

The part of the compiler that reads Python and guards what it has read, Dynamo, does not look into what a mode sees:
left to itself it would take every step for the same. So while it reads the step, it also reads the losses, for its
guards alone; their ops are dropped from the graph again. With the arguments of that call, as far as they are known,
the step is planned and verified as ever, and the traced run is held to that plan (`funcghost.ops.digest`). All tensors
that Dynamo met become inputs of the graph.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import count
from types import FunctionType
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_unflatten

from funcghost.engine.plans import Plan
from funcghost.engine.run import Outcome
from funcghost.errors import InputError, MismatchError, PlanError
from funcghost.ops.call import flatten_call
from funcghost.ops.moves import by_chance
from funcghost.options import Options
from funcghost.planning.planner import make_plan
from funcghost.problem import Losses, Problem, Reduction
from funcghost.reducers.bases import split_reducers
from funcghost.reducers.requests import Request, requested
from funcghost.side_effects import untouched
from funcghost.trees import Tree, split_params
from funcghost.versions import COMPILED_STEPS, need

_numbers = count()


Standins = dict[int, Tensor]
"""What takes the place of the tensors that the losses close over, by their id, while a compiler traces."""


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
    need(COMPILED_STEPS, "torch.compile of a step", "leave the step uncompiled (the model may be compiled).")
    import_module("funcghost.transforms.reading").read_losses(ctx)


@contextmanager
def uncompiled() -> Iterator[None]:
    """What the losses call runs as plain Python where it was given to `torch.compile`, so that a mode sees its ops.

    Gradients are taken also where the caller has inference mode on.
    """
    enabled = torch.is_grad_enabled()
    with torch.compiler.set_stance("force_eager"):
        if not torch.is_inference_mode_enabled():
            yield
            return
        with torch.inference_mode(False), torch.set_grad_enabled(enabled):
            yield


class Compilable(ABC):
    """A step that a compiler may trace."""

    losses: Losses
    reduction: Reduction | None
    has_aux: bool
    options: Options
    plans: list[Plan]

    def bound(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """A method as the function that a user gets: `torch.compile` keeps apart what it makes of each."""
        bound: Callable[..., Any] = with_code_of_its_own(method).__get__(self)
        return bound

    def prepare(self, params: Tree, batch: Tree, reducers: Tree) -> bool:
        """Sees to it that the first of the plans is verified for these arguments, with nothing changed by that.

        Says whether a graph may be for other sizes, too: if the plan was right for two.
        """
        problem = Problem(self.losses, split_params(params), batch, self.has_aux)
        request = requested(split_reducers(reducers)[0], problem.params)
        if request.empty or problem.is_meta():
            return True
        with torch._guards.tracing(None), uncompiled(), untouched(problem.devices()):
            self.planned(problem, request)
            if any(map(by_chance, self.plans[0].moves)):
                self.attempt(problem, request, make_plan(problem, self.options, any_order=True), new=True)
        return self.options.verify == "never" or len(self.plans[0].sizes) > 1

    def along_plan(self, given: Given, leaves: Sequence[Any], captured: Sequence[Tensor]) -> tuple[Any, ...]:
        """The step as a compiler traces it: what the losses close over comes in as arguments, tensors alone go out."""
        standins = {id(own): value for own, value in zip(given.captured, captured, strict=True)}
        with torch.compiler.set_stance("force_eager"):
            params, batch, reducers = given.tree(leaves)
            found = self.solve(params, batch, reducers, standins if torch.compiler.is_compiling() else None)
            return tuple(() if value is None else value for value in found)

    def traced(self, problem: Problem, request: Request, standins: Standins) -> Outcome:
        """Runs along a plan that was passed or prepared, and only that, while a compiler traces."""
        if torch._C._functorch.maybe_current_level() is not None:
            raise InputError("while a compiler traces, a step cannot run inside torch.func transforms: use fg.stack.")
        if not self.plans:
            raise PlanError(
                "while a compiler traces, nothing can be measured: make plan = fg.plan(...), and pass plan=plan."
            )
        reasons = []
        for plan in self.plans:
            try:
                outcome = self.run(problem, request, plan, self.reduction, standins)
            except MismatchError as reason:
                reasons.append(reason)
                continue
            new = outcome.sizes not in plan.sizes
            if not len(outcome.losses) or not self.due(new or not plan.verified):
                return outcome
            reasons.append(MismatchError("it has not been verified for these sizes and numbers"))
        raise PlanError(
            f"the plan passed is not for these losses: {reasons[0]} Make it with fg.plan(...) for what is compiled, or "
            "call the step once uncompiled with these arguments: it keeps what it planned and verified."
        ) from None

    @abstractmethod
    def solve(self, params: Tree, batch: Tree, reducers: Tree, standins: Standins | None) -> tuple[Any, ...]:
        """The step."""

    @abstractmethod
    def planned(self, problem: Problem, request: Request) -> Outcome:
        """Runs along a plan that fits, or is made."""

    @abstractmethod
    def attempt(self, problem: Problem, request: Request, plan: Plan, new: bool = False) -> Outcome:
        """Runs along this plan."""

    @abstractmethod
    def run(
        self,
        problem: Problem,
        request: Request,
        plan: Plan,
        reduction: Reduction | None,
        standins: Standins | None = None,
    ) -> Outcome:
        """What is asked for, along a plan."""

    @abstractmethod
    def due(self, new: bool) -> bool:
        """Whether something is to be verified that is new, or is not."""
