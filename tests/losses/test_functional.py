"""The chunked head against the head that it stands for: values, derivatives, scores, memory."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import funcghost as fg
from funcghost.attribution import in_run
from funcghost.functional import linear_cross_entropy
from tests.depth import thinned
from tests.models.small import Params, like
from tests.naive import assert_close, assert_scores, assert_trees_close, expected, gradient
from tests.versions import compiles

D = torch.float64
IGNORED = -100
Head = Callable[..., Tensor]


def unchunked(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    chunk: int | None = None,
    ignore_index: int = IGNORED,
) -> Tensor:
    """What is to be equalled, per token."""
    logits = F.linear(x, weight, bias)
    found = F.cross_entropy(
        logits.reshape(-1, len(weight)), targets.reshape(-1), reduction="none", ignore_index=ignore_index
    )
    return found.reshape(targets.shape)


class Case(NamedTuple):
    """Operands of a head and how it is called."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    chunk: int | None
    ignore_index: int

    @property
    def operands(self) -> list[Tensor]:
        return [self.x, self.weight] + ([] if self.bias is None else [self.bias])

    def of(self, head: Head, *operands: Tensor, **options: Any) -> Tensor:
        x, weight, *bias = operands or self.operands
        return head(
            x,
            weight,
            self.targets,
            bias=bias[0] if bias else None,
            chunk=self.chunk,
            ignore_index=self.ignore_index,
            **options,
        )


@st.composite
def cases(draw: st.DrawFn, tied: bool = False) -> Case:
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    width, vocabulary = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    ignore = draw(st.sampled_from([IGNORED, 0, -1]))
    targets = torch.randint(vocabulary, shape, generator=seed)
    if draw(st.booleans()):
        targets = torch.where(torch.rand(shape, generator=seed) < 0.4, ignore, targets)
    x, weight, bias = (
        torch.randn(s, generator=seed, dtype=D) for s in ((*shape, width), (vocabulary, width), (vocabulary,))
    )
    chunk = draw(st.sampled_from([None, 1, 2, 3, 5, 100]))
    return Case(x, weight, bias if draw(st.booleans()) else None, targets, chunk, ignore)


def features(case: Case) -> set[str]:
    tokens, chunk = case.targets.numel(), case.chunk or 10**6
    found = {f"axes {case.targets.dim()}"}
    found |= {"no tokens"} if tokens == 0 else set()
    found |= {"chunk 1"} if chunk == 1 and tokens > 1 else set()
    found |= {"rest"} if 1 < chunk < tokens and tokens % chunk else set()
    found |= {"divides"} if 1 < chunk < tokens and tokens % chunk == 0 else set()
    found |= {"one chunk"} if chunk > tokens > 0 else set()
    found |= {"bias"} if case.bias is not None else set()
    ignored = case.targets == case.ignore_index
    found |= {"ignored"} if bool(ignored.any()) else set()
    found |= {"all ignored"} if tokens and bool(ignored.all()) else set()
    found |= {"ignored in range"} if bool(ignored.any()) and case.ignore_index >= 0 else set()
    return found


def test_strategy_reaches_every_hard_case() -> None:
    reached: set[str] = set()

    @settings(max_examples=500, derandomize=True, database=None)
    @given(cases())
    def collect(case: Case) -> None:
        reached.update(features(case))

    collect()
    assert reached == {
        *("axes 0", "axes 1", "axes 2", "axes 3", "no tokens", "chunk 1", "rest", "divides", "one chunk", "bias"),
        *("ignored", "all ignored", "ignored in range"),
    }


def gradients(case: Case, head: Head, u: Tensor, **options: Any) -> tuple[Tensor, ...]:
    leaves = [operand.clone().requires_grad_() for operand in case.operands]
    return torch.autograd.grad(case.of(head, *leaves, **options), leaves, u)


@given(cases())
def test_values_and_gradients_are_those_of_the_unchunked_head(case: Case) -> None:
    found, wanted = case.of(linear_cross_entropy), case.of(unchunked)
    # A loss is a difference of two terms of the size of the logits.
    logits = F.linear(case.x, case.weight, case.bias).abs()
    largest = max(float(logits.max()), float(wanted.abs().max())) if logits.numel() else 0.0
    assert found.shape == wanted.shape
    assert bool(((found - wanted).abs() <= 1e-14 * (1 + largest)).all())
    assert not bool(found[case.targets == case.ignore_index].any())
    u = torch.randn_like(found)
    for ours, theirs in zip(gradients(case, linear_cross_entropy, u), gradients(case, unchunked, u), strict=True):
        assert ours.shape == theirs.shape
        assert bool(((ours - theirs).abs() <= 1e-12 * (1 + theirs.abs().max() if theirs.numel() else 1)).all())


@given(cases())
def test_forward_mode_and_hessians_are_those_of_the_unchunked_head(case: Case) -> None:
    operands, along = tuple(case.operands), tuple(torch.randn_like(operand) for operand in case.operands)
    u, numbers = torch.randn(case.targets.shape, dtype=D), tuple(range(len(case.operands)))

    def derivatives(head: Head) -> list[Tensor]:
        def total(*moved: Tensor) -> Tensor:
            return (u * case.of(head, *moved)).sum()

        def slope(*moved: Tensor) -> Tensor:
            return (u * torch.func.jvp(lambda *m: case.of(head, *m), moved, along)[1]).sum()

        def turned(*moved: Tensor) -> Tensor:
            found = torch.func.grad(total, numbers)(*moved)
            return sum(((g * v).sum() for g, v in zip(found, along, strict=True)), torch.zeros((), dtype=D))

        with torch.no_grad():  # as a step takes it, where losses and slopes come from one product
            by_dual = torch.func.jvp(lambda *m: case.of(head, *m), operands, along)
        one = torch.func.jvp(lambda w: case.of(head, operands[0], w, *operands[2:]), operands[1:2], along[1:2])[1]
        forward_over_reverse = torch.func.jvp(torch.func.grad(total, numbers), operands, along)[1]
        reverse_over_forward = torch.func.grad(slope, numbers)(*operands)
        reverse_over_reverse = torch.func.grad(turned, numbers)(*operands)
        return [*by_dual, one, *forward_over_reverse, *reverse_over_forward, *reverse_over_reverse]

    for ours, theirs in zip(derivatives(linear_cross_entropy), derivatives(unchunked), strict=True):
        assert ours.shape == theirs.shape
        scale = float(theirs.abs().max()) if theirs.numel() else 0.0
        assert bool(((ours - theirs).abs() <= 1e-11 * (1 + scale)).all())


@pytest.mark.parametrize("biased", [True, False])
def test_derivatives_of_first_and_second_order_by_finite_differences(biased: bool) -> None:
    x, weight, bias = (torch.randn(s, dtype=D, requires_grad=True) for s in ((5, 3), (4, 3), (4,)))
    targets = torch.tensor([0, 3, IGNORED, 1, 1])
    operands = (x, weight, bias) if biased else (x, weight)

    def losses(x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, targets, bias=bias[0] if bias else None, chunk=2)

    assert torch.autograd.gradcheck(losses, operands, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(losses, operands, check_fwd_over_rev=True)


@given(cases())
def test_reductions_leave_the_samples(case: Case) -> None:
    if not case.targets.dim():
        with pytest.raises(fg.InputError, match="first axis"):
            case.of(linear_cross_entropy, reduction="sum")
        return
    tokens, valid = case.of(unchunked), case.targets != case.ignore_index
    total = torch.stack([row.sum() for row in tokens]) if len(tokens) else tokens.new_zeros(0)
    count = torch.stack([row.sum() for row in valid]) if len(tokens) else total
    assert_close(case.of(linear_cross_entropy, reduction="sum"), total, 1e-13)
    found = case.of(linear_cross_entropy, reduction="mean")
    assert torch.equal(found.isnan(), count == 0)
    assert_close(found[count > 0], (total / count)[count > 0], 1e-13)


def model(head: Head, kind: str) -> Any:
    """Losses of next tokens where the head's weight is that of the embedding."""

    def hidden(p: Params, tokens: Tensor) -> Tensor:
        return torch.tanh(F.embedding(tokens, p["tokens"]) @ p["mix"])

    def batched(p: Params, tokens: Tensor) -> Tensor:
        return head(hidden(p, tokens)[:, :-1], p["tokens"], tokens[:, 1:], bias=p["bias"], chunk=3).mean(1)

    def sequence_first(p: Params, tokens: Tensor) -> Tensor:
        x = hidden(p, tokens.t())
        return head(x[:-1], p["tokens"], tokens.t()[1:], bias=p["bias"], chunk=3).mean(0)

    def flat(p: Params, tokens: Tensor) -> Tensor:
        x = hidden(p, tokens)[:, :-1].flatten(0, 1)
        return head(x, p["tokens"], tokens[:, 1:].flatten(), bias=p["bias"], chunk=3).view(len(tokens), -1).mean(1)

    def one(p: Params, tokens: Tensor) -> Tensor:
        return head(hidden(p, tokens)[:-1], p["tokens"], tokens[1:], bias=p["bias"], chunk=3).mean()

    def disguised(p: Params, tokens: Tensor) -> Tensor:
        weight = p["tokens"] * 2
        return head(hidden(p, tokens)[:, :-1], weight, tokens[:, 1:], bias=p["bias"], chunk=3).mean(1)

    def mixed(p: Params, tokens: Tensor) -> Tensor:
        x = hidden(p, tokens)[:, :-1]
        return head(x - x.mean(0), p["tokens"], tokens[:, 1:], bias=p["bias"], chunk=3).mean(1)

    by_name = {
        "sample first": batched,
        "sequence first": sequence_first,
        "flat": flat,
        "per example": fg.per_example(one),
        "disguised": disguised,
        "mixed": mixed,
    }
    return by_name[kind]


KINDS = ("sample first", "sequence first", "flat", "per example", "disguised", "mixed")


def tied(dtype: torch.dtype = D, vocabulary: int = 11, width: int = 4) -> tuple[Params, Tensor]:
    shapes = {"tokens": (vocabulary, width), "mix": (width, width), "bias": (vocabulary,)}
    return {k: torch.randn(s, dtype=dtype) for k, s in shapes.items()}, torch.randint(vocabulary, (5, 6))


@pytest.mark.parametrize("kind", KINDS)
def test_scores_gradients_and_losses_of_a_step(kind: str) -> None:
    (params, tokens), losses = tied(), model(linear_cross_entropy, kind)
    direction, other = like(params), like(params)
    plain = model(unchunked, "sample first" if kind in ("flat", "sequence first", "per example") else kind)
    wanted = expected(plain, params, tokens, direction)
    out = fg.grad_and_reduce(losses)(params, tokens, [fg.dot(direction), fg.dot(fg.stack([other, direction]))])
    assert_scores(out.reduced[0], wanted)
    assert_scores(out.reduced[1][:, 1], wanted)
    grads, values = gradient(plain, params, tokens)
    assert_close(out.losses, values, 1e-13)
    assert_trees_close(out.grads, grads)
    assert_scores(fg.reduce(losses)(params, tokens, fg.dot(direction)), wanted)
    forward = fg.reduce(losses, options=fg.Options(route="forward"))
    assert_scores(forward(params, tokens, fg.dot(direction)), wanted)


@pytest.mark.parametrize("kind", ["sample first", "sequence first", "flat", "per example"])
def test_the_plan_has_one_site_for_the_head(kind: str) -> None:
    params, tokens = tied()
    plan = fg.plan(model(linear_cross_entropy, kind), params, tokens)
    [site] = [site for site in plan.sites if "tokens" in site.parameters and "embedding" not in site.op]
    assert (site.op, site.action, site.way) == ("linear_cross_entropy", "tap", "forward")
    assert site.parameters == ("bias", "tokens")
    assert "linear_cross_entropy" in str(plan)
    tokens = torch.randint(11, (3, 9))  # other sizes
    wanted = expected(model(unchunked, "sample first"), params, tokens, direction := like(params))
    assert_scores(fg.reduce(model(linear_cross_entropy, kind), plan=plan)(params, tokens, fg.dot(direction)), wanted)


@pytest.mark.parametrize("kind", ["sample first", "per example"])
def test_products_are_as_the_docstring_says(kind: str) -> None:
    params, tokens = tied()
    losses, direction = model(linear_cross_entropy, kind), like(params)
    plan = fg.plan(losses, params, tokens)
    step, score = fg.grad_and_reduce(losses, plan=plan), fg.reduce(losses, plan=plan)
    product, mix = 2 * 25 * 4 * 11, 2 * 30 * 4 * 4

    def products(run: Callable[[], Any], mixes: int) -> float:
        with FlopCounterMode(display=False) as counter:
            run()
        return (counter.get_total_flops() - mixes * mix) / product

    assert products(lambda: losses(params, tokens), 1) == 1
    assert products(lambda: gradient(losses, params, tokens), 3) == 4
    assert products(lambda: step(params, tokens, fg.dot(direction)), 4) == 6
    assert products(lambda: score(params, tokens, fg.dot(direction)), 3) == 4


def test_hessian_vector_products_and_second_order_values() -> None:
    (params, tokens), vector = tied(), None
    vector = like(params)
    for kind in ("sample first", "per example"):
        ours, theirs = (model(head, kind) for head in (linear_cross_entropy, unchunked))
        found, wanted = (in_run.hessian_vector_product(f, params, [tokens], vector) for f in (ours, theirs))
        assert_trees_close(found, wanted)
        found, wanted = (
            in_run.second_order(f)(params, tokens, lr=0.1, validation=[tokens[:2]]).values for f in (ours, theirs)
        )
        assert_close(found, wanted, 1e-11)


def test_vmap_of_grad_and_of_batched_weights() -> None:
    params, tokens = tied()

    def loss(p: Params, row: Tensor) -> Tensor:
        x = F.embedding(row, p["tokens"])
        return linear_cross_entropy(x[:-1], p["tokens"], row[1:], bias=p["bias"], chunk=2).mean()

    def reference(p: Params, row: Tensor) -> Tensor:
        return unchunked(F.embedding(row, p["tokens"])[:-1], p["tokens"], row[1:], bias=p["bias"]).mean()

    found, wanted = (torch.func.vmap(torch.func.grad(f), (None, 0))(params, tokens) for f in (loss, reference))
    assert_trees_close(found, wanted)
    several = {k: torch.stack([p, 2 * p, -p]) for k, p in params.items()}
    for axes in ((0, None), (0, 0)):
        rows = tokens[0] if axes[1] is None else tokens[:3]
        found, wanted = (torch.func.vmap(torch.func.grad(f), axes)(several, rows) for f in (loss, reference))
        assert_trees_close(found, wanted)
    nested = torch.func.vmap(torch.func.vmap(loss, (None, 0)), (0, None))(several, tokens)
    assert_close(
        nested,
        torch.stack(
            [torch.stack([reference({k: v[i] for k, v in several.items()}, t) for t in tokens]) for i in range(3)]
        ),
        1e-12,
    )


# Inductor is asked of whole models in `engine/test_modes.py`; here it takes a minute.
COMPILED = [("aot_eager", "sample first"), ("aot_eager", "per example"), ("inductor", "sample first")]


@pytest.mark.parametrize(("backend", "kind"), thinned(COMPILED, [("aot_eager", "sample first")]))
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@compiles
def test_compiled_step_equals_eager(backend: str, kind: str) -> None:
    torch._dynamo.reset()
    (params, tokens), losses = tied(), model(linear_cross_entropy, kind)
    direction = like(params)
    step = torch.compile(
        fg.grad_and_reduce(losses, plan=fg.plan(losses, params, tokens)), fullgraph=True, backend=backend
    )
    for batch in (tokens, torch.randint(11, (7, 5))):  # other sizes than those planned with
        found = step(params, batch, fg.dot(direction))
        assert_scores(found.reduced, expected(model(unchunked, "sample first"), params, batch, direction))
        assert_trees_close(found.grads, gradient(model(unchunked, "sample first"), params, batch)[0])


def test_compiled_by_itself() -> None:
    torch._dynamo.reset()
    x, weight, targets = torch.randn(6, 4, requires_grad=True), torch.randn(11, 4, requires_grad=True), torch.arange(6)
    compiled = torch.compile(
        lambda x, w: linear_cross_entropy(x, w, targets, chunk=4), fullgraph=True, backend="aot_eager"
    )
    found, wanted = (
        torch.autograd.grad(f(x, weight).sum(), (x, weight)) for f in (compiled, lambda x, w: unchunked(x, w, targets))
    )
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours, theirs, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_has_the_dtype_of_x_and_its_accuracy(dtype: torch.dtype) -> None:
    x, weight, targets = torch.randn(64, 16), torch.randn(33, 16), torch.randint(33, (64,))
    exact = [v.to(dtype).double().requires_grad_() for v in (x, weight)]
    low = [v.to(dtype).requires_grad_() for v in (x, weight)]
    found, wanted = linear_cross_entropy(low[0], low[1], targets, chunk=5), unchunked(exact[0], exact[1], targets)
    assert found.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert_close(found.detach().double(), wanted.detach(), 4 * eps)
    ours, theirs = torch.autograd.grad(found.sum(), low), torch.autograd.grad(wanted.sum(), exact)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        assert_close(a.double(), b, 16 * eps)


@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_autocast_casts_as_the_unchunked_head_is_cast(dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(s, dtype=dtype, requires_grad=True) for s in ((40, 16), (33, 16), (33,)))
    targets, u = torch.randint(33, (40,)), torch.rand(40)

    def both(head: Head) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            losses = head(x, weight, targets, bias=bias, chunk=7)
        return losses.detach(), *torch.autograd.grad(losses, (x, weight, bias), u.to(losses.dtype))

    for ours, theirs in zip(both(linear_cross_entropy), both(unchunked), strict=True):
        assert ours.dtype == theirs.dtype
        assert_close(ours, theirs, 1e-12 if dtype == D else 2**-6)


def test_scores_under_autocast_cost_what_autocast_costs() -> None:
    params, tokens = tied(torch.float32, 40, 16)
    direction = like(params)

    def cast(head: Head) -> Any:
        def losses(p: Params, b: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return model(head, "sample first")(p, b).float()

        return losses

    found = fg.grad_and_reduce(cast(linear_cross_entropy))(params, tokens, fg.dot(direction)).reduced
    exact, size = expected(model(unchunked, "sample first"), params, tokens, direction)
    theirs = expected(cast(unchunked), params, tokens, direction)[0]
    assert float((found - exact).abs().max()) <= 2 * float((theirs - exact).abs().max()) + 2**-9 * float(size.max())


def test_meta_device() -> None:
    (params, tokens), losses = tied(), model(linear_cross_entropy, "sample first")
    plan, direction = fg.plan(losses, params, tokens), like(params)
    away, along = ({k: v.to("meta") for k, v in tree.items()} for tree in (params, direction))
    out = fg.grad_and_reduce(losses, plan=plan)(away, tokens.to("meta"), fg.dot(along))
    assert all(t.is_meta for t in (out.losses, out.reduced, *out.grads.values()))


@pytest.mark.cuda
def test_cuda_equals_cpu() -> None:
    (params, tokens), losses = tied(), model(linear_cross_entropy, "sample first")
    direction = like(params)
    wanted = fg.grad_and_reduce(losses)(params, tokens, fg.dot(direction))
    on, along = ({k: v.cuda() for k, v in tree.items()} for tree in (params, direction))
    found = fg.grad_and_reduce(losses)(on, tokens.cuda(), fg.dot(along))
    assert_close(found.reduced.cpu(), wanted.reduced, 1e-10)


def test_nothing_is_written_and_a_graph_serves_twice() -> None:
    x, weight, bias = (torch.randn(s, dtype=D, requires_grad=True) for s in ((6, 4), (5, 4), (5,)))
    targets, u = torch.randint(5, (6,)), torch.randn(6, dtype=D)
    operands = (x, weight, bias, targets, u)
    before, versions = [v.detach().clone() for v in operands], [v._version for v in operands]
    losses = linear_cross_entropy(x, weight, targets, bias=bias, chunk=4)
    losses = losses + linear_cross_entropy(2 * x, weight, targets, chunk=4)  # the same weight again
    first = torch.autograd.grad(losses, (x, weight, bias), u, retain_graph=True)
    again = torch.autograd.grad(losses, (x, weight, bias), u, retain_graph=True)
    both = unchunked(x, weight, targets, bias=bias) + unchunked(2 * x, weight, targets)
    for a, b, c in zip(first, again, torch.autograd.grad(both, (x, weight, bias), u), strict=True):
        assert torch.equal(a, b)
        assert_close(a, c, 1e-12)
    assert [v._version for v in operands] == versions
    assert all(torch.equal(a, b) for a, b in zip(operands, before, strict=True))
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(losses, (x, weight), u)


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that any op gives."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor):
                self.entries = max(self.entries, value.numel())
        return out


@pytest.mark.parametrize("work", ["gradient", "step", "scores", "per example", "forward", "torch.func", "hessian"])
def test_the_logits_of_all_tokens_never_exist(work: str) -> None:
    vocabulary, width = 300, 4
    params, _ = tied(vocabulary=vocabulary, width=width)
    tokens, direction = torch.randint(vocabulary, (8, 9)), like(params)
    losses = model(linear_cross_entropy, "per example" if work == "per example" else "sample first")
    plan = fg.plan(losses, params, tokens)
    forward = fg.reduce(losses, options=fg.Options(route="forward", verify="never"))
    if work == "forward":
        forward(params, tokens, fg.dot(direction))
    runs: dict[str, Callable[[], Any]] = {
        "gradient": lambda: gradient(losses, params, tokens),
        "step": lambda: fg.grad_and_reduce(losses, plan=plan)(params, tokens, fg.dot(direction)),
        "scores": lambda: fg.reduce(losses, plan=plan)(params, tokens, fg.dot(direction)),
        "per example": lambda: fg.grad_and_reduce(losses, plan=plan)(params, tokens, fg.dot(direction)),
        "forward": lambda: forward(params, tokens, fg.dot(direction)),
        "torch.func": lambda: torch.func.grad(lambda p: losses(p, tokens).sum())(params),
        "hessian": lambda: in_run.hessian_vector_product(losses, params, [tokens], direction),
    }
    with Largest() as seen:
        runs[work]()
    assert seen.entries <= vocabulary * width < 64 * vocabulary


X, W, T = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": [1.0]}, r"x must be a tensor, found list"),
        ({"bias": 0.0}, r"bias must be a tensor, found float"),
        ({"x": X.long()}, r"x must have real floating-point numbers, found torch.int64"),
        ({"weight": W.to(torch.complex64)}, r"weight must have real floating-point numbers, found torch.complex64"),
        ({"weight": W.to("meta")}, r"weight is on meta, x on cpu"),
        ({"targets": T.int()}, r"targets must be int64.*torch.int32.*\.long\(\)"),
        ({"weight": W[0]}, r"weight must be \[v, d\] with v > 0, found shape \(4,\)"),
        ({"weight": W[:0]}, r"weight must be \[v, d\] with v > 0, found shape \(0, 4\)"),
        ({"weight": W.t()}, r"found \(2, 3, 4\) for weight \(4, 5\)"),
        ({"x": X.sum()}, r"x must be \[\.\.\., d\]"),
        ({"targets": T[:, 1:]}, r"\(2, 3\), found \(2, 2\)"),
        ({"bias": W[0]}, r"bias must be \[v\], here \[5\], found shape \(4,\)"),
        ({"chunk": 0}, r"chunk must be a positive number of tokens, found 0"),
        ({"chunk": 2.0}, r"chunk must be a positive number of tokens, found 2.0"),
        ({"chunk": True}, r"chunk must be a positive number of tokens, found True"),
        ({"reduction": "all"}, r"reduction must be 'none', 'mean' or 'sum', found 'all'"),
        ({"weight": W.double()}, r"dtypes differ.*torch.float64"),
        ({"x": X[0, 0], "targets": T[0, 0], "reduction": "mean"}, r"leaves the first axis.*reduction='none'"),
    ],
)
def test_input_errors_say_what_was_found(arguments: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"x": X, "weight": W, "targets": T, **arguments}
    with pytest.raises(fg.InputError, match="(?s)^linear_cross_entropy: .*" + message):
        linear_cross_entropy(**given)


def test_a_target_out_of_range_raises_on_the_cpu() -> None:
    with pytest.raises(RuntimeError, match="out of bounds"):
        linear_cross_entropy(X, W, T + 5)
