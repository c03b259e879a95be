"""The mode that is active while planned losses run: it knows parameters by identity, taps, and carries tangents."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from funcghost.algebra.directions import Direction, as_dense
from funcghost.engine.checkpoints import active
from funcghost.engine.contributions import Tangents, filled
from funcghost.engine.hooks import before_hooks, hooked, is_hooked
from funcghost.engine.ledger import Ledger
from funcghost.engine.plans import Plan, Site
from funcghost.engine.positions import Positions
from funcghost.engine.shadows import Shadow, followed, of_parameters
from funcghost.engine.tap import Planned, Taps, placed, there
from funcghost.engine.unseen import edge_of, kept, now, replayed, stretch_of, tap_stretch, walk
from funcghost.engine.walker import Visit, Walker, noted_slots
from funcghost.errors import MismatchError, PlanError
from funcghost.ops.call import Call, Outputs, outputs, physical, swap
from funcghost.ops.composite import idle
from funcghost.ops.digest import op_name
from funcghost.ops.moves import Maps, Move
from funcghost.ops.tangent import Pushforward, pushforward
from funcghost.ops.values import Value
from funcghost.side_effects import RandomState, random_state, replaying
from funcghost.trees import Params


class Carried(NamedTuple):
    """What comes along with a value: its tangent in each direction, and where it comes from, if factors are wanted."""

    tangents: Tangents
    shadow: Shadow | None


class Choose(Protocol):
    """How a rehearsal picks the way to `J V` of a site."""

    def __call__(self, index: int, call: Call) -> Pushforward:
        """The pushforward to use for this site."""


class Capture(Walker[Carried]):
    """Runs the losses along a plan: `scores` arrive as the gradient of the probe, `tangents` at what is carried.

    Args:
        plan: what to do at each site, in the order in which they come.
        params: the tensors that stand for the parameters in this run.
        directions: for each direction, one tangent per parameter.
        probe: zeros [b, k].
        given: the parameters as the user gave them: a checkpointed region sees these when it is recomputed.
        choose: how a site without a way gets one (only while the plan is rehearsed).
        standins: tensors to take the place of others, by id; given while a compiler traces, when sizes are symbols.
        ledger: what collects factors of per-sample gradients, if something is made of these.
        positions: what adds up scores by position, if any are wanted.
        dtype: what products are computed in for scores, if not in the dtype of their operands.
        may_be_freed: whether what is kept for the backward may be freed before it, and come back.
    """

    sees_parts = True

    def __init__(
        self,
        plan: Plan,
        params: Sequence[Tensor],
        directions: Sequence[Direction],
        probe: Tensor,
        given: Params,
        choose: Choose | None = None,
        standins: dict[int, Tensor] | None = None,
        ledger: Ledger | None = None,
        positions: Positions | None = None,
        dtype: torch.dtype | None = None,
        may_be_freed: bool = False,
    ) -> None:
        super().__init__(standins)
        self.plan, self.probe, self.choose = plan, probe, choose
        self.traced = standins is not None
        self.taps = Taps(probe, ledger, positions, dtype, may_be_freed)
        self.params, self.given, self.directions = params, given, directions
        self.position = 0
        self.ended = False
        self.moves = {moved.call: moved for moved in plan.moves}
        self.maps: Maps = {}
        self.as_planned: list[Tensor] = []
        self.collecting = ledger is not None
        self.watching = any(site.unseen is not None for site in plan.sites)
        self.started = now() if self.watching else 0
        self.stood_for: list[Tensor] = []
        if params:  # a part that is run again follows the user's own
            self._follow(params, of_parameters(params) if self.collecting else [None] * len(params))

    def __enter__(self) -> "Capture":
        """Starts to watch."""
        self.token = active.set(self)
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        """Stops watching."""
        super().__exit__(*raised)
        active.reset(self.token)

    def visit(self, visit: Visit[Carried]) -> Any:
        """Runs the op as it is; where a tangent goes in, taps its outputs or carries the tangent on."""
        op, leaves = visit.op, visit.leaves
        if self.moves and visit.move is not None:
            self._follow_move(visit)
        if self.traced and (same := idle(op, visit.args, visit.kwargs)) is not None:
            self.digest.add(op, leaves, visit.values, same)
            return same
        tracked = noted_slots(visit.values)
        if not tracked or not torch.is_grad_enabled():
            return self.run(visit)
        index, site = self.position, self._peek(op, tracked)
        written = site.written if site else ()
        drawn = random_state([self.probe.device]) if site and site.random and site.action != "skip" else None
        if drawn is not None and self.traced:
            raise PlanError(
                f"site {index}: {op_name(op)} draws random numbers, and its derivative needs the same again, which "
                "a graph cannot draw twice. Hand them in with the batch, or leave the step uncompiled."
            )
        before = leaves
        if written and site and site.action == "tap":
            before = [leaf.clone() if slot in written else leaf for slot, leaf in enumerate(leaves)]
        call = Call(op, tuple(before), visit.spec, tracked, written)
        known = [value.note for value in visit.values if value is not None and value.note is not None]
        carrying = site is not None and site.action == "carry"
        carried = self._carry(index, call, known, site, (), drawn) if site and carrying and written else None
        returned = self.run(visit)
        found = outputs(returned, [leaves[slot] for slot in written])
        if not written and all(any(value is leaf for leaf in leaves) for value in found):
            return returned
        if site is None:
            raise self._mismatch(op, tracked)
        self.position += 1
        if len(found) != len(site.layouts):
            raise MismatchError(f"site {index}: {site.op} gave {len(found)} outputs, the plan has {len(site.layouts)}.")
        if site.action == "tap":
            return swap(returned, self._tap(index, call, known, site, found, drawn))
        if carrying and not written:
            carried = self._carry(index, call, known, site, found, drawn)
        self._attach(found, carried)
        return returned

    def carried_to(self, value: Tensor) -> Carried | None:
        """What has come along with a value."""
        return self.values.noted(value)

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

    def finish(self, losses: Tensor) -> Tensor:
        """Checks that the losses came past every site of the plan, and ran the same ops between them; gives these."""
        if losses.shape[0] != len(self.probe):
            raise MismatchError(
                f"the losses are of {losses.shape[0]} samples where the plan expects {len(self.probe)} from the batch."
            )
        losses = self.end(losses)
        if self.digest.ops != self.plan.digest:
            raise MismatchError("the losses ran other ops, or ops with other flags, than when the plan was made.")
        if self.position != len(self.plan.sites):
            raise MismatchError(f"the losses ended after {self.position} of {len(self.plan.sites)} sites of the plan.")
        self.ended = True
        self.nodes.clear()
        self.stood_for.clear()
        return losses

    def resumed(self) -> "Capture":
        """The mode for running a part again from here, on the user's own parameters."""
        again = Capture(self.plan, (), (), self.probe, self.given, self.choose, self.standins)
        again.params, again.directions, again.ended = self.given.leaves, self.directions, True
        again.met, again.started, again.nodes = self.met, self.started, dict(self.nodes)
        again.taps, again.collecting, again.traced = self.taps, self.collecting, self.traced
        again.position, again.moving, again.maps = self.position, self.moving, self.maps
        for known in self.values.known.values():
            if known.note is not None and (value := known.reference()) is not None:
                again.values.note(value, known.note)
        own = [self.values.noted(param) for param in self.params]
        again._follow(self.given.leaves, [carried and carried.shadow for carried in own])
        return again

    def _follow(self, params: Sequence[Tensor], shadows: Sequence[Shadow | None]) -> None:
        for param, name, shadow, *tangents in zip(params, self.given.names, shadows, *self.directions, strict=True):
            if is_hooked(param):
                tangents = [t if t is None else before_hooks(param, name, as_dense(t)) for t in tangents]
                shadow = shadow and hooked(shadow)
            self.values.note(param, Carried(tuple(tangents), shadow))

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

    def _carry(
        self, index: int, call: Call, known: Sequence[Carried], site: Site, found: Outputs, drawn: RandomState | None
    ) -> list[Carried | None]:
        """`J V` of every output that has a derivative, for each direction that comes here, now; and their shadows.

        Nothing has been `found` where the call is still to run, since it writes to what goes in.
        """
        push = self._push(index, call, site)
        saved = [call.leaves[slot].detach() for slot in push.needed]
        tangents = [carried.tangents for carried in known]
        slopes: list[Outputs | None] = []
        for k, along in enumerate(zip(*tangents, strict=True)):
            if all(tangent is None for tangent in along):
                slopes.append(None)
                continue
            with torch.no_grad(), replaying(drawn):
                slopes.append(push.evaluate(saved, filled(call, tangents, k)))
        sources = [carried.shadow for carried in known if carried.shadow is not None]
        shadows: Sequence[Shadow | None] = [None] * len(site.layouts)
        if sources:
            # A checkpointed region has a graph that runs it again, and counts what is kept: ours is beside it.
            # And what it keeps may be freed before it is asked for, where other ranks have a share of it.
            again = self.taps.may_be_freed or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
            with replaying(drawn), saved_tensors_hooks(_as_it_is, there) if again else nullcontext():
                shadows = followed(call, () if again else found, sources, site.way)
        return [
            None
            if layout == "constant"
            else Carried(tuple(None if slope is None else slope[i] for slope in slopes), shadows[i])
            for i, layout in enumerate(site.layouts)
        ]

    def meet(self, tensor: Tensor, value: Value[Carried], number: int) -> None:
        """Carries tangents along the stretch of graph between known tensors and one that no op was seen to give."""
        index = self.position
        site = self.plan.sites[index] if index < len(self.plan.sites) else None
        if site is None or site.unseen != number:
            return
        walked = walk(tensor, self.known_at, self.started)
        self.position += 1
        stretch, known = stretch_of(tensor, walked), [end.known for end in walked.ends.values()]
        if site.action == "tap":
            where = placed(index, site, tensor, site.layouts[0], self.maps, len(self.probe))
            tangents, shadows = [carried.tangents for carried in known], [carried.shadow for carried in known]
            behind = tap_stretch(self.taps, (index, site.op), stretch, where, tangents, shadows, lambda: self.ended)
            own = self.values.of(behind)
            own.number, own.version = value.number, behind._version
            self.standins[id(tensor)], self.stood_for = behind, [*self.stood_for, tensor]
            return
        slopes = list[Tensor | None]()
        for along in zip(*(carried.tangents for carried in known), strict=True):
            some = any(tangent is not None for tangent in along)
            slopes.append(stretch.push([t if t is None else as_dense(t) for t in along]) if some else None)
        sources = [carried.shadow for carried in known if carried.shadow is not None]
        self._attach((tensor,), [Carried(tuple(slopes), replayed(stretch, sources) if sources else None)])

    def _follow_move(self, visit: Visit[Carried]) -> None:
        """Notes where an op moves the samples, if the plan says that it does so by data."""
        moved = self.moves.get(visit.move) if visit.move is not None else None
        if moved is not None:
            if moved.op != op_name(visit.op):
                raise MismatchError(f"found {op_name(visit.op)} where {moved.op} moves samples in the plan.")
            move = Move(visit.op, tuple(visit.leaves), visit.spec, moved.slots)
            self.as_planned.append(moved.follow(move, self.maps, self.probe.shape[0]))

    def _attach(self, found: Outputs, carried: Sequence[Carried | None] | None) -> None:
        """Notes what comes along with what came out; a value that was overwritten without a tangent loses its own."""
        for value, along in zip(found, carried or [None] * len(found), strict=True):
            if along is None:
                self.values.of(value).note = None
            else:
                self.values.note(value, along)
                if self.watching and value.requires_grad and physical(value) is value:
                    self.nodes[edge_of(value)] = along._replace(shadow=along.shadow and kept(along.shadow))

    def _tap(
        self,
        index: int,
        call: Call,
        known: Sequence[Carried],
        site: Site,
        found: Outputs,
        drawn: RandomState | None,
    ) -> dict[int, Tensor]:
        """The outputs behind a tap, by the id of what they replace."""
        targets = {
            slot: carried.shadow
            for slot, carried in zip(call.tracked, known, strict=True)
            if carried.shadow is not None
        }
        planned = Planned(index, site, call, found, [carried.tangents for carried in known], targets, drawn)
        return self.taps.put(planned, self.maps, self._push, lambda: self.ended)


def _as_it_is(value: Tensor) -> Tensor:
    return value
