"""Every layer of torch.nn that has parameters, in both modes and all layouts, against one gradient per sample."""

import copy
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence

import funcghost as fg
from funcghost.laws.oracle import per_sample_gradients
from tests.depth import thinned
from tests.naive import assert_close, assert_scores, assert_trees_close, dots, expected, gradient

MAKES_PARAMETERS = {"Parameter", "UninitializedParameter", "_get_clones"}
ABSTRACT = {"RNNBase", "RNNCellBase"}
CONTAINERS = {"Container", "ModuleDict", "ModuleList", "ParameterDict", "ParameterList", "Sequential"}
"""No parameters of their own, or none but those given to them: `of_containers` uses them."""


def public_layers() -> dict[str, type[nn.Module]]:
    modules = [
        importlib.import_module(found.name) for found in pkgutil.walk_packages(nn.modules.__path__, "torch.nn.modules.")
    ]
    found = {
        name: value for module in (nn, *modules) for name, value in vars(module).items() if not name.startswith("_")
    }
    return {name: value for name, value in found.items() if inspect.isclass(value) and issubclass(value, nn.Module)}


def names_in_constructors(layer: type[nn.Module]) -> set[str]:
    inits = [vars(base)["__init__"] for base in layer.__mro__ if "__init__" in vars(base)]
    return {name for init in inits if hasattr(init, "__code__") for name in init.__code__.co_names}


def with_parameters() -> set[str]:
    """The layers that make a parameter, or a layer that does."""
    layers, found = public_layers(), set[str]()
    while new := {n for n, c in layers.items() if names_in_constructors(c) & (MAKES_PARAMETERS | found)} - found:
        found |= new
    return found


class Layer(NamedTuple):
    """`inputs(b)` are the arguments for b samples; `axis` is that of the samples in `pick(output)`.

    `training`: the modes to run it in. `sizes`: of the first batch, and of another along the same plan.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Any, ...]]
    pick: Callable[[Any], Tensor] = lambda out: out
    axis: int = 0
    training: tuple[bool, ...] = (True, False)
    sizes: tuple[int, ...] = (4, 3)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def x(*shape: int) -> Callable[[int], tuple[Any, ...]]:
    """One input, with samples on the first axis."""
    return lambda b: (normal(b, *shape),)


def sequence(*shape: int, length: int = 5) -> Callable[[int], tuple[Any, ...]]:
    """One input, with samples on the second axis."""
    return lambda b: (normal(length, b, *shape),)


def tokens(*shape: int) -> Callable[[int], tuple[Any, ...]]:
    return lambda b: (torch.randint(0, 10, (b, *shape)),)


def first(out: Any) -> Tensor:
    return out[0]


def bags(weighted: bool = False) -> Callable[[int], tuple[Any, ...]]:
    """Ten indices in bags of other sizes."""

    def inputs(b: int) -> tuple[Any, ...]:
        index, offsets = torch.randint(0, 10, (10,)), torch.tensor([0, 2, 3, 7, 9])[:b]
        return (index, offsets, normal(10)) if weighted else (index, offsets)

    return inputs


def some_padding(b: int) -> tuple[Any, ...]:
    """Some indices are 1, and all of the first sample's."""
    index = torch.arange(5 * b).view(b, 5).fmod(3)
    index[0] = 1
    return (index,)


def packed(b: int) -> tuple[Any, ...]:
    return (pack_padded_sequence(normal(b, 5, 6), torch.tensor([5, 2, 4, 2])[:b], True, enforce_sorted=False),)


def unpacked(out: Any) -> Tensor:
    return nn.utils.rnn.pad_packed_sequence(out[0], batch_first=True)[0]


class Called(nn.Module):
    """Calls a layer in a given way."""

    def __init__(self, layer: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, *args: Any) -> Any:
        return self.call(self.layer, *args)


def called(make: Callable[[], nn.Module], call: Callable[..., Any]) -> Callable[[], nn.Module]:
    return lambda: Called(make(), call)


def attention(**given: Any) -> Callable[[], nn.Module]:
    return called(lambda: nn.MultiheadAttention(6, 2, **given), lambda layer, y: layer(y, y, y))


def between(**given: Any) -> Callable[[], nn.Module]:
    """Attention from one to another, with all that it can be given."""

    def call(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Any:
        mask = torch.ones(q.shape[1], k.shape[1]).triu(2) > 0
        return layer(q, k, v, key_padding_mask=hidden, attn_mask=mask, average_attn_weights=False)

    return called(lambda: nn.MultiheadAttention(6, 2, kdim=4, vdim=3, batch_first=True, **given), call)


def three(b: int) -> tuple[Any, ...]:
    return normal(b, 3, 6), normal(b, 5, 4), normal(b, 5, 3), torch.arange(5).expand(b, 5) > 3


def with_weights(out: Any) -> Tensor:
    return torch.cat([out[0].flatten(1), out[1].flatten(1)], 1)


def encoder(layers: int = 2, norm: bool = False, **given: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(6, 2, 12, **given)
    final = nn.LayerNorm(6) if norm else None
    return nn.TransformerEncoder(layer, layers, final, enable_nested_tensor=False)


def decoded(layer: nn.Module, y: Tensor) -> Any:
    return (
        layer(y, y.flip(-1)) if isinstance(layer, nn.TransformerDecoder | nn.TransformerDecoderLayer) else layer(y, y)
    )


def masked(layer: nn.Module, y: Tensor) -> Any:
    mask = nn.Transformer.generate_square_subsequent_mask(y.shape[1], dtype=y.dtype)
    return layer(y, mask=mask, src_key_padding_mask=torch.zeros(y.shape[:2], dtype=y.dtype), is_causal=True)


def adaptive(b: int) -> tuple[Any, ...]:
    return normal(b, 6), torch.tensor([0, 11, 4, 7])[:b]


EMBEDDING: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"padding_idx": 1},
    "by frequency": {"scale_grad_by_freq": True, "padding_idx": -2},
    "sparse": {"sparse": True},
}
RECURRENT: dict[str, dict[str, Any]] = {
    "two layers, dropout": {"num_layers": 2, "dropout": 0.5},
    "both ways": {"bidirectional": True, "num_layers": 2},
    "without bias": {"bias": False},
}


def recurrent(layer: Callable[..., nn.Module], state: Callable[[Any], Tensor]) -> dict[str, Layer]:
    found = {
        "batch first": Layer(lambda: layer(6, 4, batch_first=True), x(5, 6), first),
        "sequence first": Layer(lambda: layer(6, 4), sequence(6), first, axis=1),
        "last state": Layer(lambda: layer(6, 4, batch_first=True), x(5, 6), state),
        "packed": Layer(lambda: layer(6, 4), packed, unpacked),
        "one step": Layer(lambda: layer(6, 4), sequence(6, length=1), first, axis=1),
    }
    return found | {
        name: Layer(lambda given=given: layer(6, 4, **given), sequence(6), first, axis=1)  # type: ignore[misc]
        for name, given in RECURRENT.items()
    }


def convolutions(dims: int, lazy: bool, transposed: bool) -> dict[str, Layer]:
    name = f"{'Lazy' if lazy else ''}Conv{'Transpose' if transposed else ''}{dims}d"
    layer: Callable[..., nn.Module] = getattr(nn, name)
    channels = () if lazy else (4,)
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "all options": {"stride": 2, "padding": 1, "groups": 2, "bias": False},
    }
    variants["all options"] |= {"output_padding": 1} if transposed else {"dilation": 2}
    if not transposed:
        variants["circular"] = {"padding": 1, "padding_mode": "circular"}
    return {
        variant: Layer(lambda given=given: layer(*channels, 2, 3, **given), x(4, *[5] * dims))  # type: ignore[misc]
        for variant, given in variants.items()
    }


def norms(name: str, dims: int, channels: int = 3) -> dict[str, Layer]:
    layer: Callable[..., nn.Module] = getattr(nn, name)
    own = () if name.startswith("Lazy") else (channels,)
    shape = (channels, *[4] * dims)
    found = {
        "plain": Layer(lambda: layer(*own, affine=True, eps=0.1), x(*shape)),
        "running": Layer(lambda: layer(*own, affine=True, momentum=None, track_running_stats=True), x(*shape)),
        "by batch": Layer(lambda: layer(*own, affine=True, track_running_stats=False), x(*shape)),
    }
    return {"rows": found["plain"]._replace(inputs=x(channels))} | found if name.endswith("BatchNorm1d") else found


LAYERS: dict[str, dict[str, Layer]] = {
    "Linear": {
        "rows": Layer(lambda: nn.Linear(6, 3), x(6)),
        "sequence first": Layer(lambda: nn.Linear(6, 3, bias=False), sequence(6), axis=1),
        "images": Layer(lambda: nn.Linear(6, 3), x(2, 3, 6)),
    },
    "NonDynamicallyQuantizableLinear": {
        "plain": Layer(lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(6, 3), x(5, 6))
    },
    "LazyLinear": {"plain": Layer(lambda: nn.LazyLinear(3), x(5, 6))},
    "Bilinear": {
        "plain": Layer(lambda: nn.Bilinear(6, 4, 3), lambda b: (normal(b, 5, 6), normal(b, 5, 4))),
        "without bias": Layer(lambda: nn.Bilinear(6, 4, 3, bias=False), lambda b: (normal(b, 6), normal(b, 4))),
    },
    **{
        f"{lazy}Conv{transposed}{dims}d": convolutions(dims, bool(lazy), bool(transposed))
        for lazy in ("", "Lazy")
        for transposed in ("", "Transpose")
        for dims in (1, 2, 3)
    },
    **{
        f"{lazy}BatchNorm{dims}d": norms(f"{lazy}BatchNorm{dims}d", dims) for lazy in ("", "Lazy") for dims in (1, 2, 3)
    },
    **{
        f"{lazy}InstanceNorm{dims}d": norms(f"{lazy}InstanceNorm{dims}d", dims)
        for lazy in ("", "Lazy")
        for dims in (1, 2, 3)
    },
    "SyncBatchNorm": {"eval": Layer(lambda: nn.SyncBatchNorm(3), x(3, 4), training=(False,))},  # trains on devices only
    "GroupNorm": {
        "plain": Layer(lambda: nn.GroupNorm(2, 4), x(4, 5)),
        "each": Layer(lambda: nn.GroupNorm(4, 4), x(4, 3, 3)),
    },
    "LayerNorm": {
        "plain": Layer(lambda: nn.LayerNorm(6), x(5, 6)),
        "without bias": Layer(lambda: nn.LayerNorm(6, bias=False), sequence(6), axis=1),
        "two axes": Layer(lambda: nn.LayerNorm((5, 6)), x(5, 6)),
    },
    "RMSNorm": {
        "plain": Layer(lambda: nn.RMSNorm(6), x(5, 6)),
        "two axes": Layer(lambda: nn.RMSNorm((5, 6), eps=0.1), lambda b: (normal(2, b, 5, 6),), axis=1),
    },
    "PReLU": {
        "one": Layer(lambda: nn.PReLU(), x(5, 6)),
        "channels": Layer(lambda: nn.PReLU(5), x(5, 6)),
        "rows": Layer(lambda: nn.PReLU(6), x(6)),
    },
    "Embedding": {
        name: Layer(lambda given=given: nn.Embedding(10, 3, **given), tokens(5))  # type: ignore[misc]
        for name, given in EMBEDDING.items()
    }
    | {"sequence first": Layer(lambda: nn.Embedding(10, 3), lambda b: (torch.randint(0, 10, (5, b)),), axis=1)},
    "EmbeddingBag": {
        "mean": Layer(lambda: nn.EmbeddingBag(10, 3), tokens(5)),
        "mean but for padding": Layer(lambda: nn.EmbeddingBag(3, 3, padding_idx=1), some_padding),
        "weighted rows": Layer(
            called(
                lambda: nn.EmbeddingBag(10, 3, mode="sum", padding_idx=-2),
                lambda m, i, w: m(i, per_sample_weights=w),
            ),
            lambda b: (torch.randint(0, 10, (b, 5)), normal(b, 5)),
        ),
        "two rows a sample": Layer(
            called(lambda: nn.EmbeddingBag(10, 3), lambda m, i: m(i.flatten(0, 1))),
            lambda b: (torch.randint(0, 10, (b, 2, 4)),),
            lambda out: out.unflatten(0, (-1, 2)),
        ),
        "sum of bags": Layer(lambda: nn.EmbeddingBag(10, 3, mode="sum", padding_idx=2), bags()),
        "mean of bags": Layer(lambda: nn.EmbeddingBag(10, 3, mode="mean", sparse=True), bags()),
        "weighted": Layer(
            called(lambda: nn.EmbeddingBag(10, 3, mode="sum"), lambda m, i, o, w: m(i, o, per_sample_weights=w)),
            bags(True),
        ),
        "last offset": Layer(
            called(
                lambda: nn.EmbeddingBag(10, 3, include_last_offset=True),
                lambda m, i, o: m(i, torch.cat([o, o[-1:] + 1])),
            ),
            bags(),
        ),
    },
    "RNN": recurrent(nn.RNN, lambda out: out[1][0])
    | {"relu": Layer(lambda: nn.RNN(6, 4, nonlinearity="relu"), sequence(6), first, axis=1)},
    "GRU": recurrent(nn.GRU, lambda out: out[1][0]),
    "LSTM": recurrent(nn.LSTM, lambda out: torch.cat([out[1][0][0], out[1][1][0]], 1))
    | {
        "projected": Layer(lambda: nn.LSTM(6, 4, proj_size=3, num_layers=2, batch_first=True), x(5, 6), first),
        "given a state": Layer(
            called(lambda: nn.LSTM(6, 4), lambda m, y, h, c: m(y, (h, c))),
            lambda b: (normal(5, b, 6), normal(1, b, 4), normal(1, b, 4)),
            first,
            axis=1,
        ),
    },
    "RNNCell": {
        "plain": Layer(lambda: nn.RNNCell(6, 4), x(6)),
        "relu": Layer(lambda: nn.RNNCell(6, 4, nonlinearity="relu"), x(6)),
    },
    "GRUCell": {
        "plain": Layer(lambda: nn.GRUCell(6, 4), x(6)),
        "without bias": Layer(lambda: nn.GRUCell(6, 4, bias=False), x(6)),
    },
    "LSTMCell": {"plain": Layer(lambda: nn.LSTMCell(6, 4), x(6), lambda out: torch.cat(out, 1))},
    "MultiheadAttention": {
        "batch first": Layer(attention(batch_first=True), x(5, 6), first),
        "sequence first": Layer(attention(), sequence(6), first, axis=1),
        "dropout": Layer(attention(batch_first=True, dropout=0.5), x(5, 6), first),
        "own bias and a zero": Layer(attention(batch_first=True, add_bias_kv=True, add_zero_attn=True), x(5, 6), first),
        "other widths, masks": Layer(between(), three, with_weights),
        "without bias": Layer(between(bias=False), three, first),
    },
    "TransformerEncoderLayer": {
        "batch first": Layer(lambda: nn.TransformerEncoderLayer(6, 2, 12, batch_first=True), x(5, 6)),
        "norm first": Layer(
            lambda: nn.TransformerEncoderLayer(6, 2, 12, 0.3, norm_first=True, bias=False), sequence(6), axis=1
        ),
    },
    "TransformerEncoder": {
        "batch first": Layer(lambda: encoder(batch_first=True, activation="gelu"), x(5, 6)),
        "sequence first": Layer(lambda: encoder(norm=True), sequence(6), axis=1),
        "causal": Layer(called(lambda: encoder(batch_first=True, dropout=0.0), masked), x(5, 6)),
    },
    "TransformerDecoderLayer": {
        "batch first": Layer(called(lambda: nn.TransformerDecoderLayer(6, 2, 12, batch_first=True), decoded), x(5, 6)),
        "sequence first": Layer(
            called(lambda: nn.TransformerDecoderLayer(6, 2, 12, norm_first=True), decoded), sequence(6), axis=1
        ),
    },
    "TransformerDecoder": {
        "batch first": Layer(
            called(lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(6, 2, 12, batch_first=True), 2), decoded),
            x(5, 6),
        )
    },
    "Transformer": {
        "batch first": Layer(called(lambda: nn.Transformer(6, 2, 1, 1, 12, batch_first=True), decoded), x(5, 6)),
        "sequence first": Layer(called(lambda: nn.Transformer(6, 2, 1, 1, 12), decoded), sequence(6), axis=1),
    },
    "AdaptiveLogSoftmaxWithLoss": {
        "plain": Layer(
            lambda: nn.AdaptiveLogSoftmaxWithLoss(6, 12, [4, 8], div_value=1.5, head_bias=True), adaptive, first
        ),
        "all classes": Layer(
            called(lambda: nn.AdaptiveLogSoftmaxWithLoss(6, 12, [4, 8], div_value=1.5), lambda m, y, _: m.log_prob(y)),
            adaptive,
        ),
    },
    "LinearCrossEntropyLoss": {
        "plain": Layer(
            lambda: nn.LinearCrossEntropyLoss(6, 5, reduction="none"),
            lambda b: (normal(b, 6), torch.randint(0, 5, (b,))),
        ),
        "smoothed": Layer(
            lambda: nn.LinearCrossEntropyLoss(6, 5, bias=False, reduction="none", label_smoothing=0.1),
            lambda b: (normal(b, 6), torch.randint(0, 5, (b,))),
        ),
    },
}
LAYERS = {name: variants for name, variants in LAYERS.items() if name in public_layers()}  # one is new in 2.13


def by_a_map(layer: nn.Module) -> nn.Module:
    parametrizations.orthogonal(layer, orthogonal_map="cayley")
    return layer


REPARAMETRISED: dict[str, Layer] = {
    "weight norm": Layer(lambda: parametrizations.weight_norm(nn.Linear(6, 3)), x(5, 6)),
    "weight norm of a convolution": Layer(lambda: parametrizations.weight_norm(nn.Conv1d(6, 3, 3), dim=1), x(6, 5)),
    "spectral norm": Layer(lambda: parametrizations.spectral_norm(nn.Linear(6, 3)), x(5, 6)),
    "orthogonal": Layer(lambda: parametrizations.orthogonal(nn.Linear(6, 6)), x(5, 6)),
    "orthogonal by a map": Layer(lambda: by_a_map(nn.Linear(6, 3)), x(5, 6)),
    "of a recurrent layer": Layer(
        lambda: parametrizations.weight_norm(nn.GRU(6, 4, batch_first=True), "weight_hh_l0"), x(5, 6), first
    ),
}


def of_containers() -> nn.Module:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2)])
            self.named = nn.ModuleDict({"head": nn.Linear(6, 3)})
            self.scales = nn.ParameterList([torch.randn(6), torch.randn(6)])
            self.shifts = nn.ParameterDict({"head": torch.randn(3)})

        def forward(self, y: Tensor) -> Tensor:
            for layer, scale in zip(self.layers, self.scales, strict=True):
                y = layer(y) * scale
            return self.named["head"](y) + self.shifts["head"]

    return Nested()


@contextmanager
def buffers_as_they_were(module: nn.Module) -> Iterator[None]:
    before = copy.deepcopy(dict(module.named_buffers()))
    yield
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            buffer.copy_(before[name])


def prepared(layer: Layer, training: bool) -> nn.Module:
    """With shapes known, statistics that have been running, and parameters of no special values."""
    module = layer.make().double().train(training)
    with torch.no_grad():
        module(*layer.inputs(layer.sizes[0]))
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for name, buffer in module.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return module


def check(layer: Layer, training: bool) -> None:
    module = prepared(layer, training)

    def losses(params: dict[str, Tensor], batch: tuple[Any, ...]) -> Tensor:
        out = layer.pick(functional_call(module, params, batch)).movedim(layer.axis, 0)
        return out.square().flatten(1).sum(1) if out.dim() > 1 else out.square()

    params = dict(module.named_parameters())
    assert params
    direction = {name: torch.randn_like(value) for name, value in params.items()}
    step = fg.grad_and_reduce(losses)
    for size in (layer.sizes[0], *layer.sizes):  # the planning call, the planned one, another batch size
        batch, state = layer.inputs(size), torch.get_rng_state()
        with buffers_as_they_were(module):
            rows = per_sample_gradients(losses, params, batch)
        matrix = torch.cat([value.to_dense().flatten(1) for value in rows.values()], 1)
        sizes = dots({k: v.abs() for k, v in rows.items()}, {k: v.abs() for k, v in direction.items()})
        with buffers_as_they_were(module):
            grads, values = gradient(losses, params, batch)
        torch.set_rng_state(state)
        with buffers_as_they_were(module):
            out = step(params, batch, (fg.dot(direction), fg.gram()))
        assert_scores(out.reduced[0], (dots(rows, direction), sizes))
        assert_close(out.reduced[1], matrix @ matrix.T, 1e-10)
        assert torch.equal(out.losses, values)
        assert_trees_close({k: g.to_dense() for k, g in out.grads.items()}, {k: g.to_dense() for k, g in grads.items()})


def test_bags_of_one_length_are_looked_up() -> None:
    layer = nn.EmbeddingBag(10, 3)
    pairs = fg.pairs(fg.module_losses(layer, lambda out, _: out.square().sum(1)))(
        dict(layer.named_parameters()), (torch.randint(0, 10, (4, 5)), None)
    )
    assert "lookup, 5 positions" in repr(pairs)


def test_no_layer_is_left_out() -> None:
    found = with_parameters()
    assert found - ABSTRACT - CONTAINERS == set(LAYERS)
    assert not found & CONTAINERS


EVERY = [
    (name, variant, mode)
    for name, known in LAYERS.items()
    for variant, layer in known.items()
    for mode in layer.training
]


def of_its_own(name: str, variant: str, training: bool) -> bool:
    """Not a lazy layer, which is another when it has met its input; nor eval mode where it computes the same."""
    kinds = ("BatchNorm", "InstanceNorm", "MultiheadAttention", "Transformer")
    other_in_eval = "dropout" in variant or any(kind in name for kind in kinds)
    return (training or other_in_eval) and (name == "LazyLinear" or not name.startswith("Lazy"))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.parametrize(
    ("name", "variant", "training"),
    thinned(EVERY, [case for case in EVERY if of_its_own(*case)]),
)
def test_layer(name: str, variant: str, training: bool) -> None:
    check(LAYERS[name][variant], training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", REPARAMETRISED)
def test_reparametrised_layer(name: str, training: bool) -> None:
    check(REPARAMETRISED[name], training)


@pytest.mark.filterwarnings("ignore:.*is deprecated in favor of:FutureWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("hook", ["weight_norm", "spectral_norm"])
def test_layer_reparametrised_by_hooks(hook: str, training: bool) -> None:
    make: Callable[..., nn.Module] = getattr(nn.utils, hook)
    check(Layer(lambda: make(nn.Linear(6, 3)), x(5, 6)), training)


@pytest.mark.parametrize("training", [True, False])
def test_containers(training: bool) -> None:
    check(Layer(of_containers, x(5, 6)), training)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "Embedding": (lambda: nn.Embedding(10, 3, max_norm=1.0), "written to"),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(10, 3, max_norm=1.0, mode="sum"), "written to"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    make, phrase = REFUSED[name]
    module, (batch,) = make().double(), tokens(5)(4)
    losses, params = (
        fg.module_losses(module, lambda out, _: out.square().flatten(1).sum(1)),
        dict(module.named_parameters()),
    )
    before = copy.deepcopy(params)
    with pytest.raises(fg.UnsupportedOpError, match=phrase):
        fg.grad_and_reduce(losses)(params, batch, fg.dot(before))
    assert all(torch.equal(params[name], before[name]) for name in params)


def test_remedies_of_what_is_refused() -> None:
    # Renormalised before the step, as the message says; and the largest of looked-up rows.
    table = nn.Embedding(10, 3, max_norm=1.0).double()
    largest = nn.EmbeddingBag(10, 3, mode="max").double()
    (batch,) = tokens(5)(4)
    wanted = table(batch)
    params = {"table": table.weight.detach(), "bag": largest.weight.detach()}

    def losses(p: dict[str, Tensor], i: Tensor) -> Tensor:
        return nn.functional.embedding(i, p["table"]).square().sum((1, 2)) + nn.functional.embedding(i, p["bag"]).amax(
            1
        ).sum(1)

    assert torch.equal(losses(params, batch), wanted.square().sum((1, 2)) + largest(batch).sum(1))
    direction = {name: torch.randn_like(value) for name, value in params.items()}
    found = fg.reduce(losses)(params, batch, fg.dot(direction))
    assert_scores(found, expected(losses, params, batch, direction))


def test_frozen_encoder_takes_the_fast_path_or_not_with_the_same_scores() -> None:
    frozen, head = encoder(batch_first=True).double().eval().requires_grad_(False), nn.Linear(6, 3).double()
    params = {name: value.detach() for name, value in head.named_parameters()}

    def losses(p: dict[str, Tensor], y: Tensor) -> Tensor:
        return functional_call(head, p, (frozen(y),)).square().sum((1, 2))

    batch, direction = normal(4, 5, 6), {name: torch.randn_like(value) for name, value in params.items()}
    score = fg.reduce(losses)
    for _ in range(2):
        assert_scores(score(params, batch, fg.dot(direction)), expected(losses, params, batch, direction))
