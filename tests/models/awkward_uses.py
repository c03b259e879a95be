"""Layers put together, uses of parameters, samples that mix or move, checkpoints."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import funcghost as fg
from tests.models.awkward_cases import Case, Params, case, inputs, normal, row, squares, tokens


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

    return Case(losses, {"b": normal(6)}, inputs())


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
        says="call ordinary torch ops in place of the Function",
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

    return Case(losses, {"a": normal(6, 3), "b": normal(3, 3)}, (normal(4, 6), torch.arange(4)))


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
