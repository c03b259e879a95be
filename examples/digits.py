"""The handwritten digits of scikit-learn, split at random."""

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor


class Digits(NamedTuple):
    """Images [n, 1, 8, 8] with values in [0, 1], and labels [n]."""

    images: Tensor
    labels: Tensor

    def take(self, rows: Tensor) -> "Digits":
        """Some of them."""
        return Digits(self.images[rows], self.labels[rows])


def load(held_out: int, generator: torch.Generator | None = None) -> tuple[Digits, Digits]:
    """Digits for training, and as many others as are to be held out."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=generator)
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    whole = Digits(images / 16, torch.tensor(digits.target))
    return whole.take(order[held_out:]), whole.take(order[:held_out])
