"""Which sample is which, through shuffling, workers, collation and resumption: by its place in the data set."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from funcghost.errors import InputError

KEY = "funcghost_samples"
"""What a batch has its samples under."""
DOCUMENTS = "funcghost_documents"
"""The column of a set of packs [t] that says which document each token is of."""


class Sample(NamedTuple):
    """A sample with its number."""

    id: int
    value: Any


class Identified(Dataset[Sample]):
    """A data set whose samples carry their number: their place in it."""

    def __init__(self, dataset: Any) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise InputError(
                f"the training set is a {type(dataset).__name__}, which has no places to tell samples by. Pass one "
                "with a length and items by number."
            )
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        return Sample(int(index), self.dataset[index])

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        many = getattr(self.dataset, "__getitems__", None)
        values = many(indices) if many else [self.dataset[index] for index in indices]
        return [Sample(int(index), value) for index, value in zip(indices, values, strict=True)]


class Identifying:
    """A collator that hands on the numbers of the samples, and their lengths where they have `input_ids`.

    A row that is a pack, with `seq_lengths`, has a sample for each of its documents if the collator makes one row of
    all: by its number in the column `DOCUMENTS`, or by that of the pack.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Sample]) -> Any:
        """The batch, with `{"ids": [n], "lengths": [n]}` under `KEY`."""
        values = [sample.value for sample in samples]
        batch = self.collate(values)
        ids: list[int] = [sample.id for sample in samples]
        lengths: list[int] | None = None
        if all(isinstance(value, dict) and "input_ids" in value for value in values):
            lengths = [len(value["input_ids"]) for value in values]
            if all("seq_lengths" in value for value in values) and len(batch["input_ids"]) == 1:
                ids = [number for sample in samples for number in _documents(sample)]
                lengths = [int(length) for value in values for length in value["seq_lengths"]]
        batch[KEY] = {"ids": torch.tensor(ids, dtype=torch.int64)}
        if lengths is not None:
            batch[KEY]["lengths"] = torch.tensor(lengths, dtype=torch.int64)
        return batch


def _documents(pack: Sample) -> list[int]:
    """The numbers of a pack's documents, one after the other."""
    lengths = [int(length) for length in pack.value["seq_lengths"]]
    if DOCUMENTS not in pack.value:
        return [pack.id] * len(lengths)
    starts = accumulate([0, *lengths[:-1]])
    return [int(pack.value[DOCUMENTS][start]) for start in starts]
