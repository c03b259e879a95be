"""What `bench_pairs.py` measures: the shapes, funcghost's reducers on them, and the obvious alternatives.

The alternatives are used as their documentation says; each gives the training gradient too. Whatever they need to set
up once is done before anything is measured.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

import funcghost as fg
from tests.benchmarks.models import (
    GPT,
    LARGE,
    Losses,
    Params,
    decoder,
    first_class,
    half_square,
    next_token,
    perceptron,
    resnet,
)

Result = Literal["norm", "gram", "cross"]
Route = Callable[[], Any]
ROUTES: tuple[Literal["cheapest", "ghost", "materialise"], ...] = ("cheapest", "ghost", "materialise")


@dataclass(frozen=True, eq=False)
class Shape:
    """A model with a batch of training samples, followed in `both` by `num_val` of validation."""

    name: str
    model: nn.Module
    criterion: Callable[[Any, Any], Tensor]
    both: Tensor
    num_val: int

    @property
    def train(self) -> Tensor:
        """The training samples."""
        return self.both[: len(self.both) - self.num_val]

    @property
    def params(self) -> Params:
        """The parameters by name, tied ones once."""
        return dict(self.model.named_parameters())

    @property
    def losses(self) -> Losses:
        """The losses as a function of parameters and batch."""
        return fg.module_losses(self.model, self.criterion)


def mlp(device: torch.device) -> Shape:
    return Shape("mlp", perceptron([1024] * 5).to(device), half_square, torch.randn(80, 1024, device=device), 16)


def gpt(length: int, tied: bool = True) -> Callable[[torch.device], Shape]:
    def build(device: torch.device) -> Shape:
        model = GPT(vocabulary=8192, length=length, width=256, layers=4, heads=4, tied=tied).to(device)
        tokens = torch.randint(8192, (12, length), device=device)
        return Shape(f"gpt{length}" + ("" if tied else "-untied"), model, next_token, tokens, 4)

    return build


def images(device: torch.device) -> Shape:
    return Shape("resnet", resnet().to(device), first_class, torch.randn(40, 3, 32, 32, device=device), 8)


def large(name: str, device: torch.device) -> Shape:
    """A decoder of a size that fills a GPU, in bfloat16 there."""
    size = LARGE[name]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    rows = size["batch"] + max(size["batch"] // 2, 1)
    tokens = torch.randint(size["vocabulary"], (rows, size["length"]), device=device)
    return Shape(name, decoder(name).to(device, dtype), next_token, tokens, rows - size["batch"])


SHAPES: dict[str, Callable[[torch.device], Shape]] = {
    "mlp": mlp,
    "gpt128": gpt(128),
    "gpt512": gpt(512),
    "gpt128-untied": gpt(128, tied=False),
    "resnet": images,
}
LARGE_SHAPES: dict[str, Callable[[torch.device], Shape]] = {name: partial(large, name) for name in LARGE}


@dataclass(frozen=True, eq=False)
class Contender:
    """A way to get something: `prepare` sets it up on a shape, with a plan if it takes one, and gives what is measured.

    `gives` says what comes out, for comparison. `batch` is "train" or "both". `reducer` is funcghost's.
    """

    name: str
    prepare: "Prepare"
    batch: Literal["train", "both"] = "train"
    gives: Result | None = None
    reducer: Callable[[Shape], Any] | None = None
    options: fg.Options | None = None

    def of(self, shape: Shape) -> Tensor:
        """Its batch."""
        return shape.train if self.batch == "train" else shape.both

    def plan(self, shape: Shape) -> fg.Plan | None:
        """The plan of funcghost's, with the predicted cost of contractions."""
        if self.reducer is None:
            return None
        return fg.plan(shape.losses, shape.params, self.of(shape), self.reducer(shape), self.options)


Prepare = Callable[[Shape, fg.Plan | None], Route]


def contenders(forced: bool, compiled: bool) -> list[Contender]:
    """All of them: funcghost's with `forced` routes as well, and steps `compiled` by `torch.compile`."""
    return [
        Contender("plain step", lambda shape, _: plain(shape.losses, shape.params, shape.train)),
        Contender("plain step, both", lambda shape, _: plain(shape.losses, shape.params, shape.both), "both"),
        *ours(ROUTES if forced else ROUTES[:1], ("step", "score", "compiled step") if compiled else ("step", "score")),
        *([Contender("compiled plain step", compiled_plain)] if compiled else []),
        *peers(),
    ]


def compiled_plain(shape: Shape, _: fg.Plan | None) -> Route:
    step = plain(torch.compile(shape.losses, fullgraph=True), shape.params, shape.train)
    step()
    return step


def plain(losses: Losses, params: Params, batch: Tensor) -> Route:

    def step() -> Any:
        leaves = {name: parameter.detach().requires_grad_() for name, parameter in params.items()}
        return torch.autograd.grad(losses(leaves, batch).mean(), list(leaves.values()))

    return step


def direction_of(shape: Shape) -> Params:
    generator = torch.Generator(shape.both.device).manual_seed(1)
    return {
        name: torch.randn(parameter.shape, generator=generator, device=parameter.device)
        for name, parameter in shape.params.items()
    }


def ours(routes: tuple[Literal["cheapest", "ghost", "materialise"], ...], modes: Sequence[str]) -> Iterator[Contender]:
    """Each reducer with the training gradient ("step") and alone ("score"); those that are aimed at compiled, too."""

    def transformed(
        mode: str, batch: Literal["train", "both"], make: Callable[[Shape], Any], options: fg.Options
    ) -> Prepare:
        def prepare(shape: Shape, plan: fg.Plan | None) -> Route:
            own, reducer, params = shape.train if batch == "train" else shape.both, make(shape), shape.params
            if mode == "pairs":
                pairs = fg.pairs(shape.losses, plan=plan, options=options)
                return lambda: pairs(params, own)
            if mode != "score":
                step = fg.grad_and_reduce(shape.losses, reduction="sum", plan=plan, options=options)
                if mode == "compiled step":
                    step = torch.compile(step, fullgraph=True)
                    step(params, own, reducer)
                return lambda: step(params, own, reducer).reduced
            score = fg.reduce(shape.losses, plan=plan, options=options)
            return lambda: score(params, own, reducer)

        return prepare

    reducers: list[tuple[str, Literal["train", "both"], Result | None, Callable[[Shape], Any], bool]] = [
        ("dot", "train", None, lambda shape: fg.dot(direction_of(shape)), False),
        ("squared_norm", "train", "norm", lambda shape: fg.squared_norm(), True),
        ("gram", "train", "gram", lambda shape: fg.gram(), True),
        ("cross", "both", "cross", lambda shape: fg.cross(shape.num_val), True),
        ("project(256)", "train", None, lambda shape: fg.project(256), False),
        ("project(256, kronecker)", "train", None, lambda shape: fg.project(256, kind="kronecker"), False),
    ]
    for name, batch, gives, make, quadratic in reducers:
        for route in routes if quadratic else routes[:1]:
            options = fg.Options(inner_products=route, verify="never")
            for mode in modes:
                if mode == "compiled step" and (gives not in ("norm", "cross") or route != "cheapest"):
                    continue
                label = f"{name} {mode}" + ("" if route == "cheapest" else f", {route}")
                prepare = transformed(mode, batch, make, options)
                yield Contender(label, prepare, batch, gives, make, options)
    options = fg.Options(verify="never")
    yield Contender(
        "pairs", transformed("pairs", "train", lambda shape: (), options), reducer=lambda shape: (), options=options
    )


def peers() -> Iterator[Contender]:
    """`vmap(grad)`, Opacus and TorchJD."""
    for result in ("norm", "gram", "cross"):
        batch: Literal["train", "both"] = "both" if result == "cross" else "train"
        yield Contender(f"vmap(grad): {result}", by_vmap(result), batch, result)
        yield Contender(f"Opacus, per sample: {result}", by_opacus(result), batch, result)
        if result != "norm":
            yield Contender(f"TorchJD: {result}", by_torchjd(result), batch, result)
    yield Contender("Opacus, ghost: norm", by_opacus_ghost, "train", "norm")


def _inner(rows: list[Tensor], result: Result, num_val: int) -> Tensor:
    """What is asked for of per-sample gradients [b, ...], parameter by parameter."""
    flat = [row.flatten(1) for row in rows]
    if result == "norm":
        return torch.stack([row.square().sum(1) for row in flat]).sum(0)
    if result == "gram":
        return torch.stack([row @ row.T for row in flat]).sum(0)
    return torch.stack([row[:-num_val] @ row[-num_val:].T for row in flat]).sum(0)


def by_vmap(result: Result) -> Prepare:
    def prepare(shape: Shape, _: fg.Plan | None) -> Route:
        losses, batch = shape.losses, shape.both if result == "cross" else shape.train
        params = {name: parameter.detach() for name, parameter in shape.params.items()}

        def loss(params: Params, example: Tensor) -> Tensor:
            return losses(params, example.unsqueeze(0))[0]

        each = torch.func.vmap(torch.func.grad(loss), (None, 0))

        def step() -> Tensor:
            rows = each(params, batch)
            _ = {name: row.sum(0) for name, row in rows.items()}
            return _inner(list(rows.values()), result, shape.num_val)

        return step

    return prepare


def _own(shape: Shape) -> nn.Module:
    """A copy of the model for libraries that put hooks on it."""
    return copy.deepcopy(shape.model).train()


def by_opacus(result: Result) -> Prepare:
    """`GradSampleModule`: the backward leaves `grad_sample` on every parameter."""

    def prepare(shape: Shape, _: fg.Plan | None) -> Route:
        from opacus import GradSampleModule

        batch = shape.both if result == "cross" else shape.train
        model = GradSampleModule(_own(shape), loss_reduction="sum")

        def step() -> Tensor:
            model.zero_grad(set_to_none=True)
            shape.criterion(model(batch), batch).sum().backward()
            found = _inner([p.grad_sample for p in model.parameters()], result, shape.num_val)
            model.zero_grad(set_to_none=True)
            return found

        return step

    return prepare


def by_opacus_ghost(shape: Shape, _: fg.Plan | None) -> Route:
    """`GradSampleModuleFastGradientClipping`: the backward leaves the norm for every parameter."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    model = GradSampleModuleFastGradientClipping(_own(shape), loss_reduction="sum", use_ghost_clipping=True)

    def step() -> Any:
        model.zero_grad(set_to_none=True)
        shape.criterion(model(shape.train), shape.train).sum().backward()
        return model.get_norm_sample().square()

    return step


def by_torchjd(result: Result) -> Prepare:
    """`autogram.Engine`: the Gramian first, then the gradient from the graph that was kept."""

    def prepare(shape: Shape, _: fg.Plan | None) -> Route:
        from torchjd.autogram import Engine

        model, batch = _own(shape), shape.both if result == "cross" else shape.train
        engine = Engine(model, batch_dim=0)

        def step() -> Any:
            losses = shape.criterion(model(batch), batch)
            gramian = engine.compute_gramian(losses)
            losses.sum().backward()
            model.zero_grad(set_to_none=True)
            return gramian if result == "gram" else gramian[: -shape.num_val, -shape.num_val :]

        return step

    return prepare


def quiet() -> None:
    """Drops the warnings of libraries about what is meant here."""
    for message in ("There is a performance drop", "Full backward hook", "`torch.jit.script` is deprecated"):
        warnings.filterwarnings("ignore", message=message)
