"""Ops that are no products: their gradients of one sample, from that sample alone where the op treats samples apart."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.flop_counter import FlopCounterMode

import funcghost as fg
from funcghost import versions
from funcghost.ops.call import Call, flatten_call
from funcghost.ops.known import _KNOWN, slices_of
from funcghost.testing import assert_matches_naive
from tests.naive import assert_close

B = 4


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def call(op: Any, *args: Any, **kwargs: Any) -> Call:
    leaves, spec = flatten_call(args, kwargs)
    return Call(op, tuple(leaves), spec, ())


def recurrent(op: Any, states: int = 1, batch_first: bool = True, dropout: float = 0.0) -> Call:
    x, layers = normal(B, 5, 3) if batch_first else normal(5, B, 3), 2
    layer = {torch.lstm: nn.LSTM, torch.gru: nn.GRU, torch.rnn_tanh: nn.RNN, torch.rnn_relu: nn.RNN}[op]
    weights = [p.detach() for p in layer(3, B, layers).double().parameters()]  # states are as wide as the batch is long
    state: Any = normal(layers, B, B) if states == 1 else [normal(layers, B, B) for _ in range(states)]
    return call(op, x, state, weights, True, layers, dropout, dropout > 0, False, batch_first)


CALLS: dict[str, Callable[[], Call]] = {
    "prelu": lambda: call(F.prelu, normal(B, 3), normal(3)),
    "bilinear": lambda: call(F.bilinear, normal(B, 3), normal(B, 2), normal(5, 3, 2), normal(5)),
    "conv_transpose1d": lambda: call(F.conv_transpose1d, normal(B, B, 5), normal(B, 2, 2)),
    "conv_transpose2d": lambda: call(F.conv_transpose2d, normal(B, 3, 4, 5), normal(3, 2, 2, 1), stride=2),
    "conv_transpose3d": lambda: call(F.conv_transpose3d, normal(B, 3, 2, 2, 3), normal(3, 2, 2, 1, 1)),
    **(
        {"head": lambda: call(F.linear_cross_entropy, normal(B, 3), normal(7, 3), torch.arange(B), reduction="none")}
        if versions.LINEAR_CROSS_ENTROPY is not None
        else {}
    ),
    "instance_norm": lambda: call(F.instance_norm, normal(B, 3, 5), weight=normal(3), bias=normal(3)),
    "lstm": lambda: recurrent(torch.lstm, 2),
    "lstm, sequence first": lambda: recurrent(torch.lstm, 2, batch_first=False),
    "gru": lambda: recurrent(torch.gru),
    "rnn_tanh": lambda: recurrent(torch.rnn_tanh, batch_first=False),
    "rnn_relu": lambda: recurrent(torch.rnn_relu),
    "lstm_cell": lambda: call(torch.lstm_cell, normal(B, 3), [normal(B, 2), normal(B, 2)], normal(8, 3), normal(8, 2)),
    "gru_cell": lambda: call(torch.gru_cell, normal(B, 3), normal(B, 2), normal(6, 3), normal(6, 2)),
    "rnn_tanh_cell": lambda: call(torch.rnn_tanh_cell, normal(B, 3), normal(B, 2), normal(2, 3), normal(2, 2)),
    "rnn_relu_cell": lambda: call(torch.rnn_relu_cell, normal(B, 3), normal(B, 2), normal(2, 3), normal(2, 2)),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_op_on_one_sample_gives_its_outputs(name: str) -> None:
    made = CALLS[name]()
    slices = slices_of(made)
    assert slices is not None
    whole = made.evaluate(made.leaves)
    for sample in range(B):
        for own, value, axis in zip(
            made.evaluate(slices.of(made.leaves, sample, B)), whole, slices.outputs, strict=False
        ):
            assert_close(own, value.narrow(axis, sample, 1), 1e-12)


def test_every_op_is_tried() -> None:
    assert {make().op for make in CALLS.values()} == {op for op, known in _KNOWN.items() if known.samples}


def test_none_of_calls_of_another_form() -> None:
    x, state = pack_padded_sequence(normal(B, 5, 3), torch.full((B,), 5), True), normal(1, B, 2)
    weights = [p.detach() for p in nn.GRU(3, 2).double().parameters()]
    assert slices_of(call(torch.gru, x.data, x.batch_sizes, state, weights, True, 1, 0.0, False, False)) is None
    assert slices_of(call(torch.gru, normal(5, 3), normal(1, 2), weights, True, 1, 0.0, False, False, True)) is None
    assert slices_of(recurrent(torch.gru, dropout=0.5)) is None
    assert slices_of(call(F.conv_transpose1d, normal(B, 5), normal(B, 2, 2))) is None
    assert slices_of(call(torch.gru_cell, normal(3), normal(2), normal(6, 3), normal(6, 2))) is None
    assert slices_of(call(F.linear, normal(B, 3), normal(2, 3))) is None


class Wrapped(nn.Module):
    def __init__(self, layer: nn.Module, way: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.way = layer, way

    def forward(self, x: Tensor) -> Any:
        return self.way(self.layer, x)


def time_first(layer: Any, x: Tensor) -> Any:
    return layer(x.transpose(0, 1))[0].transpose(0, 1)


def through_packed(layer: Any, x: Tensor) -> Tensor:
    packed = pack_padded_sequence(x, torch.tensor([6, 6, 3, 2])[: len(x)], True)
    return pad_packed_sequence(layer(packed)[0], True)[0]


LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "transposed convolution": lambda: (nn.ConvTranspose2d(3, 2, 2, stride=2), normal(B, 3, 4, 4)),
    "bilinear": lambda: (Wrapped(nn.Bilinear(4, 4, 3), lambda layer, x: layer(x, x.flip(1))), normal(B, 4)),
    "lstm, sequence first": lambda: (Wrapped(nn.LSTM(3, B, 2, bidirectional=True), time_first), normal(B, 6, 3)),
    "last state": lambda: (Wrapped(nn.GRU(3, 5, batch_first=True), lambda layer, x: layer(x)[1][0]), normal(B, 6, 3)),
    "packed": lambda: (Wrapped(nn.LSTM(3, 2, batch_first=True), through_packed), normal(B, 6, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_norms_of_layers(name: str) -> None:
    model, x = LAYERS[name]()
    losses = fg.module_losses(model.double(), lambda out, _: out.sin().flatten(1).sum(1))
    assert_matches_naive(losses, dict(model.named_parameters()), x)


@pytest.mark.parametrize("name", ["transposed convolution", "bilinear", "last state"])
def test_norms_cost_one_derivative_of_the_op_in_all(name: str) -> None:
    """Not one for each sample; with the forward that is run again."""
    model, x = LAYERS[name]()
    params = dict(model.double().named_parameters())
    losses = fg.module_losses(model, lambda out, _: out.sin().flatten(1).sum(1))
    plan = fg.plan(losses, params, x, fg.squared_norm())
    score = fg.reduce(losses, plan=plan, options=fg.Options(verify="never"))
    with FlopCounterMode(display=False) as ours:
        whole = score(params, x, fg.squared_norm())
    leaves = {key: value.detach().requires_grad_() for key, value in params.items()}
    with FlopCounterMode(display=False) as plain:
        torch.autograd.grad(losses(leaves, x).sum(), list(leaves.values()))
    assert ours.get_total_flops() <= 2 * plain.get_total_flops()
    assert_close(score(params, x[:2], fg.squared_norm()), whole[:2], 1e-12)
