"""Other libraries that build per-sample projections of a corpus, used as their documentation says, and ours for each.

Each maker takes token rows and the sizes, and gives a `Job`: what the other does, and the passes of funcghost over the
same samples of the same model that are to be compared with it.
"""

import importlib
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import funcghost as fg
from funcghost import corpus
from tests.benchmarks.models import GPT, next_token

LENGTH, VOCABULARY, WIDTH, LAYERS, HEADS = 64, 512, 64, 2, 4


class Job(NamedTuple):
    """What another library does once, and by what they are compared with the passes of ours that do the same."""

    theirs: Callable[[], Any]
    ours: dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Sizes:
    """Those of a batch, of projections, and of the queries."""

    batch: int
    dim: int
    queries: int


class MissingError(Exception):
    """A package is not installed."""


def needed(*names: str) -> Any:
    """The packages.

    Raises:
        MissingError: one is not installed.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingError(f"{name} is not installed")
    return importlib.import_module(names[0])


def stacked(rows: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(rows))


def a_pass(losses: Any, params: Any, data: Tensor, reducers: Any, batch: int) -> Callable[[], Any]:
    """A pass into a new store; it plans outside of it, as that is once for a corpus."""
    plan = fg.plan(losses, params, data[:batch], reducers)

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            corpus.score(losses, params, data, reducers, out, batch_size=batch, collate=stacked, plan=plan)

    return run


def small_gpt() -> tuple[GPT, Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = GPT(VOCABULARY, LENGTH, WIDTH, LAYERS, HEADS)
    params = {name: value.detach().clone() for name, value in model.named_parameters()}
    return model, fg.module_losses(model, next_token), params


def projections(data: Tensor, sizes: Sizes) -> dict[str, Callable[[], Any]]:
    """Ours of all parameters: by two sides of each weight, and by a sign for each entry, as theirs are."""
    _, losses, params = small_gpt()
    kinds: dict[str, Any] = {"two-sided projection": "kronecker", "dense projection": "rademacher"}
    return {
        name: a_pass(losses, params, data, {"sketch": fg.project(sizes.dim, kind=kind)}, sizes.batch)
        for name, kind in kinds.items()
    }


def _mean_loss(model: nn.Module, params: Any, tokens: Tensor) -> Tensor:
    logits = torch.func.functional_call(model, params, (tokens,))
    return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:])


def dattri(data: Tensor, sizes: Sizes) -> Job:
    """TracIn over one checkpoint with its random projection; ours are also exact scores of the same queries."""
    needed("dattri")
    tracin = importlib.import_module("dattri.algorithm.tracin").TracInAttributor
    task_of = importlib.import_module("dattri.task").AttributionTask
    model, losses, params = small_gpt()
    asked = data[: sizes.queries]

    def loss(params: Any, batch: Any) -> Tensor:
        return _mean_loss(model, params, batch[0].unsqueeze(0) if batch[0].dim() == 1 else batch[0])

    task = task_of(loss_func=loss, model=model, checkpoints=[model.state_dict()])
    train = DataLoader(TensorDataset(data), batch_size=sizes.batch, shuffle=False)
    test = DataLoader(TensorDataset(asked), batch_size=sizes.queries, shuffle=False)

    def theirs() -> Any:
        attributor = tracin(
            task=task,
            weight_list=torch.ones(1),
            normalized_grad=False,
            device="cpu",
            projector_kwargs={"proj_dim": sizes.dim, "proj_max_batch_size": 8, "device": "cpu"},
        )
        with torch.no_grad():
            return attributor.attribute(train, test)

    def exact() -> None:
        whole = fg.materialize(fg.pairs(losses)(params, asked))
        directions = [{name: value[k] for name, value in whole.items()} for k in range(len(asked))]
        with tempfile.TemporaryDirectory() as folder:
            reducers = {"score": fg.dot(fg.stack(directions))}
            corpus.score(losses, params, data, reducers, Path(folder) / "run", batch_size=sizes.batch, collate=stacked)

    return Job(theirs, {f"exact scores of {sizes.queries} queries": exact, **projections(data, sizes)})


def trak(data: Tensor, sizes: Sizes) -> Job:
    """`featurize` over the corpus, float32, by its dense random projection."""
    package = needed("trak")
    outputs = importlib.import_module("trak.modelout_functions").AbstractModelOutput
    projectors = importlib.import_module("trak.projectors")
    model, _, _ = small_gpt()

    class NextToken(outputs):  # type: ignore[misc, valid-type]
        @staticmethod
        def get_output(model: Any, weights: Any, buffers: Any, tokens: Tensor) -> Tensor:
            return _mean_loss(model, {**weights, **buffers}, tokens.unsqueeze(0))

        @staticmethod
        def get_out_to_loss_grad(model: Any, weights: Any, buffers: Any, batch: Any) -> Tensor:
            return torch.ones(len(batch[0]), 1)

    def theirs() -> None:
        with tempfile.TemporaryDirectory() as folder:
            size = sum(value.numel() for value in model.parameters())
            projector = projectors.BasicProjector(size, sizes.dim, 0, "rademacher", torch.device("cpu"), block_size=64)
            traker = package.TRAKer(
                model=model,
                task=NextToken,
                train_set_size=len(data),
                save_dir=folder,
                device="cpu",
                proj_dim=sizes.dim,
                projector=projector,
                use_half_precision=False,
                logging_level=40,
            )
            traker.load_checkpoint(model.state_dict(), model_id=0)
            for rows in data.split(sizes.batch):
                traker.featurize(batch=(rows,), num_samples=len(rows))
            traker.finalize_features()

    return Job(theirs, projections(data, sizes))


def bergson(data: Tensor, sizes: Sizes) -> Job:
    """An index of a GPT-2: of the sums of token losses by the weights of the blocks, two-sided, 16 x 16 for each.

    Ours is the projection of the same losses by the same weights, of all of them together.
    """
    package = needed("bergson", "datasets", "transformers")
    transformers, datasets = map(importlib.import_module, ("transformers", "datasets"))
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    weights = {
        name: value.detach().clone()
        for name, value in model.named_parameters()
        if ".h." in name and value.dim() == 2  # the linear maps of the blocks
    }
    side = round((sizes.dim / len(weights)) ** 0.5)
    rows = datasets.Dataset.from_dict({"input_ids": data.tolist(), "length": [data.shape[1]] * len(data)})
    batches = [list(range(at, min(at + sizes.batch, len(data)))) for at in range(0, len(data), sizes.batch)]

    def theirs() -> None:
        with tempfile.TemporaryDirectory() as folder:
            settings = package.IndexConfig(run_path=f"{folder}/run", projection_dim=side)
            settings.partial_run_path.mkdir()
            processor = package.GradientProcessor(projection_dim=side)
            package.collect_gradients(model, rows, processor, settings, batches=batches)

    frozen = {name: value.detach() for name, value in model.named_parameters()}

    def losses(params: Any, tokens: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, {**frozen, **params}, (tokens,), {"use_cache": False}).logits
        found = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        return found.sum(1)

    reducers = {"sketch": fg.project(sizes.dim, kind="kronecker")}
    return Job(theirs, {"two-sided projection": a_pass(losses, weights, data, reducers, sizes.batch)})


CONTENDERS: dict[str, Callable[[Tensor, Sizes], Job]] = {"dattri": dattri, "trak": trak, "bergson": bergson}
