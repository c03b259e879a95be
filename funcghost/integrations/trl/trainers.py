"""TRL's trainers with values of their samples."""

import warnings
from contextlib import nullcontext
from typing import Any, ClassVar

import trl

from funcghost.errors import InputError
from funcghost.integrations.identity import DOCUMENTS
from funcghost.integrations.transformers.trainer import Valued
from funcghost.integrations.trl.head import visible_head
from funcghost.integrations.trl.packs import packed

COUNTED = ("_metrics", "_total_train_tokens")


class _WithHead(Valued):
    """Runs training steps with the model's own head."""

    counted: ClassVar[tuple[str, ...]] = COUNTED
    gathers_for_logs: ClassVar[bool] = True

    def check_values(self) -> None:
        """Refuses values, besides, of losses whose gradient is not that of their value."""
        super().check_values()
        held = getattr(self.args, "loss_type", None) == "dft" or getattr(self.args, "use_weighting", False)
        if held and self.valuation.kind == "path":
            raise InputError(
                "kind='path': losses with weights that are held (loss_type='dft', use_weighting=True) have another "
                "gradient than that of their value, so that no values add up to its change. Use kind='score'."
            )

    def plain_step(self, batch: Any) -> None:
        """The trainer's own training step."""
        reference = getattr(self, "ref_model", None)  # by the same head, so that equal models have equal numbers
        hooks = self._net.get_input_embeddings()._forward_hooks
        kept = dict(hooks)
        with visible_head(self._net), nullcontext() if reference is None else visible_head(reference):
            super().plain_step(batch)
        for added in hooks.keys() - kept.keys():  # one more by each step of DPOTrainer with checkpoints
            del hooks[added]


class SFTTrainer(_WithHead, trl.SFTTrainer):
    """TRL's `SFTTrainer` that values its samples, the rows of its `train_dataset` as it has prepared it.

    Arguments, record and law are those of `funcghost.integrations.transformers.Valued`. Losses "nll" and "dft", label
    smoothing, losses of completions or assistants alone. With `padding_free=True` the rows of a batch are told apart by
    their lengths. With `packing=True` a sample is a document, told by its place in the set that was given; where a pack
    has a part of it ("bfd_split"), parts in one step are added up. With `packing_strategy="wrapped"` documents attend
    to one another, so that a sample is a pack, and there is a warning. Memory: the logits are made in full.

    In several processes (DDP, FSDP2), metrics beside the loss are logged as the first of them has them.

    Raises:
        InputError: the balance of experts is part of the loss, which is of no sample: pass `router_aux_loss_coef=0.0`;
            or with kind "path" the loss is "dft", whose gradient is not that of its value.

    Example: `examples/trainer_trl.py`.
    """

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        def prepare(rows: Any, given: Any, packs: bool = False) -> Any:
            return super(SFTTrainer, self)._prepare_dataset(
                rows, processing_class, given, packs, formatting_func, dataset_name
            )

        if not packing or dataset_name != "train" or not hasattr(dataset, "__len__"):
            return prepare(dataset, args, packing)
        if args.packing_strategy == "wrapped":
            warnings.warn(
                "packing_strategy='wrapped': documents of a pack attend to one another and are cut anywhere, so that a "
                "value is of a pack, told by its place in trainer.train_dataset. With 'bfd' it is of a document.",
                stacklevel=2,
            )
            return prepare(dataset, args, packing)
        if args.max_length is None:
            raise InputError("packing=True: max_length must be the length of a pack, found None.")
        return packed(prepare, dataset, args)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if DOCUMENTS not in columns:
            columns.append(DOCUMENTS)


class DPOTrainer(_WithHead, trl.DPOTrainer):
    """TRL's `DPOTrainer` that values its samples: a sample is a pair of a chosen and a rejected completion.

    Every loss type is taken apart: those of pairs into their terms. Where one sorts the batch ("aot", "aot_unpaired")
    or takes the mean over all its tokens ("sft"), a pair has the part that its own log-probabilities have in the
    gradient.

    Raises:
        InputError: the balance of experts is part of the loss; or with kind "path" there are WPO's weights
            (`use_weighting`), whose gradient is not that of the value.
        UnsupportedOpError: under FSDP2 a reference model is sharded as well, and talks to other processes: pass
            `precompute_ref_log_probs=True`.

    Example: `examples/trainer_trl.py`.
    """

    rows_per_sample: ClassVar[int] = 2
