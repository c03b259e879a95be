"""Layouts: measured right, and only where they are certain."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import funcghost as fg
from funcghost.ops.layout import Fold, Layout, candidates
from funcghost.ops.meter import Clock, Meter, codes
from funcghost.planning.sites import enough_measured
from tests.naive import assert_scores, expected

Params = dict[str, Tensor]
HALF_TO_DOUBLE = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FOLDS: tuple[Fold, ...] = ("whole", "high", "low")


def sample_of(shape: tuple[int, ...], batch: int, layout: Layout) -> Tensor:
    """The sample of every entry, from the meaning of the words: one index at a time."""
    ids = torch.empty(shape, dtype=torch.long)
    for index in itertools.product(*map(range, shape)):
        along = index[layout.axis] if shape else 0
        inner = shape[layout.axis] // batch if shape else 0
        ids[index] = {
            "single": 0,
            "whole": along,
            "high": along // inner if inner else 0,
            "low": along % batch,
        }[layout.fold]
    return ids


@dataclass(frozen=True)
class Drawn:
    """An output gradient as a linear backward gives it."""

    batch: int
    shape: tuple[int, ...]
    layout: Layout

    @property
    def ids(self) -> Tensor:
        return sample_of(self.shape, self.batch, self.layout)

    def base(self, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Sizes from 1/8 to 8, so that no half-precision number overflows or vanishes when it is scaled."""
        generator = torch.Generator().manual_seed(seed)
        size = torch.rand(self.shape, generator=generator, dtype=torch.float64) * 6 - 3
        sign = torch.randint(0, 2, self.shape, generator=generator) * 2 - 1
        return (sign * size.exp2()).to(dtype)


def layout_of(base: Tensor, batch: int, backward: Callable[[Tensor], Tensor]) -> Any:
    """What a meter says when `backward` maps cotangent scales [b] to the gradient."""
    clock = Clock(batch, started=True)
    meter = Meter(clock)
    half = base.dtype == torch.float16
    scales = codes(batch, torch.ones((), dtype=torch.float64), half=half) if batch > 1 else []
    for _ in range(2):  # once more, as a plan does where something is not finite
        clock.code = None
        meter.see(base)
        for code in scales:
            clock.code = code
            meter.see(backward(code))
        clock.keep = clock.overflow
    return meter.layout


def measured(drawn: Drawn, base: Tensor) -> Any:
    return layout_of(base, drawn.batch, lambda code: base * code.to(base.dtype)[drawn.ids])


@st.composite
def layouts(draw: st.DrawFn, least: int = 1) -> Drawn:
    """An axis for the samples, whole or folded, among others; up to 70 samples take two or three rounds of codes."""
    batch = draw(st.one_of(st.integers(least, 5), st.integers(least, 70)))
    fold = draw(st.sampled_from(FOLDS))
    size = batch if fold == "whole" else batch * draw(st.integers(2, 4))
    # T == B, and T a multiple of B, are where guessing goes wrong.
    others = draw(st.lists(st.sampled_from([1, 2, 3, batch, 2 * batch]), max_size=2))
    assume(size * torch.Size(others).numel() <= 20_000)
    axis = draw(st.integers(0, len(others)))
    shape = (*others[:axis], size, *others[axis:])
    return Drawn(batch, shape, Layout(axis, fold) if batch > 1 else Layout(0, "single"))


def test_strategy_reaches_the_hard_cases() -> None:
    reached: set[str] = set()

    @settings(max_examples=300, derandomize=True, database=None)
    @given(layouts())
    def collect(drawn: Drawn) -> None:
        ambiguous = len(candidates(torch.Size(drawn.shape), drawn.batch)) > 1
        reached.add(drawn.layout.fold + (" of several" if ambiguous else ""))
        for half in (True, False):
            reached.add(f"{len(codes(drawn.batch, torch.ones(()), half=half)) if drawn.batch > 1 else 0} rounds")
        if drawn.layout.fold == "whole" and drawn.shape.count(drawn.batch) > 1:
            reached.add("T == B")

    collect()
    folds = {"whole", "whole of several", "high of several", "low of several"}
    assert reached >= {"single", "T == B", "0 rounds", "1 rounds", "2 rounds", "3 rounds"} | folds


@given(layouts(), st.sampled_from(HALF_TO_DOUBLE), st.integers(0, 9))
def test_linear_backward_is_recognised(drawn: Drawn, dtype: torch.dtype, seed: int) -> None:
    assert measured(drawn, drawn.base(seed, dtype)) == drawn.layout


@given(layouts(), st.data())
def test_layout_is_given_only_if_it_is_the_only_one(drawn: Drawn, data: st.DataObject) -> None:
    # Where few entries have a gradient, several layouts may explain them: then none is certain.
    base = drawn.base(0)
    entries = st.lists(st.integers(0, base.numel() - 1), max_size=6)
    alive = torch.zeros(base.numel(), dtype=torch.bool)
    alive[torch.tensor(data.draw(entries), dtype=torch.long)] = True
    alive = alive.reshape(drawn.shape)
    explain = [
        c
        for c in candidates(torch.Size(drawn.shape), drawn.batch)
        if torch.equal(sample_of(drawn.shape, drawn.batch, c)[alive], drawn.ids[alive])
    ]
    found = measured(drawn, base * alive)
    if drawn.batch == 1:
        assert found == Layout(0, "single")
    else:
        assert found == (explain[0] if len(explain) == 1 and bool(alive.any()) else None)


@given(layouts(least=2), st.sampled_from(HALF_TO_DOUBLE))
def test_silence_is_no_layout(drawn: Drawn, dtype: torch.dtype) -> None:
    assert measured(drawn, torch.zeros(drawn.shape, dtype=dtype)) is None


def test_output_without_any_gradient_is_unused() -> None:
    assert Meter(Clock(3)).layout == "unused"


def test_diagonal_gradient_is_ambiguous() -> None:
    # T == B with a gradient on the diagonal alone: both axes explain it.
    drawn = Drawn(4, (4, 4), Layout(1))
    assert measured(drawn, torch.eye(4, dtype=torch.float64)) is None
    off_diagonal = torch.eye(4, dtype=torch.float64)
    off_diagonal[0, 1] = 1e-3
    assert measured(drawn, off_diagonal) == Layout(1)


@given(layouts(least=2), st.sampled_from([(torch.float64, 1e-6), (torch.float32, 1e-2)]), st.data())
def test_mixed_samples_get_no_layout(drawn: Drawn, precision: tuple[torch.dtype, float], data: st.DataObject) -> None:
    # A single entry also gets a little of another sample's gradient; the sizes of entries differ 64-fold at most.
    dtype, strength = precision
    base, ids = drawn.base(0, dtype), drawn.ids
    place = tuple(data.draw(st.integers(0, size - 1)) for size in drawn.shape)
    other = data.draw(st.integers(0, drawn.batch - 1).filter(lambda sample: sample != int(ids[place])))
    # In float32 a sample of many entries hides it: the error is measured against the whole sample.
    assume(dtype == torch.float64 or base.numel() // drawn.batch <= 16)
    own = base.clone()

    def backward(code: Tensor) -> Tensor:
        gradient = own * code.to(dtype)[ids]
        gradient[place] += strength * own[place] * code.to(dtype)[other]
        return gradient

    assert layout_of(backward(torch.ones(drawn.batch, dtype=dtype)), drawn.batch, backward) is None


@given(layouts(least=2), st.sampled_from(HALF_TO_DOUBLE), st.sampled_from([float("nan"), float("inf")]), st.data())
def test_nan_of_one_sample_does_not_hide_the_others(
    drawn: Drawn, dtype: torch.dtype, bad: float, data: st.DataObject
) -> None:
    sick = data.draw(st.integers(0, drawn.batch - 1))
    base, ids = drawn.base(0, dtype), drawn.ids
    healthy = ids != sick
    base[~healthy] = bad
    explain = [
        c
        for c in candidates(torch.Size(drawn.shape), drawn.batch)
        if torch.equal(sample_of(drawn.shape, drawn.batch, c)[healthy], ids[healthy])
    ]
    found = measured(drawn, base)
    assert found == drawn.layout if len(explain) == 1 else found is None
    # One of 8 samples hides nothing: only of two or three samples may the rest be explained in several ways.
    assert drawn.batch < 8 or found == drawn.layout


@given(layouts())
def test_by_sample_is_what_the_words_mean(drawn: Drawn) -> None:
    value = torch.arange(torch.Size(drawn.shape).numel()).reshape(drawn.shape)
    rows = drawn.layout.by_sample(value, drawn.batch)
    assert rows.shape[0] == drawn.batch
    assert rows.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()  # a view, not a copy
    for sample in range(drawn.batch):
        assert torch.equal(rows[sample].flatten().sort().values, value[drawn.ids == sample].sort().values)


@given(layouts())
def test_candidates_are_all_that_fit(drawn: Drawn) -> None:
    found = candidates(torch.Size(drawn.shape), drawn.batch)
    assert drawn.layout in found
    assert len(set(found)) == len(found)
    assert all(layout.fits(torch.Size(drawn.shape), drawn.batch) for layout in found)
    # Another number of samples fits if the axis has as many, or a multiple of them.
    size, bigger = drawn.shape[drawn.layout.axis], drawn.batch + 1
    fits = {"whole": size == bigger, "single": False}.get(drawn.layout.fold, size % bigger == 0)
    assert drawn.layout.fits(torch.Size(drawn.shape), bigger) == fits


def test_fits_asks_for_the_axis() -> None:
    assert not Layout(2).fits(torch.Size([3, 3]), 3)
    assert not Layout(0).fits(torch.Size([]), 1)
    assert Layout(0, "single").fits(torch.Size([]), 1)


@given(st.integers(2, 5000), st.sampled_from(HALF_TO_DOUBLE), st.booleans())
def test_codes_tell_all_samples_apart(batch: int, dtype: torch.dtype, half: bool) -> None:
    found = codes(batch, torch.ones((), dtype=dtype), half=half)
    narrow = half or dtype == torch.float16
    assert all(code.shape == (batch,) and code.dtype == dtype for code in found)
    words = set(zip(*(code.tolist() for code in found), strict=True))
    assert len(words) == batch
    mantissa, exponent = torch.frexp(torch.stack(found).double())
    assert bool((mantissa == 0.5).all())
    assert exponent.min() >= (-2 if narrow else -30)
    assert exponent.max() <= (5 if narrow else 33)  # from 1/8 to 16, or from 2**-31 to 2**32
    # No more backward passes than needed: with one round less, two samples would share their code.
    assert (8 if narrow else 64) ** (len(found) - 1) < batch


@given(st.integers(2, 70), st.sampled_from(HALF_TO_DOUBLE), st.integers(0, 9))
def test_codes_scale_without_rounding(batch: int, dtype: torch.dtype, seed: int) -> None:
    value = torch.randn(batch, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    value = value.where(value.abs() > 0.01, torch.ones_like(value))
    for code in codes(batch, value):
        assert torch.equal((value * code) / code, value)
        assert torch.equal((value * code).double(), value.double() * code.double())


# End to end: the layout that a plan shows, and exact scores with it.


def params_of(width: int) -> Params:
    return {"w": torch.randn(width, width, dtype=torch.float64), "b": torch.randn(width, dtype=torch.float64)}


def rows(params: Params, h: Tensor) -> Tensor:
    return torch.nn.functional.linear(h, params["w"], params["b"]).sin()


def sample_first(params: Params, x: Tensor) -> Tensor:
    return rows(params, x).sum((1, 2))


def sequence_first(params: Params, x: Tensor) -> Tensor:
    return rows(params, x.transpose(0, 1)).sum((0, 2))


def token_major(params: Params, x: Tensor) -> Tensor:
    b, t, d = x.shape
    return rows(params, x.transpose(0, 1).reshape(t * b, d)).reshape(t, b, d).sum((0, 2))


def sample_major(params: Params, x: Tensor) -> Tensor:
    b, t, d = x.shape
    return rows(params, x.reshape(b * t, d)).reshape(b, t, d).sum((1, 2))


def features_first(params: Params, x: Tensor) -> Tensor:
    return (params["w"] @ x.permute(1, 2, 0) + params["b"][:, None]).sin().sum((0, 1))


def gathered(params: Params, x: Tensor) -> Tensor:
    b, t, d = x.shape
    order = torch.randperm(b * t, generator=torch.Generator().manual_seed(3))[: b * t - 1]
    h = rows(params, x.reshape(b * t, d)[order])
    return torch.zeros(b * t, d, dtype=x.dtype).index_copy(0, order, h).reshape(b, t, d).sum((1, 2))


def mixed(params: Params, x: Tensor) -> Tensor:
    return sample_first(params, x - rows(params, x).mean(0, keepdim=True))


CASES = {
    "sample first": (sample_first, ["axis 0"]),
    "sequence first": (sequence_first, ["axis 1"]),
    "token-major": (token_major, ["axis 0, low"]),
    "sample-major": (sample_major, ["axis 0, high"]),
    "features first": (features_first, ["axis 2", "axis 2"]),
    "gathered": (gathered, ["carried"]),
    "mixed": (mixed, ["carried", "axis 0"]),
}


def shown(plan: fg.Plan, ops: str = "linear|matmul|add") -> list[str]:
    """The layout column of the printed plan, for the sites of the parameters themselves."""
    head, *body = str(plan).splitlines()
    start, stop = head.index("layout"), head.index("J V by")
    chosen = [line for line in body[:-1] if any(op in line.split()[1] for op in ops.split("|"))]
    return [
        line[start:stop].strip() for line in chosen if line[head.index("parameters") :].split()[0].strip(",") in "wb"
    ]


@pytest.mark.parametrize(("b", "t"), [(4, 4), (3, 5), (2, 4), (9, 3), (9, 9)])
@pytest.mark.parametrize("case", CASES)
def test_layout_of_a_model(case: str, b: int, t: int) -> None:
    losses, wanted = CASES[case]
    params, x = params_of(b), torch.randn(b, t, b, dtype=torch.float64)  # the width is b, too
    direction = {name: torch.randn_like(value) for name, value in params.items()}
    plan = fg.plan(losses, params, x)
    assert [layout for layout in shown(plan) if layout][: len(wanted)] == wanted
    found = fg.reduce(losses, plan=plan)(params, x, fg.dot(direction))
    assert_scores(found, expected(losses, params, x, direction))


@pytest.mark.parametrize("case", ["sample first", "sequence first", "token-major", "sample-major", "mixed"])
def test_plan_serves_other_sizes(case: str) -> None:
    # Layouts are symbolic; and what was planned for T != B holds for T == B.
    losses, _ = CASES[case]
    params = params_of(4)
    direction = {name: torch.randn_like(value) for name, value in params.items()}
    score = fg.reduce(losses, plan=fg.plan(losses, params, torch.randn(2, 3, 4, dtype=torch.float64)))
    for b, t in ((4, 4), (3, 2), (1, 3), (5, 1), (70, 2)):
        x = torch.randn(b, t, 4, dtype=torch.float64)
        assert_scores(score(params, x, fg.dot(direction)), expected(losses, params, x, direction))


def test_one_sample_is_told_as_such() -> None:
    plan = fg.plan(sample_first, params_of(3), torch.randn(1, 2, 3, dtype=torch.float64))
    assert shown(plan) == ["one sample"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["sequence first", "token-major", "gathered"])
def test_layout_in_lower_precision(case: str, dtype: torch.dtype) -> None:
    losses, wanted = CASES[case]
    params = {name: value.to(dtype) for name, value in params_of(4).items()}
    x = torch.randn(4, 4, 4, dtype=dtype)
    assert shown(fg.plan(losses, params, x))[: len(wanted)] == wanted


@pytest.mark.parametrize("length", [4, 8, 5])
def test_what_is_not_measured_at_first_is_when_it_is_needed(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # With as many positions as samples (or twice as many) the table of positions looks as if it had the samples.
    params = {"table": torch.randn(9, 3, dtype=torch.float64), **params_of(3)}
    batch, rounds = torch.randn(4, length, 3, dtype=torch.float64), list[bool]()

    def fn(p: Params, x: Tensor) -> Tensor:
        h = x + F.embedding(torch.arange(length), p["table"])
        return torch.tanh(h.sin() @ p["w"] + p["b"]).square().sum((1, 2))

    def noted(*given: Any) -> bool:
        rounds.append(enough_measured(*given))
        return rounds[-1]

    monkeypatch.setattr("funcghost.planning.planner.enough_measured", noted)
    plan = fg.plan(fn, params, batch)
    assert rounds == [length != 4]
    assert [site.action for site in plan.sites].count("carry") == 1
    direction = {name: torch.randn_like(value) for name, value in params.items()}
    found = fg.reduce(fn, plan=plan)(params, batch, fg.dot(direction))
    assert_scores(found, expected(fn, params, batch, direction))
