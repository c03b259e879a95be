"""The validation loss of a trainer and its gradient: what it would optimise on another data set."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from funcghost.distributed.collectives import several, summed_over_ranks, told_by_all
from funcghost.errors import InputError
from funcghost.losses.modules import trainable
from funcghost.side_effects import random_state, set_random_state


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

    def __call__(self, model: Any, seen: AbstractContextManager[None]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its gradient, by a model that the trainer's loss calls; `seen` is entered around it."""
        trainer, leaves = self.trainer, trainable(self.trainer.model)
        total = torch.zeros((), dtype=torch.float64)
        gradients = {name: torch.zeros_like(leaf, requires_grad=False) for name, leaf in leaves.items()}
        with self._evaluating(), seen, _of_one_process(trainer.args), torch.enable_grad():
            for batch, weight in zip(self.batches, self.weights, strict=True):
                with trainer.compute_loss_context_manager():
                    loss = weight * trainer.compute_loss(model, dict(batch), num_items_in_batch=self.items)
                found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
                for gradient, part in zip(gradients.values(), found, strict=True):
                    if part is not None:
                        gradient.add_(part)
                total = total + loss.detach().cpu().double()
        (everyone,) = summed_over_ranks([total.to(trainer.args.device)])
        return everyone.cpu(), dict(zip(gradients, summed_over_ranks(list(gradients.values())), strict=True))

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
