"""Packs of documents that know which documents they are of, packed as TRL packs them."""

from collections.abc import Callable
from copy import copy
from typing import Any

from trl import pack_dataset

from funcghost.integrations.identity import DOCUMENTS


def packed(prepare: Callable[[Any, Any], Any], dataset: Any, args: Any) -> Any:
    """The packs that `SFTTrainer` makes of a data set, with a column `DOCUMENTS`: places in the set as it was given.

    `prepare(dataset, args)` is the trainer's preparation without packing.
    """
    whole = copy(args)
    whole.max_length, whole.shuffle_dataset = None, False
    rows = prepare(dataset, whole).select_columns(["input_ids", "labels"]).map(_numbered, with_indices=True)
    shuffled = rows.shuffle(seed=args.seed) if args.shuffle_dataset else rows
    packs = pack_dataset(shuffled, args.max_length, args.packing_strategy, {"num_proc": args.dataset_num_proc})
    return packs.shuffle(seed=args.seed) if args.shuffle_dataset else packs


def _numbered(row: dict[str, Any], place: int) -> dict[str, Any]:
    return {DOCUMENTS: [place] * len(row["input_ids"])}
