"""A trainer's scalar loss, taken apart into losses of samples at the outputs of its model.

Trainers reduce losses as they like: over the tokens of several batches, with smoothed labels, by code of the user's.
What they optimise is in any case a function L(o) of what the model gives out, o = (o_1, .., o_b), so that

    grad L = sum over samples i of <dL/do_i, do_i/dparams>,

and the term of sample i is the gradient of `<o_i, dL/do_i>`, the latter held. These are the losses made here: their sum
has the gradient of L to the last bit, however it was reduced. Where L is a sum of losses of samples with constant
weights, their gradients are those of its terms.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from funcghost.errors import InputError

Edge = tuple[Node, int]


class _BackwardCaught(TorchFunctionMode):
    """Keeps the scalar that `backward` is called on, in place of the backward."""

    loss: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.backward:
            return func(*args, **(kwargs or {}))
        if self.loss is not None:
            raise InputError("the training step calls backward more than once; one scalar loss a step is taken apart.")
        self.loss = args[0]
        return None


def taken_apart(
    run: Callable[[], Any],
    module: nn.Module,
    samples: int,
    rows: int = 1,
    aside: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Tensor:
    """The losses [samples] of a training step, from the scalar that it optimises.

    `run()` does what the trainer does for a batch: it calls the module and then `backward` on a scalar L, which is not
    carried out. Law: the gradient of `losses.sum()` is that of L, and so is its value: each of them has an equal part
    of L for its value, which says nothing about the sample.

    Shapes: outputs of the module that L is made of have `rows * samples` rows: row `j * samples + i` is of sample i.

    Args:
        run: the training step.
        module: what the samples go through; L depends on parameters through its outputs alone.
        samples: how many there are in the batch.
        rows: of the outputs, for each sample; 2 where chosen and rejected texts are stacked.
        aside: is entered around the backward from L to the outputs, which a sharded model is not to hear of.

    Raises:
        InputError: L has another way to the parameters, its outputs have other rows, or there is no backward.

    Example:
        >>> import torch
        >>> from funcghost.integrations.taken_apart import taken_apart
        >>> model, x = torch.nn.Linear(2, 1), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> losses = taken_apart(lambda: model(x).square().mean().backward(), model, 2)
        >>> losses.shape, bool((losses.sum() - model(x).square().mean()).abs() < 1e-6)
        (torch.Size([2]), True)
    """
    with _BackwardCaught() as caught, outputs_of(module) as outputs:
        run()
    loss = caught.loss
    if loss is None or loss.grad_fn is None:
        raise InputError("the training step calls backward on nothing that requires gradients: nothing is trained.")
    edges = {edge: name for name, value in outputs.items() for edge in _same_values(value)}
    found = _reached(loss.grad_fn, edges)
    names = [edges[edge] for edge in found]
    for name in names if len(found) > 1 else ():
        if inner := _behind(outputs[name], found):
            raise InputError(
                f"the loss is made of the outputs {names}, and {edges[inner]!r} goes into {name!r}: what is whose "
                "cannot be told. Make it of outputs that do not follow from one another."
            )
    with aside():
        slopes = torch.autograd.grad(loss, [GradientEdge(node, place) for node, place in found])
    total = loss.new_zeros(samples)
    for name, slope in zip(names, slopes, strict=True):
        value = outputs[name]
        products = (value * slope.to(value.dtype)).flatten(1).sum(1, dtype=torch.promote_types(loss.dtype, value.dtype))
        if len(products) != rows * samples:
            raise InputError(
                f"the output {name!r} that the loss is made of has {len(products)} rows, where {rows} for each of "
                f"{samples} samples are expected: which are whose is not known. A term of the loss that is taken over "
                "the whole batch (the balance of experts) is not of any sample: leave it out."
            )
        total = total + products.view(rows, samples).sum(0)
    values: Tensor = total + (loss / len(total) - total).detach()
    return values


def outputs_in(run: Callable[[], Any], module: nn.Module) -> dict[str, Tensor]:
    """What the module gives out in a training step, whose backward is not carried out; detached, by name."""
    with _BackwardCaught(), outputs_of(module) as outputs:
        run()
    return {name: value.detach() for name, value in outputs.items()}


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Every tensor that requires gradients which calls of the module give out, by name, scalars left out."""
    found: dict[str, Tensor] = {}

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        for name, value in _leaves(output, ""):
            if value.requires_grad and value.grad_fn is not None and value.dim():
                found[name if name not in found else f"{name} of call {len(found)}"] = value

    handle = module.register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name or "output", value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from _leaves(inner, f"{name}[{place}]")


def _same_values(value: Tensor) -> Iterator[Edge]:
    """Where the value is in autograd's graph, and where it was before it was cast.

    A trainer may cast what a model gives out after the model has made its loss of it.
    """
    with torch._C.DisableTorchFunction():  # it makes a view where a node is one of Python's, as some are of a plan
        edge = get_gradient_edge(value)
    node, place = edge.node, edge.output_nr
    yield node, place
    while node.name().startswith("ToCopyBackward") and (before := _before((node, place))):
        [(node, place)] = before
        yield node, place


def _before(edge: Edge) -> list[Edge]:
    return [(node, place) for node, place in edge[0].next_functions if node is not None]


def _reached(start: Node, edges: Mapping[Edge, str]) -> list[Edge]:
    """The outputs that lead to the start without another one between.

    Raises:
        InputError: a leaf leads there by no output.
    """
    found: dict[Edge, None] = {}
    pending, seen = [(start, 0)], set()
    while pending:
        edge = pending.pop()
        if edge in seen:
            continue
        seen.add(edge)
        if edge in edges:
            found[edge] = None
            continue
        if hasattr(edge[0], "variable"):
            outputs = sorted(set(edges.values()))
            raise InputError(
                f"the loss depends on a tensor {list(edge[0].variable.shape)} that is trained otherwise than by what "
                f"the model gives out ({outputs}): by a term of its own (a penalty on weights, the balance of "
                "experts), or since the model does not give out what it makes the loss of. Leave the term out, or "
                "let the loss be made of the outputs."
            )
        pending += _before(edge)
    return list(found)


def _behind(value: Tensor, edges: list[Edge]) -> Edge | None:
    """One of the edges that goes into the value, which is another one."""
    own = set(_same_values(value))
    pending, seen = list(own), set()
    while pending:
        edge = pending.pop()
        if edge in seen:
            continue
        seen.add(edge)
        if edge in edges and edge not in own:
            return edge
        pending += _before(edge)
    return None
