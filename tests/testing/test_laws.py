"""The laws of `funcghost.testing`: what funcghost has keeps them, and what breaks one is caught."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from torch import Tensor

import funcghost as fg
from funcghost.algebra.directions import Direction
from funcghost.algebra.factors import Factor, Lookup, Outer, dense
from funcghost.ops.known import _KNOWN
from funcghost.ops.products import Product
from funcghost.reducers.bases import Directional, Reducer, register
from funcghost.reducers.quadratic import SquaredNorm
from funcghost.testing import (
    Model,
    assert_matches_naive,
    assert_reducer_laws,
    assert_rule_laws,
    models,
    naive_pairs,
    pairs,
)
from funcghost.testing.strategies import LAYERS
from funcghost.trees import Params
from tests.depth import fewer

POSITIONS_FIRST = tuple(name for name in LAYERS if name not in ("convolution", "channels"))


def direction(params: dict[str, Tensor], seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(v.shape, dtype=v.dtype, generator=generator) for k, v in params.items()}


def dots(params: Any, _: int) -> Reducer:
    return fg.dot(direction(params))


def stacked(params: Any, _: int) -> Reducer:
    return fg.dot(fg.stack([direction(params), direction(params, 4)]))


REDUCERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "squared_norm": (fg.squared_norm(), {}),
    "gram": (fg.gram(), {}),
    "cross": (fg.cross(2), {"samples": 3, "local": False}),
    "dot": (dots, {}),
    "stack": (stacked, {}),
    "rademacher": (fg.project(6, 1), {}),
    "gaussian": (fg.project(6, 1, "gaussian"), {}),
    "kronecker": (fg.project(6, 1, "kronecker"), {}),
    "per_param(gram)": (fg.per_param(fg.gram()), {}),
    "per_param(dot)": (lambda params, b: fg.per_param(dots(params, b)), {}),
    "per_token": (lambda params, b: fg.per_token(fg.dot(direction(params))), {"on": models(POSITIONS_FIRST)}),
}


@pytest.mark.parametrize("name", REDUCERS)
def test_reducers_keep_the_laws(name: str) -> None:
    reducer, given_ = REDUCERS[name]
    assert_reducer_laws(reducer, examples=settings().max_examples // 4, **given_)


@dataclass(frozen=True, eq=False)
class Broken(SquaredNorm):
    """A squared norm that breaks one law."""

    how: str = ""
    seen: dict[str, int] = field(default_factory=dict)

    def of_parameter(self, name: str, uses: Sequence[Factor]) -> Tensor:
        if self.how == "sees less of long budgets":
            return super().of_parameter(name, uses) * (1 if self.means.route is None else 2)
        if self.how == "adds up uses":
            return torch.stack([super(Broken, self).of_parameter(name, [use]) for use in uses]).sum(0)
        if self.how == "clips at one":
            return super().of_parameter(name, uses).clamp(max=1.0)
        if self.how == "is of the largest":
            found = super().of_parameter(name, uses)
            return found / found.max().clamp(min=1e-9) if found.numel() else found
        if self.how == "remembers":
            self.seen["count"] = self.seen.get("count", 0) + 1
        return super().of_parameter(name, uses)

    def result(self, parts: Mapping[str, Tensor]) -> Tensor:
        total = super().result(parts)
        return total.sqrt() if self.how == "takes the root" else total

    def zero(self, batch: int, like: Tensor) -> Tensor:
        return like.new_ones((batch,)) if self.how == "has one for nothing" else like.new_zeros((batch,))


@dataclass(frozen=True, eq=False)
class Degree(SquaredNorm):
    """One that says to be linear."""

    degree: ClassVar[int] = 1


register(Broken, (), ("how",))
register(Degree, ())

FAULTS = {
    "sees less of long budgets": "route|budget",
    "adds up uses": "naive",
    "clips at one": "of degree 2",
    "is of the largest": "of the samples|of degree",
    "remembers": "has changed",
    "takes the root": "sum of per_param",
    "has one for nothing": "zero",
}


def failure(check: Callable[[], None]) -> str:
    """What is said, by all failures that hypothesis found."""
    with pytest.raises((AssertionError, ExceptionGroup)) as caught:
        check()
    found: list[str] = []
    errors: list[BaseException] = [caught.value]
    while errors:
        error = errors.pop()
        errors += error.exceptions if isinstance(error, BaseExceptionGroup) else ()
        found.append(str(error))
    return "\n".join(found)


@pytest.fixture
def _first_failure() -> Iterator[None]:
    """Failures are expected: none is made smaller."""
    before = settings.get_current_profile_name()
    phases = [Phase.generate]
    settings.register_profile("first failure", settings.get_profile(before), phases=phases, report_multiple_bugs=False)
    settings.load_profile("first failure")
    yield
    settings.load_profile(before)


@pytest.mark.usefixtures("_first_failure")
@pytest.mark.parametrize("how", FAULTS)
def test_a_reducer_that_breaks_a_law_is_caught(how: str) -> None:
    message = failure(lambda: assert_reducer_laws(Broken(how=how), examples=40))
    assert any(phrase in message for phrase in FAULTS[how].split("|")), message


@pytest.mark.usefixtures("_first_failure")
def test_a_wrong_degree_is_caught() -> None:
    assert "degree 1" in failure(lambda: assert_reducer_laws(Degree(), examples=20))


def test_something_else_is_no_reducer() -> None:
    with pytest.raises(fg.InputError, match="found int"):
        assert_reducer_laws(3)  # type: ignore[arg-type]


# -- rules ---------------------------------------------------------------------------------------------

W, X = torch.tensor([[1.0, 2.0, -1.0], [0.0, 3.0, 1.0]]), torch.tensor([[2.0, 1.0, 0.0], [1.0, -1.0, 2.0]])
IMAGE, KERNEL = torch.arange(32.0).view(1, 2, 4, 4) % 5, torch.arange(36.0).view(2, 2, 3, 3) % 3
TOKENS = torch.tensor([[0, 1, 1], [2, 1, 0]])
RULES: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "linear": (F.linear, (X, W, torch.ones(2)), {}),
    "linear without bias": (F.linear, (X, W), {}),
    "addmm": (torch.addmm, (torch.ones(2), X, W.T), {"beta": 2, "alpha": 3}),
    "baddbmm": (torch.baddbmm, (torch.ones(2, 2, 2), X.expand(2, 2, 3), W.T.expand(2, 3, 2)), {}),
    "matmul": (torch.matmul, (X, W.T), {}),
    "rmatmul": (torch.Tensor.__rmatmul__, (W.T, X), {}),
    "einsum": (torch.einsum, ("td,pd->tp", X, W), {}),
    "mul": (torch.mul, (X, W), {}),
    "add": (torch.add, (X, W), {"alpha": 3}),
    "rsub": (torch.Tensor.__rsub__, (X, W), {}),
    "div": (torch.div, (X, 2 * torch.ones(3)), {}),
    "cat": (torch.cat, ([X, W], 1), {}),
    "getitem": (torch.Tensor.__getitem__, (X, (slice(None), 1)), {}),
    "convolution": (F.conv2d, (IMAGE, KERNEL, torch.ones(2)), {"padding": "same", "dilation": 2}),
    "transposed convolution": (F.conv_transpose2d, (IMAGE, KERNEL, torch.ones(2)), {"stride": 2}),
    "embedding": (F.embedding, (TOKENS, torch.arange(12.0).view(4, 3)), {}),
    "embedding, padding": (F.embedding, (TOKENS, torch.arange(12.0).view(4, 3)), {"padding_idx": 1}),
    "embedding, by frequency": (F.embedding, (TOKENS, torch.ones(4, 3)), {"scale_grad_by_freq": True}),
    "raw embedding": (torch.embedding, (torch.ones(4, 3), TOKENS, 1), {}),
    "bags": (F.embedding_bag, (TOKENS, torch.arange(12.0).view(4, 3)), {"mode": "sum"}),
    "layer norm": (F.layer_norm, (X, (3,), torch.ones(3), torch.ones(3)), {}),
    "group norm": (F.group_norm, (IMAGE, 2, torch.ones(2), torch.ones(2)), {}),
    "rms norm": (F.rms_norm, (X, (3,), torch.ones(3)), {}),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_keep_the_laws(name: str) -> None:
    assert_rule_laws(*RULES[name])


def test_a_rule_that_does_not_hold_says_so() -> None:
    table = torch.ones(4, 3)
    assert_rule_laws(F.embedding, (TOKENS, table), {"max_norm": 1.0}, holds=False)
    with pytest.raises(AssertionError, match="does not hold"):
        assert_rule_laws(F.embedding, (TOKENS, table), {"max_norm": 1.0})
    with pytest.raises(AssertionError, match="the rule holds"):
        assert_rule_laws(F.embedding, (TOKENS, table), holds=False)


WRONG_RULES: dict[str, tuple[Any, dict[str, Any], tuple[Any, ...], dict[str, Any], str]] = {
    "not linear": (torch.sin, {"linear": "each"}, (X,), {}, "not jointly linear|another backward"),
    "not jointly": (torch.mul, {"linear": "jointly"}, (X, W), {}, "not jointly linear|another backward"),
    "affine": (torch.addmm, {"linear": "each"}, (torch.ones(2), X, W.T), {}, "not jointly linear|another backward"),
    "no factor": (
        F.embedding,
        {"linear": [["weight"]]},
        (TOKENS, torch.ones(4, 3)),
        {"padding_idx": 1},
        "another backward",
    ),
}


@pytest.mark.parametrize("name", WRONG_RULES)
def test_a_wrong_rule_is_caught(name: str) -> None:
    op, rule, args, kwargs, phrase = WRONG_RULES[name]
    fg.register_rule(op, **rule)
    with pytest.raises(AssertionError, match=phrase):
        assert_rule_laws(op, args, kwargs)


def test_what_rules_cannot_be_asked() -> None:
    with pytest.raises(fg.InputError, match="no rule"):
        assert_rule_laws(torch.erfinv, (X,))
    with pytest.raises(fg.InputError, match="no argument"):
        assert_rule_laws(F.linear, (torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64)))


# -- models --------------------------------------------------------------------------------------------


@fewer(3)
@given(models())
def test_drawn_models_match_naive_gradients(model: Model) -> None:
    assert_matches_naive(model.losses, model.params, model.batch(3), [fg.project(4), fg.per_param(fg.squared_norm())])


@dataclass(frozen=True, eq=False)
class First(Directional):
    """The entries of the gradient of one parameter."""

    name: str

    def directions(self, params: Params) -> list[Direction]:
        own = params.names.index(self.name)
        basis = torch.eye(params.leaves[own].numel(), dtype=params.leaves[own].dtype)
        return [[row.view(leaf.shape) if i == own else None for i, leaf in enumerate(params.leaves)] for row in basis]

    def result(self, scores: Tensor, params: Params) -> Tensor:
        return scores


def test_a_reducer_of_ones_own_is_compared_and_keeps_the_laws() -> None:
    assert_reducer_laws(lambda params, _: First(sorted(params)[0]), examples=5)
    params, x = {"a": torch.ones(2), "b": torch.ones(2)}, torch.randn(3, 2)
    assert_matches_naive(lambda p, x: (x @ (p["a"] * p["b"])).sin(), params, x, First("b"))


@pytest.mark.parametrize("broken", ["rule", "description", "reducer"])
def test_a_mismatch_with_naive_gradients_is_caught(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params, x = {"w": torch.randn(3, 2), "b": torch.randn(2)}, torch.randn(4, 5, 3)

    def losses(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return F.linear(x, p["w"].T, p["b"]).sin().sum((1, 2))

    never, wanted = fg.Options(verify="never"), "dot"
    assert_matches_naive(losses, params, x, options=never)
    if broken == "rule":
        fg.register_rule(F.linear, linear=[["weight"], ["bias"]], arguments=["input", "weight", "bias"])
    elif broken == "description":
        known = _KNOWN[F.linear]
        describe: Any = known.product

        def half(*given: Any) -> Any:
            found = describe(*given)
            return replace(found, scale=0.5) if isinstance(found, Product) else found

        monkeypatch.setitem(_KNOWN, F.linear, known._replace(product=half))
        wanted = "dot|squared_norm|materialize"
    else:
        monkeypatch.setattr(SquaredNorm, "result", lambda self, parts: parts["w"])
        wanted = "squared_norm"
    with pytest.raises(AssertionError, match=wanted):
        assert_matches_naive(losses, params, x, options=never)


def test_reducers_by_position_have_no_naive_form() -> None:
    params, x = {"w": torch.randn(3, 2)}, torch.randn(4, 5, 3)
    with pytest.raises(fg.InputError, match="by position"):
        assert_matches_naive(lambda p, x: (x @ p["w"]).sum((1, 2)), params, x, fg.per_token(fg.dot(params)))


def test_strategies_reach_every_hard_case() -> None:
    kinds, layers, lengths = set[Any](), set[str](), set[int]()

    @settings(max_examples=300, derandomize=True, database=None)
    @given(pairs())
    def collect(kept: fg.Pairs) -> None:
        lengths.add(len(kept))
        for uses in kept.uses.values():
            outer = {use.form for use in uses if isinstance(use, Outer)}
            kinds.update({type(use).__name__ for use in uses})
            kinds.update({"two forms"} if len(outer) > 1 else {"one form"} if outer else ())
            kinds.update("blocks" for form in outer if form.blocks[0] > 1)
            kinds.update("no positions" for use in uses if isinstance(use, Outer | Lookup) and not use.positions)
            kinds.update({"tied"} if outer and any(isinstance(use, Lookup) for use in uses) else ())

    @settings(max_examples=100, derandomize=True, database=None)
    @given(models())
    def of_models(model: Model) -> None:
        layers.update(model.layers, {"tokens"} if model.vocabulary else {"features"})

    collect()
    of_models()
    assert kinds == {"Outer", "Lookup", "Dense", "two forms", "one form", "blocks", "no positions", "tied"}
    assert lengths == set(range(5))
    assert layers == {*LAYERS, "tokens", "features"}


@given(pairs(integers=True))
def test_integer_pairs_are_whole_numbers(kept: fg.Pairs) -> None:
    for uses in kept.uses.values():
        for use in uses:
            assert torch.equal(dense(use), dense(use).round())


def test_naive_pairs_are_the_gradients() -> None:
    params, x = {"w": torch.ones(2)}, torch.eye(2)
    found = fg.materialize(naive_pairs(lambda p, x: (x @ p["w"]).square(), params, x))
    assert torch.equal(found["w"], 2 * x)
