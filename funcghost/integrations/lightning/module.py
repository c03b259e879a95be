"""A Lightning module whose training step values its samples, by manual optimisation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import lightning
import optree
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from funcghost.attribution.path import Rule
from funcghost.distributed.collectives import several, told_by_all
from funcghost.distributed.data_parallel import validated
from funcghost.errors import InputError
from funcghost.integrations.steps import Kind, Settled, Steps
from funcghost.losses.modules import trainable
from funcghost.options import Options
from funcghost.store.manifest import JSON
from funcghost.store.record import Recorder, record
from funcghost.trees import Tree, digest


class Valued(lightning.LightningModule):
    """A module whose training step is made of losses of samples; `Record` among the trainer's callbacks values them.

    Define `losses(batch) -> [b]` in place of `training_step`, and `configure_optimizers` with one optimizer. A step is
    made of the mean of the losses of a batch, or of the mean over `accumulate` batches of their means; the last of an
    epoch is shorter. `max_norm` clips, and a scheduler takes a step with each of the optimizer's or at the end of an
    epoch, as its `interval` says. Lightning's own `gradient_clip_val` and `accumulate_grad_batches` are refused by it
    where a module optimises by itself.

    In several processes (strategy "ddp") a step is of the mean over them, as `DistributedDataParallel` makes it.

    Law: with kind "path" the values of a step and its rest add up to the change of the validation loss by the
    optimizer's step, see `in_run.along_path`. Without a `Record` it trains the same.

    Example: `examples/trainer_lightning.py`.
    """

    accumulate: ClassVar[int] = 1
    max_norm: ClassVar[float | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.steps: Steps | None = None
        self.last: Settled | None = None

    def losses(self, batch: Any) -> Tensor:
        """The losses [b] of a batch."""
        raise NotImplementedError(f"{type(self).__name__} must define losses(batch) -> [b].")

    def sample_ids(self, batch: Any) -> Tensor:
        """The ids [b] of the samples of a batch: `batch["id"]`, or the last of a tuple; define it for other batches."""
        found = batch.get("id") if isinstance(batch, Mapping) else batch[-1] if isinstance(batch, Sequence) else None
        if not isinstance(found, Tensor) or found.dim() != 1 or found.dtype != torch.int64:
            raise InputError(
                "the batch does not say which samples it has: let the data set give an 'id' with each sample, or "
                "define sample_ids(batch) -> int64 [b]."
            )
        return found

    def weighted_losses(self, params: Any, batch: Any) -> Tensor:
        """The losses of a batch, as the step weights them; on the module's own parameters."""
        weighted: Tensor = self.losses(batch["batch"]) * batch["weight"]
        return weighted

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Takes in a batch, and makes the step when it is complete."""
        place = batch_idx % self.accumulate
        last = place + 1 == self.accumulate or batch_idx + 1 == self.trainer.num_training_batches
        window = min(self.accumulate, self.trainer.num_training_batches - (batch_idx - place))
        optimizer: Any = self.optimizers()
        if place == 0:
            optimizer.zero_grad()
        self.last = None
        if self.steps is None:
            losses = self.losses(batch)
            self.manual_backward(losses.mean() / window)
            loss = losses.detach().mean()
        else:
            ids = self.sample_ids(batch)
            taken = self.steps.take({"batch": batch, "weight": 1 / (len(ids) * window)}, ids)
            loss = taken.sum() * window
            if last:
                self.steps.settle(optimizer.optimizer, self.max_norm)
        if last:
            if self.max_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.parameters(), self.max_norm)
            optimizer.step()
            self.last = None if self.steps is None else self.steps.settled()
            self._scheduled("step")
        return loss

    def on_train_epoch_end(self) -> None:
        """Schedulers that go by epochs."""
        self._scheduled("epoch")

    def _scheduled(self, interval: str) -> None:
        for config in self.trainer.lr_scheduler_configs:
            if config.interval == interval and not config.reduce_on_plateau:
                scheduler: Any = config.scheduler
                scheduler.step()


class Record(lightning.Callback):
    """Values the samples of a `Valued` module while it is fitted, and writes them.

    After it `store.open_record(path)` has a row for every sample of every step, and `accounts` has, with kind "path",
    the sum of the values, the rest and the change of the validation loss by every step. Of several processes (strategy
    "ddp") the first writes the record, of the samples of all; a sample that stands in twice for batches to be even has
    one row a step.

    Args:
        path: the folder of the record.
        validation: a list or a loader of batches; the values are about the mean of the module's losses over them, in
            evaluation mode. In several processes it is the same in each, which takes every so-manieth of them.
        kind, rule, renew, pairs_memory, options: see `funcghost.integrations.steps.Steps`.
        origin: what the run follows from, kept in the record.

    Raises:
        InputError: (when it is fitted) the module is not `Valued`, the strategy is another one than a single device or
            "ddp", with a hook on its communication, there are several optimizers, or processes are given other
            validation batches.
    """

    def __init__(
        self,
        path: str | Path,
        validation: Any,
        *,
        kind: Kind = "path",
        rule: Rule = "trapezoid",
        renew: int = 1,
        pairs_memory: int | None = None,
        options: Options | None = None,
        origin: Mapping[str, JSON] | None = None,
    ) -> None:
        self.path, self.validation, self.kind, self.origin = path, validation, kind, origin
        self.settings = {"rule": rule, "renew": renew, "pairs_memory": pairs_memory, "options": options}
        self.accounts: list[tuple[float, float, float]] = []
        self._batches: list[Any] = []
        self._recorder: Recorder | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Opens the record."""
        if not isinstance(pl_module, Valued):
            raise InputError(f"Record: values samples of a module that is Valued, found {type(pl_module).__name__}.")
        _check_plain(trainer)
        state = torch.get_rng_state()  # a loader draws a seed
        batches = [pl_module.transfer_batch_to_device(b, pl_module.device, 0) for b in self.validation]
        torch.set_rng_state(state)
        if not batches:
            raise InputError("Record: there is no validation batch.")
        _check_alike(batches)
        self._batches = batches[trainer.global_rank :: trainer.world_size]

        def validate() -> tuple[Tensor, Tree]:
            return self._validate(pl_module)

        settings: Any = self.settings
        params = trainable(pl_module)
        pl_module.steps = Steps(pl_module.weighted_losses, params, validate, kind=self.kind, **settings)
        column = "value" if self.kind == "path" else "score"
        if trainer.is_global_zero:
            self._recorder = record(self.path, [column], origin=self.origin, resume=trainer.global_step or None)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Writes the values of a step that has been made."""
        found = pl_module.last
        if found is None:
            return
        column = "value" if self.kind == "path" else "score"
        if self._recorder is not None:
            self._recorder.add(trainer.global_step - 1, found.ids, {column: found.values})
        if found.rest is not None and found.change is not None:
            self.accounts.append((float(found.values.sum()), float(found.rest), float(found.change)))

    def on_save_checkpoint(self, *args: Any) -> None:
        """What a checkpoint follows on is on the disk before it."""
        if self._recorder is not None:
            self._recorder.flush()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Closes the record, also where the fit has failed."""
        if self._recorder is not None:
            self._recorder.close()
        self._recorder = None
        if isinstance(pl_module, Valued):
            pl_module.steps = None

    def _validate(self, module: Valued) -> tuple[Tensor, Tree]:
        mode, state = module.training, torch.get_rng_state()
        module.eval()
        try:
            with torch.enable_grad():
                return validated(lambda _, batch: module.losses(batch), trainable(module), self._batches)
        finally:
            module.train(mode)
            torch.set_rng_state(state)


def _check_plain(trainer: Any) -> None:
    """It trains as `DistributedDataParallel` does, or in one process.

    Raises:
        InputError: it does not.
    """
    strategy = trainer.strategy
    single = isinstance(strategy, SingleDeviceStrategy)
    hooked = getattr(strategy, "_ddp_comm_hook", None) or getattr(strategy, "_model_averaging_period", None)
    if not single and (type(strategy) is not DDPStrategy or hooked):
        raise InputError(
            f"Record: values samples on a single device or with strategy='ddp', without a hook on its communication; "
            f"found {type(strategy).__name__}."
        )
    if len(trainer.optimizers) != 1 or trainer.precision_plugin.precision == "16-mixed":
        raise InputError("Record: values samples with one optimizer, and not in 16-mixed.")


def _check_alike(batches: list[Any]) -> None:
    """Every process has the same validation batches, of which it takes its part.

    Raises:
        InputError: one has others.
    """
    if not several(None):
        return
    given: Tree = batches
    leaves = [leaf for leaf in optree.tree_leaves(given) if isinstance(leaf, Tensor)]
    told = told_by_all(digest([""] * len(leaves), leaves), None)
    if len(set(told)) > 1:
        raise InputError(
            "Record: processes are given other validation batches. Pass the same to each, in the same order, without a "
            "DistributedSampler: each takes its part of them."
        )
