"""Samples that a collator has made one row of."""

from typing import Any

import torch
from torch import Tensor

from funcghost.errors import InputError


def segments_of(inputs: dict[str, Any], samples: dict[str, Tensor]) -> Tensor | None:
    """Which sample each position is of, [1, t], where several are one row; None where every sample has rows.

    Raises:
        InputError: the row is not the samples one after the other.
    """
    row, count = inputs.get("input_ids"), len(samples["ids"])
    if not isinstance(row, Tensor) or len(row) != 1 or count == 1:
        return None
    lengths = samples.get("lengths")
    if lengths is None or int(lengths.sum()) > row.shape[1]:
        raise InputError(
            f"the batch has one row of {row.shape[1]} positions for {count} samples, whose lengths "
            f"({None if lengths is None else lengths.tolist()}) do not say where each of them is."
        )
    found = torch.full((1, row.shape[1]), -1, dtype=torch.int64, device=row.device)  # what is padded is of none
    found[0, : int(lengths.sum())] = torch.repeat_interleave(torch.arange(count, device=row.device), lengths)
    return found


def check_documents_apart(run: Any, inputs: dict[str, Any], segments: Tensor) -> None:
    """Whether documents that are packed in one row see each other: where every second is changed, the others are not.

    `run(inputs)` gives the outputs of the model in a training step on them, by name.

    Raises:
        InputError: they do.
    """
    changed = segments % 2 == 0
    row = inputs["input_ids"]
    others = torch.where(changed, (row + 1) % (int(row.max()) + 1), row)
    before, after = run(inputs), run({**inputs, "input_ids": others})
    for name, value in before.items():
        at = slice(0, value.shape[1]) if value.dim() > 1 else slice(0)
        kept = (segments[:, at] % 2 == 1) & (segments[:, at] >= 0)
        if len(value) != 1 or value.dim() < 2 or kept.shape[1] != value.shape[1]:
            continue
        off = (value - after[name])[kept].abs().amax() if bool(kept.any()) else value.new_zeros(())
        if bool(off > 16 * torch.finfo(value.dtype).eps * value.abs().amax()):
            raise InputError(
                f"documents that are packed in one row see each other: the output {name!r} of one changes by "
                f"{float(off):.2g} where another one is changed. So a document's value would be that of its positions, "
                "not of its loss. Models keep documents apart by position_ids when there is no attention mask and no "
                "cache: pass use_cache=False in the model's config and no attention_mask; or let rows be samples "
                "(DataCollatorWithPadding)."
            )
