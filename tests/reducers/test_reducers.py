"""Reducers of inner products and by position, on every kind of model and in every way to run a step."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import funcghost as fg
from funcghost.algebra.factors import Dense, Outer
from funcghost.laws.oracle import per_sample_gradients
from funcghost.ops.known import _KNOWN
from funcghost.testing import assert_matches_naive
from tests.depth import thinned
from tests.engine.test_nn_layers import LAYERS, REPARAMETRISED, Layer, prepared
from tests.models.architectures import (
    ARCHITECTURES,
)
from tests.models.awkward import CASES, SLICE
from tests.models.huggingface import covering, parameters
from tests.models.small import like, rows, small_gpt
from tests.versions import compiles

Params = dict[str, Tensor]
FAMILIES = (*("gpt2", "llama", "bert", "t5", "vit", "convnext", "mamba", "mixtral", "albert", "bloom", "gpt_neo"),)
MORE_OF_THE_SAME = ("bert", "t5", "gpt_neo")
HUGGING_FACE = covering({name: ARCHITECTURES[name] for name in FAMILIES})


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def squares(values: Tensor) -> Tensor:
    return values.square().flatten(1).sum(1)


# -- models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", thinned(HUGGING_FACE, [case for case in HUGGING_FACE if not case.startswith(MORE_OF_THE_SAME)])
)
def test_hugging_face(name: str) -> None:
    case = HUGGING_FACE[name]
    model = case.model()
    assert_matches_naive(case.losses(model), parameters(model), case.batch(), tolerance=case.tolerance)


VARIANTS = [(name, variant) for name, known in LAYERS.items() for variant in known]
ONE_OF_EACH = [
    (name, variant)
    for name, variant in VARIANTS
    if not name.startswith("Lazy")  # which is another when it has met its input
    and (variant == next(iter(LAYERS[name])) or name.startswith(("Embedding", "Conv", "LSTM", "GRU")))
]


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.parametrize(("name", "variant"), thinned(VARIANTS, ONE_OF_EACH))
def test_layer(name: str, variant: str) -> None:
    check_layer(LAYERS[name][variant])


@pytest.mark.parametrize("name", REPARAMETRISED)
def test_reparametrised_layer(name: str) -> None:
    check_layer(REPARAMETRISED[name])


def check_layer(layer: Layer) -> None:
    """In training mode, where there is one: samples mix there, and numbers are drawn."""
    module = prepared(layer, layer.training[0])

    def losses(params: Params, batch: tuple[Any, ...]) -> Tensor:
        out = layer.pick(functional_call(module, params, batch)).movedim(layer.axis, 0)
        return squares(out) if out.dim() > 1 else out.square()

    assert_matches_naive(losses, dict(module.named_parameters()), layer.inputs(layer.sizes[0]))


@pytest.mark.parametrize("name", thinned([name for name, make in CASES.items() if make().outcome is None], SLICE))
def test_awkward_model(name: str) -> None:
    made = CASES[name]()
    np.random.seed(0)
    assert_matches_naive(made.losses, made.params, made.batch, tolerance=made.tolerance)


Losses = Callable[[Params, Any], Tensor]
CONVOLUTIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "1d, same": (1, {"padding": "same", "dilation": 2}),
    "1d, same with an even kernel": (1, {"padding": "same", "kernel_size": 2}),
    "1d, valid": (1, {"padding": "valid", "stride": 2}),
    "2d, all": (2, {"padding": (2, 1), "stride": (2, 1), "dilation": (1, 2), "groups": 2}),
    "2d, each channel": (2, {"padding": "same", "groups": 4}),
    "2d, reflected": (2, {"padding": 1, "padding_mode": "reflect"}),
    "2d, circular": (2, {"padding": 1, "padding_mode": "circular", "stride": 2}),
    "2d, replicated": (2, {"padding": "same", "padding_mode": "replicate", "groups": 2}),
    "3d, all": (3, {"padding": 1, "stride": 2, "groups": 2}),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("route", ["ghost", "materialise"])
@pytest.mark.parametrize("channels", [4, 40])
def test_convolution(name: str, channels: int, route: Any) -> None:
    dims, given = CONVOLUTIONS[name]
    layer: Callable[..., nn.Module] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    module = layer(channels, channels, **{"kernel_size": 3, **given}).double()
    losses, x = fg.module_losses(module, lambda out, _: squares(out.sin())), normal(3, channels, *[5, 6, 4][:dims])
    params = dict(module.named_parameters())
    assert_matches_naive(losses, params, x, fg.project(4), options=fg.Options(inner_products=route))
    # Patches and output gradients are kept where they are smaller than the gradient.
    (use,) = fg.pairs(losses)(params, x).uses["weight"]
    smaller = name == "1d, valid" or (channels == 40 and name not in ("2d, each channel", "2d, replicated"))
    assert isinstance(use, Outer if smaller else Dense)


EQUATIONS = {
    "...d,dp->...p": ((3, 5, 2), (2, 4)),
    "btd,pd->btp": ((3, 5, 2), (4, 2)),
    "btd, dp": ((3, 5, 2), (2, 4)),
    "bthd,hdp->bthp": ((3, 5, 2, 3), (2, 3, 4)),
    "bthd,hdp->btp": ((3, 5, 2, 3), (2, 3, 4)),
    "tbd,hdp->bhtp": ((5, 3, 2), (4, 2, 3)),
    "btd,d->bt": ((3, 5, 2), (2,)),
    "btd,td->bd": ((3, 5, 2), (5, 2)),
    "btd,td->btd": ((3, 5, 2), (5, 2)),
    "btd,tp->bdp": ((3, 5, 2), (5, 4)),
    "btd,pq->btdpq": ((3, 5, 2), (2, 4)),
    "btd,dp->bp": ((3, 5, 2), (2, 4)),
    "bd,bd->b": ((3, 2), (3, 2)),
    "b...d,...dp->b...p": ((3, 5, 2), (1, 2, 4)),
}


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("swapped", [False, True])
def test_einsum(equation: str, swapped: bool) -> None:
    first, second = EQUATIONS[equation]
    if swapped:
        left, arrow, right = equation.replace(" ", "").partition("->")
        equation = ",".join(reversed(left.split(","))) + arrow + right
    samples_first = "tbd" not in equation

    def losses(p: Params, x: Tensor) -> Tensor:
        x = x if samples_first else x.transpose(0, 1)
        out = torch.einsum(equation, *((p["w"], x) if swapped else (x, p["w"]))).sin()
        return (
            (out if out.shape[0] == 3 else out.movedim(out.shape.index(3), 0)).flatten(1).sum(1)
            if out.dim() > 1
            else out
        )

    shape = first if samples_first else (first[1], first[0], *first[2:])
    assert_matches_naive(losses, {"w": normal(*second)}, normal(*shape))


def heads(p: Params, x: Tensor) -> Tensor:
    """One matrix for each head, samples second."""
    return torch.bmm(x.movedim(2, 0).flatten(1, 2), p["w"]).unflatten(1, (3, 5)).transpose(0, 1)


OPS: dict[str, tuple[Losses, dict[str, tuple[int, ...]], tuple[int, ...]]] = {
    "linear": (lambda p, x: F.linear(x, p["w"], p["b"]), {"w": (4, 2), "b": (4,)}, (3, 5, 2)),
    "linear to a number": (lambda p, x: F.linear(x, p["w"], p["b"]), {"w": (2,), "b": ()}, (3, 5, 2)),
    "matmul": (lambda p, x: torch.matmul(x, p["w"]), {"w": (2, 4)}, (3, 5, 2)),
    "from the left": (lambda p, x: p["w"] @ x, {"w": (4, 5)}, (3, 5, 2)),
    "a vector": (lambda p, x: x @ p["w"], {"w": (2,)}, (3, 5, 2)),
    "stacked matrices": (lambda p, x: x @ p["w"], {"w": (5, 2, 4)}, (3, 5, 1, 2)),
    "mv": (lambda p, x: torch.mv(x, p["w"]), {"w": (2,)}, (3, 2)),
    "mm": (lambda p, x: x.mm(p["w"]), {"w": (2, 4)}, (3, 2)),
    "a matrix for each head": (heads, {"w": (2, 4, 3)}, (3, 5, 2, 4)),
    "addmm": (lambda p, x: torch.addmm(p["b"], x, p["w"], beta=2, alpha=3), {"w": (2, 4), "b": (4,)}, (3, 2)),
    "addmm, wide": (lambda p, x: torch.addmm(p["b"], x, p["w"]), {"w": (2, 4), "b": (1, 4)}, (3, 2)),
    "baddbmm": (
        lambda p, x: torch.baddbmm(p["b"], x.transpose(0, 1), p["w"], alpha=2).transpose(0, 1),
        {"w": (5, 2, 4), "b": (5, 1, 4)},
        (3, 5, 2),
    ),
    "scale": (lambda p, x: p["s"] * x * p["n"], {"s": (5, 1), "n": ()}, (3, 5, 2)),
    "shift": (
        lambda p, x: torch.sub(torch.add(p["a"], x, alpha=3), p["b"], alpha=2) + (1 - p["c"]),
        {"a": (2,), "b": (5, 1), "c": ()},
        (3, 5, 2),
    ),
    "transposed": (lambda p, x: torch.tanh(x @ p["w"]) @ p["w"].T, {"w": (2, 4)}, (3, 5, 2)),
    "cycled matrices": (lambda p, x: x @ p["w"].permute(1, 2, 0), {"w": (4, 5, 2)}, (3, 5, 1, 2)),
    "cycled scale": (lambda p, x: x * p["w"].permute(1, 2, 0), {"w": (4, 5, 2)}, (3, 5, 2, 4)),
    "cat": (lambda p, x: x @ torch.cat([p["u"], p["v"]], 1), {"u": (2, 1), "v": (2, 3)}, (3, 5, 2)),
    "merged": (lambda p, x: F.linear(x, p["w"] + p["u"] @ p["v"]), {"w": (4, 2), "u": (4, 1), "v": (1, 2)}, (3, 5, 2)),
    "apart": (lambda p, x: F.linear(F.linear(x, p["v"]), p["u"]), {"u": (4, 1), "v": (1, 2)}, (3, 5, 2)),
    "rows": (lambda p, x: p["w"][(x > 0).long()], {"w": (2, 4)}, (3, 5)),
    "rows from the end": (lambda p, x: p["w"][-(x > 0).long()], {"w": (2, 4)}, (3, 5)),
    "entries": (lambda p, x: p["w"][(x > 0).long()] * x, {"w": (2,)}, (3, 5)),
    "selected rows": (
        lambda p, x: p["w"].index_select(0, (x > 0).long().flatten()).view(3, 5, 4),
        {"w": (2, 4)},
        (3, 5),
    ),
    "positions": (lambda p, x: x + p["w"][torch.arange(5)], {"w": (7, 2)}, (3, 5, 2)),
    "layer norm": (lambda p, x: F.layer_norm(x, (2,), p["w"], p["b"], 0.1), {"w": (2,), "b": (2,)}, (3, 5, 2)),
    "raw layer norm": (
        lambda p, x: torch.layer_norm(x, (5, 2), p["w"], p["b"], 0.1),
        {"w": (5, 2), "b": (5, 2)},
        (3, 5, 2),
    ),
    "rms norm": (lambda p, x: F.rms_norm(x, (2,), p["w"], 0.1), {"w": (2,)}, (3, 5, 2)),
    "raw rms norm": (lambda p, x: torch.rms_norm(x, (2,), p["w"], 0.1), {"w": (2,)}, (3, 5, 2)),
    "group norm": (lambda p, x: F.group_norm(x, 2, p["w"], p["b"], 0.1), {"w": (4,), "b": (4,)}, (3, 4, 5)),
    "raw group norm": (lambda p, x: torch.group_norm(x, 2, p["w"], p["b"], 0.1), {"w": (4,), "b": (4,)}, (3, 4, 5)),
    "batch norm": (
        lambda p, x: F.batch_norm(x, torch.zeros(4).double(), torch.ones(4).double(), p["w"], p["b"]),
        {"w": (4,), "b": (4,)},
        (3, 4, 5),
    ),
}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("route", ["ghost", "materialise"])
def test_op(name: str, route: Any) -> None:
    out, sizes, shape = OPS[name]
    params = {k: normal(*size) for k, size in sizes.items()}
    options = fg.Options(inner_products=route)
    assert_matches_naive(lambda p, x: out(p, x).sin().reshape(3, -1).sum(1), params, normal(*shape), options=options)


MORE: dict[str, tuple[Losses, dict[str, tuple[int, ...]], Callable[[], Tensor]]] = {
    "T.matmul": (lambda p, x: x.matmul(p["w"]), {"w": (2, 4)}, lambda: normal(3, 5, 2)),
    "torch.mm": (lambda p, x: torch.mm(x, p["w"]), {"w": (2, 4)}, lambda: normal(3, 2)),
    "T.bmm": (lambda p, x: x.transpose(0, 1).bmm(p["w"]).transpose(0, 1), {"w": (5, 2, 4)}, lambda: normal(3, 5, 2)),
    "T.mv": (lambda p, x: x.mv(p["w"])[:, None], {"w": (2,)}, lambda: normal(3, 2)),
    "T.__rmatmul__": (lambda p, x: p["w"].__rmatmul__(x), {"w": (2, 4)}, lambda: normal(3, 2)),
    "T.addmm": (lambda p, x: p["b"].addmm(x, p["w"]), {"w": (2, 4), "b": (4,)}, lambda: normal(3, 2)),
    "T.baddbmm": (
        lambda p, x: p["b"].baddbmm(x.transpose(0, 1), p["w"]).transpose(0, 1),
        {"w": (5, 2, 4), "b": (5, 3, 4)},
        lambda: normal(3, 5, 2),
    ),
    "torch.mul": (lambda p, x: torch.mul(p["s"], x), {"s": (2,)}, lambda: normal(3, 2)),
    "T.add": (lambda p, x: x.add(p["s"]), {"s": (2,)}, lambda: normal(3, 2)),
    "T.sub": (lambda p, x: x.sub(p["s"], alpha=2), {"s": (2,)}, lambda: normal(3, 2)),
    "T.rsub": (lambda p, x: p["s"].__rsub__(x), {"s": (2,)}, lambda: normal(3, 2)),
    "embedding": (lambda p, i: F.embedding(i, p["w"]), {"w": (6, 2)}, lambda: torch.randint(0, 6, (3, 5))),
    "padding": (
        lambda p, i: F.embedding(i, p["w"], padding_idx=-2),
        {"w": (6, 2)},
        lambda: torch.randint(0, 6, (3, 5)),
    ),
    "frequency": (
        lambda p, i: F.embedding(i, p["w"], padding_idx=1, scale_grad_by_freq=True),
        {"w": (6, 2)},
        lambda: torch.randint(0, 6, (3, 5)),
    ),
    "raw embedding": (lambda p, i: torch.embedding(p["w"], i, 1), {"w": (6, 2)}, lambda: torch.randint(0, 6, (3, 5))),
    "torch.index_select": (
        lambda p, i: torch.index_select(p["w"], 0, i.flatten()).view(3, -1),
        {"w": (6, 2)},
        lambda: torch.randint(0, 6, (3, 5)),
    ),
    "bag": (lambda p, i: F.embedding_bag(i, p["w"]), {"w": (6, 2)}, lambda: torch.randint(0, 6, (3, 5))),
}


@pytest.mark.parametrize("name", MORE)
def test_op_called_otherwise(name: str) -> None:
    out, sizes, x = MORE[name]
    params = {k: normal(*size) for k, size in sizes.items()}
    assert_matches_naive(lambda p, x: squares(out(p, x)), params, x())


NOTHING: dict[str, tuple[Losses, dict[str, tuple[int, ...]]]] = {
    "linear": (lambda p, x: F.linear(x, p["w"], p["b"]), {"w": (4, 2), "b": (4,)}),
    "embedding": (lambda p, x: F.embedding(x[..., 0].long(), p["w"]), {"w": (6, 2)}),
    "rows": (lambda p, x: p["w"][x[..., 0].long()], {"w": (6, 2)}),
    "rows of tensors": (lambda p, x: p["w"][x[..., 0].long()], {"w": (6, 2, 3)}),
    "scale": (lambda p, x: x * p["s"], {"s": (2,)}),
    "layer norm": (lambda p, x: F.layer_norm(x, (2,), p["w"], p["b"]), {"w": (2,), "b": (2,)}),
}


@pytest.mark.parametrize("name", NOTHING)
@pytest.mark.parametrize("batch", [1, 3])
def test_samples_without_positions(name: str, batch: int) -> None:
    """As an expert that no token went to, or a document of length zero."""
    out, sizes = NOTHING[name]
    params = {k: normal(*size) for k, size in sizes.items()} | {"always": normal(2)}

    def losses(p: Params, x: Tensor) -> Tensor:
        return out(p, x[:, :0]).sin().flatten(1).sum(1) + (x @ p["always"]).square().sum(1)

    assert_matches_naive(losses, params, normal(batch, 5, 2))


def test_every_description_of_a_product_is_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the models of this file."""
    met = set[Any]()

    def watched(op: Any, describe: Any) -> Any:
        def description(*given: Any) -> Any:
            found = describe(*given)
            met.update({op} if found is not None else ())
            return found

        return description

    described = {op: known for op, known in _KNOWN.items() if known.product is not None}
    for op, known in described.items():
        monkeypatch.setitem(_KNOWN, op, known._replace(product=watched(op, known.product)))
    for name in OPS:
        test_op(name, "ghost")
    for name in ("1d, same", "2d, all", "3d, all"):
        test_convolution(name, 40, "ghost")
    test_einsum("btd,pd->btp", False)
    for name in MORE:
        test_op_called_otherwise(name)
    assert [op for op in described if op not in met] == []


@pytest.mark.parametrize("op", [F.linear, torch.einsum, F.embedding, F.conv1d, torch.mul], ids=lambda op: op.__name__)
def test_the_law_of_factors_catches_a_wrong_description(op: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    params = {"w": normal(6, 6), "k": normal(6, 6, 3), "s": normal(6), "table": normal(6, 6), "e": normal(6, 6)}

    def losses(p: Params, i: Tensor) -> Tensor:
        h = F.linear(F.embedding(i, p["table"]) + torch.arange(6.0).double(), p["w"]).sin()
        h = F.conv1d(torch.mul(torch.einsum("btd,de->bte", h, p["e"]).sin(), p["s"]).transpose(1, 2).sin(), p["k"])
        return squares(h)

    tokens, own = torch.randint(0, 6, (3, 5)), {F.linear: "w", F.embedding: "table", F.conv1d: "k", torch.mul: "s"}
    assert_matches_naive(losses, params, tokens)
    known = _KNOWN[op]
    describe: Any = known.product

    def wrong(call: Any, slots: Any, arguments: Any, name: str) -> Any:
        found = describe(call, slots, arguments, name)
        if found is None or found.values is None:
            return found
        values = found.values
        moved = copy.copy(found)
        shifted = (lambda s: tuple(v.roll(1, 1) for v in values(s))) if op is F.embedding else lambda s: values(s) * 2
        object.__setattr__(moved, "values", shifted)
        return moved

    monkeypatch.setitem(_KNOWN, op, known._replace(product=wrong))
    with pytest.raises(fg.ConservationError, match=f"factored.*'{own.get(op, 'e')}'"):
        fg.reduce(losses)(params, tokens, fg.squared_norm())
    with pytest.raises(fg.ConservationError):
        fg.pairs(losses)(params, tokens)


# -- ways to run a step -----------------------------------------------------------------------------------

QUADRATIC = {"norm": fg.squared_norm(), "gram": fg.gram(), "cross": fg.cross(1), "projected": fg.project(5)}


def double_gpt(**options: Any) -> tuple[nn.Module, Any, Params]:
    model, losses, params = small_gpt(**options)
    model.double()
    return model, losses, params


def naive(losses: Any, params: Any, batch: Any) -> Tensor:
    """[b, all entries]."""
    return torch.cat([g.flatten(1) for g in per_sample_gradients(losses, params, batch).values()], 1)


def assert_quadratic(found: Any, gradients: Tensor, tolerance: float = 1e-10) -> None:
    products = gradients @ gradients.T
    size = tolerance * float(products.diagonal().max())
    torch.testing.assert_close(found["norm"], products.diagonal(), rtol=0, atol=size)
    torch.testing.assert_close(found["gram"], products, rtol=0, atol=size)
    torch.testing.assert_close(found["cross"], products[:-1, -1:], rtol=0, atol=size)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 4)), nn.Dropout(0.5))
        self.norm, self.conv = nn.LayerNorm(4), nn.Conv1d(4, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x + self.inner(x))
        first: Any = self.inner[0]
        return self.conv(F.pad(h.transpose(-2, -1), (1, 0))) @ first.weight[:2].T @ self.conv.weight[:, :, 0]


@pytest.mark.parametrize("randomness", ["different", "same", "error"])
def test_per_example(randomness: str) -> None:
    module = Residual().double().train(randomness != "error")
    losses = fg.per_example(
        lambda p, x: functional_call(module, p, (x["x"],)).square().sum() * x["y"], randomness=randomness
    )
    batch = {"x": normal(3, 4, 4), "y": normal(3)}
    assert_matches_naive(losses, dict(module.named_parameters()), batch, fg.project(4))


def test_per_example_with_a_table_and_nested_vmaps() -> None:
    params = {"table": normal(6, 3), "w": normal(3, 3), "b": normal(3)}

    def of_token(p: Params, i: Tensor) -> Tensor:
        return F.linear(F.embedding(i, p["table"]), p["w"], p["b"]).tanh() @ p["w"]

    def loss(p: Params, i: Tensor) -> Tensor:
        return torch.func.vmap(lambda token: of_token(p, token))(i).square().sum()

    assert_matches_naive(fg.per_example(loss), params, torch.randint(0, 6, (4, 5)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("how", [pytest.param("compiled", marks=compiles), "make_fx"])
def test_compiled_along_a_plan(how: str) -> None:
    torch._dynamo.reset()
    _, losses, params = double_gpt(layers=1)
    batch = rows()
    reducers = QUADRATIC | {"v": fg.dot(like(params)), "each": fg.per_param(fg.squared_norm())}
    step = fg.grad_and_reduce(losses, plan=fg.plan(losses, params, batch, reducers))
    if how == "compiled":
        run = torch.compile(step, fullgraph=True, backend="aot_eager")
        found, wanted = run(params, batch, reducers).reduced, step(params, batch, reducers).reduced
    else:
        traced = make_fx(lambda tokens: step(params, (tokens,), reducers).reduced)(batch[0])
        batch = rows()
        found, wanted = traced(batch[0]), step(params, batch, reducers).reduced
    assert_quadratic(found, naive(losses, params, batch))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_meta_device() -> None:
    model, losses, params = small_gpt(dropout=0.1)
    batch = rows()
    reducers = QUADRATIC | {"each": fg.per_param(fg.gram())}
    plan = fg.plan(losses, params, batch, reducers)
    model.to("meta")
    meta, away = dict(model.named_parameters()), (batch[0].to("meta"),)
    found = fg.grad_and_reduce(losses, plan=plan)(meta, away, reducers).reduced
    assert {name: list(found[name].shape) for name in QUADRATIC} == {
        "norm": [4],
        "gram": [4, 4],
        "cross": [3, 1],
        "projected": [4, 5],
    }
    kept = fg.pairs(losses, plan=plan)(meta, away)
    for value in (*(found[name] for name in QUADRATIC), *found["each"].values(), fg.cross_dots(kept, kept)):
        assert value.is_meta
    assert all(value.is_meta for value in fg.combine(kept, torch.ones(4, device="meta")).values())


def test_autocast_to_bfloat16_costs_what_autocast_costs() -> None:
    _, losses, params = small_gpt(width=32)
    batch = rows(4)

    def cast(p: Any, b: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return losses(p, b).float()

    gradients, exact = naive(cast, params, batch), naive(losses, params, batch)
    found = fg.grad_and_reduce(cast)(params, batch, QUADRATIC).reduced
    assert all(value.dtype == torch.float32 for value in found.values())
    rounding = float((gradients @ gradients.T - exact @ exact.T).abs().max())
    largest = float((exact @ exact.T).abs().max())
    assert 0 < rounding < 0.05 * largest
    assert_quadratic(found, exact, max(4 * rounding / largest, 0.01))


class Recomputed(nn.Module):
    """Two layers, each used in a part that is recomputed and outside of it."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.first, self.second, self.recompute = nn.Linear(4, 4), nn.Linear(4, 4), recompute

    def part(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.second(x)), self.first.weight.T).sin()

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute:
            h: Any = checkpoint(self.part, x, use_reentrant=False, context_fn=fg.checkpoint_context)
        else:
            h = self.part(x)
        return self.second(h) @ self.first.weight.T + self.first.bias


def test_activation_checkpointing() -> None:
    module, x = Recomputed(True).double(), normal(3, 5, 4)
    plain = Recomputed(False).double()
    plain.load_state_dict(module.state_dict())
    losses, params = fg.module_losses(module, lambda out, _: squares(out)), dict(module.named_parameters())
    gradients = naive(fg.module_losses(plain, lambda out, _: squares(out)), dict(plain.named_parameters()), x)
    step = fg.grad_and_reduce(losses)
    for _ in range(2):
        assert_quadratic(step(params, x, QUADRATIC).reduced, gradients)
    kept = fg.pairs(losses)(params, x)
    torch.testing.assert_close(torch.cat([g.flatten(1) for g in fg.materialize(kept).values()], 1), gradients)


def test_accumulation_over_parts_of_a_batch() -> None:
    _, losses, params = double_gpt(layers=1)
    (tokens,) = rows(6)
    step = fg.grad_and_reduce(losses, reduction="sum")
    whole = step(params, (tokens,), QUADRATIC)
    parts = [step(params, (part,), QUADRATIC) for part in tokens.split([1, 3, 2])]
    for name in ("norm", "projected"):
        torch.testing.assert_close(torch.cat([part.reduced[name] for part in parts]), whole.reduced[name])
    kept = [fg.pairs(losses)(params, (part,)) for part in tokens.split([1, 3, 2])]
    blocks = torch.cat([torch.cat([fg.cross_dots(a, b) for b in kept], 1) for a in kept])
    torch.testing.assert_close(blocks, whole.reduced["gram"])
    for name, value in whole.grads.items():
        torch.testing.assert_close(sum(part.grads[name] for part in parts), value)


@pytest.mark.filterwarnings("ignore")
def test_peft() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.q(x)))

    config = peft.LoraConfig(r=2, target_modules=["q"], modules_to_save=["head"], init_lora_weights=False)
    model: Any = peft.get_peft_model(Net(), config).double()
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in params)
    assert_matches_naive(fg.module_losses(model, lambda out, _: squares(out)), params, normal(3, 5, 6), fg.project(4))


def test_tied_reused_and_disguised_at_once() -> None:
    module = parametrizations.weight_norm(nn.Linear(4, 4)).double()
    table = normal(4, 4)

    def losses(p: Params, i: Tensor) -> Tensor:
        own = {k: v for k, v in p.items() if k != "table"}
        h = functional_call(module, own, (F.embedding(i, p["table"]),))
        h = functional_call(module, own, (h.tanh(),)) @ p["table"].view(2, 2, 4).flatten(0, 1).T
        return squares(torch.cat([p["table"], p["table"].T])[i] * torch.cat([h[..., :2], h[..., 2:]], -1))

    params = dict(module.named_parameters()) | {"table": table}
    for route in ("ghost", "materialise"):
        assert_matches_naive(losses, params, torch.randint(0, 4, (3, 5)), options=fg.Options(inner_products=route))


def test_a_weight_meets_what_it_made_itself_where_samples_have_no_axis() -> None:
    """The way through the activations is scored where they are made, and not once more."""

    def losses(p: Params, x: Tensor) -> Tensor:
        h = torch.tanh(x * p["s"])
        ragged = torch.cat([row[:length] for row, length in zip(h, (2, 4, 1), strict=True)]) * p["s"]
        return torch.stack([part.sin().sum() for part in ragged.split([2, 4, 1])])

    params, x = {"s": normal()}, normal(3, 4)
    assert [site.action for site in fg.plan(losses, params, x).sites[:2]] == ["tap", "carry"]
    assert_matches_naive(losses, params, x, fg.project(4))


def test_contributions_are_added_up_as_they_come() -> None:
    """Of twenty parameters no more than the sum and the last contribution exist at once."""
    alive = weakref.WeakSet[Tensor]()
    most = 0

    class Watched(type(fg.gram())):  # type: ignore[misc]
        def of_parameter(self, *args: Any) -> Tensor:
            nonlocal most
            found: Tensor = super().of_parameter(*args)
            alive.add(found)
            most = max(most, len(alive))
            return found

    params = {f"w{i:02}": normal(3, 3) for i in range(20)}

    def losses(p: Params, x: Tensor) -> Tensor:
        for weight in p.values():
            x = torch.tanh(x @ weight)
        return squares(x)

    score, x = fg.reduce(losses), normal(4, 3)
    watched, plain, apart = score(params, x, (Watched(), fg.gram(), fg.per_param(fg.gram())))
    assert torch.equal(watched, plain)
    assert torch.allclose(watched, torch.stack(list(apart.values())).sum(0), rtol=1e-12)
    most = 0
    score(params, x, Watched())
    assert most == 2
