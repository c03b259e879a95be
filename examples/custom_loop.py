"""A loop of one's own that drops, from every update, the samples that would raise the validation loss."""

from typing import Any

import torch
from optree import tree_leaves, tree_map
from torch import Tensor, nn

import funcghost as fg
from funcghost.attribution import in_run

model = nn.Bilinear(8, 8, 4)


def losses(params: Any, batch: Any) -> Tensor:
    """One loss per sample; a batch is any tree of tensors, here {"pair": (left, right), "label": label}."""
    logits = torch.func.functional_call(model, params, batch["pair"])
    return nn.functional.cross_entropy(logits, batch["label"], reduction="none")


score, step = fg.reduce(losses), fg.grad_and_reduce(losses, reduction="sum")


def take(batch: Any, rows: Tensor) -> Any:
    """These samples of the batch."""
    return tree_map(lambda leaf: leaf[rows], batch)


def update(params: Any, micro_batches: list[Any], validation: Any, threshold: float) -> Any:
    """One step of SGD, clipped, on the samples whose gradient goes with the validation gradient."""
    direction = in_run.validation_gradient(losses, params, [validation])
    total, kept = tree_map(torch.zeros_like, params), 0
    for batch in micro_batches:
        values = score(params, batch, fg.dot(direction))  # [b], exact; no weight gradient is computed
        out = step(params, take(batch, values > threshold), ())
        total, kept = tree_map(torch.add, total, out.grads), kept + len(out.losses)
    scale = 0.3 / max(kept, nn.utils.get_total_norm(tree_leaves(total)).item(), 1)  # mean gradient, clipped to norm 1
    return tree_map(lambda weight, gradient: weight - scale * gradient, params, total)


def main() -> dict[str, float]:
    """The test loss with all samples and with the selected, where half of the training labels are random."""
    torch.manual_seed(0)
    pair = torch.randn(4500, 8), torch.randn(4500, 8)
    samples = {"pair": pair, "label": nn.Bilinear(8, 8, 4)(*pair).argmax(dim=1)}
    train, validation, test = (take(samples, rows) for rows in torch.arange(4500).split([2000, 500, 2000]))
    train["label"][:1000] = torch.randint(4, (1000,))
    test_loss = {}
    for name, threshold in {"all": float("-inf"), "selected": 0.0}.items():
        params = {key: torch.zeros_like(weight) for key, weight in model.named_parameters()}
        for _ in range(60):
            params = update(params, [take(train, rows) for rows in torch.randint(2000, (4, 64))], validation, threshold)
        test_loss[name] = losses(params, test).mean().item()
    assert test_loss["selected"] < 0.8 * test_loss["all"]
    return test_loss


if __name__ == "__main__":
    print("test loss:", main())
