"""The walk along the ops of the losses, which a measuring and a planned run must make call by call alike."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic

import optree
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from funcghost.engine.checkpoints import through_no_checkpoint
from funcghost.engine.unseen import Edge, edge_of
from funcghost.ops.call import flatten_call, physical
from funcghost.ops.composite import opened, seen_by
from funcghost.ops.digest import Digest
from funcghost.ops.moves import MOVES
from funcghost.ops.values import Note, Value, Values
from funcghost.versions import GRAD_FN

_T: Any = Tensor
QUESTIONS = frozenset(
    [
        *(_T.size, _T.dim, _T.numel, _T.is_floating_point, _T.is_complex, _T.is_contiguous, _T.stride),
        *(_T.shape.__get__, _T.dtype.__get__, _T.device.__get__, _T.ndim.__get__, _T.layout.__get__),
    ]
)
"""What models ask of tensors at every turn, and what says nothing of their values."""

DERIVATIVES = frozenset([torch.autograd.grad, torch._VF._unpack_dual, _T.grad.__get__])
"""What gives derivatives: not of its arguments, but of the graph behind them, parameters on the way included."""


@dataclass(eq=False, slots=True)
class Visit(Generic[Note]):
    """A call that the walk has come to: its flat arguments, with the record of each that is a tensor.

    `move` is its number among the calls of ops that may move samples, None for others.
    """

    op: Any
    args: Any
    kwargs: Any
    leaves: list[Any]
    spec: optree.PyTreeSpec
    values: list[Value[Note] | None]
    move: int | None


class Walker(TorchFunctionMode, ABC, Generic[Note]):
    """A mode that opens composites, flattens calls, numbers moves and values, and keeps the checksums of what ran.

    Subclasses say in `visit` what is done at a call, which they `run`. Where they are `watching`, they `meet` each
    tensor that has got its history from something that the mode did not see.
    """

    def __init__(self, standins: dict[int, Tensor] | None = None) -> None:
        """Starts before the first op. `standins` take the place of other tensors, by id."""
        super().__init__()
        self.values: Values[Note] = Values()
        self.digest = Digest(traced=standins is not None)
        self.standins = dict(standins or {})
        self.moving = self.met = 0
        self.watching = False
        self.nodes: dict[Edge, Note] = {}

    def __torch_function__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Visits the call, or the parts of a composite."""
        kwargs = kwargs or {}
        if op in QUESTIONS and not self.standins and not self.watching:
            return op(*args, **kwargs)
        parts = opened(op)
        if parts is not None:
            with seen_by(self):
                return parts(*args, **kwargs)
        leaves, spec = flatten_call(args, kwargs)
        if self.watching and op != GRAD_FN:
            self._look(leaves)
        if self.standins and any(id(leaf) in self.standins for leaf in leaves):
            leaves = [self.standins.get(id(leaf), leaf) for leaf in leaves]
            args, kwargs = optree.tree_unflatten(spec, leaves)
        move = None
        if op in MOVES:
            move, self.moving = self.moving, self.moving + 1
        of = self.values.of
        values = [of(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves]
        visit = Visit(op, args, kwargs, leaves, spec, values, move)
        if op in DERIVATIVES:
            with through_no_checkpoint():
                returned = self.run(visit)
            self._give(returned, watching=False)
            return returned
        returned = self.visit(visit)
        if self.watching:
            for leaf, value in zip(leaves, values, strict=True):
                if value is not None and leaf.requires_grad:
                    value.version = leaf._version  # the op may have written to it
        # A view of itself is what a custom Function makes of an argument that it returns, and gives a history after.
        itself = op is Tensor.view_as and leaves[0] is leaves[-1]
        self._give(returned, watching=self.watching and not itself)
        return returned

    def end(self, losses: Tensor) -> Tensor:
        """Takes note of what the losses are in the end, which may come from something that was not seen."""
        if self.watching:
            self._look([losses])
        return self.standins.get(id(losses), losses)

    def renamed(self, old: Tensor, new: Tensor) -> None:
        """Takes another tensor for one that went into no op: the same value, which something else has its eye on."""
        self.values.rename(old, new)
        own = self.values.noted(new)
        if own is not None and self.watching and new.requires_grad:
            self.nodes[edge_of(new)] = own

    def known_at(self, edge: Edge) -> Note | None:
        """What is noted of the tensor at an edge of the graph: of a leaf, or as the subclass keeps it in `nodes`."""
        leaf = getattr(edge[0], "variable", None)
        return self.nodes.get(edge) if leaf is None else self.values.noted(leaf)

    @abstractmethod
    def meet(self, tensor: Tensor, value: Value[Note], number: int) -> None:
        """Is shown a tensor whose history is not known, the `number`th of these, before it goes into an op."""

    @abstractmethod
    def visit(self, visit: Visit[Note]) -> Any:
        """Runs the call, and gives the losses what they are to get."""

    def run(self, visit: Visit[Note]) -> Any:
        """What the op returns for its arguments."""
        returned = visit.op(*visit.args, **visit.kwargs)
        self.digest.add(visit.op, visit.leaves, visit.values, returned)
        return returned

    def _look(self, leaves: Sequence[Any]) -> None:
        for leaf in leaves:
            if not isinstance(leaf, Tensor) or not leaf.requires_grad or physical(leaf) is not leaf:
                continue
            value = self.values.of(leaf)
            if leaf._version != value.version:
                value.version = leaf._version
                if leaf.grad_fn is not None:
                    self.met += 1
                    self.meet(leaf, value, self.met)

    def _give(self, returned: Any, watching: bool) -> None:
        """Numbers the tensors that an op gave, in the form in which the losses get them."""
        if isinstance(returned, Tensor):
            self.digest.number(self.values.of(returned))
            if watching and returned.requires_grad:
                self.values.of(returned).version = returned._version
        elif isinstance(returned, tuple | list):
            for part in returned:
                self._give(part, watching)


def noted_slots(values: Sequence[Value[Any] | None]) -> tuple[int, ...]:
    """The slots of what something is noted of."""
    return tuple([slot for slot, value in enumerate(values) if value is not None and value.note is not None])
