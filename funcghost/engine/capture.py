"""The mode that is active while planned losses run: it knows parameters by identity, taps, and carries tangents."""

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any, Protocol

import optree
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from funcghost.algebra.directions import Direction
from funcghost.engine.contributions import Tangents, filled
from funcghost.engine.ledger import Ledger
from funcghost.engine.plans import Plan, Site
from funcghost.engine.positions import Positions
from funcghost.engine.shadows import Shadow, followed, of_parameters
from funcghost.engine.tap import Planned, Taps
from funcghost.errors import MismatchError, PlanError
from funcghost.ops.composite import opened, seen_by
from funcghost.ops.digest import Digest, op_name
from funcghost.ops.moves import MOVES, Maps, Move
from funcghost.ops.tangent import Call, Outputs, Pushforward, flatten_call, outputs, pushforward, swap
from funcghost.side_effects import RandomState, random_state, replaying


class Choose(Protocol):
    """How a rehearsal picks the way to `J V` of a site."""

    def __call__(self, index: int, call: Call) -> Pushforward:
        """The pushforward to use for this site."""


_active: ContextVar["Capture | None"] = ContextVar("funcghost_capture", default=None)


class Capture(TorchFunctionMode):
    """Runs the losses along a plan: `scores` arrive as the gradient of the probe, `tangents` at what is carried.

    Args:
        plan: what to do at each site, in the order in which they come.
        params: the tensors that stand for the parameters in this run.
        directions: for each direction, one tangent per parameter.
        probe: zeros [b, k].
        originals: the user's own tensors of the parameters, which a checkpointed region sees when it is recomputed.
        choose: how a site without a way gets one (only while the plan is rehearsed).
        standins: tensors to take the place of others, by id; given while a compiler traces, when sizes are symbols.
        ledger: what collects factors of per-sample gradients, if something is made of these.
        positions: what adds up scores by position, if any are wanted.
        dtype: what products are computed in for scores, if not in the dtype of their operands.
    """

    def __init__(
        self,
        plan: Plan,
        params: Sequence[Tensor],
        directions: Sequence[Direction],
        probe: Tensor,
        originals: Sequence[Tensor] = (),
        choose: Choose | None = None,
        standins: dict[int, Tensor] | None = None,
        ledger: Ledger | None = None,
        positions: Positions | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.plan, self.probe, self.choose, self.standins = plan, probe, choose, standins or {}
        self.taps = Taps(probe, ledger, positions, dtype)
        self.shadows: dict[int, Shadow] = {}
        self.traced = standins is not None
        self.params, self.originals, self.directions = params, originals, directions
        self.tangents: dict[int, Tangents] = {}
        self.references: dict[int, Any] = {}
        self.position = 0
        self.digest = Digest()
        self.ended = False
        self.moves = {moved.call: moved for moved in plan.moves}
        self.calls = 0
        self.maps: Maps = {}
        self.as_planned: list[Tensor] = []
        self._follow(params)
        if ledger is not None:
            self.shadows.update(zip(map(id, params), of_parameters(params), strict=True))

    def __enter__(self) -> "Capture":
        """Starts to watch."""
        self.token = _active.set(self)
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        """Stops watching."""
        super().__exit__(*raised)
        _active.reset(self.token)

    def __torch_function__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the op as it is; where a tangent goes in, taps its outputs or carries the tangent on."""
        parts = opened(op)
        if parts is not None:
            with seen_by(self):
                return parts(*args, **(kwargs or {}))
        returned = self._run(op, args, kwargs or {})
        return returned if self.traced else self.digest.give(returned)

    def _run(self, op: Any, args: Any, kwargs: Any) -> Any:
        leaves, spec = flatten_call(args, kwargs)
        if self.standins and any(id(leaf) in self.standins for leaf in leaves):
            leaves = [self.standins.get(id(leaf), leaf) for leaf in leaves]
            args, kwargs = optree.tree_unflatten(spec, leaves)
        if self.moves and op in MOVES:
            self._follow_move(op, leaves, spec)
        tracked = tuple([slot for slot, leaf in enumerate(leaves) if id(leaf) in self.tangents])
        if not tracked or not torch.is_grad_enabled():
            returned = op(*args, **kwargs)
            self._digest(op, leaves, returned)
            return returned
        index, site = self.position, self._peek(op, tracked)
        written = site.written if site else ()
        drawn = random_state([self.probe.device]) if site and site.random and site.action != "skip" else None
        if written and site and site.action == "tap":
            before = tuple(leaf.clone() if slot in written else leaf for slot, leaf in enumerate(leaves))
            call = Call(op, before, spec, tracked, written)
        else:
            call = Call(op, tuple(leaves), spec, tracked, written)
        carrying = site is not None and site.action == "carry"
        carried = self._carry(index, call, site, drawn) if site and carrying and written else None
        shadows = self._shadow(call, site, (), drawn) if site and carrying and written else None
        returned = op(*args, **kwargs)
        self._digest(op, leaves, returned)
        found = outputs(returned, [leaves[slot] for slot in written])
        if not written and all(any(value is leaf for leaf in leaves) for value in found):
            return returned
        if site is None:
            raise self._mismatch(op, tracked)
        self.position += 1
        if len(found) != len(site.layouts):
            raise MismatchError(f"site {index}: {site.op} gave {len(found)} outputs, the plan has {len(site.layouts)}.")
        if site.action == "tap":
            return swap(returned, self._tap(index, call, site, found, drawn))
        if carrying and not written:
            carried, shadows = self._carry(index, call, site, drawn), self._shadow(call, site, found, drawn)
        self._attach(site, found, carried, shadows)
        return returned

    def tangents_of(self, value: Tensor) -> Tangents | None:
        """What was carried to a value, per direction."""
        return self.tangents.get(id(value))

    def check_moves(self, *, at_once: bool) -> None:
        """Checks that samples were moved to where the plan says; not `at_once`, the device does it when it gets there.

        Costs the wait for one number, in programs that move samples by the values of data.
        """
        if not self.as_planned:
            return
        fine = torch.stack(self.as_planned).all()
        if not at_once:
            torch._assert_async(fine, "samples were moved to other places than when the plan was made")
        elif not fine:
            raise MismatchError("samples were moved to other places than when the plan was made.")

    def finish(self) -> None:
        """Checks that the losses came past every site of the plan, and ran the same ops between them.

        A compiler may run other ops than eager mode where a model asks whether it is being compiled.
        """
        if not self.traced and self.digest.ops != self.plan.digest:
            raise MismatchError("the losses ran other ops, or ops with other flags, than when the plan was made.")
        if self.position != len(self.plan.sites):
            raise MismatchError(f"the losses ended after {self.position} of {len(self.plan.sites)} sites of the plan.")
        self.ended = True

    def resumed(self) -> "Capture":
        """The mode for running a part again from here, on the user's own parameters."""
        again = Capture(self.plan, (), (), self.probe, (), self.choose, self.standins)
        again.originals, again.directions, again.ended = self.originals, self.directions, True
        again.taps = self.taps
        again.position, again.calls, again.maps = self.position, self.calls, self.maps
        for key, tangents in self.tangents.items():
            reference = self.references[key]
            value = reference() if isinstance(reference, weakref.ref) else reference
            again.tangents[key] = tangents
            again.references[key] = weakref.ref(value, again._forgetting(key))
        again.shadows.update(self.shadows)
        again._follow(self.originals)
        if self.shadows:
            of_own = (self.shadows[id(param)] for param in self.params)
            again.shadows.update(zip(map(id, self.originals), of_own, strict=True))
        return again

    def _digest(self, op: Any, leaves: Sequence[Any], returned: Any) -> None:
        if not self.traced:
            self.digest.add(op, leaves, returned)

    def _follow(self, params: Sequence[Tensor]) -> None:
        for param, *tangents in zip(params, *self.directions, strict=True):
            self.tangents[id(param)] = tuple(tangents)
            self.references[id(param)] = param

    def _peek(self, op: Any, tracked: tuple[int, ...]) -> Site | None:
        if self.position < len(self.plan.sites):
            site = self.plan.sites[self.position]
            if site.tracked == tracked and site.op == op_name(op):
                return site
        return None

    def _mismatch(self, op: Any, tracked: tuple[int, ...]) -> MismatchError:
        planned = self.plan.sites[self.position] if self.position < len(self.plan.sites) else None
        wanted = f"{planned.op} with parameters in slots {planned.tracked}" if planned else "the end"
        return MismatchError(
            f"site {self.position}: found {op_name(op)} with parameters in slots {tracked}, the plan has {wanted}."
        )

    def _push(self, index: int, call: Call, site: Site) -> Pushforward:
        if site.way is not None:
            return pushforward(call, site.way)
        if self.choose is None:
            raise PlanError(f"site {index}: {site.op} has no way to its derivative yet. Make the plan with fg.plan.")
        return self.choose(index, call)

    def _along(self, call: Call) -> list[Tangents]:
        """The tangents that come into a call, for each of its tracked slots."""
        return [self.tangents[id(call.leaves[slot])] for slot in call.tracked]

    def _carry(self, index: int, call: Call, site: Site, drawn: RandomState | None) -> list[Outputs | None]:
        """`J V` of every output, for each direction that comes here, now."""
        push = self._push(index, call, site)
        saved = [call.leaves[slot].detach() for slot in push.needed]
        tangents = self._along(call)
        slopes: list[Outputs | None] = []
        for k, along in enumerate(zip(*tangents, strict=True)):
            if all(tangent is None for tangent in along):
                slopes.append(None)
                continue
            with torch.no_grad(), replaying(drawn):
                slopes.append(push.evaluate(saved, filled(call, tangents, k)))
        return slopes

    def _follow_move(self, op: Any, leaves: Sequence[Any], spec: optree.PyTreeSpec) -> None:
        """Notes where an op moves the samples, if the plan says that it does so by data."""
        moved, self.calls = self.moves.get(self.calls), self.calls + 1
        if moved is not None:
            if moved.op != op_name(op):
                raise MismatchError(f"found {op_name(op)} where {moved.op} moves samples in the plan.")
            move = Move(op, tuple(leaves), spec, moved.slots)
            self.as_planned.append(moved.follow(move, self.maps, self.probe.shape[0]))

    def _shadow(self, call: Call, site: Site, found: Outputs, drawn: RandomState | None) -> list[Shadow] | None:
        """Where the outputs of a call that carries tangents come from, if that is asked for."""
        if not self.shadows:
            return None
        with replaying(drawn):
            return followed(call, found, [self.shadows[id(call.leaves[slot])] for slot in call.tracked], site.way)

    def _attach(
        self, site: Site, found: Outputs, carried: list[Outputs | None] | None, shadows: list[Shadow] | None
    ) -> None:
        """Notes the tangents of what came out; a value that was overwritten without one loses its own."""
        for i, (value, layout) in enumerate(zip(found, site.layouts, strict=True)):
            self.shadows.pop(id(value), None)
            if carried is None or layout == "constant":
                self.tangents.pop(id(value), None)
                continue
            self.tangents[id(value)] = tuple(None if slope is None else slope[i] for slope in carried)
            self.references[id(value)] = weakref.ref(value, self._forgetting(id(value)))
            shadow = shadows[i] if shadows else None
            if shadow is not None:
                self.shadows[id(value)] = shadow

    def _forgetting(self, key: int) -> Callable[[Any], None]:
        """Drops what is known of a value when it dies, before its id comes again."""
        tangents, shadows = self.tangents, self.shadows

        def forget(_: Any) -> None:
            tangents.pop(key, None)
            shadows.pop(key, None)

        return forget

    def _tap(self, index: int, call: Call, site: Site, found: Outputs, drawn: RandomState | None) -> dict[int, Tensor]:
        """The outputs behind a tap, by the id of what they replace."""
        targets = {slot: self.shadows[id(call.leaves[slot])] for slot in call.tracked} if self.shadows else {}
        planned = Planned(index, site, call, found, self._along(call), targets, drawn)
        return self.taps.put(planned, self.maps, self._push, lambda: self.ended)


def checkpoint_context() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The `context_fn` that lets `torch.utils.checkpoint` recompute under funcghost.

    Example:
        >>> import torch, funcghost as fg
        >>> from torch.utils.checkpoint import checkpoint
        >>> layer, x = torch.nn.Linear(3, 3), torch.ones(2, 3)
        >>> y = checkpoint(layer, x, use_reentrant=False, context_fn=fg.checkpoint_context)

    Checkpointing recomputes a region in the backward, outside of the losses. There a module has its own parameters
    again, not those handed to `functional_call`; so this works when the `params` of the step are the module's own
    tensors, and raises `UnsupportedOpError` otherwise. Outside of funcghost it does nothing.
    """
    capture = _active.get()
    again = nullcontext() if capture is None else capture.resumed()
    return nullcontext(), again
