"""Blocks of a model that were given to `torch.compile` one by one: in a step they run compiled, too, taps and all.

Dynamo reads a block's forward as it does without us, with no mode on, and guards what it has read; hooks, those of
FSDP2 among them, run outside. Plans are made of the graph that it gives. A run that has to see every op runs the graph
op by op; one along a plan that wants scores alone gives it, with the taps of the plan inside, to the backend that the
block was compiled with: forward and backward are one op each. Blocks that Dynamo does not take whole run uncompiled.

This imports Dynamo, which takes as long as the import of torch: it is imported when something has been compiled.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from operator import getitem
from types import FunctionType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch._dynamo.eval_frame import OptimizeContext, innermost_backend
from torch._dynamo.exc import TorchDynamoException
from torch._inductor import config as inductor
from torch._ops import HigherOrderOperator
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.fx import Graph, GraphModule
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _pop_mode, _push_mode

from funcghost.control_flow import AsPython
from funcghost.distributed.fsdp_groups import standing
from funcghost.engine.capture import Capture
from funcghost.engine.regions import Known, RefusedError, Walked, put_together, taken_apart, takes_parts, walk_through
from funcghost.engine.tap import there
from funcghost.engine.walker import Walker
from funcghost.ops.composite import seen_by
from funcghost.side_effects import random_state, replaying
from funcghost.transforms.compiling import with_code_of_its_own

log = logging.getLogger("funcghost")

MOST = 16
"""How many forms and sizes of a block's inputs are compiled, and how many plans for each."""


class Outside(NamedTuple):
    """What is on around a block, while Dynamo takes nothing to be: a mode that sees ops, and others that see their parts.

    `gradients`: whether those of parameters are wanted.
    """

    mode: TorchFunctionMode | None
    others: Sequence[TorchDispatchMode]
    gradients: bool

    @contextmanager
    def again(self) -> Iterator[None]:
        """It is on again."""
        for other in self.others:
            _push_mode(other)
        try:
            assert self.mode is not None
            with seen_by(self.mode):
                yield
        finally:
            for _ in self.others:
                _pop_mode()


_outside: ContextVar[Outside] = ContextVar("funcghost_outside")


@contextmanager
def _alone(mode: TorchFunctionMode | None, gradients: bool) -> Iterator[None]:
    """Dynamo may work: a mode, which is the only one that sees ops, is off, and so are those that see their parts."""
    with _disable_current_modes() as others, torch.compiler.set_stance("default"):
        token = _outside.set(Outside(mode, others[::-1], gradients))
        try:
            with _off(mode):
                yield
        finally:
            _outside.reset(token)


@contextmanager
def _off(mode: TorchFunctionMode | None) -> Iterator[None]:
    """A mode, which is the only one, is off; None where there is none."""
    if mode is None:
        yield
        return
    TorchFunctionMode.__exit__(mode, None, None, None)
    try:
        yield
    finally:
        TorchFunctionMode.__enter__(mode)


class Compiled:
    """A graph with taps, compiled for inputs and tangents of one form, and what runs are told of it.

    It is held once to what the same graph gives op by op, on these inputs along drawn directions.

    Raises:
        RefusedError: it gives something else; and, as MismatchError and PlanError, where `walk_through` does.
    """

    def __init__(
        self, graph: GraphModule, backend: Any, capture: Capture, inputs: Sequence[Any], known: Known
    ) -> None:
        count, forms, walks = len(inputs), known.forms, list[Walked]()

        def part(probe: Tensor, *given: Any) -> tuple[Any, ...]:
            present = _outside.get().mode
            assert isinstance(present, Capture)
            found, walked = walk_through(present, graph, probe, given[:count], put_together(forms, given[count:]))
            walks.append(walked)
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
        self.walked = walks[-1]


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
        capture = outside.mode
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
            for node in {value.grad_fn for value in found if isinstance(value, Tensor) and value.requires_grad}:
                node.register_prehook(lambda _: _check_there(known.tensors))
        return found

    def _compiled(self, capture: Capture, inputs: Sequence[Any], known: Known) -> Compiled:
        """What was, or is, compiled for inputs of this form, and the sites that come next."""
        form = (*map(_form, (capture.probe, *inputs, *known.tensors)), known.forms, capture.taps.dtype)
        made = self.made.setdefault(form, [])
        for compiled in made:
            if compiled.walked.fits(capture):
                return compiled
        place = form, capture.plan.digest, capture.position
        if place not in self.refused:
            try:
                if len(self.made) > MOST or len(made) >= MOST:
                    raise RefusedError(f"its inputs have had {MOST} forms and sizes already")
                made.append(Compiled(self.graph, self.backend, capture, inputs, known))
                return made[-1]
            except Exception as error:
                self.refused[place] = _in_short(error)
        raise RefusedError(self.refused[place])


def _in_short(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return text if isinstance(error, RefusedError) else f"{type(error).__name__}: {text}"


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


Read = Callable[..., Any]
_forwards: WeakKeyDictionary[FunctionType, list[tuple[Any, tuple[Read, Read]]]] = WeakKeyDictionary()


def _read_by_dynamo(function: FunctionType, backend: Any) -> tuple[Read, Read]:
    """A forward for steps that score, and for others: what Dynamo makes of it serves all blocks of one form."""
    known = _forwards.setdefault(function, [])
    for own, read in known:
        if own == backend:
            return read
    scored, plain = (
        torch.compile(with_code_of_its_own(function), backend=each, fullgraph=True)
        for each in (Backend(backend), backend)
    )
    known.append((backend, (scored, plain)))
    return scored, plain


@contextmanager
def compiled_blocks(model: nn.Module, *, scores: bool = True, gradients: bool = True) -> Iterator[None]:
    """Blocks of the model that were compiled run so in steps inside: whether these want `scores`, and `gradients`.

    Such are modules with `block.compile(...)`, or in `torch.compile(block)`, with the backends "inductor" (without CUDA
    graphs) and "aot_eager". Others run uncompiled.
    """
    forwards = [(block, {"forward": _forward(block, own, scores, gradients)}) for block, own in _blocks(model)]
    with standing(forwards), torch._dynamo.config.patch(specialize_float=True):  # no graph reads a number from a tensor
        yield


def _blocks(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """The outermost modules that were compiled, with their backends."""
    inside = set[nn.Module]()
    for name, module in model.named_modules():
        if module in inside:
            continue
        block: Any = module._orig_mod if isinstance(module, OptimizedModule) else module
        backend = _backend(module)
        if backend is None:
            continue
        inside |= set(module.modules())
        while isinstance(block, ActivationWrapper):
            block = block._checkpoint_wrapped_module
        reason = _why_not(block, backend)
        if reason is None:
            yield block, backend
        else:
            say(f"{name or 'the model'}, given to torch.compile, runs uncompiled in a step: {reason}")


def _backend(module: nn.Module) -> Any:
    """What a module was compiled with, None if it was not."""
    if isinstance(module, OptimizedModule):
        return innermost_backend(module.dynamo_ctx.callback)
    for cell in getattr(module._compiled_call_impl, "__closure__", None) or ():
        if isinstance(cell.cell_contents, OptimizeContext):
            return innermost_backend(cell.cell_contents.callback)
    return None


def _why_not(block: nn.Module, backend: Any) -> str | None:
    if not isinstance(getattr(block.forward, "__func__", None), FunctionType):
        return "its forward is no method of its class"
    name = getattr(backend, "compiler_name", type(backend).__name__)
    if name not in ("inductor", "aot_eager"):
        return f"backend {name!r} may read directions in the forward, which are there in the backward alone"
    if name == "inductor" and (backend.config.get("triton.cudagraphs") or inductor.triton.cudagraphs):
        return "CUDA graphs copy directions in the forward, which are there in the backward alone"
    return None


def _forward(block: nn.Module, backend: Any, scores: bool, gradients: bool) -> Callable[..., Any]:
    """What stands for a block's forward."""
    own: Any = block.forward
    scored, plain = _read_by_dynamo(own.__func__, backend)
    compiled = scored if scores else plain
    kinds = Walker if scores else AsPython | None  # None where a checkpoint runs again in the backward

    def forward(*args: Any, **kwargs: Any) -> Any:
        mode, *others = _get_current_function_mode_stack() or [None]
        inside_a_transform = torch._C._functorch.maybe_current_level() is not None
        if block in _refused or others or not isinstance(mode, kinds) or inside_a_transform:
            return own(*args, **kwargs)
        try:
            with _alone(mode, gradients):
                return compiled(block, *args, **kwargs)
        except TorchDynamoException as error:
            _refused.add(block)
            say(f"a block given to torch.compile runs uncompiled in a step: {_in_short(error)}")
        return own(*args, **kwargs)

    return forward


_refused: WeakSet[nn.Module] = WeakSet()
"""Blocks that Dynamo does not take as a whole."""


@cache
def say(text: str) -> None:
    """Logs a sentence, once."""
    log.warning("%s", text)
