"""A training step of transformers' `Trainer` that values its samples.

`Trainer.training_step` runs as it is, with whatever a subclass makes of it, up to the backward: the scalar that it
would have called backward on is what is optimised, the division by the items of all batches of the step, by their
number or by none of these included. It is taken apart into samples (`funcghost.integrations.taken_apart`), `.grad` is
filled with the same gradient, and clipping, optimizer, schedule, logging and callbacks go on as before.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any, ClassVar

import transformers
from torch import Tensor
from transformers.trainer_utils import TrainOutput

from funcghost.engine.checkpoints import checkpoint_context
from funcghost.errors import InputError
from funcghost.integrations.identity import KEY, Identified, Identifying
from funcghost.integrations.sharded import ShardedSteps, is_sharded
from funcghost.integrations.steps import Steps
from funcghost.integrations.taken_apart import outputs_in, taken_apart
from funcghost.integrations.transformers.packing import check_documents_apart, segments_of
from funcghost.integrations.transformers.processes import alone, gathering, told_processes
from funcghost.integrations.transformers.validation import ValidationSet
from funcghost.integrations.transformers.valuation import StepAccount, Valuation
from funcghost.losses.modules import trainable
from funcghost.side_effects import random_state, set_random_state
from funcghost.store.record import Recorder, record

CHECKPOINTING = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
"""The names that the arguments of checkpoints go by, the present one and the deprecated one."""


class Valued(transformers.Trainer):
    """Put before any `Trainer` in the bases of a class, it gives the samples of each step their values.

        class Mine(Valued, MyTrainer): ...
        Mine(..., valuation=Valuation("runs/values")).train()

    After it `store.open_record("runs/values")` has a row for every sample of every step, and `accounts` an account of
    every step, which goes into the logs, too.

    Law, with `kind="path"`: the values of a step and its rest add up to the change of the validation loss by
    `optimizer.step()`, up to the quadrature of `in_run.along_path`; the gradients are those of the trainer without it,
    to rounding (with "score", or where samples are seen twice, to the last bit).

    A sample is a row of what the model gives out. Rows that a collator makes one of (`DataCollatorWithFlattening`) are
    told apart by their lengths.

    In several processes (`torchrun`) the step is of the mean over them, and the record, which the first of them writes,
    of the samples of all: under DDP; and under FSDP2, as accelerate's plugin shards a model (`fsdp=True`) or
    transformers while it loads one (`distributed_config=`), where every batch is seen twice with "path".

    Raises:
        InputError: (when it trains) something is asked for that is not supported: several devices in one process, fp16,
            DeepSpeed, FSDP1, tensor parallel; under FSDP2 samples packed in one row, or `pairs_memory`; with "path" an
            optimizer that is none of `updates.of`. The loss has terms that are of no sample, or documents that are
            packed see each other.
        GhostError: the step that was made is not the one the values are about.
    """

    rows_per_sample: ClassVar[int] = 1
    """Rows of the model's outputs for each sample of the batch, in blocks."""
    counted: ClassVar[tuple[str, ...]] = ()
    """Attributes that a training step adds to for its logs. It runs more than once here, and is to count once."""
    gathers_for_logs: ClassVar[bool] = False
    """What a training step gathers over processes goes to the logs alone, which are then the first process's own."""

    def __init__(self, *args: Any, valuation: Valuation, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(valuation, Valuation):
            raise InputError(f"valuation: must be a Valuation, found {type(valuation).__name__}.")
        self.valuation = valuation
        self.accounts: list[StepAccount] = []
        self._steps: Steps | None = None
        self._recorder: Recorder | None = None
        self._validation: ValidationSet | None = None
        self._runs: list[tuple[Tensor, dict[str, Any]]] = []
        self._model: Any = None
        self._apart = False
        self.add_callback(_Around(self))

    @property
    def _net(self) -> Any:
        """What is trained, without what it is wrapped in."""
        return self.model

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As the trainer's own."""
        self.check_values()
        self._checkpoints_seen()
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._recorder is not None:
                self._recorder.close()
            self._steps = self._recorder = None

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The trainer's own, with the values of its samples."""
        samples = inputs.pop(KEY, None)
        if self._steps is None:
            return super().training_step(model, inputs, num_items_in_batch)
        if samples is None:
            raise InputError(
                "the batch does not say which samples it has: get_train_dataloader is not the trainer's own. Let it "
                "call super().get_train_dataloader()."
            )
        inputs, samples = self._prepare_inputs(dict(inputs)), self._prepare_inputs(dict(samples))
        self._model, self._runs = alone(model), []
        segments = segments_of(inputs, samples)
        rows = samples["ids"] if segments is None else samples["ids"][:1]
        batch = {"inputs": inputs, "items": num_items_in_batch, "rows": rows}
        if segments is not None and not self._apart:
            with self._unseen():
                check_documents_apart(lambda changed: self._outputs(batch | {"inputs": changed}), inputs, segments)
            self._apart = True
        loss = self._steps.take(batch, samples["ids"], segments).sum()
        self._count_once(loss)
        if self.accelerator.sync_gradients:
            norm = self.args.max_grad_norm
            self._steps.settle(_inner(self.optimizer), norm if norm and norm > 0 else None)
        return loss

    def sample_losses(self, params: Any, batch: Any) -> Tensor:
        """The losses of a batch, [n], of which the gradient of the step is the sum over its batches."""
        with self._unseen():
            rows = len(batch["rows"])
            aside = nullcontext if self._steps is None else self._steps.aside
            found = taken_apart(lambda: self.plain_step(batch), self._model, rows, self.rows_per_sample, aside)
            self._runs.append((found.detach().sum(), {name: getattr(self, name) for name in self.counted}))
        return found

    def _count_once(self, loss: Tensor) -> None:
        """Counts for the logs the run that was the step's: plans are made on other random numbers."""
        if self.counted:
            for name, value in min(self._runs, key=lambda run: float((run[0] - loss).abs()))[1].items():
                setattr(self, name, value)

    def plain_step(self, batch: Any) -> None:
        """The trainer's own training step."""
        super().training_step(self._model, dict(batch["inputs"]), batch["items"])

    def _outputs(self, batch: Any) -> dict[str, Tensor]:
        drawn = random_state([self.args.device])
        found = outputs_in(lambda: self.plain_step(batch), self._model)
        set_random_state(drawn)
        return found

    @contextmanager
    def _unseen(self) -> Iterator[None]:
        """What is counted for the logs is not counted."""
        kept = {name: deepcopy(getattr(self, name)) for name in self.counted}
        try:
            with gathering(self.accelerator, refused=not self.gathers_for_logs):
                yield
        finally:
            for name, value in kept.items():
                setattr(self, name, value)

    def get_train_dataloader(self) -> Any:
        """The trainer's own, whose batches say which samples they have."""
        dataset, collate = self.train_dataset, self.data_collator
        if hasattr(dataset, "remove_columns"):  # of the library `datasets`: columns are taken off the set itself
            named, inner = self._remove_unused_columns(dataset, description="training"), collate
        else:
            named, inner = dataset, self._get_collator_with_removed_columns(collate, description="training")
        try:
            self.train_dataset, self.data_collator = Identified(named), Identifying(inner)
            return super().get_train_dataloader()
        finally:
            self.train_dataset, self.data_collator = dataset, collate

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        given = self.train_dataset if train_dataset is None else train_dataset
        return super()._get_train_sampler(given.dataset if isinstance(given, Identified) else given)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With the account of the last step."""
        if self._steps is not None and self.accounts and "loss" in logs:
            last = self.accounts[-1]
            logs |= {"values": last.values, "values_rest": last.rest, "values_change": last.change}
        super().log(logs, start_time)

    def begin_values(self) -> None:
        """Opens the record, and gets ready to value; parameters and optimizer are there."""
        valuation, begun = self.valuation, self.state.global_step
        if valuation.validation is None and (self.eval_dataset is None or isinstance(self.eval_dataset, dict)):
            raise InputError(
                "valuation: pass validation=, the data set whose loss the values are about, or give the trainer one "
                "eval_dataset."
            )
        self._validation = ValidationSet(self, valuation.validation)
        settings: Any = {
            "kind": valuation.kind,
            "rule": valuation.rule,
            "renew": valuation.renew,
            "pairs_memory": valuation.pairs_memory,
            "options": valuation.options,
        }
        net, losses, params = self._net, self.sample_losses, trainable(self._net)
        self._steps = (
            ShardedSteps(losses, net, params, self.validate, **settings)
            if is_sharded(net)
            else Steps(losses, params, self.validate, **settings)
        )
        column = "value" if valuation.kind == "path" else "score"
        if self.is_world_process_zero():
            self._recorder = record(valuation.path, [column], origin=valuation.origin, resume=begun or None)

    def end_step(self, save: bool) -> None:
        """Writes the values of the step that has been made."""
        assert self._steps is not None
        found, step = self._steps.settled(), self.state.global_step - 1
        column = "value" if self.valuation.kind == "path" else "score"
        if self._recorder is not None:
            self._recorder.add(step, found.ids, {column: found.values})
        if found.rest is not None and found.change is not None:
            account = StepAccount(step, float(found.values.sum()), float(found.rest), float(found.change))
            self.accounts.append(account)
        if save and self._recorder is not None:
            self._recorder.flush()

    def validate(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The validation loss and its gradient, in evaluation mode."""
        assert self._validation is not None
        return self._validation(alone(self.model_wrapped), self._unseen())

    def check_values(self) -> None:
        """Refuses what the values would not be right for.

        Raises:
            InputError: there is such a thing.
        """
        found = {
            **told_processes(self),
            "fp16, whose loss scale changes from step to step (use bf16)": self.accelerator.scaler is not None,
        }
        if wrong := [what for what, there in found.items() if there]:
            raise InputError(f"values of a Trainer's samples are not to be had with {' or '.join(wrong)}.")

    def _checkpoints_seen(self) -> None:
        """Lets regions that a checkpoint runs again be seen."""
        if not self.args.activation_checkpointing:
            return
        kwargs: Any = self.args.activation_checkpointing_kwargs
        given = dict(kwargs or {})
        if given.get("use_reentrant"):
            raise InputError("activation_checkpointing_kwargs: use_reentrant=True is not supported; leave it out.")
        for name in CHECKPOINTING:
            setattr(self.args, name, {"context_fn": checkpoint_context, **given, "use_reentrant": False})


class Trainer(Valued):
    """transformers' `Trainer` that values its samples: see `Valued` and `Valuation`.

    Example:
        >>> import tempfile, torch, transformers
        >>> from funcghost import store
        >>> from funcghost.integrations.transformers import Trainer, Valuation
        >>> config = transformers.LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...     num_attention_heads=2)
        >>> texts = [{"input_ids": row, "labels": row} for row in torch.randint(20, (12, 6))]
        >>> folder = tempfile.mkdtemp()
        >>> trainer = Trainer(
        ...     transformers.LlamaForCausalLM(config),
        ...     transformers.TrainingArguments(folder, max_steps=1, use_cpu=True, disable_tqdm=True),
        ...     train_dataset=texts[:8], eval_dataset=texts[8:], valuation=Valuation(folder + "/values"))
        >>> trainer.remove_callback(transformers.PrinterCallback)
        >>> _ = trainer.train()
        >>> store.open_record(folder + "/values").table().column_names
        ['step', 'sample_id', 'value']
    """


class _Around(transformers.TrainerCallback):
    """Begins with the training, and sees every step that has been made."""

    def __init__(self, trainer: Valued) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Parameters and optimizer are there."""
        self.trainer.begin_values()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer has made its step."""
        self.trainer.end_step(control.should_save)


def _inner(optimizer: Any) -> Any:
    """The optimizer that accelerate has wrapped."""
    while (wrapped := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = wrapped
    return optimizer
