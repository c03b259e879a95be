"""Models that break engines of this kind, each with what must come of it: exact scores, or the error named.

Layers of torch.nn have a table of their own, in `test_nn_layers`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.checkpoint import checkpoint

import funcghost as fg

Params = dict[str, Tensor]


class Case(NamedTuple):
    """`outcome` is the error to come, `says` a phrase of it; `remedy` names the case that does what it advises.

    The remedied case has the same losses. `forward_route`: whether scores can be carried to the losses as well.
    """

    losses: Callable[[Params, Any], Tensor]
    params: Params
    batch: Any
    outcome: type[Exception] | None = None
    forward_route: bool = True
    says: str = ""
    remedy: str = ""
    tolerance: float = 1e-10


CASES: dict[str, Callable[[], Case]] = {}


def case(make: Callable[[], Case]) -> Callable[[], Case]:
    CASES[make.__name__] = make
    return make


Size = tuple[int, ...] | Callable[[], Tensor]


def row(
    batch: Callable[[], Any] | None = None, says: str = "", remedy: str = "", **given: Any
) -> Callable[[Callable[[Params, Any], Tensor]], Callable[[Params, Any], Tensor]]:
    """A case from its losses: `given` are the fields of `Case` and the parameters, by shape or by what makes them."""
    fields = {k: given.pop(k) for k in ("outcome", "forward_route", "tolerance") if k in given}
    sizes: dict[str, Size] = given

    def add(losses: Callable[[Params, Any], Tensor]) -> Callable[[Params, Any], Tensor]:
        def make() -> Case:
            params = {k: size() if callable(size) else normal(*size) for k, size in sizes.items()}
            return Case(losses, params, (batch or inputs)(), says=says, remedy=remedy, **fields)

        CASES[losses.__name__] = make
        return losses

    return add


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64) * 0.7


def inputs() -> Tensor:
    return normal(4, 5, 6)


def rows() -> Tensor:
    return normal(4, 6)


def tokens() -> Tensor:
    return torch.randint(0, 10, (4, 5))


def squares(values: Tensor) -> Tensor:
    return values.square().flatten(1).sum(1)


def of_module(module: nn.Module, batch: Any = None, pick: Callable[[Any], Tensor] = lambda out: out) -> Case:
    """Squares of what a module gives for one input."""
    module = module.double()

    def losses(params: Params, x: Any) -> Tensor:
        return squares(pick(functional_call(module, params, (x,))))

    return Case(losses, dict(module.named_parameters()), inputs() if batch is None else batch)


# -- layers, put together ----------------------------------------------------------------------


@case
def lstm_cell_in_a_loop() -> Case:
    cell = nn.LSTMCell(6, 7).double()

    def losses(params: Params, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), 7)
        for t in range(x.shape[1]):
            h, c = functional_call(cell, params, (x[:, t], (h, c)))
        return squares(h)

    return Case(losses, dict(cell.named_parameters()), inputs())


@case
def embedding_negative_padding() -> Case:
    table = normal(10, 3)
    return Case(lambda p, i: squares(F.embedding(i, p["table"], padding_idx=-3)), {"table": table}, tokens())


@case
def convolutions() -> Case:
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, groups=2, stride=2),
        nn.GroupNorm(2, 4),
        nn.ConvTranspose2d(4, 2, 2, stride=2),
    )
    return of_module(module, normal(4, 3, 8, 8))


@case
def batch_norm_in_training() -> Case:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    return of_module(module, normal(4, 3, 8, 8))


@case
def dropout_on_a_weight() -> Case:
    return Case(lambda p, x: squares(x @ F.dropout(p["w"], 0.5)), {"w": normal(6, 3)}, inputs())


# -- uses of parameters ------------------------------------------------------------------------


@case
def tied_in_three_ways() -> Case:
    def losses(p: Params, x: Tensor) -> Tensor:
        h = torch.tanh(x @ p["w"])
        return squares(torch.tanh(h @ p["w"].T) @ p["w"][:, :3])

    return Case(losses, {"w": normal(6, 6)}, inputs())


@case
def decay_inside_the_loss() -> Case:
    return Case(lambda p, x: squares(x @ p["w"]) + 0.1 * p["w"].square().sum(), {"w": normal(6, 3)}, inputs())


@case
def a_parameter_is_the_loss() -> Case:
    return Case(lambda p, x: p["v"] * x.new_ones(len(x)), {"v": normal()}, inputs())


@case
def unused_and_dead_ends() -> Case:
    def losses(p: Params, x: Tensor) -> Tensor:
        (x @ p["dead"]).sum()
        return squares(x @ p["w"])

    return Case(losses, {"w": normal(6, 3), "dead": normal(6, 2), "never": normal(2)}, inputs())


@case
def stacked_parameters_einsum() -> Case:
    def losses(p: Params, x: Tensor) -> Tensor:
        return squares(torch.einsum("btd,kde->bkte", x, torch.stack([p["a"], p["b"]])))

    return Case(losses, {"a": normal(6, 3), "b": normal(6, 3)}, inputs())


@case
def nested_functional_call_on_slices() -> Case:
    outer, inner = nn.Linear(6, 3).double(), nn.Linear(3, 3).double()

    def losses(p: Params, x: Tensor) -> Tensor:
        small = {"weight": p["weight"][:, :3], "bias": p["bias"]}
        return squares(functional_call(inner, small, (functional_call(outer, p, (x,)),)))

    return Case(losses, dict(outer.named_parameters()), inputs())


@case
def zero_initialised_branch() -> Case:
    def losses(p: Params, x: Tensor) -> Tensor:
        return squares((x @ p["w"]).tanh() @ p["zero"] + x[..., :3])

    return Case(losses, {"w": normal(6, 3), "zero": torch.zeros(3, 3, dtype=torch.float64)}, inputs())


@case
def complex_spectrum() -> Case:
    def losses(p: Params, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x @ p["w"], dim=1) * torch.view_as_complex(p["filter"])
        return spectrum.abs().square().sum((1, 2))

    return Case(losses, {"w": normal(6, 3), "filter": normal(3, 2)}, inputs())


@case
def several_outputs() -> Case:
    def losses(p: Params, x: Tensor) -> Tensor:
        values, _ = (x @ p["w"]).sort(-1)
        q, r = torch.linalg.qr(p["w"][:3])
        a, b, c = (values @ q @ r).unbind(-1)
        return squares(a * b + c)

    return Case(losses, {"w": normal(6, 3)}, inputs())


@case
def no_grad_and_detach() -> Case:
    def losses(p: Params, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = (x @ p["w"]).sum((1, 2)).sigmoid()
        return gate * squares(x @ p["w"]) + squares(x @ p["w"].detach())

    return Case(losses, {"w": normal(6, 3)}, inputs())


@case
def written_into_an_activation() -> Case:
    def losses(p: Params, x: Tensor) -> Tensor:
        y = (x @ p["w"]) * 1.5
        y.add_(p["b"])
        y *= p["b"]
        z = torch.zeros_like(x)
        z[:, 0] = p["row"]
        z[:, 1] = x[:, 1] * p["row"]
        return squares(y) + (x + z).tanh().square().sum((1, 2))

    return Case(losses, {"w": normal(6, 3), "b": normal(3), "row": normal(6)}, inputs())


@case
def output_that_is_a_view_written_to() -> Case:
    # Inside, a linear layer on [b, t, d] is a product and a view of it.
    def losses(p: Params, x: Tensor) -> Tensor:
        h = F.linear(x, p["w"], p["b"])
        h[:, 1] = 0.5
        h.relu_()
        return squares(torch.einsum("btd,pd->btp", h, p["v"]).mul_(2.0).add_(p["b"]))

    return Case(losses, {"w": normal(3, 6), "b": normal(3), "v": normal(3, 3)}, inputs())


@case
def written_through_a_view() -> Case:
    def losses(p: Params, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, 0].add_(p["b"])
        return squares(y)

    return Case(
        losses, {"b": normal(6)}, inputs(), fg.ConservationError, says="out of place", remedy="written_out_of_place"
    )


@row(b=(6,))
def written_out_of_place(p: Params, x: Tensor) -> Tensor:
    return squares(torch.cat([x[:, :1] + p["b"], x[:, 1:]], 1))


class Hidden(torch.autograd.Function):
    """A product whose backward does not tell autograd that the weight's gradient depends on the incoming one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return gradient @ w.T, (x.flatten(0, -2).T @ gradient.flatten(0, -2)).detach() + 0 * gradient.sum()


@case
def hidden_in_a_custom_function() -> Case:
    def losses(p: Params, x: Tensor) -> Tensor:
        return squares(Hidden.apply(x, p["hidden"])) + squares(x @ p["seen"])

    return Case(
        losses,
        {"hidden": normal(6, 3), "seen": normal(6, 3)},
        inputs(),
        fg.ConservationError,
        says="Call ordinary torch ops on these",
        remedy="by_ordinary_ops",
    )


@row(hidden=(6, 3), seen=(6, 3))
def by_ordinary_ops(p: Params, x: Tensor) -> Tensor:
    return squares(x @ p["hidden"]) + squares(x @ p["seen"])


@case
def custom_function_between_sites() -> Case:
    def losses(p: Params, x: Tensor) -> Tensor:
        return squares(Hidden.apply(x @ p["a"], torch.eye(3, dtype=x.dtype)) @ p["b"])

    return Case(losses, {"a": normal(6, 3), "b": normal(3, 3)}, inputs(), forward_route=False)


@case
def rows_moved_after_a_custom_function() -> Case:
    # The rows come from an op that no mode shows, and carry samples all the same: no layout may be taken for lasting.
    def losses(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, order = batch
        rows = Hidden.apply(x @ p["a"], torch.eye(3, dtype=x.dtype))[order]
        return squares(rows @ p["b"])

    params = {"a": normal(6, 3), "b": normal(3, 3)}
    return Case(
        losses,
        params,
        (normal(4, 6), torch.arange(4)),
        fg.ConservationError,
        says="Call ordinary torch ops",
        remedy="rows_moved_after_ordinary_ops",
    )


@row(a=(6, 3), b=(3, 3), batch=lambda: (normal(4, 6), torch.arange(4)))
def rows_moved_after_ordinary_ops(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    return squares((batch[0] @ p["a"])[batch[1]] @ p["b"])


# -- samples that mix, move, or come in other layouts --------------------------------------------


@case
def contrastive() -> Case:
    def losses(p: Params, x: Tensor) -> Tensor:
        h = F.normalize((x @ p["w"]).mean(1), dim=-1)
        scores = h @ h.T * p["temperature"]
        return -torch.log_softmax(scores, -1).diagonal() + scores[:, 0]

    return Case(losses, {"w": normal(6, 3), "temperature": normal()}, inputs())


@case
def experts_by_argmax() -> Case:
    def losses(p: Params, x: Tensor) -> Tensor:
        h = x.flatten(0, 1)
        scores = (h @ p["router"]).softmax(-1)
        out = torch.zeros_like(h)
        for expert in range(3):
            rows = (scores.argmax(-1) == expert).nonzero().squeeze(1)
            out.index_add_(0, rows, torch.tanh(h[rows] @ p["experts"][expert]) * scores[rows, expert, None])
        return squares(out.view(x.shape))

    return Case(losses, {"router": normal(6, 3), "experts": normal(3, 6, 6)}, inputs())


@case
def packed_segments() -> Case:
    def losses(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        rows, segments = batch
        h = torch.tanh(rows @ p["w"]) @ p["v"]
        return torch.zeros(2, dtype=h.dtype).index_add(0, segments, h.square().sum(1))

    return Case(losses, {"w": normal(6, 3), "v": normal(3, 3)}, (normal(6, 6), torch.tensor([0, 0, 0, 1, 1, 1])))


@case
def hardest_first() -> Case:
    return Case(lambda p, x: squares(x @ p["w"]).sort(descending=True).values, {"w": normal(6, 3)}, inputs())


@case
def pooled_at_an_index() -> Case:
    def losses(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, last = batch
        h = torch.tanh(x @ p["w"])
        return squares(h[torch.arange(len(h)), last] @ p["v"])

    return Case(losses, {"w": normal(6, 3), "v": normal(3, 2)}, (inputs(), torch.tensor([0, 3, 1, 4])))


@case
def square_batch_sequence_first() -> Case:
    def losses(p: Params, x: Tensor) -> Tensor:
        return squares((torch.tanh(x.transpose(0, 1) @ p["w"]) @ p["v"]).transpose(0, 1))

    return Case(losses, {"w": normal(6, 6), "v": normal(6, 2)}, normal(5, 5, 6))


@row(w=(6, 3), scale=(4,))
def tapped_first_and_carried_to_the_end(p: Params, x: Tensor) -> Tensor:
    # On a diagonal rows and columns are the same samples, and a view of it cannot be tapped either.
    return (torch.diag_embed(squares(x @ p["w"])) * p["scale"]).diagonal()


# -- per_example, checkpointing ------------------------------------------------------------------


def on_the_second_axis(length: int) -> Case:
    def loss(p: Params, i: Tensor) -> Tensor:
        return (F.embedding(i, p["table"]).cumsum(0) @ p["w"]).square().sum()

    params = {"table": normal(10, 4), "w": normal(4, 3)}
    return Case(fg.per_example(loss, in_dims=1), params, torch.randint(0, 10, (length, 4)), None, False)


@case
def per_example_on_the_second_axis() -> Case:
    return on_the_second_axis(5)


@case
def per_example_on_the_second_of_equal_axes() -> Case:
    return on_the_second_axis(4)


@case
def per_example_tied_and_shared() -> Case:
    def loss(p: Params, x: Tensor) -> Tensor:
        h = torch.tanh(x @ p["w"] + p["b"] + p["w"].sum())
        return (h @ p["v"].T).square().sum() + (h @ p["w"].T).sum()

    return Case(fg.per_example(loss), {"w": normal(6, 3), "b": normal(3), "v": normal(2, 3)}, inputs(), None, False)


@case
def per_example_attention() -> Case:
    table, position = nn.Embedding(10, 6).double(), nn.Embedding(5, 6).double()
    qkv, norm = nn.Linear(6, 18).double(), nn.LayerNorm(6).double()
    modules = nn.ModuleDict({"table": table, "position": position, "qkv": qkv, "norm": norm})

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = modules

        def forward(self, i: Tensor) -> Tensor:
            h = self.parts["table"](i) + self.parts["position"](torch.arange(len(i)))
            q, k, v = self.parts["qkv"](self.parts["norm"](h)).chunk(3, -1)
            return F.linear(h + torch.softmax(q @ k.T, -1) @ v, table.weight)

    block = Block()

    def loss(p: Params, i: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(block, p, (i,)), i)

    return Case(fg.per_example(loss), dict(block.named_parameters()), tokens(), None, False)


@case
def per_example_convolution_with_dropout() -> Case:
    module = nn.Sequential(
        nn.Conv1d(5, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(0), nn.Linear(16, 2)
    ).double()
    losses = fg.per_example(lambda p, x: functional_call(module, p, (x,)).square().sum(), randomness="different")
    return Case(losses, dict(module.named_parameters()), inputs(), None, False)


class Checkpointed(nn.Module):
    def __init__(self, context: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))
        self.extra: dict[str, Any] = {"context_fn": fg.checkpoint_context} if context else {}

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.body, x, use_reentrant=False, **self.extra)
        return out


@case
def checkpointed() -> Case:
    return of_module(Checkpointed(context=True))


@case
def checkpointed_without_context() -> Case:
    made = of_module(Checkpointed(context=False))
    return made._replace(outcome=fg.UnsupportedOpError, says="context_fn=fg.checkpoint_context", remedy="checkpointed")


@case
def checkpointed_with_other_parameters() -> Case:
    # A recomputed module has its own parameters again: with others handed in, plain autograd is wrong as well.
    made = of_module(Checkpointed(context=True))
    params = {k: p.detach().clone() for k, p in made.params.items()}
    return made._replace(
        params=params, outcome=fg.UnsupportedOpError, says="module's own tensors", remedy="checkpointed"
    )


# -- parameters in disguise: views, products, decompositions of them ---------------------------------


@row(flat=(6 * 3 + 3,))
def slices_of_one_flat_parameter(p: Params, x: Tensor) -> Tensor:
    return squares(F.linear(x, p["flat"][:18].view(3, 6), p["flat"].narrow(0, 18, 3)))


@row(w=(6, 6))
def views_of_views(p: Params, x: Tensor) -> Tensor:
    w = p["w"].T.reshape(2, 3, 6).transpose(0, 2).flatten(1).unflatten(1, (2, 3))[:, 1]
    return squares(x @ w) + squares(x[..., :3] @ p["w"].as_strided((3, 2), (1, 6), 4))


@row(a=(3, 6), b=(2, 6), c=(6,))
def one_vector_of_all_parameters(p: Params, x: Tensor) -> Tensor:
    flat = nn.utils.parameters_to_vector([p["a"], p["b"], p["c"]])
    return squares(F.linear(x, flat[:30].view(5, 6), flat[31:]))


@row(w=(6, 3))
def cast_and_back(p: Params, x: Tensor) -> Tensor:
    return squares(x @ p["w"].to(torch.complex128).real.to(torch.float64))


@row(scale=(), shift=(1,), empty=(0, 6))
def scalars_and_an_empty_parameter(p: Params, x: Tensor) -> Tensor:
    both = torch.cat([x, (x[:, :0] @ p["empty"].T @ p["empty"])], 1)
    return squares(both * p["scale"].exp().expand(6) + p["shift"].expand_as(both))


@row(w=(6, 3), mask=lambda: (normal(6, 3) > 0).double())
def pruned_by_an_ordinary_tensor(p: Params, x: Tensor) -> Tensor:
    kept = p["w"].detach().abs() > 0.3
    return squares(x @ p["w"].masked_fill(~kept, 0.0)) + squares(x @ torch.where(kept, p["w"], p["mask"]))


@row(w=(6, 3))
def only_the_kept_entries(p: Params, x: Tensor) -> Tensor:
    kept = torch.arange(18).view(6, 3) % 3 > 0
    w = torch.zeros(6, 3, dtype=x.dtype).masked_scatter(kept, p["w"][kept])
    return squares(x @ w)


@row(w=(6, 3), s=(3,))
def reparametrised_by_functions(p: Params, x: Tensor) -> Tensor:
    w = p["w"].softmax(0) + p["w"].clamp(-0.5, 0.5) + p["w"].tril().abs()
    return squares(x @ w * F.softplus(p["s"]))


@row(a=(6, 2), b=(2, 3))
def outer_product_weight(p: Params, x: Tensor) -> Tensor:
    return squares(x @ (p["a"] @ p["b"]) + x @ torch.outer(p["a"][:, 0], p["b"][1]))


@row(a=(2, 3), b=(3, 1))
def kronecker_weight(p: Params, x: Tensor) -> Tensor:
    return squares(x @ torch.kron(p["a"], p["b"]).reshape(6, 3))


@row(a=(2, 3), b=(4, 2), d=(5,))
def blocks_and_diagonals(p: Params, x: Tensor) -> Tensor:
    w = torch.block_diag(p["a"], p["b"])  # [6, 5]
    return squares(x @ w @ torch.diag(p["d"])) + squares(x @ torch.diag_embed(torch.cat([p["d"], p["d"][:1]])))


@row(a=(6, 2), b=(2, 3), scale=())
def lora_by_hand(p: Params, x: Tensor) -> Tensor:
    base = torch.linspace(-1, 1, 18, dtype=x.dtype).view(6, 3)
    return squares(x @ base + (x @ p["a"]) @ p["b"] * p["scale"] + x @ (base + p["a"] @ p["b"]))


@row(up=(6, 8), kernel=(8, 4 * 5 * 3), bias=(4,))
def convolution_from_another_net(p: Params, x: Tensor) -> Tensor:
    kernel = torch.tanh(torch.linspace(-1, 1, 6, dtype=x.dtype) @ p["up"]) @ p["kernel"]
    return squares(F.conv1d(x, kernel.view(4, 5, 3), p["bias"]))


@row(style=(6, 5), kernel=(4, 5, 3))
def a_kernel_for_each_sample(p: Params, x: Tensor) -> Tensor:
    # Samples are folded into the channels of one image, as groups.
    kernels = p["kernel"] * torch.sigmoid(x[:, 0] @ p["style"])[:, None, :, None]
    kernels = kernels * (kernels.square().sum((2, 3), keepdim=True) + 1e-3).rsqrt()
    out = F.conv1d(x.reshape(1, -1, 6), kernels.flatten(0, 1), groups=len(x))
    return squares(out.view(len(x), 4, -1))


@row(generator=(6, 18))
def weights_made_of_the_sample(p: Params, x: Tensor) -> Tensor:
    weights = (x.mean(1) @ p["generator"]).view(-1, 6, 3)
    return squares(torch.bmm(x, weights))


@row(w=(6, 3))
def weights_standardised(p: Params, x: Tensor) -> Tensor:
    deviation, mean = torch.std_mean(p["w"], 0)
    return squares(x @ ((p["w"] - mean) / deviation))


@row(w=(6, 6))
def solved_and_inverted(p: Params, x: Tensor) -> Tensor:
    w = p["w"] + 3 * torch.eye(6, dtype=x.dtype)
    return squares(torch.linalg.solve(w, x.mT)) + squares(x @ torch.linalg.inv(w))


@row(w=(6, 6))
def symmetric_decompositions(p: Params, x: Tensor) -> Tensor:
    positive = p["w"] @ p["w"].T + torch.eye(6, dtype=x.dtype)
    lower, values = torch.linalg.cholesky(positive), torch.linalg.eigvalsh(positive)
    return squares(x @ lower) + squares(x @ torch.linalg.eigh(positive).eigenvectors.abs()) * values.log().sum()


@row(w=(6, 3))
def singular_values(p: Params, x: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(p["w"], full_matrices=False)
    return squares(x @ (u * s.sqrt()) @ vh) + torch.linalg.matrix_norm(p["w"], 2)


@row(w=(6, 6))
def exponential_of_a_skew_matrix(p: Params, x: Tensor) -> Tensor:
    return (x @ torch.matrix_exp(p["w"] - p["w"].T)).tanh().sum((1, 2)) + torch.linalg.slogdet(p["w"]).logabsdet


@row(w=(6, 3))
def einsum_with_odd_letters(p: Params, x: Tensor) -> Tensor:
    a = torch.einsum("zQ,bAz->QbA", p["w"], x).movedim(0, 2)
    b = torch.einsum("...d,dp", x, p["w"])
    c = torch.einsum("btd,dp,btd->bp", x, p["w"], x.cos())
    return squares(a * b) + squares(torch.einsum("bii->b", torch.einsum("bp,pd->bpd", c, p["w"].T)[:, :, :3])[:, None])


@row(w=(6, 2, 5))
def tensordot_over_two_axes(p: Params, x: Tensor) -> Tensor:
    return squares(torch.tensordot(x, p["w"], dims=([2, 1], [0, 2]))) + squares(
        torch.tensordot(p["w"][..., 0].T, x.permute(2, 0, 1), 1)[0]
    )


@row(w=(6, 3), b=(3,))
def expanded_over_the_batch(p: Params, x: Tensor) -> Tensor:
    weights = p["w"].expand(len(x), 6, 3)
    return squares(torch.baddbmm(p["b"].expand(len(x), 5, 3), x, weights)) + squares(torch.bmm(x, weights.clone()))


@row(table=(7, 3))
def a_parameter_indexed_by_data(p: Params, x: Tensor) -> Tensor:
    index = (x.sum(-1).abs() * 3).long() % 7
    first, second = p["table"][index], p["table"].index_select(0, index[:, 0])
    return squares(first) + squares(second.sin() * p["table"].gather(0, index[:, :3]))


@row(memory=(3, 6), key=(6, 3))
def written_into_a_memory_for_each_sample(p: Params, x: Tensor) -> Tensor:
    memory = p["memory"].repeat(len(x), 1, 1)
    for t in range(x.shape[1]):
        address = (x[:, t] @ p["key"]).softmax(-1)
        memory = memory * (1 - 0.5 * address.unsqueeze(-1)) + address.unsqueeze(-1) * x[:, t, None]
    return squares(memory)


@row(target=(4, 3, 6), w=(6, 6))
def added_into_a_parameter(p: Params, x: Tensor) -> Tensor:
    index = torch.tensor([0, 2, 1, 0, 2])
    return squares(p["target"].index_add(1, index, x @ p["w"]))


@row(target=(4, 5, 6), start=(4, 6))
def a_parameter_for_each_sample(p: Params, x: Tensor) -> Tensor:
    # The derivative of these sums is the direction itself, which must not be written to.
    h = torch.addcmul(p["target"], x, x.cos()).sin() + torch.lerp(x, p["target"], 0.5)
    return squares(h + torch.rsub(x, p["target"])) + (x[:, 0].clone().addcmul_(p["start"], x[:, 1])).tanh().sum(1)


@row(value=(3,), w=(6, 6))
def put_into_an_activation(p: Params, x: Tensor) -> Tensor:
    where = torch.tensor([0, 2, 4]), torch.tensor([5, 1, 3])
    h = (x @ p["w"]).mT.index_put((torch.tensor([1]),), x.new_ones(()))
    return squares(h.mT.clone().index_put((torch.arange(4)[:, None], *where), p["value"], accumulate=True))


@row(w=(3,))
def scattered_onto_each_sample(p: Params, x: Tensor) -> Tensor:
    index = torch.tensor([[0, 2, 4]]).expand(len(x), 3)
    return squares(x.sum(-1).scatter_add(1, index, p["w"].expand(len(x), 3)))


@row(table=(10, 6), batch=tokens)
def embedding_that_is_the_head_and_a_mean(p: Params, i: Tensor) -> Tensor:
    h = F.embedding(i, p["table"] - p["table"].mean(0))
    return F.cross_entropy(F.linear(h, p["table"]).mT, i, reduction="none").mean(1)


@row(first=(5, 6), second=(5, 6), batch=tokens)
def hashed_embedding(p: Params, i: Tensor) -> Tensor:
    return squares(F.embedding(i * 7 % 5, p["first"]) * F.embedding(i * 3 % 5, p["second"]).sigmoid())


@row(w=(6, 3))
def straight_through_binary_weights(p: Params, x: Tensor) -> Tensor:
    return squares(x @ (p["w"] + (p["w"].sign() - p["w"]).detach()))


@row(filter=(5, 3), w=(6, 3))
def long_convolution_by_fft(p: Params, x: Tensor) -> Tensor:
    spectrum = torch.fft.rfft(x @ p["w"], n=10, dim=1) * torch.fft.rfft(p["filter"], n=10, dim=0)
    return squares(torch.fft.irfft(spectrum, n=10, dim=1)[:, :5])


@row(w=(6, 6), real=(3,), imaginary=(3,))
def rotated_as_complex_numbers(p: Params, x: Tensor) -> Tensor:
    turn = torch.polar(p["real"].exp(), p["imaginary"])
    pairs = torch.view_as_complex((x @ p["w"]).unflatten(-1, (3, 2)).contiguous())
    return squares(torch.view_as_real(pairs * turn).flatten(2)) + (pairs * turn.conj()).angle().cos().sum((1, 2))


@row(
    w=lambda: torch.view_as_complex(normal(6, 3, 2)),
    outcome=fg.InputError,
    says="real floating-point dtype",
    remedy="complex_spectrum_of_real_parts",
)
def complex_parameter(p: Params, x: Tensor) -> Tensor:
    return squares((x.to(p["w"].dtype) @ p["w"]).abs())


@row(w=(6, 3, 2))
def complex_spectrum_of_real_parts(p: Params, x: Tensor) -> Tensor:
    return squares((x.to(torch.complex128) @ torch.view_as_complex(p["w"])).abs())


@row(
    w=(6, 3),
    steps=lambda: torch.tensor(3),
    outcome=fg.InputError,
    says="close over the others",
    remedy="integer_closed_over",
)
def integer_parameter(p: Params, x: Tensor) -> Tensor:
    return squares(x @ p["w"]) * p["steps"]


@row(w=(6, 3))
def integer_closed_over(p: Params, x: Tensor) -> Tensor:
    return squares(x @ p["w"]) * torch.tensor(3)


@row(w=(6, 3), low=lambda: normal(3, 2).bfloat16(), bias=lambda: normal(2).float(), tolerance=2e-2)
def parameters_of_three_precisions(p: Params, x: Tensor) -> Tensor:
    h = (x @ p["w"]).bfloat16() @ p["low"]
    return squares(h.float() + p["bias"]).double()


# -- how often, when and where a parameter is used ----------------------------------------------------


@row(w=(6, 6))
def shared_over_time_and_depth(p: Params, x: Tensor) -> Tensor:
    h = torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        for _ in range(2):
            h = torch.tanh(h @ p["w"] + x[:, t] @ p["w"].T)
    return squares(h)


@row(w=(6, 6), b=(6,))
def until_it_settles(p: Params, x: Tensor) -> Tensor:
    w = 0.5 * p["w"] / torch.linalg.matrix_norm(p["w"], 2)
    h, step = x, x
    while float(step.detach().abs().max()) > 0.05:
        step, h = h, torch.tanh(h @ w + x + p["b"])
        step = h - step
    return squares(h)


@row(w=(6, 6), out=(4, 6, 2))
def early_exit(p: Params, x: Tensor) -> Tensor:
    depth = 0
    while depth < 3 and float(x.detach().abs().mean()) < 0.6:
        x, depth = torch.tanh(x @ p["w"]), depth + 1
    return squares(x @ p["out"][depth])


@row(leaf=(6, 3), join=(6, 3), gate=(3,))
def recursion_over_a_tree(p: Params, x: Tensor) -> Tensor:
    def join(nodes: Tensor) -> Tensor:
        if nodes.shape[1] == 1:
            return torch.tanh(nodes[:, 0] @ p["leaf"])
        middle = (nodes.shape[1] + 1) // 2
        both = torch.cat([join(nodes[:, :middle]), join(nodes[:, middle:])], -1)
        return torch.tanh(both @ p["join"]) * p["gate"]

    return squares(join(x))


@row(w=(6, 3), b=(3,), batch=lambda: [normal(4, n, 6) for n in (1, 3, 2, 3)])
def called_again_with_other_sizes(p: Params, parts: list[Tensor]) -> Tensor:
    return squares(torch.cat([F.linear(part, p["w"].T, p["b"]).tanh() for part in parts], 1))


@row(w=(6, 3), never=(2,))
def some_samples_do_not_use_it(p: Params, x: Tensor) -> Tensor:
    used = x.sum((1, 2)) > 0
    return torch.where(used, squares(x @ p["w"]), x.new_ones(()))


@row(w=(6, 3), v=(3, 2))
def zero_gradients_for_some_samples(p: Params, x: Tensor) -> Tensor:
    live = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=x.dtype)
    return squares(torch.relu(x @ p["w"]) @ p["v"] * live[:, None, None])


@row(w=(6, 3), v=(3, 2))
def zero_gradients_for_all(p: Params, x: Tensor) -> Tensor:
    return squares(torch.relu(-(x @ p["w"]).square() - 1) @ p["v"])


@row(w=(6, 3), s=(4,))
def uncertainty_weights_and_a_penalty(p: Params, x: Tensor) -> Tensor:
    return squares(x @ p["w"]) * torch.exp(-p["s"]) + p["s"] + p["w"].abs().sum() + p["w"].norm()


@row(w=(6, 3))
def detached_in_place(p: Params, x: Tensor) -> Tensor:
    frozen = p["w"].sin()
    h = x @ frozen
    return squares(h + x @ frozen.detach_() * p["w"].sum())


@row(w=(6, 3))
def branch_on_a_parameter(p: Params, x: Tensor) -> Tensor:
    h = x @ p["w"]
    return squares(h if float(p["w"].detach().sum()) > 0 else h.sin()) * p["w"].detach().max().item()


@row(w=(6, 3), cls=(1, 1, 6), position=(6, 6))
def a_learned_token_in_front(p: Params, x: Tensor) -> Tensor:
    h = torch.cat([p["cls"].expand(len(x), -1, -1), x], 1) + p["position"]
    return squares(torch.softmax(h @ h.mT, -1)[:, :1] @ h @ p["w"])


@row(student=(6, 3), v=(3, 2))
def ema_teacher(p: Params, x: Tensor) -> Tensor:
    with torch.no_grad():
        teacher = 0.9 * p["student"].flip(0) + 0.1 * p["student"]
        wanted = (x @ teacher @ p["v"]).softmax(-1)
    return -(wanted * (x @ p["student"] @ p["v"]).log_softmax(-1)).sum((1, 2))


@row(w=(6, 3), table=(4, 3), forward_route=False)
def stop_gradient_codebook(p: Params, x: Tensor) -> Tensor:
    # Forward mode would need the derivative of the distances, which torch has not; the backward never comes there.
    z = torch.tanh(x @ p["w"])
    nearest = torch.cdist(z, p["table"]).argmin(-1)
    code = F.embedding(nearest, p["table"])
    passed = z + (code - z).detach()
    return squares(passed.sin()) + squares(z.detach() - code) + 0.25 * squares(z - code.detach())


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -0.3 * gradient


@row(features=(6, 3), label=(3, 2), domain=(3, 2), forward_route=False)
def gradient_reversal(p: Params, x: Tensor) -> Tensor:
    # Forward mode looks through: only the function's backward knows of the reversal.
    h = torch.tanh(x @ p["features"])
    reversed_features: Tensor = Reverse.apply(h)
    return squares(h @ p["label"]) + squares(reversed_features @ p["domain"])


@row(w=(6, 3), start=(3,))
def scheduled_sampling(p: Params, x: Tensor) -> Tensor:
    h = p["start"].expand(len(x), 3)
    for t in range(x.shape[1]):
        fed = torch.where(torch.rand(len(x), 1) < 0.5, x[:, t, :3], h)
        h = torch.tanh(torch.cat([fed, x[:, t, 3:]], 1) @ p["w"])
    return squares(h)


# -- randomness ---------------------------------------------------------------------------------------


@row(w=(6, 6), logits=(6, 4), code=(4, 3))
def noise_of_many_kinds(p: Params, x: Tensor) -> Tensor:
    h = F.rrelu(F.alpha_dropout(x @ p["w"], 0.3, True), training=True)
    soft = F.gumbel_softmax(h @ p["logits"], hard=True)
    return squares(F.dropout1d(soft @ F.dropout(p["code"], 0.3)))


@row(encoder=(6, 4), decoder=(2, 6))
def variational_autoencoder(p: Params, x: Tensor) -> Tensor:
    mean, log_variance = (x @ p["encoder"]).chunk(2, -1)
    z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
    return squares(z @ p["decoder"] - x) + divergence.sum((1, 2))


@row(w=(6, 3), noise=(3,))
def noise_on_a_weight(p: Params, x: Tensor) -> Tensor:
    w = p["w"] + torch.randn_like(p["w"]) * p["noise"].exp()
    return squares(x @ w + torch.bernoulli(p["noise"].sigmoid()) * p["noise"])


@row(w=(6, 3), rates=(3,))
def samples_of_a_distribution(p: Params, x: Tensor) -> Tensor:
    normals = torch.distributions.Normal((x @ p["w"]), p["rates"].exp(), validate_args=False)
    gamma = torch.distributions.Gamma((x @ p["w"]).exp(), p["rates"].exp(), validate_args=False)
    return -normals.log_prob(normals.rsample().detach()).sum((1, 2)) + gamma.log_prob(x.new_ones(())).sum((1, 2))


# -- derivatives inside the losses --------------------------------------------------------------------


def small_net(p: Params, x: Tensor) -> Tensor:
    return torch.tanh(x @ p["w"]) @ p["v"]


@row(w=(6, 3), v=(3,), outcome=fg.ConservationError, says="by hand", remedy="gradient_penalty_by_hand", batch=rows)
def gradient_penalty(p: Params, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    [slope] = torch.autograd.grad(small_net(p, x).sum(), x, create_graph=True)
    return small_net(p, x) + (slope.norm(dim=1) - 1).square()


@row(w=(6, 3), v=(3,), outcome=fg.ConservationError, says="by hand", remedy="gradient_penalty_by_hand", batch=rows)
def gradient_penalty_by_torch_func(p: Params, x: Tensor) -> Tensor:
    slope = torch.func.grad(lambda x: small_net(p, x).sum())(x)
    return small_net(p, x) + (slope.norm(dim=1) - 1).square()


@row(w=(6, 3), v=(3,), batch=rows)
def gradient_penalty_by_hand(p: Params, x: Tensor) -> Tensor:
    h = torch.tanh(x @ p["w"])
    slope = ((1 - h.square()) * p["v"]) @ p["w"].T
    return h @ p["v"] + (slope.norm(dim=1) - 1).square()


@row(w=(6, 3), v=(3,), outcome=fg.ConservationError, says="by hand", remedy="laplacian_by_hand", batch=rows)
def laplacian(p: Params, x: Tensor) -> Tensor:
    hessians = torch.func.vmap(torch.func.hessian(lambda x: small_net(p, x)))(x)
    return (hessians.diagonal(0, 1, 2).sum(1) - 1).square()


@row(w=(6, 3), v=(3,), batch=rows)
def laplacian_by_hand(p: Params, x: Tensor) -> Tensor:
    h = torch.tanh(x @ p["w"])
    bent = (-2 * h * (1 - h.square()) * p["w"].square().sum(0)) @ p["v"]
    return (bent - 1).square()


@row(w=(6, 3), v=(3,), outcome=fg.ConservationError, says="by hand", remedy="inner_step_by_hand", batch=rows)
def inner_step_by_torch_func(p: Params, x: Tensor) -> Tensor:
    inner = torch.func.grad(lambda v: (x.flip(1) @ p["w"] @ v).square().mean())(p["v"])
    return (x @ p["w"] @ (p["v"] - 0.1 * inner)).square()


@row(w=(6, 3), v=(3,), outcome=fg.UnsupportedOpError, says="used by grad", remedy="inner_step_by_hand", batch=rows)
def inner_step_by_autograd(p: Params, x: Tensor) -> Tensor:
    [inner] = torch.autograd.grad((x.flip(1) @ p["w"] @ p["v"]).square().mean(), p["v"], create_graph=True)
    return (x @ p["w"] @ (p["v"] - 0.1 * inner)).square()


@row(w=(6, 3), v=(3,), batch=rows)
def inner_step_by_hand(p: Params, x: Tensor) -> Tensor:
    features = x.flip(1) @ p["w"]
    inner = 2 * features.T @ (features @ p["v"]) / len(x)
    return (x @ p["w"] @ (p["v"] - 0.1 * inner)).square()


@row(w=(6, 3), v=(3,), batch=rows)
def adversarial_input_through_parameters(p: Params, x: Tensor) -> Tensor:
    near = x.detach().requires_grad_()
    [slope] = torch.autograd.grad(small_net(p, near).square().sum(), near)
    return small_net(p, x + 0.1 * slope.sign()).square()


@row(w=(6, 3), v=(3,), batch=rows)
def adversarial_input(p: Params, x: Tensor) -> Tensor:
    near = x.detach().requires_grad_()
    [slope] = torch.autograd.grad(small_net({k: v.detach() for k, v in p.items()}, near).square().sum(), near)
    return small_net(p, x + 0.1 * slope.sign()).square()


@row(
    w=(6, 3),
    v=(3,),
    outcome=fg.ConservationError,
    says="a torch.func transform of their own",
    remedy="slope_along_by_hand",
    batch=rows,
)
def slope_along_by_jvp(p: Params, x: Tensor) -> Tensor:
    return torch.func.jvp(lambda x: small_net(p, x), (x,), (torch.ones_like(x),))[1].square()


@row(w=(6, 3), v=(3,), batch=rows)
def slope_along_by_hand(p: Params, x: Tensor) -> Tensor:
    h = torch.tanh(x @ p["w"])
    return (((1 - h.square()) * (torch.ones_like(x) @ p["w"])) @ p["v"]).square()


@row(w=(6, 6), rate=())
def ode_by_runge_kutta(p: Params, x: Tensor) -> Tensor:
    def slope(h: Tensor) -> Tensor:
        return torch.tanh(h @ p["w"])

    step = p["rate"].sigmoid()
    for _ in range(2):
        k1 = slope(x)
        k2 = slope(x + step / 2 * k1)
        k3 = slope(x + step / 2 * k2)
        k4 = slope(x + step * k3)
        x = x + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return squares(x)


@row(w=(6, 6), b=(6,))
def fixed_point_with_a_last_step(p: Params, x: Tensor) -> Tensor:
    w = 0.5 * p["w"] / p["w"].norm()
    with torch.no_grad():
        h = x
        for _ in range(20):
            h = torch.tanh(h @ w + x + p["b"])
    return squares(torch.tanh(h @ w + x + p["b"]))


@row(
    members=(3, 6, 2),
    outcome=fg.ConservationError,
    says="a torch.func transform of their own",
    remedy="ensemble_by_einsum",
)
def ensemble_by_vmap(p: Params, x: Tensor) -> Tensor:
    return squares(torch.func.vmap(lambda w: torch.tanh(x @ w), out_dims=1)(p["members"]))


@row(members=(3, 6, 2))
def ensemble_by_einsum(p: Params, x: Tensor) -> Tensor:
    return squares(torch.tanh(torch.einsum("btd,mdp->bmtp", x, p["members"])))


# -- losses of several samples ------------------------------------------------------------------------


@row(w=(6, 3), scale=(), batch=rows)
def clip_symmetric(p: Params, x: Tensor) -> Tensor:
    one, other = F.normalize(x @ p["w"], dim=1), F.normalize(x.sin() @ p["w"], dim=1)
    scores, wanted = one @ other.T * p["scale"].exp(), torch.arange(len(x))
    ce = nn.CrossEntropyLoss(reduction="none")
    return (ce(scores, wanted) + ce(scores.T, wanted)) / 2


def hardest(distance: Tensor) -> Tensor:
    label = torch.tensor([0, 0, 1, 1])
    same = label[:, None] == label
    return torch.relu((distance * same).amax(1) - distance.masked_fill(same, torch.inf).amin(1) + 1)


@row(
    w=(6, 3),
    batch=rows,
    outcome=fg.UnsupportedOpError,
    says="write the op with others that torch can differentiate twice",
    remedy="hardest_triplets_by_norms",
)
def hardest_triplets_by_cdist(p: Params, x: Tensor) -> Tensor:
    h = x @ p["w"]
    return hardest(torch.cdist(h, h))


@row(w=(6, 3), batch=rows)
def hardest_triplets_by_norms(p: Params, x: Tensor) -> Tensor:
    h = x @ p["w"]
    return hardest((h[:, None] - h).norm(dim=-1))


@row(w=(6, 3), batch=rows)
def decorrelated_features(p: Params, x: Tensor) -> Tensor:
    h = x @ p["w"]
    z = (h - h.mean(0)) / h.std(0)
    off = (z.T @ z / len(x) - torch.eye(3, dtype=x.dtype)).square().sum()
    return squares(z.sin()) + off


@row(w=(6, 3), batch=rows)
def best_of_the_batch(p: Params, x: Tensor) -> Tensor:
    h = x @ p["w"]
    return h.topk(4, 0).values.cumsum(0).square().sum(1) + h.max(0).values.sum()


@row(w=(6, 1), batch=rows)
def pairwise_ranking(p: Params, x: Tensor) -> Tensor:
    s = (x @ p["w"])[:, 0]
    return F.softplus(s[None, :] - s[:, None]).triu(1).sum(1) + s.square()


@row(w=(6, 3), batch=rows)
def one_loss_for_each_pair(p: Params, x: Tensor) -> Tensor:
    h, (i, j) = x @ p["w"], torch.triu_indices(len(x), len(x), 1)
    return F.cosine_embedding_loss(h[i], h[j].tanh(), torch.ones(6), reduction="none")


@row(w=(6, 3), v=(3, 2), batch=rows)
def mixed_features(p: Params, x: Tensor) -> Tensor:
    h, order, share = torch.tanh(x @ p["w"]), torch.randperm(len(x)), torch.rand(len(x), 1, dtype=x.dtype)
    return squares((share * h + (1 - share) * h[order]) @ p["v"])


@row(w=(6, 4), batch=rows)
def assignments_by_sinkhorn(p: Params, x: Tensor) -> Tensor:
    scores = x @ p["w"]
    q = scores.exp()
    for _ in range(3):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdim=True)
    return -(q * scores.log_softmax(1)).sum(1)


@row(w=(6, 3), batch=rows)
def normalised_over_the_batch(p: Params, x: Tensor) -> Tensor:
    each = squares(x @ p["w"])
    return each / each.sum() + (each - each.median()).abs()


@row(w=(6, 3), batch=rows)
def a_weak_term_over_the_batch(p: Params, x: Tensor) -> Tensor:
    h = x @ p["w"]
    return squares(h) + 1e-6 * (h - h.mean(0)).exp().sum(1)


@row(w=(6, 3), bank=(3,), batch=rows)
def cumulated_over_the_batch(p: Params, x: Tensor) -> Tensor:
    return squares((x @ p["w"] + p["bank"]).cumsum(0)) + squares(
        (x @ p["w"]).logcumsumexp(0).diff(dim=0, prepend=x[:1, :3])
    )


@case
def two_critics() -> Case:
    with_gradient = nn.Sequential(nn.Linear(6, 3), nn.LeakyReLU(), nn.Linear(3, 1)).double()
    critic = dict(with_gradient.named_parameters())

    def losses(p: Params, x: Tensor) -> Tensor:
        fake = torch.tanh(x[:, 0] @ p["generator"])
        frozen = {k: v.detach() for k, v in p.items() if k != "generator"}
        fooled = F.softplus(-functional_call(with_gradient, frozen, (fake,)))
        own = {k: v for k, v in p.items() if k != "generator"}
        told = F.softplus(functional_call(with_gradient, own, (fake.detach(),)))
        return (fooled + told + F.softplus(-functional_call(with_gradient, own, (x[:, 1],))))[:, 0]

    return Case(losses, {"generator": normal(6, 6), **critic}, inputs())


# -- other layouts ------------------------------------------------------------------------------------


@row(w=(6, 6), kernel=(3, 6, 2))
def convolution_on_token_major_rows(p: Params, x: Tensor) -> Tensor:
    b, t, d = x.shape
    tokens_first = x.transpose(0, 1).reshape(t * b, d) @ p["w"]
    signal = tokens_first.view(t, b, d).permute(1, 2, 0)
    return squares(F.conv1d(signal, p["kernel"]))


@row(w=(6, 6), v=(6, 2))
def heads_folded_into_the_batch(p: Params, x: Tensor) -> Tensor:
    b, t, _ = x.shape
    heads = (x @ p["w"]).view(b, t, 2, 3).permute(0, 2, 1, 3).reshape(2 * b, t, 3)
    mixed = torch.bmm(torch.baddbmm(heads.new_zeros(1), heads, heads.mT).softmax(-1), heads)
    return squares(mixed.view(b, 2, t, 3).transpose(1, 2).reshape(b, t, 6) @ p["v"])


@row(w=(6, 3), b=(3, 1, 1))
def samples_on_the_last_axis(p: Params, x: Tensor) -> Tensor:
    h = torch.tanh(torch.einsum("btd,dp->ptb", x, p["w"]) + p["b"])
    return (h * p["b"]).square().sum((0, 1))


@row(w=(6, 3), v=(3, 3), batch=lambda: (normal(4, 5, 6), torch.tensor([5, 2, 4, 2])))
def packed_by_lengths(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, lengths = batch
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    h = torch.tanh(packed.data @ p["w"])
    back, _ = pad_packed_sequence(packed._replace(data=h), batch_first=True)
    return squares(back @ p["v"])


@case
def lstm_on_packed_sequences() -> Case:
    module = nn.LSTM(6, 3, batch_first=True).double()

    def losses(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        packed = pack_padded_sequence(*batch, batch_first=True, enforce_sorted=False)
        out, (last, _) = functional_call(module, p, (packed,))
        return squares(pad_packed_sequence(out, batch_first=True)[0]) + squares(last[0])

    return Case(losses, dict(module.named_parameters()), (inputs(), torch.tensor([5, 2, 4, 2])))


@row(w=(6, 3), v=(3, 3), batch=lambda: [normal(n, 6) for n in (3, 1, 4, 2)])
def ragged_rows(p: Params, parts: list[Tensor]) -> Tensor:
    h = torch.tanh(torch.cat(parts) @ p["w"])
    padded = pad_sequence(h.split([len(part) for part in parts]), batch_first=True)
    return squares(padded @ p["v"])


@row(w=(6, 3), batch=lambda: [normal(n, 6) for n in (3, 1, 4, 2)])
def one_sample_after_the_other(p: Params, parts: list[Tensor]) -> Tensor:
    return torch.stack([torch.tanh(part @ p["w"]).square().sum() for part in parts])


def segments() -> tuple[Tensor, Tensor]:
    return normal(7, 6), torch.tensor([2, 1, 3, 1])


@row(
    w=(6, 3),
    v=(3, 3),
    batch=segments,
    outcome=fg.UnsupportedOpError,
    says="write the op with others that torch can differentiate twice",
    remedy="segments_added",
)
def segments_reduced(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    h = torch.tanh(batch[0] @ p["w"])
    return squares(torch.segment_reduce(h, "mean", lengths=batch[1]) @ p["v"])


@row(w=(6, 3), v=(3, 3), batch=segments)
def segments_added(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    h, owner = torch.tanh(batch[0] @ p["w"]), torch.arange(4).repeat_interleave(batch[1])
    total = torch.zeros(4, 3, dtype=h.dtype).index_add(0, owner, h)
    return squares((total / batch[1].unsqueeze(1)) @ p["v"])


@row(table=(10, 6), head=(6, 10), batch=tokens)
def masked_tokens_only(p: Params, i: Tensor) -> Tensor:
    masked = torch.tensor([[1, 0, 0, 1, 0], [0, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
    logits = F.embedding(i, p["table"])[masked] @ p["head"]
    loss = F.cross_entropy(logits, i[masked], reduction="none")
    sample = masked.nonzero()[:, 0]
    return torch.zeros(4, dtype=loss.dtype).index_add(0, sample, loss) / masked.sum(1)


# -- kinds of models ----------------------------------------------------------------------------------


def graph() -> tuple[Tensor, Tensor, Tensor]:
    edges = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0], [1, 2, 0, 4, 3, 6, 5, 2]])
    return normal(7, 6), edges, torch.tensor([0, 0, 0, 1, 1, 2, 2])


@row(message=(6, 6), update=(6, 6), batch=graph)
def graph_network(p: Params, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    h, (source, target), owner = batch
    for _ in range(2):
        messages = torch.relu(h[source] @ p["message"])
        h = torch.tanh(torch.zeros_like(h).index_add(0, target, messages) + h @ p["update"])
    return squares(torch.zeros(3, 6, dtype=h.dtype).index_add(0, owner, h))


@row(w=(6, 6), batch=graph)
def graph_attention(p: Params, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    h, (source, target), owner = batch
    h = h @ p["w"]
    score = (h[source] * h[target]).sum(1).exp()
    total = torch.zeros(7, dtype=h.dtype).scatter_add(0, target, score)
    h = torch.zeros_like(h).index_add(0, target, h[source] * (score / total[target]).unsqueeze(1))
    return torch.zeros(3, dtype=h.dtype).scatter_reduce(0, owner, h.square().sum(1), "sum")


@row(w=(6, 3), batch=lambda: (normal(4, 5, 6), torch.randint(0, 2, (5, 3)).double()))
def hypergraph(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, incidence = batch
    edges = torch.tanh(incidence.T @ (x @ p["w"]))
    return squares(incidence @ edges / (1 + incidence.sum(1, keepdim=True)))


@row(phi=(6, 4), rho=(4, 2))
def deep_sets(p: Params, x: Tensor) -> Tensor:
    h = torch.relu(x @ p["phi"])
    return squares(torch.cat([h.sum(1), h.amax(1), h.logsumexp(1)]).view(3, len(x), 4).sum(0) @ p["rho"])


@row(router=(6, 3), up=(3, 6, 4), down=(3, 4, 6))
def dense_mixture_of_experts(p: Params, x: Tensor) -> Tensor:
    gate = (x @ p["router"]).softmax(-1)
    h = torch.relu(torch.einsum("btd,edh->bteh", x, p["up"]))
    return squares(torch.einsum("bteh,ehd,bte->btd", h, p["down"], gate))


@row(router=(6, 3), experts=(3, 6, 6))
def experts_top_two(p: Params, x: Tensor) -> Tensor:
    h = x.flatten(0, 1)
    weights, chosen = (h @ p["router"]).softmax(-1).topk(2, -1)
    out = torch.zeros_like(h)
    for expert in range(3):
        where, rank = torch.where(chosen == expert)
        out = out.index_add(0, where, (h[where] @ p["experts"][expert]).tanh() * weights[where, rank, None])
    return squares(out.view_as(x)) + (weights.view(len(x), -1).sum(1) - 1).square()


@row(w=(6, 3), means=(3, 4), scales=(3, 4))
def mixture_density(p: Params, x: Tensor) -> Tensor:
    h = torch.tanh(x[:, :, :] @ p["w"])
    share, mean, deviation = h @ p["means"], h @ p["scales"], (h @ p["means"]).exp()
    log = share.log_softmax(-1) - 0.5 * ((x[..., :1] - mean) / deviation).square() - deviation.log()
    return -log.logsumexp(-1).sum(1)


@row(qkv=(6, 18), bias=(2, 9), slopes=(2,))
def attention_with_biases(p: Params, x: Tensor) -> Tensor:
    b, t = x.shape[:2]
    q, k, v = (part.view(b, t, 2, 3).transpose(1, 2) for part in (x @ p["qkv"]).chunk(3, -1))
    offset = torch.arange(t)[:, None] - torch.arange(t)
    relative = p["bias"][:, offset + t - 1] - p["slopes"].exp()[:, None, None] * offset.abs()
    causal = torch.where(offset < 0, -torch.inf, 0.0).to(x.dtype)
    return squares(F.scaled_dot_product_attention(q, k, v, attn_mask=relative + causal))


@row(qk=(6, 12), frequency=(3,))
def rotary_attention(p: Params, x: Tensor) -> Tensor:
    angle = torch.arange(5, dtype=x.dtype)[:, None] * p["frequency"].exp()
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)

    def turned(h: Tensor) -> Tensor:
        return h * cos + torch.cat([-h[..., 3:], h[..., :3]], -1) * sin

    q, k = (x @ p["qk"]).chunk(2, -1)
    return squares((turned(q) @ turned(k).mT / math.sqrt(6)).softmax(-1) @ x)


@row(qkv=(6, 9), decay=(3,))
def linear_attention(p: Params, x: Tensor) -> Tensor:
    q, k, v = (x @ p["qkv"]).chunk(3, -1)
    state = (F.elu(k) + 1).unsqueeze(-1) * v.unsqueeze(-2) * p["decay"].sigmoid()[:, None]
    return squares(torch.einsum("btd,btdp->btp", F.elu(q) + 1, state.cumsum(1)))


@row(project=(6, 6), step=(6,), a=(6, 2), bc=(6, 4), skip=(6,), kernel=(6, 1, 2))
def selective_state_space(p: Params, x: Tensor) -> Tensor:
    u = F.silu(F.conv1d((x @ p["project"]).mT, p["kernel"], padding=1, groups=6)[..., :-1].mT)
    delta, (b, c) = F.softplus(u * p["step"]), (u @ p["bc"]).chunk(2, -1)
    h, out = u.new_zeros(len(u), 6, 2), []
    for t in range(u.shape[1]):
        h = torch.exp(-delta[:, t, :, None] * p["a"].exp()) * h
        h = h + delta[:, t, :, None] * b[:, t, None] * u[:, t, :, None]
        out.append((h * c[:, t, None]).sum(-1) + p["skip"] * u[:, t])
    return squares(torch.stack(out, 1))


@row(shift=(3, 3), scale=(3, 3), mix=(6, 6))
def normalising_flow(p: Params, x: Tensor) -> Tensor:
    log_det = x.new_zeros(len(x))
    for _ in range(2):
        left, right = x.chunk(2, -1)
        log_scale = torch.tanh(left @ p["scale"])
        x = torch.cat([left, right * log_scale.exp() + left @ p["shift"]], -1) @ p["mix"]
        log_det = log_det + log_scale.sum((1, 2)) + x.shape[1] * torch.linalg.slogdet(p["mix"]).logabsdet
    return 0.5 * squares(x) - log_det


@row(w=(3, 6, 4))
def capsules_routed_by_agreement(p: Params, x: Tensor) -> Tensor:
    votes, logits = torch.einsum("btd,kdp->btkp", x, p["w"]), x.new_zeros(4, 5, 3)
    for _ in range(3):
        out = (logits.softmax(-1).unsqueeze(-1) * votes).sum(1)
        out = out * out.norm(dim=-1, keepdim=True) / (1 + out.square().sum(-1, keepdim=True))
        logits = logits + (votes * out[:, None]).sum(-1)
    return out.norm(dim=-1).sum(1)


@row(frequencies=(6, 4), w=(8, 2))
def learned_fourier_features(p: Params, x: Tensor) -> Tensor:
    angle = 2 * math.pi * x @ p["frequencies"]
    return squares(torch.cat([angle.sin(), angle.cos()], -1) @ p["w"])


@row(theta=(2, 3), kernel=(4, 2, 3, 3), batch=lambda: normal(4, 2, 6, 6))
def spatial_transformer(p: Params, x: Tensor) -> Tensor:
    grid = F.affine_grid(p["theta"].expand(len(x), 2, 3), list(x.shape), align_corners=False)
    h = F.pixel_shuffle(F.conv2d(F.grid_sample(x, grid, align_corners=False), p["kernel"], padding=1), 2)
    return squares(F.interpolate(h, scale_factor=0.5, mode="bilinear"))


@row(w=(3, 18), bias=(3,), batch=lambda: normal(4, 2, 6, 6))
def convolution_by_unfolding(p: Params, x: Tensor) -> Tensor:
    patches = p["w"] @ F.unfold(x, 3, padding=1) + p["bias"][:, None]
    return squares(F.fold(patches.repeat(1, 4, 1), (7, 7), 2)) + squares(
        x.unfold(2, 2, 2)[:, 0, ..., 0] @ p["w"][:, :6].T
    )


@row(w=(6, 6), batch=lambda: (normal(4, 5, 6), torch.tensor([[1, 2], [3, 3], [5, 1], [2, 4]])), forward_route=False)
def connectionist_temporal(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, targets = batch
    log = (x @ p["w"]).log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(log, targets, torch.tensor([5, 5, 4, 5]), torch.tensor([2, 2, 1, 2]), reduction="none")


@row(emission=(6, 3), transition=(3, 3))
def forward_algorithm_with_forbidden_steps(p: Params, x: Tensor) -> Tensor:
    allowed = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, 0.0, 0.0], [-torch.inf, 0.0, 0.0]], dtype=x.dtype)
    scores, steps = x @ p["emission"], p["transition"] + allowed
    alpha = scores[:, 0]
    for t in range(1, 5):
        alpha = (alpha.unsqueeze(2) + steps).logsumexp(1) + scores[:, t]
    return alpha.logsumexp(1)


@row(w=(6, 3))
def quantiles_and_soft_counts(p: Params, x: Tensor) -> Tensor:
    h = x @ p["w"]
    bins = torch.linspace(-2, 2, 4, dtype=x.dtype)
    counts = torch.exp(-(h.unsqueeze(-1) - bins).square()).sum((1, 2))
    off = h[..., 0] - 0.3
    return torch.maximum(0.9 * off, -0.1 * off).sum(1) + squares(counts) + h.flatten(1).quantile(0.25, 1)


@row(w=(6, 4), temperature=())
def distillation_and_focal(p: Params, x: Tensor) -> Tensor:
    logits = (x @ p["w"]) / p["temperature"].exp()
    told = F.kl_div(logits.log_softmax(-1), x[..., :4].softmax(-1), reduction="none").sum((1, 2))
    ce = F.cross_entropy(logits.mT, torch.zeros(4, 5, dtype=torch.long), label_smoothing=0.1, reduction="none")
    return told + ((1 - torch.exp(-ce)).square() * ce).sum(1)


@row(w=(6, 3), batch=rows)
def product_with_sparse_data(p: Params, x: Tensor) -> Tensor:
    return squares(torch.sparse.mm((x * (x > 0)).to_sparse(), p["w"]))


@row(w=(6, 3), tolerance=1e-10, batch=lambda: normal(1, 5, 6))
def one_sample(p: Params, x: Tensor) -> Tensor:
    return squares(torch.tanh(x @ p["w"]).cumsum(1))


@row(w=(6, 3), g=(3,), batch=lambda: normal(1, 5, 6))
def one_sample_with_batch_statistics(p: Params, x: Tensor) -> Tensor:
    h = F.batch_norm((x @ p["w"]).flatten(0, 1), None, None, p["g"], training=True)
    return squares(h.sin().view(1, 5, 3))


# -- steps that follow one another --------------------------------------------------------------------


class Sequel(NamedTuple):
    """One loss on one batch after the other; `plans` is how many it takes, if that matters."""

    losses: Callable[[Params, Any], Tensor]
    params: Params
    batches: list[Any]
    plans: int | None


SEQUELS: dict[str, Callable[[], Sequel]] = {}


def sequel(
    batches: Callable[[], list[Any]], plans: int | None = 1, **sizes: tuple[int, ...]
) -> Callable[[Callable[[Params, Any], Tensor]], Callable[[Params, Any], Tensor]]:
    """Steps from their losses, and the shapes of the parameters."""

    def add(losses: Callable[[Params, Any], Tensor]) -> Callable[[Params, Any], Tensor]:
        def make() -> Sequel:
            return Sequel(losses, {k: normal(*size) for k, size in sizes.items()}, batches(), plans)

        SEQUELS[losses.__name__] = make
        return losses

    return add


def with_rows(*others: Any) -> Callable[[], list[Any]]:
    """New rows [4, 6] for each of the others."""
    return lambda: [(rows(), other) for other in others]


def shares(*lines: Sequence[float]) -> Tensor:
    return torch.tensor(lines, dtype=torch.float64)


@sequel(lambda: [normal(b, t, 6) for b, t in ((4, 5), (2, 5), (7, 3), (5, 5), (4, 1), (4, 5))], w=(6, 6), v=(6, 2))
def other_batch_sizes_and_lengths(p: Params, x: Tensor) -> Tensor:
    h = torch.tanh(x.transpose(0, 1) @ p["w"])
    return squares((h.cumsum(0) @ p["v"]).transpose(0, 1))


@sequel(lambda: [normal(b, 5, 6) for b in (1, 4, 1, 3, 1)], plans=2, w=(6, 6), v=(6, 2))
def one_sample_and_then_more(p: Params, x: Tensor) -> Tensor:
    return squares(torch.tanh(x.transpose(0, 1) @ p["w"]).transpose(0, 1) @ p["v"])


@sequel(lambda: [normal(b, 5, 6) for b in (4, 1, 2, 1)], w=(6, 6), v=(6, 2))
def more_samples_and_then_one(p: Params, x: Tensor) -> Tensor:
    return squares(torch.tanh(x.transpose(0, 1) @ p["w"]).transpose(0, 1) @ p["v"])


@sequel(lambda: [normal(4, 5, 6) for _ in range(6)], router=(6, 3), experts=(3, 6, 6), w=(6, 6))
def experts_in_sorted_order(p: Params, x: Tensor) -> Tensor:
    h = (x @ p["w"]).tanh().flatten(0, 1)
    gate, chosen = (h @ p["router"]).softmax(-1).max(-1)
    order = chosen.argsort(stable=True)
    found = torch.einsum("nd,ndp->np", h[order], p["experts"][chosen[order]]).tanh() * gate[order, None]
    return squares(found[order.argsort()].view_as(x))


@sequel(lambda: [(normal(4, 5, 6), torch.randint(0, 5, (4,))) for _ in range(5)], w=(6, 3), v=(3, 2))
def pooled_at_other_indices(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, last = batch
    return squares(torch.tanh(x @ p["w"])[torch.arange(len(x)), last] @ p["v"])


@sequel(lambda: [(normal(4, 5, 6), torch.rand(4, 5) < 0.7) for _ in range(4)], w=(6, 6), v=(6, 2))
def other_masks_within_samples(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, seen = batch
    seen = seen | ~seen.any(1, keepdim=True)
    h = x @ p["w"]
    scores = (h @ h.mT).masked_fill(~seen[:, None], -torch.inf)
    return squares((scores.softmax(-1) @ h @ p["v"]) * seen.unsqueeze(-1))


@sequel(lambda: [normal(4, 5, 6) * size for size in (1.0, 0.01, 1.0, 0.2, 0.01)], plans=2, w=(6, 6), out=(4, 6, 2))
def depth_by_data(p: Params, x: Tensor) -> Tensor:
    depth = 0
    while depth < 3 and float(x.detach().abs().mean()) < 0.1 * 2**depth:
        x, depth = 3 * torch.tanh(x @ p["w"]), depth + 1
    return squares(x @ p["out"][depth])


@sequel(
    lambda: [(normal(4, 5, 6), torch.tensor(n)) for n in ([5, 5, 5, 5], [5, 2, 4, 2], [4, 3, 1, 5], [5, 4, 4, 2])],
    plans=2,
    w=(6, 3),
    v=(3, 3),
)
def packed_by_other_lengths(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    return packed_by_lengths(p, batch)


@sequel(lambda: [[normal(n, 6) for n in sizes] for sizes in ([4, 1, 5], [1, 4, 5], [2, 2, 2], [4, 1])], 2, w=(6, 3))
def other_ragged_rows(p: Params, parts: list[Tensor]) -> Tensor:
    h = torch.tanh(torch.cat(parts) @ p["w"])
    return squares(pad_sequence(h.split([len(part) for part in parts]), batch_first=True))


@sequel(lambda: [rows() for _ in range(4)], w=(6, 3), v=(3, 2))
def another_order_of_the_batch(p: Params, x: Tensor) -> Tensor:
    h = torch.tanh(x @ p["w"])
    order = h.detach().sum(1).argsort()
    return squares(h[order] @ p["v"])[order.argsort()]


@sequel(lambda: [-rows().abs(), rows(), rows()], w=(6, 3))
def dead_at_first(p: Params, x: Tensor) -> Tensor:
    return squares(torch.relu((x @ p["w"].abs()).cumsum(1)))


@sequel(lambda: [(rows(), lam) for lam in (0.0, 0.5, 1.0)], plans=2, w=(6, 3), v=(3, 2))
def a_term_that_starts_at_zero(p: Params, batch: tuple[Tensor, float]) -> Tensor:
    h = torch.tanh(batch[0] @ p["w"])
    return squares(h) + batch[1] * squares(h @ p["v"])


@sequel(lambda: [(graph()[0], graph()[1][:, torch.randperm(8)], graph()[2]) for _ in range(3)], w=(6, 3))
def other_edges(p: Params, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    h, (source, target), owner = batch
    h = torch.tanh(h @ p["w"])
    h = torch.zeros_like(h).index_add(0, target, h[source])
    return squares(torch.zeros(3, 3, dtype=h.dtype).index_add(0, owner, h))


@sequel(with_rows(False, True, False, True), plans=2, w=(6, 3))
def statistics_by_a_flag(p: Params, batch: tuple[Tensor, bool]) -> Tensor:
    h = batch[0] @ p["w"]
    return squares(F.batch_norm(h, h.new_zeros(3), h.new_ones(3), training=batch[1]).sin())


@sequel(lambda: [(normal(8, 6), order) for order in (torch.arange(8), torch.randperm(8))], plans=2, w=(6, 3), v=(3, 2))
def paired_after_another_order(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    moved = torch.tanh(batch[0] @ p["w"])[batch[1]]
    return squares(torch.einsum("ndk,dp->npk", moved.unfold(0, 2, 2), p["v"]))


# Samples that are apart at first, and later are not where the plan says.

FIRST, LATER = [1.0, 1, 1, 0, 0, 0], [0.0, 1, 1, 1, 1, 1]
UNSEEN_ORDER = "which of the values an op takes is not in the checksum of the program"


@sequel(
    lambda: [(normal(6, 6), m) for m in (shares(FIRST, FIRST[::-1]), shares(LATER[::-1], [0] * 5 + [1]))],
    None,
    w=(6, 3),
)
def pooled_by_a_matrix_of_data(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    return squares(batch[1] @ torch.tanh(batch[0] @ p["w"]))


@sequel(
    lambda: [(normal(6, 6), torch.tensor(s)) for s in ([0, 0, 0, 1, 1, 1], [0, 1, 0, 1, 1, 1])],
    None,
    w=(6, 3),
)
def packed_segments_by_one_hot(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    each = torch.tanh(batch[0] @ p["w"]).square().sum(1)
    return F.one_hot(batch[1], 2).T.to(each.dtype) @ each


@sequel(with_rows(torch.ones(4, 1) > 0, torch.tensor([[1], [0], [0], [1]]) > 0), None, w=(6, 3))
def chosen_from_two_samples(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    h = batch[0] @ p["w"]
    return squares(torch.where(batch[1], h, h.flip(0)))


@sequel(with_rows(torch.eye(4) < 1, torch.zeros(4, 4) > 0), None, w=(6, 3))
def attention_over_the_batch_behind_a_mask(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    h = batch[0] @ p["w"]
    return squares((h @ h.T).masked_fill(batch[1], -torch.inf).softmax(1) @ h)


@sequel(with_rows(0.0, 0.5), None, w=(6, 3))
def a_term_over_the_batch_that_starts_at_zero(p: Params, batch: tuple[Tensor, float]) -> Tensor:
    h = batch[0] @ p["w"]
    return squares(h) + batch[1] * (h - h.mean(0)).exp().sum(1)


@sequel(with_rows(shares([0.0])[0], shares([0.5])[0]), None, w=(6, 3))
def a_term_over_the_batch_weighted_by_a_tensor(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    h = batch[0] @ p["w"]
    return squares(h) + batch[1] * (h - h.mean(0)).exp().sum(1)


@sequel(with_rows(shares([0.0])[0], shares([0.5])[0]), None, w=(6, 3))
def a_term_over_the_batch_weighted_in_place(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    h = batch[0] @ p["w"]
    return squares(h + (h - h.mean(0)).sin().mul_(batch[1]))


@sequel(with_rows(torch.ones(4, 1) > 0, torch.tensor([[1], [0], [0], [1]]) > 0), None, w=(6, 3))
def a_term_over_the_batch_masked_in_place(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    h = batch[0] @ p["w"]
    return squares(h + (h - h.mean(0)).sin().masked_fill_(batch[1], 0.0))


@sequel(with_rows(torch.ones(4) > 0, torch.tensor([1, 0, 0, 1]) > 0), None, w=(6, 3))
def a_term_over_the_batch_overwritten(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    h = batch[0] @ p["w"]
    term = (h - h.mean(0)).sin()
    term[batch[1]] = 0.0
    return squares(h + term)


@sequel(with_rows(torch.tensor([0, 1, 2, 3]), torch.tensor([1, 1, 1, 1])), None, w=(6, 3))
def a_term_over_the_batch_overwritten_by_number(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    h = batch[0] @ p["w"]
    term = (h - h.mean(0)).sin()
    term[batch[1]] = 0.0
    return squares(h + term)


@sequel(with_rows(-9.0, 9.0), None, w=(6, 3))
def a_term_over_the_batch_that_is_off_in_place(p: Params, batch: tuple[Tensor, float]) -> Tensor:
    h = batch[0] @ p["w"]
    return squares(h + F.relu(h - h.mean(0) + batch[1], inplace=True))


@sequel(lambda: [5 * rows(), 0.02 * rows()], None, w=(6, 3))
def a_margin_that_nothing_is_within(p: Params, x: Tensor) -> Tensor:
    h = x @ p["w"]
    return squares(h) + torch.relu(0.1 - (h[:, None] - h).square().sum(-1)).sum(1)


@sequel(with_rows(torch.arange(4), torch.tensor([2, 0, 1, 1])), None, w=(6, 3))
def activations_as_a_table(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    return squares(F.embedding(batch[1], batch[0] @ p["w"]))


@sequel(lambda: [(normal(6, 6), torch.tensor([0, n])) for n in (3, 1)], None, w=(6, 3))
def activations_in_bags(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    return squares(F.embedding_bag(torch.arange(6), torch.tanh(batch[0] @ p["w"]), batch[1], mode="sum"))


@sequel(lambda: [torch.arange(4.0, dtype=torch.float64)[:, None].expand(4, 6), -rows()], None, w=(6, 3))
def largest_so_far(p: Params, x: Tensor) -> Tensor:
    return squares((x @ p["w"].abs()).cummax(0).values)


@sequel(
    with_rows(
        *(
            torch.stack([torch.eye(4)[o] * m, torch.eye(4) * (1 - m)], 1).double()
            for o, m in (([0, 1, 2, 3], torch.ones(4, 1)), ([3, 2, 1, 0], shares([1.0], [0.0], [1.0], [0.0])))
        )
    ),
    None,
    w=(6, 3),
    experts=(2, 3, 3),
)
def experts_by_a_dispatch_mask(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    h, dispatch = batch[0] @ p["w"], batch[1]
    slots = torch.einsum("sec,sd->ecd", dispatch, h)
    return squares(torch.einsum("sec,ecd->sd", dispatch, torch.tanh(slots @ p["experts"])))


@sequel(with_rows((0, 1, 2, 3), (3, 1, 2, 0), (0, 0, 1, 1)), None, w=(6, 3))
def rows_ordered_by_python(p: Params, batch: tuple[Tensor, tuple[int, ...]]) -> Tensor:
    each = (batch[0] @ p["w"]).unbind(0)
    return squares(torch.stack([each[i] for i in batch[1]]))


@sequel(with_rows(0.0, 0.5), None, w=(6, 18), out=(6, 6))
def attention_whose_dropout_starts_at_zero(p: Params, batch: tuple[Tensor, float]) -> Tensor:
    x, nothing = batch[0].view(2, 2, 6), torch.zeros(0)
    return squares(
        F.multi_head_attention_forward(
            *(x, x, x, 6, 2, p["w"].T, None, None, None, False, batch[1], p["out"], None),
            need_weights=bool(len(nothing)),
        )[0].transpose(0, 1)
    )


class Stopped(torch.autograd.Function):
    """The identity, for a number that is zero without a gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, number: float) -> Tensor:
        ctx.number = number
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * ctx.number if ctx.number else None, None


@sequel(with_rows(0.0, 0.5), plans=2, w=(6, 3), v=(6, 3))
def used_after_all(p: Params, batch: tuple[Tensor, float]) -> Tensor:
    return squares(Stopped.apply(batch[0] @ p["w"], batch[1]) + batch[0] @ p["v"])
