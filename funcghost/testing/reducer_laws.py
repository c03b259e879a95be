"""The laws of reducers."""

import copy
from collections.abc import Callable
from typing import Any

import optree
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from funcghost.algebra.cost import Means
from funcghost.algebra.factors import Factor, Outer
from funcghost.algebra.pairs import Pairs
from funcghost.errors import InputError
from funcghost.options import Options
from funcghost.reducers.bases import Additive, Directional, Reducer
from funcghost.reducers.by_parameter import PerParamAdditive, PerParamDirectional, per_param
from funcghost.reducers.quadratic import squared_norm
from funcghost.testing.naive import naive_pairs
from funcghost.testing.strategies import Model, models
from funcghost.testing.strategies import pairs as drawn_pairs
from funcghost.transforms.halves import apply, plan
from funcghost.transforms.steps import pairs, reduce
from funcghost.trees import Tree

Make = Callable[[Tree, int], Reducer]
SMALL = Means(budget=1 << 14)


def assert_reducer_laws(
    reducer: Reducer | Make,
    *,
    samples: int = 2,
    local: bool = True,
    on: st.SearchStrategy[Model] | None = None,
    tolerance: float = 1e-9,
    examples: int | None = None,
) -> None:
    """Holds a reducer to the laws that `fg.apply`, the step and `fg.per_param` rely on, on drawn models and pairs.

    - In the step, over kept pairs and over naive per-sample gradients it gives the same numbers.
    - It is the sum of `fg.per_param` of it over the parameters.
    - Within a tree of reducers each gives what it gives alone.
    - For any choice `index` of samples, `r(batch[index]) == r(batch)[index]`, where `[index]` is taken along every axis
      of the result that is as long as the batch, whatever its size: samples may be permuted,
      left out and repeated, the batch split.
    - What a parameter contributes is homogeneous in the gradients of the declared `degree`, at degree 1 it is the sum
      over uses, `zero` is what gradients of zero contribute, and no budget or route changes it.
    - It holds no state: its fields are the same after all of that.

    Args:
        reducer: a reducer, or `make(params, samples)` that gives one for a tree of parameters and a size of the batch.
        samples: the smallest batch to use; the others are up to two larger.
        local: whether what it says of samples depends on these alone; False leaves out the law on choices of samples.
        on: which models to draw, `models()` if not given.
        tolerance: relative to the largest number of a result.
        examples: how many models and pairs to draw; by default as many as hypothesis draws.

    Raises:
        AssertionError: a law does not hold, with the falsifying example.
        InputError: this is no reducer.

    Example:
        >>> import funcghost as fg, torch
        >>> from funcghost.testing import assert_reducer_laws
        >>> assert_reducer_laws(fg.squared_norm(), examples=5)
        >>> ones = lambda params, samples: {name: torch.ones_like(value) for name, value in params.items()}
        >>> assert_reducer_laws(lambda params, samples: fg.dot(ones(params, samples)), examples=5)
    """
    if not isinstance(reducer, Reducer) and not callable(reducer):
        raise InputError(f"assert_reducer_laws: takes a reducer, found {type(reducer).__name__}.")
    own = settings(suppress_health_check=list(HealthCheck), deadline=None, database=None)
    own = own if examples is None else settings(own, max_examples=examples)

    @own
    @given(models() if on is None else on, st.integers(samples, samples + 2), st.data())
    def on_models(model: Model, b: int, drawn: st.DataObject) -> None:
        _on_model(_made(reducer, model.params, b), model, b, tolerance)
        if local:
            _local(reducer, model, b, drawn, tolerance)

    @own
    @given(drawn_pairs(samples), st.sampled_from([Means(route="ghost"), Means(route="materialise"), SMALL]))
    def on_pairs(kept: Pairs, means: Means) -> None:
        found = _made(reducer, kept.params.rebuild([leaf.clone() for leaf in kept.params.leaves]), samples)
        if isinstance(found, Additive):
            _additive(found, kept, means, tolerance)

    on_pairs()
    on_models()


def _made(reducer: Reducer | Make, params: Tree, b: int) -> Reducer:
    return reducer if isinstance(reducer, Reducer) else reducer(params, b)


def _on_model(reducer: Reducer, model: Model, b: int, tolerance: float) -> None:
    batch, before = model.batch(b, seed=b), copy.deepcopy(vars(reducer))
    made = plan(model.losses, model.params, batch, reducer)
    score = reduce(model.losses, plan=made)
    alone = score(model.params, batch, reducer)
    both = score(model.params, batch, {"first": squared_norm(), "nested": (reducer, squared_norm())})
    _compare("is something else within a tree of reducers", both["nested"][0], alone, tolerance)
    if not (isinstance(reducer, Directional) and reducer.by_position):
        kept = pairs(model.losses, plan=made)(model.params, batch)
        _compare("is something else over pairs than in the step", apply(reducer, kept), alone, tolerance)
        naive = naive_pairs(model.losses, model.params, batch)
        _compare("is not what naive gradients give", alone, apply(reducer, naive), tolerance)
        for route in ("ghost", "materialise"):
            forced = apply(reducer, kept, options=Options(inner_products=route, memory_budget=1 << 14))
            _compare(f"is something else by the route {route!r}", forced, alone, tolerance)
    if not isinstance(reducer, PerParamAdditive | PerParamDirectional):
        parts = list(score(model.params, batch, per_param(reducer)).values())
        total = optree.tree_map(lambda *leaves: sum(leaves[1:], start=leaves[0]), *parts)
        _compare("is not the sum of per_param of it", total, alone, tolerance)
    if not _same(vars(reducer), before):
        raise AssertionError(f"{_name(reducer)} has changed: a reducer holds no state")


def _local(reducer: Reducer | Make, model: Model, b: int, drawn: st.DataObject, tolerance: float) -> None:
    """The law on choices of samples. An axis is that of samples if it is as long as the batch, for two sizes of it."""
    score = reduce(model.losses)

    def result(batch: Tensor) -> tuple[list[Tensor], optree.PyTreeSpec]:
        return optree.tree_flatten(score(model.params, batch, _made(reducer, model.params, len(batch))))

    index = torch.tensor(drawn.draw(st.lists(st.integers(0, b - 1), min_size=b, max_size=b), label="index"))
    batch = model.batch(b + 1, seed=b)
    (longer, _), (whole, spec), (found, other) = result(batch), result(batch[:b]), result(batch[:b][index])
    wanted = []
    for leaf, more in zip(whole, longer, strict=True):
        for axis in range(leaf.dim()):
            if (leaf.shape[axis], more.shape[axis]) == (b, b + 1):
                leaf = leaf.index_select(axis, index)
        wanted.append(leaf)
    law = f"of the samples {index.tolist()} is not that of theirs"
    _compare(law, optree.tree_unflatten(other, found), optree.tree_unflatten(spec, wanted), tolerance)


def _additive(reducer: Additive, kept: Pairs, means: Means, tolerance: float) -> None:
    """The laws of what a parameter contributes."""
    for name, uses in kept.uses.items():
        whole = reducer.of_parameter(name, uses)
        _compare("depends on route or budget", reducer.within(means).of_parameter(name, uses), whole, tolerance)
        twice = reducer.of_parameter(name, [_scaled(use, 2.0) for use in uses])
        _compare(f"is not of degree {reducer.degree}", twice, whole * 2.0**reducer.degree, tolerance)
        if reducer.degree == 1:
            apart = [reducer.of_parameter(name, [use]) for use in uses]
            _compare("is not the sum over uses, at degree 1", torch.stack(apart).sum(0), whole, tolerance)
        zero = reducer.zero(len(kept), whole.new_zeros(()))
        nothing = reducer.of_parameter(name, [_scaled(use, 0.0) for use in uses])
        _compare("has another `zero` than gradients of zero give", zero, nothing, tolerance)


def _scaled(use: Factor, by: float) -> Factor:
    if isinstance(use, Outer):
        return Outer(use.rows, use.cols * by, use.form)
    return use.map(lambda value: value * by if value.is_floating_point() else value)


def _name(reducer: Any) -> str:
    return type(reducer).__name__


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(_same, one, other))
    if hasattr(one, "__dict__") and not isinstance(one, type):
        return type(one) is type(other) and _same(vars(one), vars(other))
    return bool(one == other)


def _compare(law: str, found: Tree, wanted: Tree, tolerance: float) -> None:
    (got, own), (leaves, spec) = optree.tree_flatten(found), optree.tree_flatten(wanted)
    if own != spec:
        raise AssertionError(f"the reducer's result {law}: {own} instead of {spec}")
    for one, other in zip(got, leaves, strict=True):
        scale = float(other.abs().max()) if other.numel() else 0.0
        if one.shape != other.shape or not bool(((one - other).abs() <= tolerance * max(scale, 1e-3)).all()):
            raise AssertionError(f"the reducer's result {law}: {one} instead of {other}")
