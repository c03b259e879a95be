"""A model held to naive per-sample gradients."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import optree
import torch
from torch import Tensor

from funcghost.algebra.directions import as_dense
from funcghost.algebra.factors import Dense
from funcghost.algebra.pair_algebra import combine, materialize
from funcghost.algebra.pairs import Pairs
from funcghost.errors import InputError
from funcghost.laws.oracle import per_sample_gradients
from funcghost.options import Options
from funcghost.problem import Losses, Problem, backward, cotangents
from funcghost.reducers.bases import Additive, Directional, Reducer, split_reducers
from funcghost.reducers.by_parameter import per_param
from funcghost.reducers.dots import dot
from funcghost.reducers.quadratic import cross, gram, squared_norm
from funcghost.side_effects import untouched
from funcghost.transforms.halves import apply, plan
from funcghost.transforms.steps import grad_and_reduce, pairs
from funcghost.trees import Params, Tree, split_params

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Relative to the size of the terms, by the lowest precision among the parameters."""


def naive_pairs(losses: Losses, params: Tree, batch: Tree) -> Pairs:
    """The pairs of a batch by one backward per sample, each gradient as it is: what all factors have to agree with.

    Example:
        >>> import torch
        >>> from funcghost.testing import naive_pairs
        >>> naive_pairs(lambda params, x: x @ params["w"], {"w": torch.zeros(2)}, torch.eye(2))
        Pairs of 2 samples, 16 bytes
          w  2  dense
    """
    return _kept(split_params(params), per_sample_gradients(losses, params, batch))


def _kept(params: Params, gradients: Tree) -> Pairs:
    leaves = optree.tree_leaves(gradients)
    uses = {name: (Dense(leaf),) for name, leaf in zip(params.names, leaves, strict=True)}
    facts = tuple((k, tuple(leaf.shape), leaf.dtype) for k, leaf in zip(params.names, params.leaves, strict=True))
    return Pairs(uses, facts, params.spec)


def assert_matches_naive(
    losses: Losses,
    params: Tree,
    batch: Tree,
    reducers: Tree = None,
    *,
    tolerance: float | None = None,
    options: Options | None = None,
) -> None:
    """Holds everything that funcghost says of a batch to per-sample gradients by one backward each.

    Compared are the losses and the training gradient; `fg.dot` in a random direction, `fg.squared_norm`, `fg.gram`,
    the Gram matrix of each parameter and `fg.cross`, in the step and over pairs; `fg.materialize` and `fg.combine`; and
    the `reducers` given, with what they make of the naive gradients.

    Args:
        losses: as in `fg.grad_and_reduce`. Every run starts from the present state of the random numbers.
        params: a tree of parameters.
        batch: any object; two samples or more tell the most.
        reducers: more reducers to compare, any tree of them.
        tolerance: how far numbers may be off, relative to the sizes of the terms they are sums of and to the largest
            of the batch (terms may cancel inside an op, before they reach the gradient): by default 1e-10 in float64,
            1e-5 in float32, 5e-2 in bfloat16, 1e-2 in float16, by the lowest precision among the parameters. Give one
            where the losses themselves compute in a lower one.
        options: those of the step.

    Cost: a backward pass and a copy of the parameters for each sample, in float64.

    Raises:
        AssertionError: saying what differs, where and by how much.
        InputError: reducers by position, which have no naive form: compare the sum of `per_token` with `dot`.

    Example:
        >>> import torch
        >>> from funcghost.testing import assert_matches_naive
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        >>> def losses(params, x):
        ...     return torch.func.functional_call(model, params, (x,)).square().sum(1)
        >>> assert_matches_naive(losses, dict(model.named_parameters()), torch.randn(5, 3))
    """
    named = split_params(params)
    problem = Problem(losses, named, batch)
    given, _ = split_reducers(reducers)
    if any(isinstance(reducer, Directional) and reducer.by_position for reducer in given):
        raise InputError("assert_matches_naive: reducers by position have no naive form. Compare their sum with dot.")
    naive = naive_pairs(losses, params, batch)
    usual = max(TOLERANCE[leaf.dtype] for leaf in named.leaves)
    allowed = usual if tolerance is None else tolerance
    truth = _Truth(named, naive, allowed)

    def alone(function: Callable[..., Any], *arguments: Any) -> Any:
        with untouched(problem.devices()):
            return function(*arguments)

    b = len(naive)
    direction = named.rebuild(truth.direction)
    own: dict[str, Any] = {"dot": dot(direction), "squared_norm": squared_norm(), "gram": gram()}
    own |= {"per_param(gram)": per_param(gram()), "per_param(dot)": per_param(dot(direction))}
    own |= {"cross": cross(max(1, b // 2))} if b else {}
    asked = {"own": own, "given": list(given)}
    made = alone(plan, losses, params, batch, asked, options)
    out = alone(grad_and_reduce(losses, options=options, plan=made), params, batch, asked)
    kept = alone(pairs(losses, options=options, plan=made), params, batch)

    leaves = problem.leaves()
    with untouched(problem.devices()):
        values, _ = problem.evaluate(leaves)
        gradients = backward(values, leaves, cotangents(values, "mean"))
    truth.compare("losses", out.losses, values.detach().double(), values.detach().double().abs())
    truth.trees("grads", optree.tree_leaves(out.grads), gradients, [g.abs().mean(0) for g in truth.leaves] if b else [])
    for where, found in (("in the step", out.reduced), ("over pairs", apply(asked, kept, options=options))):
        truth.reduced(found["own"], where)
        for number, (reducer, got) in enumerate(zip(given, found["given"], strict=True)):
            truth.given(f"reducer {number}, {type(reducer).__name__}, {where}", reducer, got)
    if len(kept) != b:
        raise AssertionError(f"pairs: of {len(kept)} samples, expected {b}")
    truth.trees("materialize", optree.tree_leaves(materialize(kept)), truth.leaves, [g.abs() for g in truth.leaves])
    weights = _drawn((b,), 7, truth.rows)
    wanted = [torch.tensordot(weights, g, 1) for g in truth.leaves]
    sizes = [torch.tensordot(weights.abs(), g.abs(), 1) for g in truth.leaves]
    combined = optree.tree_leaves(combine(kept, weights.to(truth.leaves[0].dtype)))
    truth.trees("combine", combined, wanted, sizes)


def _drawn(shape: Sequence[int], seed: int, like: Tensor) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(like)


class _Truth:
    """The naive gradients, in float64, and what is compared with them."""

    def __init__(self, params: Params, naive: Pairs, tolerance: float) -> None:
        self.params, self.naive, self.tolerance = params, naive, tolerance
        self.leaves = [uses[0].value.double() for uses in naive.uses.values() if isinstance(uses[0], Dense)]
        flat = [leaf.reshape(len(naive), prod(leaf.shape[1:])) for leaf in self.leaves]
        self.rows = torch.cat(flat, 1)
        self.columns = dict(zip(params.names, flat, strict=True))
        self.direction = [_drawn(leaf.shape, seed, self.rows).to(leaf.dtype) for seed, leaf in enumerate(params.leaves)]

    def compare(self, what: str, found: Any, wanted: Tensor, size: Tensor, largest: Tensor | None = None) -> None:
        """Equality relative to the size of each number's terms and the largest of all."""
        if not isinstance(found, Tensor) or found.shape != wanted.shape:
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise AssertionError(f"{what}: found {shape}, expected {list(wanted.shape)}")
        if not found.numel():
            return
        whole = size.max() if largest is None else largest
        off = (found.double() - wanted.double()).abs()
        if not bool((off <= self.tolerance * (size + whole)).all()):
            worst = (off / (size + whole)).nan_to_num(torch.inf).argmax()
            place = tuple(int(i) for i in torch.unravel_index(worst, off.shape)) if off.dim() else ()
            raise AssertionError(
                f"{what}: entry {place} is {float(found[place])!r}, expected {float(wanted[place])!r}; off by "
                f"{float(off[place]):.3g}, allowed {float(self.tolerance * (size[place] + whole)):.3g} for terms of "
                f"size {float(size[place]):.3g}"
            )

    def trees(self, what: str, found: Sequence[Tensor], wanted: Sequence[Tensor], sizes: Sequence[Tensor]) -> None:
        """Equality of trees of gradients, relative to the sizes of the terms."""
        largest = max((size.max() for size in sizes if size.numel()), default=self.rows.new_zeros(()))
        for name, one, other, size in zip(self.params.names, found, wanted, sizes or wanted, strict=True):
            self.compare(f"{what}[{name!r}]", one.to_dense(), other.to_dense(), size, largest)

    def reduced(self, found: dict[str, Any], where: str) -> None:
        """The reducers of inner products."""
        b, whole = len(self.rows), self.rows.abs() @ self.rows.abs().T
        largest = whole.max() if b else None
        along = [v.double().flatten() for v in self.direction]
        terms = torch.stack([c @ v for c, v in zip(self.columns.values(), along, strict=True)])
        sizes = torch.stack([c.abs() @ v.abs() for c, v in zip(self.columns.values(), along, strict=True)])
        self.compare(f"dot, {where}", found["dot"], terms.sum(0), sizes.sum(0))
        products = self.rows @ self.rows.T
        self.compare(f"squared_norm, {where}", found["squared_norm"], products.diagonal(), whole.diagonal(), largest)
        self.compare(f"gram, {where}", found["gram"], products, whole, largest)
        if "cross" in found:
            at = b - max(1, b // 2)
            self.compare(f"cross, {where}", found["cross"], products[:at, at:], whole[:at, at:], largest)
        for k, (name, own) in enumerate(self.columns.items()):
            size = own.abs() @ own.abs().T
            self.compare(f"gram of {name!r}, {where}", found["per_param(gram)"][name], own @ own.T, size, largest)
            top = sizes.sum(0).max() if b else None
            self.compare(f"dot of {name!r}, {where}", found["per_param(dot)"][name], terms[k], sizes[k], top)

    def given(self, what: str, reducer: Reducer, found: Any) -> None:
        """A reducer of the user's, against itself over naive gradients."""
        wanted = apply(reducer, self.naive)
        if isinstance(reducer, Directional):
            size = 0.0
            for column in reducer.directions(self.params) if len(self.rows) else ():
                own = zip(column, self.columns.values(), strict=True)
                terms = [c.abs() @ as_dense(v).double().flatten().abs() for v, c in own if v is not None]
                size = max(size, float(sum(terms, start=self.rows.new_zeros(1)).max()))
        else:
            degree = reducer.degree if isinstance(reducer, Additive) else 1
            size = float(self.rows.norm(dim=1).max()) ** degree if len(self.rows) else 0.0
        leaves, spec = optree.tree_flatten(wanted)
        got, other = optree.tree_flatten(found)
        if spec != other:
            raise AssertionError(f"{what}: found {other}, expected {spec}")
        for one, value in zip(got, leaves, strict=True):
            self.compare(what, one, value.double(), value.double().abs() + size)
