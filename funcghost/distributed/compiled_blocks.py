"""Blocks of a model that were given to `torch.compile` one by one: in a step they run compiled, too, taps and all.

Dynamo reads a block's forward as it does without us, with no mode on, and guards what it has read; hooks, those of
FSDP2 among them, run outside. Plans are made of the graph that it gives. A run that has to see every op runs the graph
op by op; one along a plan that wants scores alone gives it, with the taps of the plan inside, to the backend that the
block was compiled with: forward and backward are one op each. Blocks that Dynamo does not take whole run uncompiled.

This imports Dynamo, which takes as long as the import of torch: it is imported when something has been compiled.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch._dynamo.eval_frame import OptimizeContext, innermost_backend
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._inductor import config as inductor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.overrides import _get_current_function_mode_stack

from funcghost.control_flow import AsPython
from funcghost.distributed.compiled_graphs import Backend, alone, first_line_of, say
from funcghost.distributed.fsdp_groups import standing
from funcghost.engine.walker import Walker
from funcghost.transforms.compiling import with_code_of_its_own

Read = Callable[..., Any]
_forwards: WeakKeyDictionary[FunctionType, list[tuple[Any, tuple[Read, Read]]]] = WeakKeyDictionary()


def _read_by_dynamo(function: FunctionType, backend: Any) -> tuple[Read, Read]:
    """A forward for steps that score, and for others: what Dynamo makes of it serves all blocks of one form."""
    known = _forwards.setdefault(function, [])
    for own, read in known:
        if own == backend:
            return read
    scored = torch.compile(with_code_of_its_own(function), backend=Backend(backend), fullgraph=True)
    plain = torch.compile(with_code_of_its_own(function), backend=backend, fullgraph=True)
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
    given: Any = module._compiled_call_impl
    contexts = [module.dynamo_ctx] if isinstance(module, OptimizedModule) else []
    contexts += [cell.cell_contents for cell in getattr(given, "__closure__", None) or ()]
    callbacks: list[Any] = [context.callback for context in contexts if isinstance(context, OptimizeContext)]
    return innermost_backend(callbacks[0]) if callbacks else None


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
    # Before its graph is met, all that fails is the compiler's; a checkpoint may end what it runs again by an error.
    refusals = (Exception,) if scores else (TorchDynamoException, FailOnRecompileLimitHit)

    def forward(*args: Any, **kwargs: Any) -> Any:
        mode, *others = _get_current_function_mode_stack() or [None]
        inside_a_transform = torch._C._functorch.maybe_current_level() is not None
        if block in _refused or others or not isinstance(mode, kinds) or inside_a_transform:
            return own(*args, **kwargs)
        with alone(mode, gradients) as outside:
            try:
                return compiled(block, *args, **kwargs)
            except refusals as error:
                if outside.met:
                    raise
                say(f"a block given to torch.compile runs uncompiled in a step: {first_line_of(error)}")
                _refused.add(block)
        return own(*args, **kwargs)

    return forward


_refused: WeakSet[nn.Module] = WeakSet()
"""Blocks that Dynamo does not take as a whole."""
