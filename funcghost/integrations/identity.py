"""Which sample is which, through shuffling, workers, collation and resumption: by its place in the data set."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from funcghost.errors import InputError

KEY = "funcghost_samples"
"""What a batch has its samples under."""


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
    """A collator that hands on the numbers of the samples, and their lengths where they have `input_ids`."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Sample]) -> Any:
        """The batch, with `{"ids": [n], "lengths": [n]}` under `KEY`."""
        values = [sample.value for sample in samples]
        found = {"ids": torch.tensor([sample.id for sample in samples], dtype=torch.int64)}
        if all(isinstance(value, dict) and "input_ids" in value for value in values):
            found["lengths"] = torch.tensor([len(value["input_ids"]) for value in values], dtype=torch.int64)
        batch = self.collate(values)
        batch[KEY] = found
        return batch
