"""Scores by position and by segment of packed rows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

import funcghost as fg
from funcghost.laws.oracle import per_sample_gradients
from funcghost.testing import Model, models
from tests.models.small import like
from tests.naive import assert_close, assert_scores, dots, expected
from tests.versions import compiles

Params = dict[str, Tensor]


# What is called with wrong arguments on purpose.
PER_TOKEN: Any = fg.per_token
PER_SEGMENT: Any = fg.per_segment
PER_PARAM: Any = fg.per_param


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@given(models(), st.integers(2, 4), st.data())
def test_sums_over_positions_and_segments_are_the_score(model: Model, b: int, drawn: st.DataObject) -> None:
    batch, direction = model.batch(b), like(model.params)
    numbers = st.lists(st.integers(-1, 2), min_size=b * model.length, max_size=b * model.length)
    ids = torch.tensor(drawn.draw(numbers), dtype=torch.int64).view(b, model.length)
    dot = fg.dot(direction)
    tokens, segments, each, both = fg.reduce(model.losses)(
        model.params,
        batch,
        (
            fg.per_token(dot),
            fg.per_segment(dot, ids, 3),
            fg.per_param(fg.per_token(dot)),
            fg.per_token(fg.dot(fg.stack([direction, direction]))),
        ),
    )
    assert tokens.shape == (b, model.length)
    assert_scores(tokens.sum(1), expected(model.losses, model.params, batch, direction))
    wanted = torch.stack([torch.where(ids == s, tokens, 0).sum(1) for s in range(3)], 1)
    assert_close(segments, wanted, 1e-12)
    assert_close(torch.stack(list(each.values())).sum(0), tokens, 1e-10)
    assert both.shape == (b, model.length, 2)
    assert_close(both[..., 1], tokens, 1e-12)


def by_token(p: Params, x: Tensor) -> Tensor:
    """[b, t]: nothing passes from one position to another."""
    return F.linear(torch.tanh(x @ p["w"] + p["b"]), p["w"]).square().sum(-1)


PARAMS: dict[str, tuple[int, ...]] = {"w": (3, 4), "b": (4,)}


def unfolded(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A convolution of x [b, t, c] as a product at each position: [b, t, d]."""
    around = F.pad(x, (0, 0, 1, 1)).unfold(1, 3, 1)  # [b, t, c, 3]
    return F.linear(around.flatten(2), weight.flatten(1), bias)


CHANNELS_FIRST: dict[str, Callable[[Params, Tensor], Tensor]] = {
    "convolution": lambda p, x: F.conv1d(x.mT, p["w"], p["b"], padding=1).mT,
    "product": lambda p, x: (p["w"].flatten(1) @ F.pad(x.mT, (1, 1)).unfold(2, 3, 1).mT.flatten(1, 2)).mT + p["b"],
}


@pytest.mark.parametrize(("name", "width", "length"), [("convolution", 4, 7), ("convolution", 5, 5), ("product", 4, 7)])
def test_channels_may_come_before_positions(name: str, width: int, length: int) -> None:
    params = {"w": normal(width, 3, 3), "b": normal(width), "g": normal(width), "v": normal(3, width)}
    x, dot = normal(4, length, 3), fg.dot(like(params))

    def losses(layer: Callable[[Params, Tensor], Tensor]) -> Any:
        def mixing(p: Params, x: Tensor) -> Tensor:
            h = F.group_norm(layer(p, x).mT, 1, p["g"], None).mT
            return F.linear(torch.tanh(h), p["v"]).cumsum(1).square().sum((1, 2))

        return mixing

    found = fg.reduce(losses(CHANNELS_FIRST[name]))(params, x, fg.per_token(dot))
    wanted = fg.reduce(losses(lambda p, x: unfolded(x, p["w"], p["b"])))(params, x, fg.per_token(dot))
    assert_close(found, wanted, 1e-10)


def test_uses_that_mix_positions_are_refused() -> None:
    params, x = {"w": normal(5, 3), "v": normal(7, 5)}, normal(4, 7, 3)

    def losses(p: Params, x: Tensor) -> Tensor:
        return (torch.tanh(x @ p["w"].mT).mT @ p["v"]).sin().sum((1, 2))  # [b, 7, 5], then [b, 5, 5]

    with pytest.raises(fg.SampleAxisError, match="Leave the parameters that are used there out of params"):
        fg.reduce(losses)(params, x, fg.per_token(fg.dot(like(params))))


@pytest.mark.parametrize("sequence_first", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_where_positions_do_not_meet_each_score_is_that_of_its_own_loss(sequence_first: bool, reduction: Any) -> None:
    params, x = {k: normal(*size) for k, size in PARAMS.items()}, normal(4, 4, 3)
    direction = like(params)

    def losses(p: Params, x: Tensor) -> Tensor:
        return by_token(p, x.transpose(0, 1)).sum(0) if sequence_first else by_token(p, x).sum(1)

    alone = dots(per_sample_gradients(lambda p, x: by_token(p, x).flatten(), params, x), direction)
    out = fg.grad_and_reduce(losses, reduction=reduction)(params, x, fg.per_token(fg.dot(direction)))
    assert_close(out.reduced, alone.view(4, 4), 1e-10)


@pytest.mark.parametrize("how", ["per_example", pytest.param("compiled", marks=compiles)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_in_other_ways_to_run_a_step(how: str) -> None:
    torch._dynamo.reset()
    params, x = {k: normal(*size) for k, size in PARAMS.items()}, normal(4, 5, 3)
    reducer = fg.per_segment(fg.dot(like(params)), torch.tensor([[0, 0, 1, 1, -1]]).expand(4, 5))
    wanted = fg.reduce(lambda p, x: by_token(p, x).sum(1))(params, x, reducer)
    if how == "per_example":
        found = fg.reduce(fg.per_example(lambda p, x: by_token(p, x).sum()))(params, x, reducer)
    else:

        def losses(p: Params, x: Tensor) -> Tensor:
            return by_token(p, x).sum(1)

        score = fg.reduce(losses, plan=fg.plan(losses, params, x))
        found = torch.compile(score, fullgraph=True, backend="aot_eager")(params, x, reducer)
    assert_close(found, wanted, 1e-10)


# -- packed rows --------------------------------------------------------------------------------------------


class Packed(nn.Module):
    """A GPT of one block over rows packed of documents, which do not see each other."""

    def __init__(self, see_all: bool = False) -> None:
        super().__init__()
        self.tokens, self.places, self.see_all = nn.Embedding(11, 8), nn.Embedding(6, 8), see_all
        self.first, self.second = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.out, self.up, self.down = (nn.Linear(8, n) for n in (24, 8, 16, 8))
        self.down = nn.Linear(16, 8)

    def forward(self, tokens: Tensor, places: Tensor, ids: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(places)
        causal = torch.ones(tokens.shape[1], tokens.shape[1]).tril() > 0
        seen = causal & (ids[:, :, None] == ids[:, None, :]) if not self.see_all else causal
        q, k, v = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in self.qkv(self.first(x)).chunk(3, -1))
        mask = seen[:, None] if seen.dim() == 3 else seen
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.second(x))))
        return F.linear(x, self.tokens.weight)


Rows = tuple[Tensor, Tensor, Tensor, Tensor]
LENGTHS = ((3, 2, 4), (5, 4, 0), (6, 1, 1))


def packed_rows() -> Rows:
    """Tokens, places within documents, documents (-1 for padding), and whether the next token is of the same one."""
    places, ids = torch.zeros(3, 9, dtype=torch.int64), torch.full((3, 9), -1)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for document, length in enumerate(lengths):
            ids[row, start : start + length] = document
            places[row, start : start + length] = torch.arange(length)
            start += length
    follows = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)
    return torch.randint(0, 11, (3, 9)), places, ids, follows


def next_token_losses(logits: Tensor, rows: Rows) -> Tensor:
    """The sum over each row."""
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), rows[0][:, 1:], reduction="none")
    return (losses * rows[3]).sum(1)


def packed_losses(model: nn.Module) -> Any:
    return lambda p, rows: next_token_losses(functional_call(model, p, rows[:3]), rows)


def by_document(losses: Any, params: Params, rows: Rows, direction: Params) -> Tensor:
    """The score of each document alone."""
    wanted = torch.zeros(3, 3, dtype=torch.float64)
    for row, lengths in enumerate(LENGTHS):
        for document in range(3):
            inside = rows[2][row] == document
            if lengths[document]:
                alone = tuple(part[row, inside][None] for part in rows[:3])
                follows = torch.ones(1, lengths[document] - 1, dtype=torch.bool)
                found = per_sample_gradients(losses, params, (*alone, follows))
                wanted[row, document] = dots(found, direction)[0]
    return wanted


def test_documents_of_packed_rows_are_scored_as_if_alone() -> None:
    model, rows = Packed().double(), packed_rows()
    losses, params = packed_losses(model), dict[str, Tensor](model.named_parameters())
    direction = like(params)
    reducer = fg.per_segment(fg.dot(direction), rows[2])
    found = fg.grad_and_reduce(losses)(params, rows, reducer).reduced
    wanted = by_document(losses, params, rows, direction)
    assert_close(found, wanted, 1e-10)
    assert float(wanted[1, 2]) == float(found[1, 2]) == 0.0
    # Where documents see each other the numbers are others: the docstring says so.
    model.see_all = True
    seeing = fg.grad_and_reduce(losses)(params, rows, reducer).reduced
    assert float((seeing - wanted).abs().max()) > 1e-3
    assert_scores(
        fg.reduce(losses)(params, rows, fg.per_token(fg.dot(direction))).sum(1),
        expected(losses, params, rows, direction),
    )


# -- what is refused, and what to do --------------------------------------------------------------------------


def pooled(p: Params, x: Tensor) -> Tensor:
    """A head on the mean over positions: [b, d], whose first axis after the samples is no position."""
    return torch.tanh(torch.tanh(x @ p["w"]).mean(1) @ p["head"]).sum(1)


@pytest.mark.parametrize("name", ["per_token", "per_segment"])
def test_uses_that_differ_in_positions_are_refused_and_left_out(name: str) -> None:
    params, x = {"w": normal(3, 4), "head": normal(4, 2)}, normal(4, 5, 3)

    def reducer(direction: Params) -> Any:
        ids = torch.zeros(4, 5, dtype=torch.int64)
        dot = fg.dot(direction)
        return fg.per_token(dot) if name == "per_token" else fg.per_segment(dot, ids)

    score = fg.reduce(pooled)
    with pytest.raises(fg.SampleAxisError, match="Leave the parameters that are used there out of params"):
        score(params, x, reducer(like(params)))
    own = {"w": params["w"]}

    def losses(p: Params, x: Tensor) -> Tensor:
        return pooled({**p, "head": params["head"]}, x)

    direction = like(own)
    found = fg.reduce(losses)(own, x, reducer(direction))
    assert_scores(found.sum(1), expected(losses, own, x, direction))


def test_uses_without_positions_are_refused() -> None:
    params, x = {"w": normal(3)}, normal(4, 3)
    with pytest.raises(fg.SampleAxisError, match="first axis after the samples"):
        fg.reduce(lambda p, x: (x @ p["w"]).sin())(params, x, fg.per_token(fg.dot(params)))


def test_what_is_carried_to_a_position_belongs_to_it_and_what_is_not_is_refused() -> None:
    params, x = {"w": normal(3, 4)}, normal(4, 5, 3)
    dot = fg.dot(like(params))

    def mixed(p: Params, x: Tensor) -> Tensor:
        h = x @ p["w"]
        return ((h - h.mean(0)).sin() * h.tanh()).sum((1, 2))

    found, score = fg.reduce(mixed)(params, x, (fg.per_token(dot), dot))
    assert_close(found.sum(1), score, 1e-10)

    def decayed(p: Params, x: Tensor) -> Tensor:
        return torch.tanh(x @ p["w"]).sum((1, 2)) + p["w"].square().sum()

    with pytest.raises(fg.SampleAxisError, match=r"gives \[4\].* out of params"):
        fg.reduce(decayed)(params, x, fg.per_token(dot))


def test_one_sample_takes_the_plan_of_two() -> None:
    params, x = {k: normal(*size) for k, size in PARAMS.items()}, normal(1, 5, 3)
    direction = like(params)

    def losses(p: Params, x: Tensor) -> Tensor:
        return by_token(p, x).sum(1)

    with pytest.raises(fg.SampleAxisError, match=r"fg\.plan\(losses, params, batch\) with two samples"):
        fg.reduce(losses)(params, x, fg.per_token(fg.dot(direction)))
    plan = fg.plan(losses, params, normal(2, 5, 3))
    found = fg.reduce(losses, plan=plan)(params, x, fg.per_token(fg.dot(direction)))
    assert_scores(found.sum(1), expected(losses, params, x, direction))


def test_negative_ids_are_left_out_and_segments_may_be_empty() -> None:
    params, x = {k: normal(*size) for k, size in PARAMS.items()}, normal(2, 3, 3)
    dot = fg.dot(like(params))
    score = fg.reduce(lambda p, x: by_token(p, x).sum(1))
    ids = torch.tensor([[-1, 0, -7], [3, -1, 3]])
    tokens, found, more = score(
        params, x, (fg.per_token(dot), fg.per_segment(dot, ids), fg.per_segment(dot, ids, segments=6))
    )
    assert found.shape == (2, 4)
    wanted = torch.zeros(2, 6, dtype=torch.float64)
    wanted[0, 0], wanted[1, 3] = tokens[0, 1], tokens[1, 0] + tokens[1, 2]
    assert_close(more, wanted, 1e-12)
    assert torch.equal(found, more[:, :4])


@pytest.mark.parametrize(
    ("make", "phrase"),
    [
        (lambda dot: PER_TOKEN(fg.squared_norm()), r"takes fg\.dot"),
        (lambda dot: PER_TOKEN(fg.per_token(dot)), r"takes fg\.dot"),
        (lambda dot: PER_SEGMENT(fg.gram(), torch.zeros(2, 3, dtype=torch.int64)), r"takes fg\.dot"),
        (lambda dot: fg.per_segment(dot, torch.zeros(2, 3)), "int64"),
        (lambda dot: fg.per_segment(dot, torch.zeros(3, dtype=torch.int64)), r"\[b, t\]"),
        (lambda dot: fg.per_segment(dot, torch.zeros(2, 3, dtype=torch.int64, device="meta")), "segments="),
        (lambda dot: fg.per_param(fg.per_param(dot)), "by parameter already"),
        (lambda dot: PER_PARAM(3), "found int"),
    ],
)
def test_wrong_arguments(make: Callable[[Any], Any], phrase: str) -> None:
    with pytest.raises(fg.InputError, match=phrase):
        make(fg.dot({"w": torch.ones(2)}))


def test_ids_of_another_shape_and_kept_pairs_are_refused() -> None:
    params, x = {k: normal(*size) for k, size in PARAMS.items()}, normal(2, 3, 3)
    dot = fg.dot(like(params))

    def losses(p: Params, x: Tensor) -> Tensor:
        return by_token(p, x).sum(1)

    with pytest.raises(fg.InputError, match=r"\[2, 3\] for this batch, found \[3, 2\]"):
        fg.reduce(losses)(params, x, fg.per_segment(dot, torch.zeros(3, 2, dtype=torch.int64)))
    with pytest.raises(fg.InputError, match="segments=2 is too few"):
        fg.reduce(losses)(params, x, fg.per_segment(dot, torch.tensor([[0, 1, 5], [0, 0, 0]]), segments=2))
    with pytest.raises(fg.InputError, match="those of a step"):
        fg.apply(fg.per_token(dot), fg.pairs(losses)(params, x))


def test_an_empty_batch() -> None:
    params, x = {k: normal(*size) for k, size in PARAMS.items()}, normal(0, 3, 3)
    ids = torch.zeros(0, 3, dtype=torch.int64)

    def losses(p: Params, x: Tensor) -> Tensor:
        return by_token(p, x).sum(1)

    tokens, segments = fg.reduce(losses)(
        params, x, (fg.per_token(fg.dot(like(params))), fg.per_segment(fg.dot(like(params)), ids, 2))
    )
    assert len(tokens) == 0
    assert segments.shape == (0, 2)
