"""A small corpus and its losses."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import funcghost as fg
from funcghost import corpus
from tests.models.small import next_token, small_gpt

COUNT, LENGTH, PAD = 21, 12, -100


def samples() -> list[Tensor]:
    """Rows of tokens."""
    return list(torch.randint(0, 32, (COUNT, LENGTH), generator=torch.Generator().manual_seed(0)))


def collate(items: Sequence[Tensor]) -> list[Tensor]:
    return [torch.stack(list(items))]


def padded_collate(items: Sequence[Tensor], length: int) -> list[Tensor]:
    rows = torch.full((len(items), length), PAD)
    for row, item in zip(rows, items, strict=True):
        row[: len(item)] = item
    return [rows]


def losses_of(padding: bool = False) -> tuple[Any, dict[str, Tensor]]:
    """Losses of embeddings with a tied head, and its parameters; with `padding`, rows may end before the batch does."""
    torch.manual_seed(1)
    model, _, params = small_gpt(layers=0)
    own = {name: value.detach().clone() for name, value in params.items()}

    def padded(params: Any, batch: list[Tensor]) -> Tensor:
        (rows,) = batch
        logits = torch.func.functional_call(model, params, (rows.clamp(min=0),))
        targets = rows[:, 1:]
        surprise = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), targets, reduction="none", ignore_index=PAD
        )
        return surprise.sum(1) / (targets != PAD).sum(1)

    def plain(params: Any, batch: Any) -> Tensor:
        return next_token(torch.func.functional_call(model, params, (batch[0],)), (batch[0],))

    return padded if padding else plain, own


def reducers_of(params: dict[str, Tensor]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    one, two = (
        {name: torch.randn(value.shape, generator=generator).to(value.dtype) for name, value in params.items()}
        for _ in range(2)
    )
    return {
        "score": fg.dot(fg.stack([one, two])),
        "norm": fg.squared_norm(),
        "sketch": fg.project(48, kind="kronecker"),
    }


def make(out: Path, **change: Any) -> corpus.Scored:
    """Scores the corpus."""
    losses, params = losses_of()
    params = change.pop("params", params)
    given = {"losses": losses, "data": samples(), "reducers": reducers_of(params)}
    given |= {name: change.pop(name) for name in list(change) if name in given}
    options = {"batch_size": 4, "part": 8, "collate": collate, **change}
    return corpus.score(given["losses"], params, given["data"], given["reducers"], out, **options)
