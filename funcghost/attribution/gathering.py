"""Sums over all batches, losses and processes of what reducers make of factored gradients."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from funcghost.algebra.factors import Factor
from funcghost.attribution.batches import check_batches
from funcghost.attribution.inverses import Curvature, blank
from funcghost.attribution.spectra import Spectrum
from funcghost.dtypes import wide
from funcghost.errors import InputError
from funcghost.options import Options
from funcghost.problem import Losses
from funcghost.progress import progress
from funcghost.reducers.bases import Additive
from funcghost.transforms.steps import Transform
from funcghost.trees import Tree, split_params

Across = Callable[[Tensor], Tensor]
"""Adds a tensor up over processes that have other batches, such as `distributed.data_parallel.across()`."""


class Passes:
    """Goes through the batches with each of the losses, and adds up what reducers make of them."""

    def __init__(
        self,
        losses: Losses | Sequence[Losses],
        params: Tree,
        batches: Iterable[Tree],
        options: Options | None,
        across: Across | None,
    ) -> None:
        self.losses = [losses] if callable(losses) else list(losses)
        if not self.losses:
            raise InputError("curvature: takes one function of losses or more, found none.")
        distinct = {id(own): own for own in self.losses}
        self.transforms = {key: Transform(own, None, False, options, None) for key, own in distinct.items()}
        self.params, self.tree = split_params(params), params
        self.batches = check_batches("curvature: batches", batches)
        self.across = across or (lambda value: value)

    def first(self) -> Mapping[str, Sequence[Factor]]:
        """The factors of a batch."""
        for batch in self.batches:
            return self.transforms[id(self.losses[0])].pairs(self.tree, batch)[0].uses
        raise InputError("curvature: takes one batch or more, found none.")

    def summed(self, reducer: Additive, shapes: Mapping[str, Sequence[int]]) -> tuple[dict[str, Tensor], int]:
        """The sums by name, of these shapes, zero for parameters without a gradient; and the number n of samples."""
        self.agreed(shapes)
        sums: dict[str, Tensor] = {}
        count = 0
        for batch in progress(self.batches, "curvature", "batches"):
            for number, own in enumerate(self.losses):
                out = self.transforms[id(own)].step(self.tree, batch, reducer)
                count += len(out.losses) if number == 0 else 0
                for name, value in out.reduced.items():
                    if value.numel():
                        sums[name] = sums[name] + value if name in sums else value
        samples = self.counted(count)
        like = dict(zip(self.params.names, self.params.leaves, strict=True))
        for name, shape in shapes.items():  # every process has all of them, in this order
            own_sum = sums[name] if name in sums else wide(like[name].detach().new_zeros(tuple(shape)))
            sums[name] = self.across(own_sum.reshape(tuple(shape)))
        return sums, samples

    def agreed(self, what: Any) -> None:
        """Sums over processes are of one thing in all of them.

        Raises:
            InputError: on every process, where they differ.
        """
        number = int.from_bytes(blake2b(repr(what).encode(), digest_size=2).digest(), "little")
        like = self.params.leaves[0]
        told = torch.tensor([1, number, number**2], dtype=torch.float64, device=like.device)
        ranks, once, twice = (int(value) for value in self.across(told).tolist())
        if ranks * twice != once**2:
            raise InputError(
                "curvature: parameters are used in other ways, or other ones, by the batches of other processes. Give "
                "every process a batch in which all of them are used, first in its list."
            )

    def counted(self, count: int) -> int:
        """The number of samples of all processes."""
        own = torch.tensor(float(count), dtype=torch.float64, device=self.params.leaves[0].device)
        if not (samples := int(self.across(own))):
            raise InputError("curvature: the batches have no samples.")
        return samples

    def made(self, kind: str, spectra: Sequence[Spectrum], samples: int, **facts: Any) -> Curvature:
        """The curvature, with what it was made of."""
        names = [f"{getattr(own, '__module__', '')}.{getattr(own, '__qualname__', repr(own))}" for own in self.losses]
        made_of = {"kind": kind, "samples": samples, "losses": names, "params": self.params.digest(), **facts}
        return Curvature(tuple(spectra), blank(self.params), made_of)
