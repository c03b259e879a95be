"""Other libraries that build per-sample projections of a corpus, used as their documentation says.

Each maker takes the model, the token rows, the batch size, the projection's dimension and the number of queries, and
gives a call that does the whole job once.
"""

import importlib
import importlib.util
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class MissingError(Exception):
    """A package is not installed."""


def needed(name: str) -> Any:
    """The package.

    Raises:
        MissingError: it is not installed.
    """
    if importlib.util.find_spec(name) is None:
        raise MissingError(f"{name} is not installed")
    return importlib.import_module(name)


def _mean_loss(model: nn.Module, params: Any, tokens: Tensor) -> Tensor:
    logits = torch.func.functional_call(model, params, (tokens,))
    return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:])


def dattri(model: nn.Module, data: Tensor, batch: int, dim: int, queries: int) -> Callable[[], Any]:
    """TracIn over one checkpoint, with its random projection."""
    needed("dattri")
    tracin = importlib.import_module("dattri.algorithm.tracin").TracInAttributor
    task_of = importlib.import_module("dattri.task").AttributionTask

    def loss(params: Any, batch: Any) -> Tensor:
        return _mean_loss(model, params, batch[0].unsqueeze(0) if batch[0].dim() == 1 else batch[0])

    task = task_of(loss_func=loss, model=model, checkpoints=[model.state_dict()])
    train = DataLoader(TensorDataset(data), batch_size=batch, shuffle=False)
    test = DataLoader(TensorDataset(data[:queries]), batch_size=queries, shuffle=False)

    def run() -> Any:
        attributor = tracin(
            task=task,
            weight_list=torch.ones(1),
            normalized_grad=False,
            device="cpu",
            projector_kwargs={"proj_dim": dim, "proj_max_batch_size": 8, "device": "cpu"},
        )
        with torch.no_grad():
            return attributor.attribute(train, test)

    return run


def trak(model: nn.Module, data: Tensor, batch: int, dim: int, queries: int) -> Callable[[], Any]:
    """`featurize` over the corpus, float32."""
    package = needed("trak")
    outputs = importlib.import_module("trak.modelout_functions").AbstractModelOutput
    projectors = importlib.import_module("trak.projectors")

    class NextToken(outputs):  # type: ignore[misc, valid-type]
        @staticmethod
        def get_output(model: Any, weights: Any, buffers: Any, tokens: Tensor) -> Tensor:
            return _mean_loss(model, {**weights, **buffers}, tokens.unsqueeze(0))

        @staticmethod
        def get_out_to_loss_grad(model: Any, weights: Any, buffers: Any, batch: Any) -> Tensor:
            return torch.ones(len(batch[0]), 1)

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            size = sum(value.numel() for value in model.parameters())
            projector = projectors.BasicProjector(size, dim, 0, "rademacher", torch.device("cpu"), block_size=64)
            traker = package.TRAKer(
                model=model,
                task=NextToken,
                train_set_size=len(data),
                save_dir=folder,
                device="cpu",
                proj_dim=dim,
                projector=projector,
                use_half_precision=False,
                logging_level=40,
            )
            traker.load_checkpoint(model.state_dict(), model_id=0)
            for rows in data.split(batch):
                traker.featurize(batch=(rows,), num_samples=len(rows))
            traker.finalize_features()

    return run


def bergson(model: nn.Module, data: Tensor, batch: int, dim: int, queries: int) -> Callable[[], Any]:
    """An index of the linear layers' gradients, by its Python functions."""
    needed("bergson")
    raise MissingError("its builder takes Hugging Face models and data sets alone, which this model is not")


CONTENDERS: dict[str, Callable[[nn.Module, Tensor, int, int, int], Callable[[], Any]]] = {
    "dattri": dattri,
    "trak": trak,
    "bergson": bergson,
}
