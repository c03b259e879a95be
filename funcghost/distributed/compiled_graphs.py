"""The graph that Dynamo makes of a block, and what the block's backend makes of that with the taps of a plan inside."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from operator import getitem
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import Graph, GraphModule
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _pop_mode, _push_mode

from funcghost.engine.capture import Capture
from funcghost.engine.regions import Known, RefusedError, Walked, put_together, taken_apart, takes_parts, walk_through
from funcghost.engine.tap import there
from funcghost.ops.composite import seen_by
from funcghost.side_effects import random_state, replaying

log = logging.getLogger("funcghost")

MOST = 16
"""How many forms and sizes of a block's inputs are compiled, and how many plans for each."""


class Outside:
    """What is on around a block while Dynamo takes nothing to be: a mode that sees calls, and `others` that see ops.

    `gradients`: whether those of parameters are wanted. `met`: whether Dynamo's graph has been called.
    """

    def __init__(self, mode: TorchFunctionMode | None, others: Sequence[TorchDispatchMode], gradients: bool) -> None:
        self.mode, self.others, self.gradients, self.met = mode, others, gradients, False

    @contextmanager
    def again(self) -> Iterator[None]:
        """It is on again."""
        assert self.mode is not None
        for other in self.others:
            _push_mode(other)
        try:
            with seen_by(self.mode):
                yield
        finally:
            for _ in self.others:
                _pop_mode()


_outside: ContextVar[Outside] = ContextVar("funcghost_outside")


@contextmanager
def alone(mode: TorchFunctionMode | None, gradients: bool) -> Iterator[Outside]:
    """Dynamo may work: the mode that sees calls is off, if there is one, and so are those that see ops."""
    with _disable_current_modes() as others, torch.compiler.set_stance("default"):
        outside = Outside(mode, others[::-1], gradients)
        token = _outside.set(outside)
        if mode is not None:
            TorchFunctionMode.__exit__(mode, None, None, None)
        try:
            yield outside
        finally:
            if mode is not None:
                TorchFunctionMode.__enter__(mode)
            _outside.reset(token)


@cache
def say(text: str) -> None:
    """Logs a sentence, once."""
    log.warning("%s", text)


def first_line_of(error: Exception) -> str:
    """The first line of what an error says."""
    error = getattr(error, "inner_exception", error)  # of a backend
    text = str(error).strip().partition("\n")[0]
    return text if isinstance(error, RefusedError) else f"{type(error).__name__}: {text}"


class Compiled:
    """A graph with taps, compiled for inputs and tangents of one form, and what runs are told of it.

    It is held once to what the same graph gives op by op, on these inputs along drawn directions.

    Raises:
        RefusedError: it gives something else; and, as MismatchError and PlanError, where `walk_through` does.
    """

    def __init__(self, graph: GraphModule, backend: Any, capture: Capture, inputs: Sequence[Any], known: Known) -> None:
        """Compiles it, for where a run has come to."""
        count, forms, walks = len(inputs), known.forms, list[Walked]()

        def part(probe: Tensor, *given: Any) -> tuple[Any, ...]:
            present = _outside.get().mode
            assert isinstance(present, Capture)
            found, walked = walk_through(present, graph, probe, given[:count], put_together(forms, given[count:]))
            walks[:] = [walked]
            return found

        # Directions may have no memory yet.
        drawn = [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device) for v in known.tensors]
        own_affair = saved_tensors_hooks(_as_it_is, _as_it_is)  # and none of a checkpoint's, which counts what is kept
        with replaying(random_state([capture.probe.device])), own_affair:
            for value in drawn:
                value.normal_()
            example = [capture.probe, *inputs, *drawn]
            self.run = backend(_as_graph(part, len(example), graph), example)
            _hold(self.run, part, example, capture.plan.precision)
        (self.walked,) = walks


def _as_it_is(value: Tensor) -> Tensor:
    return value


def _hold(
    compiled: Callable[..., Sequence[Any]],
    part: Callable[..., Sequence[Any]],
    example: Sequence[Any],
    precision: torch.dtype,
) -> None:
    """Holds what was compiled to what it was compiled from: outputs, and all gradients, the scores among them.

    Where random numbers are drawn, which compilers draw in ways of their own, there is nothing to hold it to.
    """
    before = random_state([example[0].device])
    wanted = _derived(part, example)
    if any(not a.equal(b) for (_, a), (_, b) in zip(before, random_state([example[0].device]), strict=True)):
        return
    largest = max(other.double().norm() for other in wanted)
    for own, other in zip(_derived(compiled, example), wanted, strict=True):
        eps = max(torch.finfo(other.dtype).eps, torch.finfo(precision).eps)
        allowed = 3 * eps**0.5 * other.double().norm() + 100 * eps * largest
        if largest.isfinite() and not (own.double() - other.double()).norm() <= allowed:
            raise RefusedError("compiled by its backend it gives other numbers")


def _derived(part: Callable[..., Sequence[Any]], example: Sequence[Any]) -> list[Tensor]:
    """What comes out for copies of inputs, and the gradients of a combination of it."""
    own = [_copy(value) if isinstance(value, Tensor) else value for value in example]
    found = [value for value in part(*own) if isinstance(value, Tensor) and value.is_floating_point()]
    ends = [value for value in own if isinstance(value, Tensor) and value.requires_grad]
    smooth = [value for value in found if value.requires_grad]
    weights = [torch.linspace(0.5, 1.5, v.numel(), dtype=v.dtype, device=v.device).view(v.shape) for v in smooth]
    gradients = torch.autograd.grad(smooth, ends, weights, allow_unused=True)
    return [
        *(value.detach() for value in found),
        *(torch.zeros_like(end) if g is None else g for end, g in zip(ends, gradients, strict=True)),
    ]


def _copy(value: Tensor) -> Tensor:
    copied = value.detach().clone()
    return (copied if copied.stride() == value.stride() else value.detach()).requires_grad_(value.requires_grad)


def _as_graph(part: Callable[..., Any], count: int, like: GraphModule) -> GraphModule:
    """A graph of one op with so many inputs, and as many outputs as another graph."""
    made = Graph()
    found = made.call_function(part, tuple([made.placeholder(f"given_{i}") for i in range(count)]))
    (outputs,) = (node for node in like.graph.nodes if node.op == "output")
    made.output(tuple([made.call_function(getitem, (found, i)) for i in range(len(outputs.args[0]))]))
    return GraphModule({}, made)


class Block:
    """The graph that Dynamo made of a block, in its place: called with what the graph takes in."""

    def __init__(self, graph: GraphModule, backend: Any) -> None:
        self.graph, self.backend = graph, backend
        self.made: dict[Any, list[Compiled]] = {}
        self.refused: dict[Any, str] = {}

    def __call__(self, *inputs: Any) -> Any:
        """Runs it along the plan of the run that is going on, as one op or op by op."""
        outside = _outside.get()
        outside.met, capture = True, outside.mode
        if isinstance(capture, Capture) and takes_parts(capture) and not outside.others:
            try:
                return self._as_one(capture, inputs, outside.gradients)
            except RefusedError as reason:
                say(f"a block given to torch.compile runs op by op in a step: {reason}")
        with outside.again():
            return self.graph(*inputs)

    def _as_one(self, capture: Capture, inputs: Sequence[Any], gradients: bool) -> Any:
        notes = [capture.values.noted(value) if isinstance(value, Tensor) else None for value in inputs]
        known = taken_apart([None if note is None else note.tangents for note in notes])
        given = inputs
        if not gradients:  # a compiled backward computes all gradients that are not ruled out when it is made
            given = [
                value if note is None or not value.is_leaf else value.detach()
                for value, note in zip(inputs, notes, strict=True)
            ]
        compiled = self._compiled(capture, given, known)
        found = compiled.run(capture.probe, *given, *known.tensors)
        compiled.walked.passed(capture, inputs, found)
        if capture.taps.may_be_freed:
            for node in {value.grad_fn for value in found if isinstance(value, Tensor)}:
                if node is not None:
                    node.register_prehook(lambda _: _check_there(known.tensors))
        return found

    def _compiled(self, capture: Capture, inputs: Sequence[Any], known: Known) -> Compiled:
        """What was, or is, compiled for inputs of this form, and the sites that come next."""
        form = (*map(_form, (capture.probe, *inputs, *known.tensors)), known.forms, capture.taps.dtype)
        made = self.made.get(form, [])
        for compiled in made:
            if compiled.walked.fits(capture):
                return compiled
        place = form, capture.plan.digest, capture.position
        if place in self.refused:
            raise RefusedError(self.refused[place])
        if len(made) >= MOST or (not made and len(self.made) + len(self.refused) >= MOST):
            raise RefusedError(f"its inputs have had {MOST} forms and sizes already")
        try:
            compiled = Compiled(self.graph, self.backend, capture, inputs, known)
        except Exception as error:
            self.refused[place] = first_line_of(error)
            raise RefusedError(self.refused[place]) from error
        self.made[form] = [*made, compiled]
        return compiled


def _form(value: Any) -> Any:
    """What a graph is made for: of a number, its value."""
    if not isinstance(value, Tensor):
        return value
    if type(value) not in (Tensor, nn.Parameter):
        raise RefusedError(f"a {type(value).__name__} goes into it")
    return value.shape, value.stride(), value.dtype, value.device, value.requires_grad


def _check_there(tensors: Sequence[Tensor]) -> None:
    for value in tensors:
        there(value)


class Backend:
    """What Dynamo is given as the backend of a block: it keeps the graph, for the block's own backend."""

    def __init__(self, own: Any) -> None:
        self.own = own

    def __call__(self, graph: GraphModule, _: Sequence[Any]) -> Block:
        """The block's place is taken."""
        for node in graph.graph.nodes:
            if isinstance(node.target, HigherOrderOperator) or node.op == "get_attr":
                raise RefusedError(f"{node.target} stands in it")
        return Block(graph, self.own)
