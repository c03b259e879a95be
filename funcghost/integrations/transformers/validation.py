"""The validation loss of a trainer and its gradient: what it would optimise on another data set."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, distributed

from funcghost.distributed.collectives import several, summed_over_ranks, told_by_all
from funcghost.distributed.sharded_validation import validated
from funcghost.distributed.together import Together
from funcghost.errors import InputError
from funcghost.integrations.sharded import is_sharded
from funcghost.losses.modules import trainable
from funcghost.side_effects import random_state, set_random_state
from funcghost.trees import split_params


class ValidationSet:
    """A data set in batches, of which each process takes every so-manieth.

    Called, it gives `(loss, gradient)` in evaluation mode where the parameters are: the mean over all items of all
    batches where the trainer counts them, otherwise the mean over the samples. The gradient is a tree like
    `fg.trainable(trainer.model)`, the same in all processes.

    Args:
        trainer: transformers' `Trainer` or a subclass.
        dataset: what its `get_eval_dataloader` takes.

    Raises:
        InputError: it has no batch, or several processes are to share a stream.
    """

    def __init__(self, trainer: Any, dataset: Any) -> None:
        self.trainer = trainer
        drawn = random_state([trainer.args.device])  # a loader draws a seed
        with _each_sample_once(trainer.accelerator):
            loader = trainer.get_eval_dataloader(dataset)
            if several(None) and isinstance(getattr(loader, "dataset", None), torch.utils.data.IterableDataset):
                raise InputError(
                    "validation: several processes cannot share a stream evenly. Pass a data set with a length."
                )
            self.batches = [trainer._prepare_inputs(dict(batch)) for batch in loader]
        set_random_state(drawn)
        own = [len(next(value for value in batch.values() if isinstance(value, Tensor))) for batch in self.batches]
        with _of_one_process(trainer.args):
            counted = trainer._get_num_items_in_batch(self.batches, trainer.args.device)
        told = told_by_all((own, None if counted is None else float(counted)), None)
        total, items = sum(size for sizes, _ in told for size in sizes), [found for sizes, found in told if sizes]
        if not total:
            raise InputError("validation: there is no validation batch.")
        self.items = None if None in items else torch.tensor(sum(items), device=trainer.args.device)
        self.weights = [1.0 if self._is_scaled() else size / total for size in own]
        self._sharded: Together | None = None
        if is_sharded(trainer.model):
            self._sharded = Together(self._weighted, trainer.model, "sum", False, None, None, None)
            self._fill([len(sizes) for sizes, _ in told])

    def __call__(self, model: Any, seen: AbstractContextManager[None]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its gradient, by a model that the trainer's loss calls; `seen` is entered around it."""
        leaves = trainable(self.trainer.model)
        with self._evaluating(), seen, _of_one_process(self.trainer.args), torch.enable_grad():
            if self._sharded is not None:
                batches = [{"inputs": batch, "weight": weight} for batch, weight in self._weights()]
                return validated(self._sharded, split_params(leaves), batches)
            total = torch.zeros((), dtype=torch.float64)
            gradients = {name: torch.zeros_like(leaf, requires_grad=False) for name, leaf in leaves.items()}
            for batch, weight in self._weights():
                loss = self._loss(model, batch, weight)
                found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
                for gradient, part in zip(gradients.values(), found, strict=True):
                    if part is not None:
                        gradient.add_(part)
                total = total + loss.detach().cpu().double()
        (everyone,) = summed_over_ranks([total.to(self.trainer.args.device)])
        return everyone.cpu(), dict(zip(gradients, summed_over_ranks(list(gradients.values())), strict=True))

    def _weights(self) -> Iterator[tuple[Any, float]]:
        """The batches with the weights of their losses."""
        return zip(self.batches, self.weights, strict=True)

    def _loss(self, model: Any, batch: Any, weight: float) -> Tensor:
        with self.trainer.compute_loss_context_manager():
            loss: Tensor = weight * self.trainer.compute_loss(model, dict(batch), num_items_in_batch=self.items)
        return loss

    def _weighted(self, params: Any, batch: Any) -> Tensor:
        """Losses [1] of a batch, whose mean over all batches is the loss."""
        return self._count * self._loss(self.trainer.model, batch["inputs"], batch["weight"])[None]

    def _fill(self, counts: list[int]) -> None:
        """A sharded model runs on all ranks at once: those with fewer batches run one more often, with no weight."""
        more = max(counts) - counts[distributed.get_rank()] if several(None) else 0
        (spare,) = next(found for found in told_by_all(self.batches[:1], None) if found)
        self.batches += [self.trainer._prepare_inputs(dict(spare))] * more
        self.weights += [0.0] * more
        self._count = max(counts) * len(counts)

    def _is_scaled(self) -> bool:
        """Whether the loss of a batch is its part of the loss of all batches, as in `Trainer.training_step`."""
        trainer = self.trainer
        if trainer.loss_is_scaled_for_ga is not None:
            return bool(trainer.loss_is_scaled_for_ga)
        counted = trainer.model_accepts_loss_kwargs and self.items is not None
        return counted or trainer.compute_loss_func is not None

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode; what is drawn in it is put back."""
        net, drawn = self.trainer.model, random_state([self.trainer.args.device])
        mode = net.training
        net.eval()
        try:
            yield
        finally:
            net.train(mode)
            set_random_state(drawn)


@contextmanager
def _each_sample_once(accelerator: Any) -> Iterator[None]:
    """Loaders made within it give no sample twice for all processes to have as many batches."""
    even = accelerator.even_batches
    accelerator.even_batches = False
    try:
        yield
    finally:
        accelerator.even_batches = even


@contextmanager
def _of_one_process(args: Any) -> Iterator[None]:
    """Items are counted in this process alone, and losses are not multiplied by the number of processes."""
    average = args.average_tokens_across_devices
    args.average_tokens_across_devices = False
    try:
        yield
    finally:
        args.average_tokens_across_devices = average
