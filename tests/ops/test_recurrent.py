"""Recurrent layers and ragged bags: their factors by steps and rows, against a derivative for each sample."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.flop_counter import FlopCounterMode

import funcghost as fg
from funcghost.algebra.factors import Dense, Lookup, Outer, dense
from funcghost.laws.oracle import per_sample_gradients
from funcghost.ops.apart import Passed, Use, by_autograd
from funcghost.ops.call import Call, flatten_call
from funcghost.ops.families.recurrent import KINDS
from funcghost.ops.known import description
from funcghost.ops.layout import Layout, Placed, Rows
from funcghost.ops.recurrence import sequences_of
from funcghost.ops.unrolled import by_steps
from funcghost.ops.uses import find_uses
from tests.depth import fewer, thinned
from tests.naive import assert_close, assert_scores, expected

LAYERS: dict[Any, Any] = {torch.lstm: nn.LSTM, torch.gru: nn.GRU, torch.rnn_tanh: nn.RNN, torch.rnn_relu: nn.RNN}
D, H = 3, 2


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def lengths(draw: st.DrawFn, sequences: int) -> Tensor:
    """How long each sequence is: often as long as another."""
    return torch.tensor(draw(st.lists(st.integers(1, 4), min_size=sequences, max_size=sequences)))


@st.composite
def samples(draw: st.DrawFn, sequences: int) -> tuple[int, Any]:
    """How many samples the sequences are of, and where these are: an axis, or a part of one, or anywhere."""
    batch = draw(st.sampled_from([n for n in range(1, sequences + 1) if sequences % n == 0]))
    owner = torch.tensor(draw(st.lists(st.integers(0, batch - 1), min_size=sequences, max_size=sequences)))
    folds = ["single"] if batch == 1 else ["whole"] if batch == sequences else ["high", "low"]
    return batch, draw(st.sampled_from([*folds, owner]))


@st.composite
def layers(draw: st.DrawFn) -> tuple[Call, list[Tensor | None], list[Any], int]:
    """A call of a recurrent layer, the gradients of its outputs, where the samples are there, and their number."""
    op, packed, sequences = draw(st.sampled_from(sorted(KINDS, key=str))), draw(st.booleans()), draw(st.integers(1, 4))
    both, biases, depth = draw(st.booleans()), draw(st.booleans()), draw(st.integers(1, 2))
    batch, where = draw(samples(sequences))
    layer = LAYERS[op](D, H, depth, bias=biases, bidirectional=both)
    weights = [p.detach() for p in layer.double().parameters()]
    states = 2 if op is torch.lstm else 1
    first = [normal(depth * (1 + both), sequences, H) for _ in range(states)]
    settings = (first if states == 2 else first[0], weights, biases, depth, 0.0, draw(st.booleans()), both)
    if packed:
        long = lengths(draw, sequences).sort(descending=True)[0]
        data, sizes = pack_padded_sequence(normal(4, sequences, D), long)[:2]
        arguments: Any = (data, sizes, *settings)
        of_rows, axis, even = sequences_of(sizes, len(data)), 0, bool((long == long[0]).all())
    else:
        batch_first = draw(st.booleans())
        shape = (sequences, 3) if batch_first else (3, sequences)
        arguments, axis, of_rows, even = (normal(*shape, D), *settings, batch_first), int(not batch_first), None, True
    leaves, spec = flatten_call(arguments, {})
    tracked = tuple(
        slot for slot, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and any(leaf is w for w in weights)
    )
    tracked += tuple(slot for slot, leaf in enumerate(leaves) if any(leaf is state for state in first))
    call = Call(op, tuple(leaves), spec, tuple(sorted(tracked)))
    out = call.evaluate(call.leaves)
    places: list[Any] = []
    for number in range(len(out)):
        own = 1 if number else axis
        if number == 0 and of_rows is not None and where == "whole" and even:
            places.append(Layout(0, "low"))
        elif number == 0 and of_rows is not None:
            owner = (
                where if isinstance(where, Tensor) else Layout(0, where).numbers((sequences,), batch, normal().device)
            )
            places.append(Placed(0, owner.long()[of_rows]))
        else:
            places.append(Placed(own, where) if isinstance(where, Tensor) else Layout(own, where))
    used = draw(st.lists(st.booleans(), min_size=len(out), max_size=len(out)).filter(any))
    return call, [normal(*v.shape) if own else None for v, own in zip(out, used, strict=True)], places, batch


def factors(use: Use, call: Call, gradients: list[Tensor | None], places: list[Any], batch: int) -> dict[int, Any]:
    found = use.factors(Passed([call.leaves[slot].detach() for slot in use.needed], (), gradients, places, batch))
    return dict(zip(use.slots, found, strict=True))


def assert_same(found: dict[int, Any], wanted: dict[int, Any]) -> None:
    assert found.keys() == wanted.keys()
    size = max(float(factor.value.abs().max()) for factor in wanted.values())
    for slot, factor in wanted.items():
        assert dense(found[slot]).shape == factor.value.shape
        assert float((dense(found[slot]) - factor.value).abs().max()) <= 1e-12 * size, slot


@fewer(2)
@given(layers())
def test_the_steps_of_a_layer(drawn: Any) -> None:
    call, gradients, places, batch = drawn
    chosen = tuple(range(len(gradients)))
    use = by_steps(call, [None] * len(chosen), chosen, 0)
    assert use is not None
    found = factors(use, call, gradients, places, batch)
    assert any(isinstance(factor, Outer) for factor in found.values())
    assert_same(found, factors(by_autograd(call, call.tracked, chosen), call, gradients, places, batch))


@pytest.mark.parametrize("packed", [False, True])
def test_a_sequence_of_several_samples_is_left_to_autograd(packed: bool) -> None:
    """Of which each has a step: what it gives goes back to steps before it."""
    layer = nn.GRU(D, H).double()
    weights = [p.detach() for p in layer.parameters()]
    x, sizes = pack_padded_sequence(normal(4, 1, D), torch.tensor([4]))[:2]
    settings = (normal(1, 1, H), weights, True, 1, 0.0, False, False)
    leaves, spec = flatten_call((x, sizes, *settings) if packed else (x.unsqueeze(1), *settings, False), {})
    slots = tuple(slot for slot, leaf in enumerate(leaves) if any(leaf is weight for weight in weights))
    call = Call(torch.gru, tuple(leaves), spec, slots)
    (use,) = find_uses(call, description(call.op), [Layout(0), None], (0, 1), 0)
    gradients, places = [normal(*call.evaluate(leaves)[0].shape), None], [Layout(0), "unused"]
    assert_same(
        factors(use, call, gradients, places, 4),
        factors(by_autograd(call, slots, (0, 1)), call, gradients, places, 4),
    )


@st.composite
def bags(draw: st.DrawFn) -> tuple[Call, list[Tensor | None], list[Any], int]:
    """A sum over ragged bags, some of them empty."""
    count, rows = draw(st.integers(1, 5)), draw(st.integers(0, 9))
    batch, where = draw(samples(count))
    starts = torch.tensor(
        [0, *draw(st.lists(st.integers(0, rows), min_size=count - 1, max_size=count - 1).map(sorted))]
    )
    mode, last = draw(st.sampled_from(["sum", "mean"])), draw(st.booleans())
    kwargs: dict[str, Any] = {
        "mode": mode,
        "include_last_offset": last,
        "padding_idx": draw(st.sampled_from([None, 1, -1])),
    }
    if mode == "sum" and draw(st.booleans()):
        kwargs["per_sample_weights"] = normal(rows)
    if last:
        starts = torch.cat([starts, torch.tensor([draw(st.integers(int(starts[-1]), rows))])])
    weight = normal(4, H)
    leaves, spec = flatten_call((torch.randint(4, (rows,)), weight, starts), kwargs)
    slot = next(slot for slot, leaf in enumerate(leaves) if leaf is weight)
    call = Call(F.embedding_bag, tuple(leaves), spec, (slot,))
    return call, [normal(count, H)], [Placed(0, where) if isinstance(where, Tensor) else Layout(0, where)], batch


def test_bags_that_end_before_the_index_does() -> None:
    """Which rows are in the last one, torch does not say: the rule alone is asked, no bag is made."""
    rows, offsets = torch.arange(5), torch.tensor([0, 2, 4])
    leaves, spec = flatten_call((rows, normal(5, 2).float(), offsets), {"include_last_offset": True})
    call = Call(F.embedding_bag, tuple(leaves), spec, (1,))
    (use,) = find_uses(call, description(F.embedding_bag), [Layout(0)], (0,), 0)
    with pytest.raises(fg.InputError, match="must be the length of the input, 5, found 4"):
        use.factors(Passed([leaves[slot] for slot in use.needed], (), [normal(2, 2).float()], [Layout(0)], 2))


@given(bags(), st.booleans())
def test_the_rows_of_ragged_bags(drawn: Any, traced: bool) -> None:
    call, gradients, places, batch = drawn
    layout = Rows(0, 0) if isinstance(places[0], Placed) else places[0]
    (use,) = find_uses(call, description(call.op), [layout], (0,), 0)
    with unreadable() if traced else nullcontext():
        found = factors(use, call, gradients, places, batch)
    assert isinstance(next(iter(found.values())), Dense if traced else Lookup)
    assert_same(found, factors(by_autograd(call, call.tracked, (0,)), call, gradients, places, batch))


MOVED: dict[str, Callable[[int], tuple[Any, tuple[Any, ...], tuple[int, ...]]]] = {
    "linear": lambda n: (F.linear, (normal(n, D), normal(H, D), normal(H)), (1, 2)),
    "linear, more axes": lambda n: (F.linear, (normal(n, 2, D), normal(H, D), normal(H)), (1, 2)),
    "scale": lambda n: (torch.mul, (normal(n, D), normal(D)), (1,)),
    "convolution": lambda n: (F.conv1d, (normal(n, D, 4), normal(H, D, 2), normal(H)), (1, 2)),
    "groups": lambda n: (F.conv1d, (normal(n, 4, 4), normal(4, 2, 2), normal(4), 1, 1, 1, 2), (1, 2)),
    "embedding": lambda n: (F.embedding, (torch.randint(5, (n, 2)), normal(5, H)), (1,)),
    "bags": lambda n: (F.embedding_bag, (torch.randint(5, (n, 2)), normal(5, H)), (1,)),
}


@pytest.mark.parametrize("name", MOVED)
@fewer(3)
@given(owner=st.lists(st.integers(0, 2), max_size=6), traced=st.booleans())
def test_products_of_rows_that_data_have_moved(name: str, owner: list[int], traced: bool) -> None:
    op, arguments, tracked = MOVED[name](len(owner))
    leaves, spec = flatten_call(arguments, {})
    call = Call(op, tuple(leaves), spec, tracked)
    gradients: list[Tensor | None] = [normal(*call.evaluate(leaves)[0].shape)]
    places = [Placed(0, torch.tensor(owner, dtype=torch.int64))]
    found: dict[int, Any] = {}
    for use in find_uses(call, description(op), [Rows(0, 0)], (0,), 0):
        with unreadable() if traced else nullcontext():
            found |= factors(use, call, gradients, places, 3)
    assert_same(found, factors(by_autograd(call, tracked, (0,)), call, gradients, places, 3))


@contextmanager
def unreadable() -> Iterator[None]:
    """As it is while a graph is traced."""
    with patch.object(torch.compiler, "is_compiling", lambda: True):
        yield


class Packed(nn.Module):
    """Embedded tokens through a recurrent layer, packed, to one number for each."""

    def __init__(self, layer: nn.Module, read: Callable[[Any, Any, Tensor], Tensor], in_order: bool = False) -> None:
        super().__init__()
        self.embedding, self.layer, self.read, self.in_order = nn.Embedding(9, D), layer, read, in_order
        self.first = nn.Parameter(torch.randn(1, 1, H))

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embedding(tokens), lengths, True, enforce_sorted=self.in_order)
        return self.read(self, packed, lengths)


def last_state(model: Any, packed: Any, _: Tensor) -> Tensor:
    state = model.layer(packed)[1]
    out: Tensor = (state[0] if isinstance(state, tuple) else state)[-1].square().sum(1)
    return out


def largest(model: Any, packed: Any, _: Tensor) -> Tensor:
    """Over the steps, of which those behind the end count for nothing."""
    out: Tensor = pad_packed_sequence(model.layer(packed)[0], True, float("-inf"))[0].amax(1).square().sum(1)
    return out


def from_a_state(model: Any, packed: Any, lengths: Tensor) -> Tensor:
    first = model.first.expand(-1, len(lengths), -1) * lengths.to(model.first.dtype).view(1, -1, 1)
    out: Tensor = model.layer(packed, first)[1][-1].square().sum(1)
    return out


def in_pairs(model: Any, packed: Any, _: Tensor) -> Tensor:
    """Two sequences are one sample."""
    out: Tensor = last_state(model, packed, _).view(-1, 2).prod(1)
    return out


MODELS: dict[str, Callable[[], Packed]] = {
    "last state": lambda: Packed(nn.GRU(D, H, batch_first=True), last_state),
    "both ways": lambda: Packed(nn.LSTM(D, H, 2, batch_first=True, bidirectional=True), largest),
    "in order": lambda: Packed(nn.LSTM(D, H, batch_first=True), last_state, in_order=True),
    "a first state": lambda: Packed(nn.RNN(D, H, batch_first=True), from_a_state),
    "in pairs": lambda: Packed(nn.GRU(D, H, batch_first=True), in_pairs),
}


@pytest.mark.parametrize("name", thinned(MODELS, ["both ways", "in order", "a first state"]))
def test_packed_sequences(name: str) -> None:
    """Exact, with nothing carried but the first state; also for other lengths, in the order of other data."""
    torch.manual_seed(0)
    model = MODELS[name]().double()
    losses, params = fg.module_losses(model, lambda out, _: out), dict(model.named_parameters())
    if name != "a first state":
        del params["first"]
    sizes = [[4, 4, 2, 1], [4, 2, 2, 2]] if name == "in order" else [[2, 4, 1, 4], [4, 1, 3, 2]]
    plan = fg.plan(losses, params, (torch.randint(9, (4, 4)), torch.tensor(sizes[0])))
    carried = {name for site in plan.sites if site.action == "carry" for name in site.parameters}
    assert carried <= {"first"}
    assert any(
        site.action == "tap" and site.way == "transpose" for site in plan.sites
    )  # and positions can be told apart
    direction = {key: torch.randn_like(value) for key, value in params.items()}
    step = fg.reduce(losses, plan=plan)
    for long in sizes:
        batch = torch.randint(9, (4, 4)), torch.tensor(long)
        found = step(params, batch, {"norm": fg.squared_norm(), "score": fg.dot(direction)})
        assert_scores(found["score"], expected(losses, params, batch, direction))
        assert_norms(found["norm"], losses, params, batch)


def assert_norms(found: Tensor, losses: Any, params: Any, batch: Any) -> None:
    gradients = per_sample_gradients(losses, params, batch).values()
    assert_close(found, torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0), 1e-10)


def test_ragged_bags() -> None:
    def losses(p: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (F.embedding_bag(batch[0], p["rows"], batch[1]) @ p["w"]).square()

    params = {"rows": normal(6, H), "w": normal(H)}
    batch = torch.tensor([1, 1, 4, 5, 0]), torch.tensor([0, 0, 3, 4])
    assert_norms(fg.reduce(losses)(params, batch, fg.squared_norm()), losses, params, batch)


def test_steps_cost_less_than_a_backward_for_each_sample() -> None:
    """Two forwards in all, and the two backwards of the weights."""
    torch.manual_seed(0)
    model = Packed(nn.LSTM(D, H, batch_first=True), last_state).double()
    losses = fg.module_losses(model, lambda out, _: out)
    params = {key: value for key, value in model.named_parameters() if key != "first"}
    batch = torch.randint(9, (8, 4)), torch.tensor([4, 1, 3, 3, 4, 2, 2, 4])
    plan = fg.plan(losses, params, batch, fg.squared_norm())
    score = fg.reduce(losses, plan=plan, options=fg.Options(verify="never", inner_products="materialise"))
    with FlopCounterMode(display=False) as ours:
        score(params, batch, fg.squared_norm())
    leaves = {key: value.detach().requires_grad_() for key, value in params.items()}
    with FlopCounterMode(display=False) as plain:
        torch.autograd.grad(losses(leaves, batch).sum(), list(leaves.values()))
    assert ours.get_total_flops() <= 2 * plain.get_total_flops()
