"""What the tests of Hugging Face's architectures share; by hand, a table of what comes of each of them.

python -m tests.models.huggingface [name ...]
"""

import argparse
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import funcghost as fg
from funcghost.laws.oracle import per_sample_gradients
from tests.models.architectures import (
    ARCHITECTURES,
)
from tests.models.building import (
    Architecture,
    B,
    Batch,
    Padding,
    Params,
    T,
    hf,
    padded,
)

Losses = Callable[[Params, Batch], Tensor]


@dataclass(frozen=True)
class Case:
    """An architecture with one of its attention implementations and one layout of its rows."""

    architecture: Architecture
    attention: str = "eager"
    padding: Padding = "none"
    training: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return self.architecture.precision(self.attention, self.padding)

    @property
    def tolerance(self) -> float:
        return self.architecture.tolerance(self.dtype)

    def model(self) -> nn.Module:
        """The model with no parameter left at zero or one, where a missing use of it would not show."""
        model = self.architecture.build(attn_implementation=self.attention).to(self.dtype).train(self.training)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    def batch(self, samples: int = B, length: int = T) -> Batch:
        batch = padded(self.architecture.batch(samples, length), self.padding)
        return {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in batch.items()}

    def losses(self, model: nn.Module) -> Losses:
        return fg.module_losses(model, self.architecture.criterion)


def full_product(architectures: dict[str, Architecture]) -> dict[str, Case]:
    """Every architecture with each of its attention implementations and each layout of its rows."""
    return {
        f"{name}-{attention}-{padding}": Case(architecture, attention, padding)
        for name, architecture in architectures.items()
        for attention in architecture.attentions
        for padding in architecture.paddings
    }


def covering(architectures: dict[str, Architecture]) -> dict[str, Case]:
    """Every architecture once: which implementation of attention it has, and where rows are padded, change by turns."""
    cases = {}
    for number, (name, architecture) in enumerate(architectures.items()):
        attention = architecture.attentions[number % len(architecture.attentions)]
        full, *paddings = architecture.paddings
        padding = paddings[number // 2 % len(paddings)] if paddings and number % 4 else full
        cases[f"{name}-{attention}-{padding}"] = Case(architecture, attention, padding)
    return cases


def parameters(model: nn.Module) -> Params:
    return dict(model.requires_grad_().named_parameters())  # fixed tables of positions, too


def draw_direction(params: Params) -> Params:
    return {name: torch.randn_like(parameter) for name, parameter in params.items()}


@dataclass(frozen=True)
class Truth:
    """Per-sample gradients one by one: their norms are the size of scores in directions of independent entries."""

    gradients: Params

    def scores(self, direction: Params) -> Tensor:
        terms = [(g.flatten(1) * direction[k].flatten()).sum(1) for k, g in self.gradients.items()]
        return torch.stack(terms).sum(0)

    def norms(self) -> Tensor:
        return torch.stack([g.flatten(1).square().sum(1) for g in self.gradients.values()]).sum(0).sqrt()

    def errors(self, found: Tensor, direction: Params) -> Tensor:
        """How far scores are off, in units of what they are sums of."""
        wanted, norms = self.scores(direction), self.norms()
        assert found.shape == wanted.shape
        assert bool((norms > 0).all())
        return (found - wanted).abs() / norms

    def error_of_gram(self, found: Tensor) -> float:
        """How far the Gram matrix is off, in units of the norms of which its entries are products."""
        rows = torch.cat([g.flatten(1).double() for g in self.gradients.values()], 1)
        norms = rows.square().sum(1).sqrt()
        return float(((found.double() - rows @ rows.T).abs() / (norms[:, None] * norms)).max())

    def check(self, found: Tensor, direction: Params, tolerance: float) -> None:
        errors = self.errors(found, direction)
        assert bool((errors <= tolerance).all()), errors.tolist()


def find_truth(losses: Losses, params: Params, batch: Batch) -> Truth:
    found = per_sample_gradients(losses, params, batch)
    return Truth({name: rows[:, None] if rows.dim() == 1 else rows for name, rows in found.items()})


def autograd(losses: Losses, params: Params, batch: Batch) -> tuple[Params, Tensor]:
    """The gradient of the mean loss without funcghost, and the losses."""
    leaves = {name: parameter.detach().requires_grad_() for name, parameter in params.items()}
    values = losses(leaves, batch)
    gradients = torch.autograd.grad(values.mean(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, gradients, strict=True)), values.detach()


class CountedPlans(logging.Handler):
    """Counts the plans that are made while it is used as a context."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.plans = 0
        self.logger = logging.getLogger("funcghost")

    def emit(self, record: logging.LogRecord) -> None:
        self.plans += record.getMessage().startswith("planned")

    def __enter__(self) -> "CountedPlans":
        self.level_before = self.logger.level
        self.logger.setLevel(logging.INFO)
        self.logger.addHandler(self)
        return self

    def __exit__(self, *raised: Any) -> None:
        self.logger.removeHandler(self)
        self.logger.setLevel(self.level_before)


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Row:
    """What came of one case: the largest error of scores over five batches, that of norms, and what planning takes."""

    name: str
    outcome: str
    norms: str = ""
    tapped: int = 0
    carried: int = 0
    plans: int = 0
    planning: float = 0.0

    def __str__(self) -> str:
        known = (
            [str(self.tapped), str(self.carried), str(self.plans), f"{self.planning:.0f}"] if self.plans else [""] * 4
        )
        return f"| {' | '.join([self.name, self.outcome, self.norms, *known])} |"


def examine(name: str, case: Case) -> Row:
    torch.manual_seed(0)
    model = case.model()
    params, losses = parameters(model), case.losses(model)
    direction, errors = draw_direction(params), []
    step = fg.grad_and_reduce(losses)
    with CountedPlans() as counted:
        for _ in range(5):
            batch = case.batch()
            truth = find_truth(losses, params, batch)
            try:
                errors.append(float(truth.errors(step(params, batch, fg.dot(direction)).reduced, direction).max()))
            except fg.GhostError as error:
                return Row(name, f"{type(error).__name__}: {str(error).splitlines()[0][:90]}")
    found = fg.reduce(losses)(params, batch, {"norm": fg.squared_norm(), "gram": fg.gram()})
    off = (found["norm"] - found["gram"].diagonal()).abs() / found["norm"]
    of_norms = max(truth.error_of_gram(found["gram"]), float(off.max()))
    plan = fg.plan(losses, params, batch)
    plain = median(seconds(lambda: autograd(losses, params, batch)) for _ in range(5))
    planning = median(seconds(lambda: fg.plan(losses, params, batch)) for _ in range(3))
    outcome = "exact" if max(errors) <= case.tolerance else "WRONG"
    return Row(
        name,
        f"{outcome} ({max(errors):.0e}, {str(case.dtype).removeprefix('torch.')})",
        f"{'exact' if of_norms <= 4 * case.tolerance else 'WRONG'} ({of_norms:.0e})",
        tapped=sum(site.action == "tap" for site in plan.sites),
        carried=sum(site.action == "carry" for site in plan.sites),
        plans=counted.plans,
        planning=planning / plain,
    )


def examined(names: Sequence[str], everything: bool) -> Iterator[Row]:
    chosen = {name: architecture for name, architecture in ARCHITECTURES.items() if not names or name in names}
    for name, case in (full_product if everything else covering)(chosen).items():
        yield examine(name, case)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Holds Hugging Face's architectures to per-sample gradients.")
    parser.add_argument("names", nargs="*", choices=[*ARCHITECTURES, []], help="architectures; default all")
    parser.add_argument("--everything", action="store_true", help="each attention with each padding")
    args = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")
    hf.logging.set_verbosity_error()
    columns = ["architecture", "scores (error)", "norms and Gram matrix (error)", "tapped", "carried"]
    print(f"| {' | '.join([*columns, 'plans for 5 batches', 'planning in plain steps'])} |")
    print("|---|---|---|---|---|---|---|")
    for row in examined(args.names, args.everything):
        print(row, flush=True)


if __name__ == "__main__":
    main()
