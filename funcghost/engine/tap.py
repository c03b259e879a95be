"""Puts a tap behind a planned call: the identity, whose backward takes the contribution of the site on the way.

The contribution to the scores goes out *as the gradient of a zero probe*, so that autograd itself adds the sites up: no
state, nothing kept after a layer's backward. Under `torch.func.vmap` a tap sees the physical batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcghost.engine.contributions import Tangents, Tapped, Wanted
from funcghost.engine.ledger import Ledger
from funcghost.engine.plans import OutputLayout, Site
from funcghost.engine.positions import Positions
from funcghost.engine.recipes import recipe, tried
from funcghost.engine.shadows import Shadow
from funcghost.errors import MismatchError, UnsupportedOpError
from funcghost.ops.apart import Level, Where
from funcghost.ops.call import Call, Outputs, alias, physical
from funcghost.ops.known import description
from funcghost.ops.layout import Layout, Placed, Rows
from funcghost.ops.moves import Maps
from funcghost.ops.tangent import Pushforward
from funcghost.side_effects import RandomState, replaying
from funcghost.trees import gathered, is_distributed
from funcghost.versions import detach_as_placed


class Planned(NamedTuple):
    """A call at a site that the plan taps, before the tap is put.

    `number`: of the site.
    `site`: what the plan says of it.
    `call`: the call.
    `found`: what came out of it.
    `tangents`: those that come in, for each tracked slot.
    `targets`: the shadows of what is in these slots, if factors are wanted.
    `drawn`: the random numbers from which the call drew.
    """

    number: int
    site: Site
    call: Call
    found: Outputs
    tangents: Sequence[Tangents]
    targets: Mapping[int, Shadow]
    drawn: RandomState | None


@dataclass(frozen=True, eq=False, slots=True)
class Taps:
    """Puts the taps of one run.

    `probe`: what scores go to as its gradient.
    `ledger`: what factors go to, if any are wanted.
    `positions`: what scores by position go to, if any are wanted.
    `dtype`: what products for scores are computed in, if not in the dtype of their operands.
    `may_be_freed`: whether what is kept may be freed, and come back, before the backward.
    """

    probe: Tensor
    ledger: Ledger | None
    positions: Positions | None
    dtype: torch.dtype | None
    may_be_freed: bool = False

    def put(
        self, planned: Planned, maps: Maps, push: Callable[[int, Call, Site], Pushforward], ready: Callable[[], bool]
    ) -> dict[int, Tensor]:
        """The outputs behind a tap, by the id of what they replace; none where there is nothing to contribute.

        `maps` say where data moved the samples, `push` gives `J V` of a call at a site. Before `ready()`, backwards are
        those of the losses themselves.
        """
        number, site, call, found, tangents, targets, drawn = planned
        values, batch = [found[i] for i in site.smooth], len(self.probe)
        layouts = tuple([placed(number, site, found[i], site.layouts[i], maps, batch) for i in site.smooth])
        if self.positions is not None:
            if site.way == "each":
                raise UnsupportedOpError(
                    f"per_token: {site.op} has neither a forward derivative nor a backward that can be differentiated: "
                    "its scores are those of a backward for each sample, which does not tell positions apart. Add a "
                    "rule with fg.register_rule, or leave per_token out."
                )
            for output, (value, layout) in enumerate(zip(values, layouts, strict=True)):
                where, shape = f"site {number} ({site.op})", batched_shape(value)
                self.positions.see((number, output), where, call.op, layout, shape, batch)
        wanted = Wanted(
            chosen=site.smooth,
            layouts=site.arranged,
            vmapped=len(batched_shape(values[0])) - values[0].dim(),
            kinds=tuple([tuple(map(type, known)) for known in tangents]),
            collects=bool(targets),
            apart=self.positions.columns if self.positions is not None else frozenset(),
            dtype=self.dtype if site.way == "rule" and site.flops else None,
        )
        described = description(call.op)
        if site.way is None:
            terms = tried(call, wanted, described, push(number, call, site))
        else:
            terms = recipe(call, wanted, described, site.way)
        if not terms:
            return {}
        if self.ledger is not None and targets and not ready():  # what is run again has been expected
            self.ledger.expect(targets.values())
        kept = [term.keeps(call, tangents) for term in terms]
        tapped = Tapped(
            site=(number, site.op),
            terms=terms,
            ends=tuple(accumulate(map(len, kept))),
            layouts=layouts,
            batch=batch,
            ready=ready,
            around=ambient(values[0].device.type, drawn),
            tangents=dict(zip(call.tracked, tangents, strict=True)),
            targets=targets,
            ledger=self.ledger,
            positions=self.positions,
            dtype=self.dtype,
            may_be_freed=self.may_be_freed,
        )
        replaced = self.behind(tapped, values, [tensor for own in kept for tensor in own])
        return {id(value): tapped_value for value, tapped_value in zip(values, replaced, strict=True)}

    def behind(self, tapped: Tapped, outputs: Sequence[Tensor], saved: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs behind a tap."""
        return behind(self.probe, tapped, outputs, saved)


class Tap(torch.autograd.Function):
    """`Tap.apply(probe, tapped, n, *outputs, *saved) -> outputs`; the gradient of `probe` [b, k] is the score."""

    @staticmethod
    def forward(probe: Tensor, tapped: Tapped, n: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The outputs as they are."""
        return tuple(alias(value) for value in tensors[:n])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps what `J V` needs: the op's own inputs, which autograd keeps as well, and the directions."""
        probe, ctx.tapped, ctx.n, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(probe, *tensors[ctx.n :])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        """The score for the probe, and the gradients passed on."""
        probe, *saved = ctx.saved_tensors
        score = ctx.tapped.contribution(saved, gradients, probe)
        return (score, None, None, *gradients, *(None for _ in saved))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        """An identity in forward mode, too."""
        return tuple(tangents[3 : 3 + ctx.n])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], probe: Tensor, tapped: Tapped, n: int, *tensors: Tensor) -> Any:
        """The tap of the physical batch: the vmapped axis goes first, also in the tensors that are kept."""
        dims = in_dims[3:]
        values = [v if d is None else v.movedim(d, 0) for v, d in zip(tensors, dims, strict=True)]
        level = Level(tuple(d is not None for d in dims[n:]), info.randomness)
        out = Tap.apply(probe, replace(tapped, levels=(level, *tapped.levels)), n, *values)
        return out, tuple(None if d is None else 0 for d in dims[:n])


class EagerTap(torch.autograd.Function):
    """`Tap` where no `torch.func` transform is active: the same, without the cost of being ready for one."""

    @staticmethod
    def forward(ctx: Any, probe: Tensor, tapped: Tapped, saved: Sequence[Tensor], *values: Tensor) -> Any:
        """The outputs as they are."""
        ctx.tapped = tapped
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(probe, *saved)
        return tuple([detach_as_placed(value) for value in values])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        """The score for the probe, and the gradients passed on."""
        probe, *saved = ctx.saved_tensors
        if ctx.tapped.may_be_freed:
            saved = [there(value) for value in saved]
        # What ranks have together is computed with as a whole, on each of them: every sum is then that of one process.
        if any(map(is_distributed, (*saved, *gradients))):
            saved = [gathered(value) for value in saved]
            given = [None if g is None else gathered(g) for g in gradients]
            return (ctx.tapped.contribution(saved, given, probe), None, None, *gradients)
        return (ctx.tapped.contribution(saved, gradients, probe), None, None, *gradients)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        """An identity in forward mode, too."""
        return tuple(tangents[3:])


def behind(probe: Tensor, tapped: Tapped, outputs: Sequence[Tensor], saved: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs, behind a tap that takes its contribution in the backward."""
    found: tuple[Tensor, ...]
    if torch._C._functorch.maybe_current_level() is None:
        found = EagerTap.apply(probe, tapped, saved, *outputs)
    else:
        found = Tap.apply(probe, tapped, len(outputs), *outputs, *saved)
    return found


def there(value: Tensor) -> Tensor:
    """The tensor itself, whose memory has not been freed: to read it all the same would end the process.

    Raises:
        UnsupportedOpError: it has been, as `fully_shard` does with parameters.
    """
    local = value.to_local() if is_distributed(value) else value  # type: ignore[attr-defined]
    if local.numel() and value.layout is torch.strided and not physical(local).untyped_storage().nbytes():
        raise UnsupportedOpError(
            f"a tensor {tuple(value.shape)} that per-sample gradients are computed from was freed before they were: "
            "fully_shard keeps a parameter only while the layers of its group run, and here it is used, or what was "
            "computed from it, across groups. Put the modules into one group, fully_shard([one, other]), or use fg.dot "
            "alone; or score the model before fully_shard."
        )
    return value


def placed(number: int, site: Site, value: Tensor, layout: OutputLayout, maps: Maps, batch: int) -> Where:
    """Where the samples of an output are in this run.

    Raises:
        MismatchError: the output has not the shape that the plan takes it to have.
    """
    shape = batched_shape(value)
    if isinstance(layout, Layout):
        if layout.fits(shape, batch):
            return layout
    elif layout == "unused":
        return layout
    elif isinstance(layout, Rows):
        rows = maps.get((layout.call, layout.output))
        if rows is not None and layout.axis < len(shape) and shape[layout.axis] == len(rows):
            return Placed(layout.axis, rows.long())
    raise MismatchError(f"site {number}: {site.op} gave shape {tuple(value.shape)}, which is not {layout}.")


def batched_shape(value: Tensor) -> tuple[int, ...]:
    """The shape with all vmapped axes in front, the outer before the inner: that of the gradients a tap sees."""
    if torch._C._functorch.maybe_current_level() is None:
        return value.shape
    vmapped, inner = list[int](), value
    while torch._C._functorch.is_functorch_wrapped_tensor(inner):
        axis, inner = torch._C._functorch.maybe_get_bdim(inner), torch._C._functorch.get_unwrapped(inner)
        if axis >= 0:
            vmapped.insert(0, inner.shape[axis])
    return (*vmapped, *value.shape)


def ambient(device: str, drawn: RandomState | None) -> Callable[[], AbstractContextManager[None]]:
    """A context for the backward that repeats what surrounded the forward: autocast, and the random numbers drawn."""
    autocast = torch.is_autocast_enabled(device) if torch.amp.is_autocast_available(device) else False
    if not autocast and drawn is None:
        return nullcontext
    dtype = torch.get_autocast_dtype(device) if autocast else None

    @contextmanager
    def around() -> Iterator[None]:
        with torch.autocast(device, dtype, enabled=autocast), replaying(drawn):
            yield

    return around
