"""Sizes that follow from others are not verified, and right; those that do not follow are."""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import funcghost as fg
from funcghost.engine.verified import Verified
from funcghost.ops.digest import Sizes
from tests.naive import assert_scores, expected

Params = dict[str, Tensor]
WIDTH = 3


# -- what follows from what ----------------------------------------------------------------------


@st.composite
def programs(draw: st.DrawFn) -> tuple[Callable[[int, int], tuple[int, ...]], list[tuple[int, int]]]:
    """The sizes of a program, functions of a batch size and a length; and some of these two."""
    whole = st.integers(0, 5)
    terms = draw(st.lists(st.tuples(whole, whole, whole, st.integers(2, 60)), min_size=1, max_size=12))
    calls = draw(st.lists(st.tuples(st.integers(2, 40), st.integers(2, 900)), min_size=1, max_size=12))
    return lambda b, t: tuple(p * b + q * t + r * b * t + s for p, q, r, s in terms), calls


def sizes(numbers: tuple[int, ...], fixed: tuple[int, ...] = ()) -> Sizes:
    return Sizes(numbers, fixed, hash(numbers))


@given(program=programs(), more=st.tuples(st.integers(2, 40), st.integers(2, 900)))
def test_affine_sizes_follow_when_there_are_enough(program: Any, more: tuple[int, int]) -> None:
    of, calls = program
    known = Verified()
    for call in [*calls, (2, 2), (2, 3), (3, 2), (3, 3), (4, 5), (5, 4)]:
        known = known.verified_for(sizes(of(*call)))
    while known.implies(sizes((0,))) or not (len(known) + 1) & len(known):  # the next is not one to check in any case
        known = replace(known, checksums=known.checksums | {len(known)})
    own = of(*more)
    assert known.knows(sizes(own))
    for place in range(len(own)):
        other = tuple(n + (i == place) for i, n in enumerate(own))
        assert known.implies(sizes(other)) == on_hull(of, other)
    assert not known.implies(sizes(own, fixed=(0,)))
    assert not known.implies(sizes((*own, 2)))
    assert not known.implies(sizes((1, *own[1:])))


def on_hull(of: Callable[[int, int], tuple[int, ...]], numbers: tuple[int, ...]) -> bool:
    """By ranks in float64."""
    rows = torch.tensor([of(b, t) for b, t in ((2, 2), (2, 3), (3, 2), (3, 3))], dtype=torch.float64)
    span = rows[1:] - rows[0]
    both = torch.cat([span, torch.tensor([numbers], dtype=torch.float64) - rows[0]])
    return bool(torch.linalg.matrix_rank(both) == torch.linalg.matrix_rank(span))


def test_three_sizes_and_then_every_doubling_are_verified() -> None:
    known, verified = Verified(), list[int]()
    for number in range(1, 40):
        own = sizes((number + 1, 8, 8 * number))
        if known.knows(own):
            known = known.with_implied(own)
        else:
            verified.append(number)
            known = known.verified_for(own)
    assert verified == [1, 2, 3, 4, 8, 16, 32]


# -- steps ---------------------------------------------------------------------------------------


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes what is verified after planning."""
    module: Any = sys.modules["funcghost.transforms.steps"]
    found = list[str]()

    def counted(name: str, check: Any) -> Any:
        def noted(*given: Any) -> Any:
            found.append(name)
            return check(*given)

        return noted

    for name in ("verify_plan", "verify_factors"):
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    return found


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention_params() -> Params:
    shapes = {"table": (50, 4), "place": (64, 4), "qkv": (12, 4), "out": (7, 4)}
    return {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def attention(params: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Packed as models of languages are: views of lengths and batch sizes, a mask, the loss per real token."""
    tokens, mask = batch
    b, t = tokens.shape
    x = F.embedding(tokens, params["table"]) + params["place"][:t]
    q, k, v = F.linear(x, params["qkv"]).view(b, t, 3, 2, 2).permute(2, 0, 3, 1, 4).unbind()
    causal = torch.ones(t, t, dtype=torch.bool).tril() & mask[:, None, None, :]
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=causal | torch.eye(t, dtype=torch.bool))
    logits = F.linear(x.transpose(1, 2).reshape(b * t, 4), params["out"])
    entries = F.cross_entropy(logits, tokens.reshape(-1) % 7, reduction="none").view(b, t)
    return (entries * mask).sum(1) / mask.sum(1)


def padded(b: int, t: int) -> tuple[Tensor, Tensor]:
    tokens = torch.arange(b * t).view(b, t) * 7 % 50
    return tokens, torch.arange(t) < torch.arange(b)[:, None] % t + 2


def test_padded_batches_are_verified_a_few_times(verified: list[str]) -> None:
    params = attention_params()
    direction = {name: normal(*value.shape, seed=9) for name, value in params.items()}
    step = fg.grad_and_reduce(attention)
    lengths = [11, 5, 17, 9, 12, 6, 20, 8, 13, 7, 10, 16]
    for t in lengths:
        scores = step(params, padded(4, t), fg.dot(direction)).reduced
        assert_scores(scores, expected(attention, params, padded(4, t), direction))
        norms = step(params, padded(4, t), fg.squared_norm()).reduced
        assert_scores(norms, squared_norms(attention, params, padded(4, t)))
    assert verified.count("verify_plan") == 4  # lengths 2, 3, 4 and 8; the first was verified with the plan
    assert verified.count("verify_factors") == 5


def squared_norms(losses: Any, params: Params, batch: Any) -> tuple[Tensor, Tensor]:
    each = [torch.func.grad(lambda p, i=i: losses(p, batch)[i])(params) for i in range(len(batch[0]))]
    found = torch.stack([torch.cat([g.flatten() for g in own.values()]).square().sum() for own in each])
    return found, found


def test_other_batch_sizes_follow_as_well(verified: list[str]) -> None:
    params = attention_params()
    score = fg.reduce(attention)
    for number in range(24):
        b, t = 2 + number * 7 % 5, 5 + number * 11 % 13
        found = score(params, padded(b, t), fg.dot(params))
        assert_scores(found, expected(attention, params, padded(b, t), params))
    assert len(verified) <= 7


def test_always_means_always(verified: list[str]) -> None:
    params = attention_params()
    score = fg.reduce(attention, options=fg.Options(verify="always"))
    for t in range(4, 12):
        score(params, padded(3, t), fg.dot(params))
    assert len(verified) == 7


# -- programs in which samples go elsewhere with other sizes, though ops and shapes are as before ----------------------


def rows_of(params: Params, x: Tensor) -> Tensor:
    return (x @ params["w"]).sin().sum(1)


def rolled(params: Params, x: Tensor) -> Tensor:
    return rows_of(params, x).roll(x.shape[1], 0)


def times_a_row(params: Params, x: Tensor) -> Tensor:
    h = rows_of(params, x)
    return h * h[x.shape[1] % len(x)]


def window(params: Params, x: Tensor) -> Tensor:
    h, start = rows_of(params, x), x.shape[1] % len(x)
    return torch.cat([h, h])[start : start + len(x)]


def narrowed(params: Params, x: Tensor) -> Tensor:
    h = rows_of(params, x)
    return torch.cat([h, h]).narrow(0, x.shape[1] % len(x), len(x))


def narrowed_by_its_length(params: Params, x: Tensor) -> Tensor:
    h = rows_of(params, x)
    return torch.cat([h] * 3).narrow(0, x.shape[1] % 3 + len(x), len(x))


def folded(params: Params, x: Tensor) -> Tensor:
    return (x @ params["w"]).sin().reshape(x.shape[1], len(x)).sum(0)


def unflattened(params: Params, x: Tensor) -> Tensor:
    return (x @ params["w"]).sin().flatten().unflatten(0, (x.shape[1], len(x))).mean(0)


def below_a_diagonal(params: Params, x: Tensor) -> Tensor:
    h, b = rows_of(params, x), len(x)
    return torch.ones(b, b, dtype=h.dtype).tril(x.shape[1] % b) @ h


def by_an_index(params: Params, x: Tensor) -> Tensor:
    return rows_of(params, x)[(torch.arange(len(x)) + x.shape[1]) % len(x)]


def by_a_number_in_a_tensor(params: Params, x: Tensor) -> Tensor:
    return rows_of(params, x).index_select(0, (torch.arange(len(x)) + torch.tensor(x.shape[1])) % len(x))


def by_a_start(params: Params, x: Tensor) -> Tensor:
    h, start = rows_of(params, x), x.shape[1] % len(x)
    return torch.cat([h, h])[torch.arange(start, start + len(x))]


def every_so_many(params: Params, x: Tensor) -> Tensor:
    h = rows_of(params, x)
    return torch.cat([h, h])[:: x.shape[1] % 2 + 1][: len(x)]


def by_branch(params: Params, x: Tensor) -> Tensor:
    h = rows_of(params, x)
    return h.flip(0) if x.shape[1] % 4 else h.flip(())


def as_strided(params: Params, x: Tensor) -> Tensor:
    h = rows_of(params, x)
    return torch.cat([h, h]).as_strided((len(x),), (1,), x.shape[1] % len(x))


MOVING = [
    *(rolled, times_a_row, window, narrowed, narrowed_by_its_length, folded, unflattened, below_a_diagonal),
    *(by_an_index, by_a_number_in_a_tensor, by_a_start, every_so_many, by_branch, as_strided),
]


@pytest.mark.parametrize("losses", MOVING)
def test_samples_that_go_elsewhere_with_other_sizes(losses: Any) -> None:
    """The first lengths leave the samples where they are; enough of them to be believed."""
    params = {"w": normal(WIDTH, seed=1)}
    score = fg.reduce(losses)
    direction = {"w": torch.ones(WIDTH, dtype=torch.float64)}
    for t in (8, 12, 16, 20, 24, 28, 9, 10, 32, 11, 13, 6, 36):
        x = normal(4, t, WIDTH, seed=t)
        assert_scores(score(params, x, fg.dot(direction)), expected(losses, params, x, direction))
