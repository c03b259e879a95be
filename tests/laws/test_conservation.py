"""The conservation law: when it is checked, that nothing missing passes, and that nothing right is refused."""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import funcghost as fg
from funcghost.engine.plans import Plan, Site
from funcghost.laws.conservation import check_conservation, shares_of, together, witness
from funcghost.laws.draws import TOLERANCE
from funcghost.ops.layout import Layout
from funcghost.trees import split_params
from tests.depth import DEEP, fewer, thinned
from tests.models.awkward import Hidden
from tests.naive import assert_scores, expected

Params = dict[str, Tensor]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def losses(params: Params, x: Tensor) -> Tensor:
    return (torch.tanh(x @ params["w"] + params["b"]) @ params["v"]).square().sum(1)


def hidden_losses(params: Params, x: Tensor) -> Tensor:
    return (torch.tanh(Hidden.apply(x, params["w"]) + params["b"]) @ params["v"]).square().sum(1)


def small() -> Params:
    return {"w": normal(3, 4), "b": normal(4), "v": normal(4, 2)}


def zeros(params: Params) -> Params:
    return {name: torch.zeros_like(value) for name, value in params.items()}


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every check of the law."""
    made: list[int] = []

    def counting(*args: Any, **kwargs: Any) -> None:
        made.append(len(made))
        check_conservation(*args, **kwargs)

    monkeypatch.setattr("funcghost.planning.ways.check_conservation", counting)
    return made


def transformed(scoring_only: bool, fn: Any, **given: Any) -> Callable[..., Any]:
    return fg.reduce(fn, **given) if scoring_only else fg.grad_and_reduce(fn, **given)


# When.


@pytest.mark.parametrize("scoring_only", [False, True])
@pytest.mark.parametrize(("verify", "counts"), [("first", [1, 1, 1]), ("always", [1, 2, 3]), ("never", [0, 0, 0])])
def test_checks_are_made_when_the_option_says(
    checks: list[int], verify: Any, counts: list[int], scoring_only: bool
) -> None:
    params, found = small(), []
    step = transformed(scoring_only, losses, options=fg.Options(verify=verify))
    for seed in range(3):
        step(params, normal(5, 3, seed=seed), fg.dot(params))
        found.append(len(checks))
    assert found == counts


def test_first_is_the_default(checks: list[int]) -> None:
    assert fg.Options().verify == "first"
    step = fg.reduce(losses)
    for _ in range(3):
        step(small(), normal(5, 3), fg.dot(small()))
    assert len(checks) == 1


@pytest.mark.parametrize("verify", ["first", "always", "never"])
def test_new_sizes_and_new_ops_are_checked_anew(checks: list[int], verify: Any) -> None:
    flags = {"cube": False}

    def either(params: Params, x: Tensor) -> Tensor:
        values = losses(params, x)
        return values**3 if flags["cube"] else values

    step, params = fg.reduce(either, options=fg.Options(verify=verify)), small()
    found = []
    for size, flags["cube"] in ((5, False), (7, False), (5, False), (7, True), (7, True), (5, False), (7, True)):
        step(params, normal(size, 3), fg.dot(params))
        found.append(len(checks))
    wanted = {"first": [1, 2, 2, 3, 3, 3, 3], "always": [1, 2, 3, 4, 5, 6, 7], "never": [0] * 7}
    assert found == wanted[verify]


def test_nothing_is_checked_where_nothing_is_scored(checks: list[int]) -> None:
    params = small()
    fg.grad_and_reduce(hidden_losses)(params, normal(5, 3), {})
    fg.grad_and_reduce(losses)(params, normal(0, 3), fg.dot(params))
    assert checks == []


def test_plan_says_whether_it_was_verified(checks: list[int]) -> None:
    params, x = small(), normal(5, 3)
    verified = fg.plan(losses, params, x)
    assert verified.verified
    assert str(verified).endswith("planned with 5 samples, verified")
    # One that was comes with its check, for the sizes it was made with ...
    fg.reduce(losses, plan=verified)(params, x, fg.dot(params))
    assert len(checks) == 1
    # ... and one that was not is checked when it is first used, once.
    unverified = fg.plan(losses, params, x, options=fg.Options(verify="never"))
    assert not unverified.verified
    assert str(unverified).endswith("not verified")
    step = fg.reduce(losses, plan=unverified)
    for _ in range(2):
        step(params, x, fg.dot(params))
    assert len(checks) == 2


def test_never_means_that_the_user_answers_for_it() -> None:
    params, x = small(), normal(5, 3)
    found = fg.reduce(hidden_losses, options=fg.Options(verify="never"))(params, x, fg.dot(params))
    seen = {**zeros(params), "b": params["b"], "v": params["v"]}
    assert_scores(found, expected(losses, params, x, seen))


def test_always_finds_what_breaks_later_and_first_does_not_look() -> None:
    params, x = small(), normal(5, 3)
    steps = {
        "first": fg.reduce(losses, options=fg.Options(verify="first")),
        "always": fg.reduce(losses, options=fg.Options(verify="always")),
    }
    for step in steps.values():
        step(params, x, fg.dot(params))
    fg.register_rule(torch.Tensor.matmul, linear="each", factor=lambda a: torch.tensor(1.01))
    steps["first"](params, x, fg.dot(params))
    with pytest.raises(fg.ConservationError, match=re.escape("['v', 'w']")):
        steps["always"](params, x, fg.dot(params))


# What.


@pytest.mark.parametrize("scoring_only", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_direction_of_zeros_does_not_blind_the_check(batch: int, scoring_only: bool) -> None:
    params, x = small(), normal(batch, 3)
    for direction in (zeros(params), {**zeros(params), "v": params["v"]}):
        with pytest.raises(fg.ConservationError, match=re.escape("['w']")):
            transformed(scoring_only, hidden_losses)(params, x, fg.dot(direction))


def towers(count: int, hidden: int, scale: float, seed: int) -> tuple[Any, Params]:
    """One product per parameter, added up; that of the hidden one is scaled and, with it, its gradient."""
    params = {f"w{k}": normal(3, 2, seed=100 * seed + k) for k in range(count)}

    def losses(params: Params, x: Tensor) -> Tensor:
        parts = [
            scale * Hidden.apply(x, w).sin() if k == hidden else (x @ w).sin() for k, w in enumerate(params.values())
        ]
        return torch.stack(parts).to(torch.promote_types(x.dtype, torch.float32)).sum((0, 2))

    return losses, params


@fewer(3)
@given(st.integers(1, 12), st.integers(0, 11), st.floats(-5, 0), st.sampled_from([1, 2, 9]), st.integers(0, 99))
def test_every_parameter_is_missed_however_small_its_gradient(
    count: int, hidden: int, exponent: float, batch: int, seed: int
) -> None:
    hidden %= count
    fn, params = towers(count, hidden, 10.0**exponent, seed)
    with pytest.raises(fg.ConservationError, match=re.escape(f"for parameters ['w{hidden}']:")):
        fg.reduce(fn)(params, normal(batch, 3, seed=seed), fg.dot(params))


@pytest.mark.parametrize("hidden", range(12))
def test_gradient_smaller_by_1e5_is_missed_wherever_it_stands(hidden: int) -> None:
    fn, params = towers(12, hidden, 1e-5, 0)
    leaves = [value.requires_grad_() for value in zeros(params).values()]
    moved = dict(zip(params, (p + leaf for p, leaf in zip(params.values(), leaves, strict=True)), strict=True))
    norms = [float(g.norm()) for g in torch.autograd.grad(fn(moved, normal(4, 3)).sum(), leaves)]
    assert 1e-6 < norms[hidden] / max(norms) < 1e-4  # it is as small as the name says
    with pytest.raises(fg.ConservationError, match=re.escape(f"for parameters ['w{hidden}']:")):
        fg.reduce(fn)(params, normal(4, 3), fg.dot(params))


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)], ids=str
)
def test_small_gradient_is_missed_in_lower_precision(dtype: torch.dtype, scale: float) -> None:
    # As those of biases beside those of an embedding: small, and nothing that rounding explains.
    for seed in range(5):
        fn, params = towers(6, 2, scale, seed)
        params = {name: value.to(dtype) for name, value in params.items()}
        with pytest.raises(fg.ConservationError, match=re.escape("for parameters ['w2']:")):
            fg.plan(fn, params, normal(4, 3, seed=seed, dtype=dtype))


def residual(params: Params, x: Tensor, hidden: str = "") -> Tensor:
    """A network of many layers, one of which may be hidden."""
    for name, w in params.items():
        x = x + (Hidden.apply(x, w) if name == hidden else x @ w).tanh() / len(params) ** 0.5
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().mean(1)


PRECISIONS = [*itertools.product([torch.float32, torch.bfloat16, torch.float16], [4, 100])]
HARDEST = [case for case in PRECISIONS if case[1] == 4 or case[0] == torch.bfloat16]


@pytest.mark.parametrize(("dtype", "count"), thinned(PRECISIONS, HARDEST), ids=str)
def test_one_parameter_of_many_is_missed_in_any_precision(dtype: torch.dtype, count: int) -> None:
    # The tolerance grows as the precision falls; the share of one parameter must stay above it.
    params = {f"w{k}": (normal(8, 8, seed=k) / 8**0.5).to(dtype) for k in range(count)}
    x = normal(6, 8, dtype=dtype)
    assert fg.plan(residual, params, x).verified
    for hidden in ("w0", f"w{count - 1}"):

        def fn(params: Params, x: Tensor, hidden: str = hidden) -> Tensor:
            return residual(params, x, hidden)

        with pytest.raises(fg.ConservationError, match=re.escape(f"'{hidden}'")):
            fg.plan(fn, params, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_use_of_two_is_missed(dtype: torch.dtype) -> None:
    params = {"other": normal(3, 3, dtype=dtype), "twice": normal(3, 3, seed=1, dtype=dtype)}

    def fn(params: Params, x: Tensor) -> Tensor:
        h = (x @ params["twice"]).sin() @ params["other"]
        return Hidden.apply(h.sin(), params["twice"]).square().sum(1)

    with pytest.raises(fg.ConservationError, match=re.escape("for parameters ['twice']:")):
        fg.reduce(fn)(params, normal(4, 3, dtype=dtype), fg.dot(params))


def test_many_missing_parameters_are_named_in_part() -> None:
    params = {f"w{k:02}": normal(3, 2, seed=k) for k in range(12)}

    def fn(params: Params, x: Tensor) -> Tensor:
        return torch.stack([Hidden.apply(x, w).sin() for w in params.values()]).sum((0, 2))

    with pytest.raises(fg.ConservationError, match=re.escape("'w08', 'w09'] and others: ")):
        fg.reduce(fn)(params, normal(4, 3), fg.dot(params))


@pytest.mark.parametrize("source", ["torch", "numpy"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_noise_from_a_generator_of_the_user_does_not_blind_the_check(source: str, dtype: torch.dtype) -> None:
    # Its draws differ from run to run unless it is put back: the check must not take that for rounding.
    params = {name: value.to(dtype) for name, value in small().items()}
    for seed in range(4):
        generator, numbers = torch.Generator().manual_seed(seed), np.random.default_rng(seed)

        def fn(params: Params, x: Tensor, g: torch.Generator = generator, n: np.random.Generator = numbers) -> Tensor:
            noise = torch.randn(x.shape, generator=g) if source == "torch" else torch.from_numpy(n.normal(size=x.shape))
            return hidden_losses(params, x + noise.to(x.dtype))

        with pytest.raises(fg.ConservationError if source == "torch" else fg.PlanError):
            fg.reduce(fn)(params, normal(5, 3, dtype=dtype), fg.dot(params))


def test_losses_that_cannot_be_run_again_are_refused_and_the_remedy_works() -> None:
    own, params, x = np.random.default_rng(0), small(), normal(5, 3)

    def fn(params: Params, x: Tensor) -> Tensor:
        return losses(params, x + torch.from_numpy(own.normal(size=x.shape)))

    def remedied(params: Params, x: Tensor) -> Tensor:
        return losses(params, x + torch.from_numpy(np.random.normal(size=x.shape)))

    with pytest.raises(fg.PlanError, match="Draw random numbers from torch, or from the global"):
        fg.reduce(fn)(params, x, fg.dot(params))
    before = np.random.get_state()
    scores = fg.reduce(remedied)(params, x, fg.dot(params))
    np.random.set_state(before)
    noise = torch.from_numpy(np.random.normal(size=x.shape))
    torch.testing.assert_close(scores, torch.func.jvp(lambda p: losses(p, x + noise), (params,), (params,))[1])


@pytest.mark.parametrize("site", [0, 1])
def test_wrong_layout_in_a_plan_is_caught(site: int) -> None:
    # T == B: the shape admits either axis, only the law tells them apart.
    params, x = {"w": normal(4, 4), "b": normal(4)}, normal(4, 4, 4)

    def fn(params: Params, x: Tensor) -> Tensor:
        return (x @ params["w"] + params["b"]).sin().sum((1, 2))

    plan = fg.plan(fn, params, x, options=fg.Options(verify="never"))
    wrong = [replace(s, layouts=(Layout(1),)) if i == site else s for i, s in enumerate(plan.sites)]
    with pytest.raises(fg.ConservationError, match=re.escape(f"for parameters ['{'wb'[site]}']:")):
        fg.reduce(fn, plan=replace(plan, sites=tuple(wrong)))(params, x, fg.dot(params))


def test_site_left_out_of_a_plan_is_caught() -> None:
    params, x = small(), normal(5, 3)
    plan = fg.plan(losses, params, x, options=fg.Options(verify="never"))
    for index, site in enumerate(plan.sites):
        cut = [replace(s, action="skip") if i == index else s for i, s in enumerate(plan.sites)]
        with pytest.raises(fg.ConservationError, match=re.escape(f"for parameters {list(site.parameters)}:")):
            fg.reduce(losses, plan=replace(plan, sites=tuple(cut)))(params, x, fg.dot(params))


@pytest.mark.parametrize(
    ("precision", "count", "sums"),
    [(torch.float64, 300, 1), (torch.float32, 300, 1), (torch.float16, 60, 8), (torch.bfloat16, 6, 6)],
)
def test_a_part_of_one_share_is_missed_in_a_sum_of_many(precision: torch.dtype, count: int, sums: int) -> None:
    """Tangents that are carried are checked in few sums, in which rounding of all shares is no alarm."""
    names = [f"p{i:03}" for i in range(count)]
    params = {name: normal(5, seed=i).float() * 10.0 ** (i % 7 - 3) for i, name in enumerate(names)}
    each = [normal(4, 5, seed=1000 + i).float() * 10.0 ** (i % 3 - 1) for i in range(count)]
    weights = torch.tensor([1.0, -0.7, 1.3, 0.6])
    seen = witness(torch.ones(4), weights, [weights @ g for g in each], list(params.values()), precision)
    site = Site("op", (0,), "carry", ("carried",), tuple(names), ((4,),))
    groups = together(Plan((site,), 4, precision=precision), names)
    assert len(groups) == sums
    rounding = TOLERANCE[precision] / 10

    def check(missing: int | None) -> None:
        noise = [1 + rounding * normal(4, 5, seed=2000 + i) for i in range(count)]
        ours = [g * (1 - 0.9 * (i == missing)) * off for i, (g, off) in enumerate(zip(each, noise, strict=True))]

        def scores(directions: Sequence[Sequence[Tensor | None]]) -> Tensor:
            columns = [[g @ v.double() for g, v in zip(ours, own, strict=True) if v is not None] for own in directions]
            return torch.stack([torch.stack(column).sum(0) for column in columns], 1)

        def nearby(seed: int) -> list[Tensor]:
            return [weights @ g for g in each]

        check_conservation(split_params(params), scores, seen, groups, nearby, str)

    check(None)
    for missing in (0, 4, count - 1):
        with pytest.raises(fg.ConservationError, match=re.escape(f"['p{missing:03}']")):
            check(missing)


# No false alarms.


def test_shares_of_many_entries_keep_their_digits() -> None:
    gradient = torch.rand(2**24)
    assert shares_of([gradient], [gradient])[0] == pytest.approx(float(gradient.double().square().sum()), rel=1e-6)


@pytest.mark.parametrize("seed", range(16 if DEEP else 6))
def test_under_autocast_a_gradient_that_is_rounding_alone_is_no_alarm(seed: int) -> None:
    # A bias before a batch norm in training: its gradient is what bfloat16 leaves of zero, parameters are float32.
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    head = nn.Sequential(model, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    x = torch.randn(4, 2, 8, 8)

    def losses(params: Params, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = torch.func.functional_call(head, params, (x,))
            return F.cross_entropy(out.float(), torch.arange(4) % 3, reduction="none")

    params = fg.trainable(head)
    plan = fg.plan(losses, params, x, reducers=fg.squared_norm())
    assert plan.verified

    def hidden(params: Params, x: Tensor) -> Tensor:
        unseen = Hidden.apply(x[:, :, :2, 0].flatten(1), params["3.weight"].T)
        return losses(params, x) + unseen.sin().sum(1)

    with pytest.raises(fg.ConservationError, match=r"3\.weight"):  # what is missed is told all the same
        fg.plan(hidden, params, x)


class Attention(nn.Module):
    """The softmax does not change when all keys move by one vector: the gradient of their bias is rounding alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))


class Shifted(nn.Module):
    """A bias before a normalisation that takes the mean away."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 6, bias=False), norm
        self.shift = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.linear(x) + self.shift)
        return out


WITHOUT_GRADIENT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "keys": (lambda: Attention(6), "key.bias"),
    "keys of torch": (lambda: nn.MultiheadAttention(6, 2, batch_first=True), "in_proj_bias"),
    "layer norm": (lambda: Shifted(nn.LayerNorm(6)), "shift"),
    "softmax": (lambda: Shifted(nn.Softmax(-1)), "shift"),
}


@pytest.mark.parametrize(
    ("dtype", "size"),
    # Smaller, all gradients of half precision would be rounding.
    [
        *itertools.product([torch.float64, torch.float32], [1e-2, 1.0, 30.0]),
        (torch.bfloat16, 1.0),
        (torch.float16, 1.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", WITHOUT_GRADIENT)
def test_gradient_that_is_rounding_alone_is_no_alarm(case: str, dtype: torch.dtype, size: float) -> None:
    make, name = WITHOUT_GRADIENT[case]
    for seed in range(5 if DEEP else 2):
        torch.manual_seed(seed)
        model = make().to(dtype)
        params: Params = {key: value.detach() for key, value in model.named_parameters()}

        def fn(params: Params, x: Tensor, model: nn.Module = model) -> Tensor:
            args = (x, x, x) if isinstance(model, nn.MultiheadAttention) else (x,)
            out = torch.func.functional_call(model, params, args)
            terms = (out[0] if isinstance(out, tuple) else out).sin()
            return terms.to(torch.promote_types(dtype, torch.float32)).sum((1, 2))

        x = size * normal(3, 7, 6, seed=seed, dtype=dtype)
        assert fg.plan(fn, params, x).verified
        if dtype.itemsize < 4:
            continue
        wanted = expected(fn, params, x, params)
        # The part of the others is right, too; the tolerance is rounding in a few products, relative to their terms.
        assert_scores(fg.reduce(fn)(params, x, fg.dot(params)), wanted, 1e3 * torch.finfo(dtype).eps)
        if dtype == torch.float64 and case != "keys of torch":  # which holds the biases of queries and values, too
            along = {k: torch.ones_like(v) * (k == name) for k, v in params.items()}
            assert float(expected(fn, params, x, along)[0].abs().max()) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_batch_norm_swallows_a_bias_without_alarm(dtype: torch.dtype) -> None:
    for seed in range(8):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 2, 1)).to(dtype)
        params: Params = {key: value.detach() for key, value in model.named_parameters()}
        fn = fg.module_losses(model, lambda output, x: output.square().sum((1, 2)))
        assert fg.plan(fn, params, normal(5, 3, 9, seed=seed, dtype=dtype)).verified


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("flat", ["all", "one"])
def test_zero_gradients_are_no_alarm(flat: str, dtype: torch.dtype) -> None:
    params = {name: value.to(dtype) for name, value in small().items()}
    if flat == "all":
        params["v"] = torch.zeros_like(params["v"])  # of a squared output: every gradient is zero
    else:
        params = {**params, "w": torch.zeros_like(params["w"]), "b": torch.zeros_like(params["b"])}
    plan = fg.plan(losses, params, normal(5, 3, dtype=dtype))
    assert plan.verified
    wanted = expected(losses, params, normal(5, 3, dtype=dtype), params)
    assert_scores(fg.reduce(losses)(params, normal(5, 3, dtype=dtype), fg.dot(params)), wanted)


def test_unused_parameter_is_no_alarm() -> None:
    params, x = {**small(), "unused": normal(7)}, normal(5, 3)
    out = fg.grad_and_reduce(losses)(params, x, fg.dot(params))
    assert not bool(out.grads["unused"].any())
    assert_scores(out.reduced, expected(losses, params, x, params))


@given(st.lists(st.floats(-6, 6), min_size=3, max_size=3), st.sampled_from([torch.float64, torch.float32]))
def test_scales_of_parameters_are_no_alarm(exponents: list[float], dtype: torch.dtype) -> None:
    # Parameters and gradients of sizes from 1e-6 to 1e6 beside each other.
    params = {name: value.to(dtype) * 10**e for (name, value), e in zip(small().items(), exponents, strict=True)}
    scales = [10**-e for e in exponents]

    def fn(params: Params, x: Tensor) -> Tensor:
        w, b, v = (value * scale for value, scale in zip(params.values(), scales, strict=True))
        return (torch.tanh(x @ w + b) @ v).square().sum(1)

    assert fg.plan(fn, params, normal(5, 3, dtype=dtype)).verified


@pytest.mark.parametrize(("dtype", "depth"), [(torch.float32, 24), (torch.bfloat16, 12), (torch.float16, 12)])
def test_rounding_of_a_deep_network_is_no_alarm(dtype: torch.dtype, depth: int) -> None:
    for seed, batch in itertools.product(range(3), (1, 6)):
        torch.manual_seed(seed)
        layers = [nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()) for _ in range(depth)]
        model = nn.Sequential(*layers, nn.Linear(8, 2)).to(dtype)
        params: Params = {key: value.detach() for key, value in model.named_parameters()}
        fn = fg.module_losses(model, lambda output, x: output.float().square().sum(1))
        assert fg.plan(fn, params, normal(batch, 8, seed=seed, dtype=dtype)).verified


def test_losses_that_nearly_cancel_are_no_alarm() -> None:
    # A trained classifier: the losses are all but zero, and so are the gradients.
    params = {"w": 40 * torch.eye(4), "b": torch.zeros(4)}
    target = torch.arange(8) % 4

    def fn(params: Params, x: Tensor) -> Tensor:
        return F.cross_entropy(x @ params["w"] + params["b"], target, reduction="none")

    x = F.one_hot(target, 4).float() + 0.05 * normal(8, 4, dtype=torch.float32)
    assert fg.plan(fn, params, x).verified


def test_a_vmap_of_the_losses_own_is_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `out_dims` does to the outcome is no call of a torch function, whatever watches."""
    params, x = {"w": torch.randn(6, 2, dtype=torch.float64)}, torch.randn(4, 5, 6, dtype=torch.float64)

    def losses(p: dict[str, Tensor], x: Tensor) -> Tensor:
        shifted = torch.func.vmap(lambda shift: x.sin() + shift, out_dims=1)(torch.arange(3.0, dtype=torch.float64))
        return torch.tanh(shifted @ p["w"]).square().flatten(1).sum(1)

    plan = fg.plan(losses, params, x)
    monkeypatch.setattr("funcghost.transforms.steps.make_plan", None)
    direction = {"w": torch.randn_like(params["w"])}
    scores = fg.reduce(losses, plan=plan)(params, x, fg.dot(direction))
    wanted = torch.func.jvp(lambda p: losses(p, x), (params,), (direction,))[1]
    torch.testing.assert_close(scores, wanted)
