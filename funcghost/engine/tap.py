"""The autograd Functions: identities in the forward that see the output gradient in the backward.

`Observe` hands the gradient to a meter while a plan is made. `Tap` contracts it with `J V` and returns the
contribution of the site *as the gradient of a zero probe*, so that autograd itself adds the sites up: no state,
nothing kept after a layer's backward. Both see the physical batch under `torch.func.vmap`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from funcghost.dtypes import wide_dtype
from funcghost.engine.collector import Around, Collector
from funcghost.engine.prepared import Slopes
from funcghost.errors import MismatchError
from funcghost.ops.layout import Layout, Placed
from funcghost.ops.uses import Levels, Where


def alias(value: Tensor) -> Tensor:
    """The same memory under a new identity that autograd does not take for a view, so in-place ops stay legal."""
    aliased: Tensor = torch.ops.aten._unsafe_view(value, value.shape)
    return aliased


@dataclass(eq=False, slots=True)
class Scorer:
    """What a tap needs to know: `J V` of its outputs as a function of the saved tensors, and their layouts.

    `columns` are the directions that reach the site, those `apart` by position. Before `ready()`, backwards are those
    of the losses themselves. The forward ran in what is `around`. The first tensors, so many as are `kept`, are the
    collector's, which takes the factors of the gradients.
    """

    site: tuple[int, str]
    slopes: Slopes
    columns: tuple[int, ...]
    layouts: tuple[Where, ...]
    ready: Callable[[], bool]
    around: Around
    collector: Collector | None
    kept: int
    apart: Mapping[int, Callable[[int, Tensor], None]]
    levels: Levels = ()

    def contribution(
        self, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None], probe: Tensor
    ) -> Tensor | None:
        """[b, k]: per sample and direction, the sum of `(J V) * g` over the sample's entries; None for zero.

        The first tensors are those kept for the factors, which are collected on the way.
        """
        if not self.ready():
            return None
        used = False
        for g, layout in zip(gradients, self.layouts, strict=True):
            if g is not None:
                used = True
                if layout == "unused":
                    number, op = self.site
                    raise MismatchError(
                        f"site {number} ({op}): an output that the losses did not use when the plan was made is used."
                    )
        if not used:
            return None
        found = dict[int, Tensor]()
        if self.collector is not None:
            found = self.collector.collect(self.around, tensors[: self.kept], self.levels, gradients)
        if self.columns:
            saved = tensors[self.kept :]
            for k, slope in zip(self.columns, self.slopes(*saved), strict=True):
                score = self._column(k, slope, gradients, probe, alone(slope, saved))
                found[k] = found[k].to(score.dtype) + score if k in found else score
        if not found:
            return None
        if len(found) == probe.shape[1] == 1:
            return found[0].to(probe.dtype).unsqueeze(-1)
        if len(found) < probe.shape[1]:
            found = dict.fromkeys(range(probe.shape[1]), probe.new_zeros(len(probe))) | found
        return torch.stack([found[k].to(probe.dtype) for k in range(probe.shape[1])], -1)

    def _column(
        self, k: int, slope: tuple[Tensor, ...], gradients: Sequence[Tensor | None], probe: Tensor, ours: bool
    ) -> Tensor:
        apart = self.apart.get(k)
        parts = [
            inner(value, g, layout, probe, ours, by_position=apart is not None)
            for value, g, layout in zip(slope, gradients, self.layouts, strict=True)
            if g is not None and not isinstance(layout, str)
        ]
        total = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
        if apart is None:
            return total
        apart(k, total)
        return total.sum(1)


def inner(
    slope: Tensor,
    gradient: Tensor,
    layout: Layout | Placed,
    probe: Tensor,
    ours: bool = False,
    by_position: bool = False,
) -> Tensor:
    """The inner product per sample [b] of two tensors of one layout, accumulated in the dtype of the probe.

    If the memory of the slope is `ours`, the product is written there. With `by_position`, [b, t].
    """
    wide = wide_dtype(slope.dtype)
    if ours and not by_position and slope.dtype == gradient.dtype == wide and slope.shape == gradient.shape:
        return layout.sum(slope.mul_(gradient), probe)
    product = slope.to(wide) * gradient.conj()
    product = product.real if product.is_complex() else product
    if by_position:
        assert isinstance(layout, Layout)
        return layout.by_sample(product, len(probe)).unsqueeze(-1).flatten(2).sum(2, dtype=probe.dtype)
    return layout.sum(product, probe)


def alone(slopes: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether there is one slope, in memory that holds nothing else and that no other tensor shares."""
    if len(slopes) != 1 or type(slopes[0]) is not Tensor or slopes[0].is_complex() or not slopes[0].is_contiguous():
        return False
    memory = slopes[0].untyped_storage()
    own = memory._cdata
    return memory.nbytes() == slopes[0].nbytes and not any(
        other.untyped_storage()._cdata == own for other in others if other.layout is torch.strided
    )


def _unsqueezed(slopes: Slopes) -> Slopes:
    return lambda *saved: [tuple(value.unsqueeze(0) for value in slope) for slope in slopes(*saved)]


class Tap(torch.autograd.Function):
    """`Tap.apply(probe, scorer, n, *outputs, *saved) -> outputs`; the gradient of `probe` [b, k] is the score."""

    @staticmethod
    def forward(probe: Tensor, scorer: Scorer, n: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The outputs as they are."""
        return tuple(alias(value) for value in tensors[:n])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps what `J V` needs: the op's own inputs, which autograd keeps as well, and the directions."""
        probe, ctx.scorer, ctx.n, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(probe, *tensors[ctx.n :])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        """The score for the probe, and the gradients passed on."""
        probe, *saved = ctx.saved_tensors
        score = ctx.scorer.contribution(saved, gradients, probe)
        return (score, None, None, *gradients, *(None for _ in saved))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        """An identity in forward mode, too."""
        return tuple(tangents[3 : 3 + ctx.n])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], probe: Tensor, scorer: Scorer, n: int, *tensors: Tensor) -> Any:
        """The tap of the physical batch: the vmapped axis goes first, `J V` is vmapped over the saved tensors."""
        dims = in_dims[3:]
        values = [v if d is None else v.movedim(d, 0) for v, d in zip(tensors, dims, strict=True)]
        has = tuple(d is not None for d in dims[n:])
        mapped = tuple(0 if own else None for own in has[scorer.kept :])
        if any(own is not None for own in mapped):
            slopes = torch.func.vmap(scorer.slopes, in_dims=mapped, randomness=info.randomness)
        else:
            slopes = _unsqueezed(scorer.slopes)
        levels = (has[: scorer.kept], *scorer.levels)
        out = Tap.apply(probe, replace(scorer, slopes=slopes, levels=levels), n, *values)
        return out, tuple(None if d is None else 0 for d in dims[:n])


class EagerTap(torch.autograd.Function):
    """`Tap` where no `torch.func` transform is active: the same, without the cost of being ready for one."""

    @staticmethod
    def forward(ctx: Any, probe: Tensor, scorer: Scorer, saved: Sequence[Tensor], *values: Tensor) -> Any:
        """The outputs as they are."""
        ctx.scorer = scorer
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(probe, *saved)
        return tuple([value.detach() for value in values])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        """The score for the probe, and the gradients passed on."""
        probe, *saved = ctx.saved_tensors
        return (ctx.scorer.contribution(saved, gradients, probe), None, None, *gradients)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        """An identity in forward mode, too."""
        return tuple(tangents[3:])


def tap(probe: Tensor, scorer: Scorer, outputs: Sequence[Tensor], saved: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs, behind a tap that scores them in the backward."""
    found: tuple[Tensor, ...]
    if torch._C._functorch.maybe_current_level() is None:
        found = EagerTap.apply(probe, scorer, saved, *outputs)
    else:
        found = Tap.apply(probe, scorer, len(outputs), *outputs, *saved)
    return found


class Observe(torch.autograd.Function):
    """`Observe.apply(see, output) -> output`; the backward calls `see(gradient)`, with the physical batch."""

    @staticmethod
    def forward(see: Callable[[Tensor], None], value: Tensor) -> Tensor:
        """The output as it is."""
        return alias(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps the observer."""
        ctx.see = inputs[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        """Shows the gradient and passes it on."""
        ctx.see(gradient)
        return None, gradient

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor) -> Tensor:
        """An identity in forward mode, too."""
        return alias(tangent)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], see: Callable[[Tensor], None], value: Tensor) -> tuple[Tensor, int]:
        """The same for the physical batch, the vmapped axis first."""
        return Observe.apply(see, value.movedim(in_dims[1], 0)), 0
