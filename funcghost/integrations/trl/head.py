"""What TRL's fused head gives out, made of the logits of the model.

The fused head is a function of its own, whose backward cannot be differentiated and does not tell positions apart.
While samples are valued, the model's own forward gives the logits, in full, and these the same numbers to rounding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trl.trainer.utils import FusedCausalLMOutput

from funcghost.errors import InputError

IGNORED = -100


@contextmanager
def visible_head(model: nn.Module) -> Iterator[None]:
    """Within it, `model(..., labels=labels, fused_lm_head=True)` runs the model's own head."""
    own = model.forward
    there = "forward" in vars(model)

    def forward(
        *args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, shift_labels: Any = None, **kwargs: Any
    ) -> Any:
        if not fused_lm_head:
            given = {"labels": labels, "shift_labels": shift_labels}
            return own(*args, **{key: value for key, value in given.items() if value is not None}, **kwargs)
        kwargs.pop("num_items_in_batch", None)  # a divisor of a loss that the trainers do not use
        output = own(*args, **kwargs)
        return as_fused(output.logits, labels, shift_labels, getattr(output, "aux_loss", None))

    model.forward = forward
    try:
        yield
    finally:
        if there:
            model.forward = own
        else:
            del model.forward


def as_fused(logits: Tensor, labels: Tensor | None, shift_labels: Tensor | None, aux_loss: Any) -> FusedCausalLMOutput:
    """The output of the fused head, from logits [b, t, V]; what the trainers only log has no gradient.

    Raises:
        InputError: the logits are of other positions than the labels.
    """
    if shift_labels is None:
        assert labels is not None
        if logits.shape[:2] != labels.shape:
            raise InputError(
                f"the model gives logits for {list(logits.shape[:2])} positions, and there are labels for "
                f"{list(labels.shape)}: prompt learning, which adds positions, is not supported."
            )
        logits, shift_labels = logits[:, :-1], labels[:, 1:]
    kept = shift_labels != IGNORED
    targets = shift_labels.clamp(min=0).unsqueeze(-1)
    every = F.log_softmax(logits.float(), -1)
    log_probs = every.gather(-1, targets).squeeze(-1).masked_fill(~kept, 0)
    with torch.no_grad():
        probs = every.exp()
        found = {
            "entropy": -(probs * every).sum(-1),
            "log_sum_sq_probs": probs.square().sum(-1).log(),
            "mean_logits": logits.float().mean(-1),
            "is_top1": logits.argmax(-1) == targets.squeeze(-1),
        }
        found = {name: value.masked_fill(~kept, 0) for name, value in found.items()}
    loss = -log_probs.sum() / kept.sum().clamp(min=1)
    return FusedCausalLMOutput(loss=loss, log_probs=log_probs, label_mask=kept, aux_loss=aux_loss, **found)
