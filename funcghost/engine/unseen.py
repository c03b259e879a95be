"""What no mode sees, the graph of autograd shows: functions of one's own, scripted ops, views written in place.

Where an op receives a tensor that requires gradients and that no op gave, the stretch of graph between it and the
nearest tensors that are known is an op. Its transpose is its backward, and so its `J V` is the transpose of that.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from funcghost.algebra.factors import Dense, Factor
from funcghost.dtypes import as_written
from funcghost.engine.checkpoints import through_no_checkpoint
from funcghost.engine.contributions import ByFactors, Tangents, Tapped
from funcghost.engine.shadows import Computed, Constant, Shadow
from funcghost.engine.tap import Taps, behind
from funcghost.errors import MismatchError, UnsupportedOpError
from funcghost.ops.apart import Passed, Use, Where, of_sample
from funcghost.ops.call import alias

Known = TypeVar("Known")
Edge = tuple[Any, int]
"""A node of the graph and the number of its output."""

TAPS = ("EagerTapBackward", "TapBackward", "TapGeneratedBackward")
"""The nodes of taps: what is behind one has been scored there."""


def edge_of(value: Tensor) -> Edge:
    """Where in the graph a tensor comes from; leaves have an end of their own there."""
    edge = get_gradient_edge(value)
    return edge.node, edge.output_nr


def now() -> int:
    """A number that no node made before has reached, on this thread."""
    with torch.enable_grad(), torch._C.DisableTorchFunction():  # a mode may be on, where a checkpoint makes another
        node: Any = torch.zeros((), requires_grad=True, device="cpu").view(()).grad_fn
    number: int = node._sequence_nr()
    return number


class End(NamedTuple, Generic[Known]):
    """What is known of a tensor where a stretch ends, and whether what leads there was made before the run."""

    known: Known
    old: bool


class Walked(NamedTuple, Generic[Known]):
    """What a walk back from a tensor comes to: known tensors, taps, and the leaves that are not known."""

    ends: dict[Edge, End[Known]]
    taps: list[Any]
    leaves: list[Tensor]
    names: list[str]


def walk(value: Tensor, known: Callable[[Edge], Known | None], start: int) -> Walked[Known]:
    """Goes back from a tensor to the nearest that are known; nodes numbered below `start` are older than the run."""
    found: Walked[Known] = Walked({}, [], [], [])
    seen, todo = set[tuple[Edge, bool]](), [(edge_of(value), False)]
    while todo:
        edge, old = todo.pop()
        node = edge[0]
        if node is None or (edge, old) in seen:
            continue
        again = (edge, not old) in seen
        seen.add((edge, old))
        own = known(edge)
        if own is not None:
            found.ends[edge] = End(own, old or (again and found.ends[edge].old))
        elif again:
            continue
        elif hasattr(node, "variable"):
            found.leaves.append(node.variable)
        elif type(node).__name__ in TAPS:
            found.taps.append(node)
        else:
            found.names.append(node.name())
            todo += [(following, node._sequence_nr() < start) for following in node.next_functions]
    return found


@dataclass(frozen=True, eq=False)
class Stretch:
    """The graph between a `value` and the edges `ends` of known tensors, cut there and at the `taps`."""

    value: Tensor
    ends: tuple[Edge, ...]
    taps: tuple[Any, ...]
    names: tuple[str, ...]

    def pull(self, cotangent: Tensor | None, *, differentiable: bool = False) -> list[Tensor | None]:
        """The backward: what comes to each end, by ways that pass no other end."""
        if cotangent is None:
            return [None] * len(self.ends)
        inputs = [
            node.variable if hasattr(node, "variable") else GradientEdge(node, nr, None) for node, nr in self.ends
        ]
        with self._cut(), as_written(self.value.device), torch.set_grad_enabled(differentiable):
            return list(
                torch.autograd.grad(
                    self.value, inputs, cotangent, retain_graph=True, create_graph=differentiable, allow_unused=True
                )
            )

    def push(self, tangents: Sequence[Tensor | None]) -> Tensor:
        """`J V`, from a tangent at each end (None for zero): the backward is linear, hence its own backward is that.

        Raises:
            UnsupportedOpError: the backward cannot be differentiated.
        """
        slope, drawn = torch.zeros_like(self.value, requires_grad=False), list[Tensor | None]()
        with torch.enable_grad(), as_written(self.value.device), through_no_checkpoint():
            dual = torch.zeros_like(self.value, requires_grad=True)
            try:
                pulled = self.pull(dual, differentiable=True)
                for place, (u, v) in enumerate(zip(pulled, tangents, strict=True)):
                    if u is None or v is None:
                        continue
                    own = None
                    if u.requires_grad:
                        (own,) = torch.autograd.grad(u, dual, v, allow_unused=True, retain_graph=True)
                    if own is not None:
                        slope = slope + own.detach()
                        continue
                    drawn = drawn or self.pull(torch.ones_like(self.value))
                    if (whole := drawn[place]) is not None and bool(whole.any()):
                        raise RuntimeError("what it returns does not depend on what comes in, as far as autograd sees")
            except MismatchError:
                raise
            except RuntimeError as error:
                raise self._refused(str(error).splitlines()[0]) from error
        return slope

    def _refused(self, reason: str) -> UnsupportedOpError:
        names = ", ".join(dict.fromkeys(name.removesuffix("Backward") for name in self.names)) or "a view"
        return UnsupportedOpError(
            f"a parameter, or what is computed from one, goes into {names}, which no torch function mode sees, and "
            f"whose backward cannot be differentiated ({reason}). Write its backward with torch ops that autograd can "
            "follow (no once_differentiable, no detach, no torch.autograd.grad without create_graph=True), or call "
            "ordinary torch ops in its place."
        )

    def is_differentiable(self) -> bool:
        """Whether there is `J V`."""
        try:
            blank = self.pull(torch.ones_like(self.value))
        except RuntimeError:  # a reentrant checkpoint, which planning refuses
            return False
        try:
            self.push([None if u is None else torch.ones_like(u) for u in blank])
        except UnsupportedOpError:
            return False
        return True

    @contextmanager
    def _cut(self) -> Iterator[None]:
        """Lets no gradient past an end or a tap, and no hook of a leaf have a say: its tangent has been through it."""
        stops: dict[Any, list[int] | None] = dict.fromkeys(self.taps)
        hooks = list[tuple[dict[int, Any], dict[int, Any]]]()
        for node, nr in self.ends:
            if not hasattr(node, "variable"):
                places = stops.setdefault(node, [])
                assert places is not None
                places.append(nr)
            elif node.variable._backward_hooks:
                hooks.append((node.variable._backward_hooks, dict(node.variable._backward_hooks)))
        outer = torch._C._current_graph_task_id()
        handles = [node.register_prehook(partial(_stop, places, outer)) for node, places in stops.items()]
        for own, _ in hooks:
            own.clear()
        try:
            yield
        finally:
            for own, kept in hooks:
                own.update(kept)
            for handle in handles:
                handle.remove()


def stretch_of(value: Tensor, walked: Walked[Any]) -> Stretch:
    """The stretch that a walk back from the value has gone."""
    return Stretch(value, tuple(walked.ends), tuple(walked.taps), tuple(walked.names))


def tap_stretch(
    taps: Taps,
    site: tuple[int, str],
    stretch: Stretch,
    where: Where,
    tangents: Sequence[Tangents],
    shadows: Sequence[Shadow | None],
    ready: Callable[[], bool],
) -> Tensor:
    """The end of a stretch without `J V` behind a tap, which takes a backward of the stretch for each sample.

    Raises:
        UnsupportedOpError: scores by position are wanted.
    """
    if taps.positions is not None:
        raise UnsupportedOpError(
            f"per_token: {site[1]} is seen in autograd's graph alone, and its backward cannot be differentiated: "
            "scores are those of a backward for each sample, which does not tell positions apart. Leave it out."
        )
    blank = stretch.pull(torch.zeros_like(stretch.value))
    slots = tuple(slot for slot, like in enumerate(blank) if like is not None)

    def factors(passed: Passed) -> list[Factor]:
        _, _, (g,), (own,), batch = passed
        rows = [stretch.pull(of_sample(g, own, sample, batch)) for sample in range(batch)]
        return [Dense(torch.stack([_there(row[slot], blank[slot]) for row in rows])) for slot in slots]

    scored = frozenset((slot, k) for slot in slots for k, own in enumerate(tangents[slot]) if own is not None)
    targets = {slot: shadow for slot, shadow in enumerate(shadows) if shadow is not None and slot in slots}
    if taps.ledger is not None and targets and not ready():
        taps.ledger.expect(targets.values())
    tapped = Tapped(
        site=site,
        terms=(ByFactors(Use(slots, (), factors, by_product=False), scored),),
        ends=(0,),
        layouts=(where,),
        batch=len(taps.probe),
        ready=ready,
        around=nullcontext,
        tangents=dict(enumerate(tangents)),
        targets=targets,
        ledger=taps.ledger,
        positions=None,
        dtype=taps.dtype,
    )
    (value,) = behind(taps.probe, tapped, [stretch.value], [])
    return value


def _there(gradient: Tensor | None, like: Tensor | None) -> Tensor:
    assert like is not None
    return torch.zeros_like(like) if gradient is None else gradient.to_dense()


def _stop(places: list[int] | None, outer: int, gradients: tuple[Tensor | None, ...]) -> Any:
    """Nothing in place of the gradients at these places (None: all), but for the backward that is running already."""
    if torch._C._current_graph_task_id() == outer:
        return None
    return tuple(None if places is None or i in places else gradient for i, gradient in enumerate(gradients))


class Replay(torch.autograd.Function):
    """`Replay.apply(stretch, *ends) -> value`: a stretch of one graph as an op of another."""

    @staticmethod
    def forward(ctx: Any, stretch: Stretch, *ends: Tensor) -> Tensor:
        """The value that came out."""
        ctx.stretch = stretch
        return stretch.value.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The backward of the stretch."""
        return (None, *ctx.stretch.pull(gradients[0]))


def replayed(stretch: Stretch, ends: Sequence[Shadow]) -> Shadow:
    """Where the value at the end of a stretch comes from, given the same of its beginnings."""
    with torch.enable_grad():
        value = Replay.apply(stretch, *(end.value for end in ends))
    if not value.requires_grad:
        return Constant(value)
    leaves = {number: leaf for end in ends for number, leaf in end.leaves.items()}
    return Computed(value, dict(sorted(leaves.items())), get_gradient_edge(value))


def kept(shadow: Shadow) -> Shadow:
    """The same, whose value keeps its history where the other is written to."""
    if not shadow.value.requires_grad:
        return shadow
    with torch.enable_grad():
        return replace(shadow, value=alias(shadow.value))
