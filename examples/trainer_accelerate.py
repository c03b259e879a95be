"""Values samples in a loop with accelerate: accumulation, clipping, a schedule, and the optimizer's own step.

What is added to the loop are three calls: `take` in place of the backward, `settle` before the step, `settled` after.
They are the same in several processes, which have the values of the samples of all. Where accelerate shards the model
(its FSDP plugin, version 2), `ShardedSteps(losses, prepared, fg.trainable(prepared), validation)` of
`funcghost.integrations.sharded` takes their place, with `validation = sharded.validation(losses, prepared, params,
batches)` of this process's validation batches, and losses that call `prepared`.

    python examples/trainer_accelerate.py
    torchrun --nproc-per-node 2 examples/trainer_accelerate.py
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import funcghost as fg
from funcghost.integrations.steps import Steps

ACCUMULATED = 2


def main() -> list[tuple[float, float, float]]:
    """Trains for an epoch; for each step the sum of its values, the rest, and the change of the validation loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    x, y = torch.randn(60, 8).double(), torch.randint(3, (60,))
    loader = DataLoader(TensorDataset(x[:40], y[:40], torch.arange(40)), batch_size=5, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
    prepared, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

    def losses(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:  # their sum over a step is its loss
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none") / len(batch[0]) / ACCUMULATED

    def validation() -> tuple[Tensor, dict[str, Tensor]]:
        loss, params = F.cross_entropy(model(x[40:]), y[40:]), fg.trainable(model)
        return loss.detach(), dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))

    steps, accounts = Steps(losses, fg.trainable(model), validation, rule="simpson"), []
    for inputs, labels, ids in loader:
        with accelerator.accumulate(prepared):
            steps.take((inputs, labels), ids)  # in place of accelerator.backward(loss)
            if accelerator.sync_gradients:
                steps.settle(optimizer.optimizer, max_norm=1.0)
                accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            found = steps.settled()
            assert found.rest is not None
            assert found.change is not None
            accounts.append((float(found.values.sum()), float(found.rest), float(found.change)))
            accelerator.print("values {:+.6f}  rest {:+.6f}  change {:+.6f}".format(*accounts[-1]))
    return accounts


if __name__ == "__main__":
    main()
