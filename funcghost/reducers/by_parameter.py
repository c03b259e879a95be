"""Reducers for each parameter by itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor

from funcghost.algebra.cost import Means, Route, Sketch
from funcghost.algebra.directions import Direction
from funcghost.algebra.factors import Factor, samples
from funcghost.dtypes import wide
from funcghost.errors import InputError
from funcghost.reducers.bases import Additive, Directional, Reducer, register
from funcghost.trees import Params


@dataclass(frozen=True, eq=False)
class PerParamDirectional(Directional):
    """`per_param` of a reducer with directions."""

    reducer: Directional

    @property
    def by_position(self) -> bool:  # type: ignore[override]
        """Whether the reducer is."""
        return self.reducer.by_position

    def directions(self, params: Params) -> list[Direction]:
        """Each direction in each parameter alone."""
        whole = self.reducer.directions(params)
        return [
            [value if i == own else None for i, value in enumerate(direction)]
            for own in range(len(params.names))
            for direction in whole
        ]

    def result(self, scores: Tensor, params: Params) -> dict[str, Any]:
        """The reducer's result for each parameter."""
        parts = scores.split(scores.shape[-1] // len(params.names), dim=-1)
        return {name: self.reducer.result(part, params) for name, part in zip(params.names, parts, strict=True)}


@dataclass(frozen=True, eq=False)
class PerParamAdditive(Additive):
    """`per_param` of a reducer to which parameters contribute; with `names`, to those alone, zero for the others."""

    reducer: Additive
    names: frozenset[str] | None = None

    @property
    def degree(self) -> int:  # type: ignore[override]
        """The degree of the reducer."""
        return self.reducer.degree

    def within(self, means: Means) -> Self:
        """The reducer, by these means."""
        return replace(self, reducer=self.reducer.within(means))

    def of_parameter(self, name: str, uses: Sequence[Factor]) -> Tensor:
        """The contribution to the reducer."""
        if self.names is not None and name not in self.names:
            return self.zero(samples(uses[0]), wide(uses[0].tensors[-1]))
        return self.reducer.of_parameter(name, uses)

    def zero(self, batch: int, like: Tensor) -> Tensor:
        """The reducer's zero."""
        return self.reducer.zero(batch, like)

    def route(self, uses: Sequence[Sketch], batch: int, name: str) -> tuple[Route, list[Route]] | None:
        """The reducer's route."""
        wanted = self.names is None or name in self.names
        return self.reducer.route(uses, batch, name) if wanted else None

    def result(self, parts: Mapping[str, Tensor]) -> dict[str, Any]:
        """One result for each parameter."""
        return {name: self.reducer.result({name: part}) for name, part in parts.items()}


def per_param(reducer: Reducer) -> Reducer:
    """The reducer for each parameter by itself: a dict from names to results, whose sum is the reducer's result.

    Law: `sum(per_param(r).values()) == r`, since inner products add up over parameters.

    Shapes: a dict with the names of the parameters (their paths in the tree, joined by dots).

    Cost: as the reducer where each parameter has taps of its own; a direction that is carried costs one pass more for
    each parameter.

    Raises:
        InputError: this is no reducer, or one by parameter already.

    Example:
        >>> import funcghost as fg, torch
        >>> params = {"w": torch.ones(2), "b": torch.ones(())}
        >>> score = fg.reduce(lambda params, x: x @ params["w"] + params["b"])
        >>> score(params, torch.eye(2), fg.per_param(fg.squared_norm()))
        {'b': tensor([1., 1.]), 'w': tensor([1., 1.])}
    """
    if isinstance(reducer, PerParamDirectional | PerParamAdditive):
        raise InputError("per_param: the reducer is by parameter already.")
    if isinstance(reducer, Directional):
        return PerParamDirectional(reducer)
    if isinstance(reducer, Additive):
        return PerParamAdditive(reducer)
    raise InputError(f"per_param: takes a reducer such as fg.squared_norm(), found {type(reducer).__name__}.")


register(PerParamDirectional, ("reducer",))
register(PerParamAdditive, ("reducer",), ("names",))
