"""Values samples of a Lightning module: `losses(batch)` in place of `training_step`, and a callback.

pip install 'funcghost[lightning]' && python examples/trainer_lightning.py
"""

import tempfile
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from funcghost.integrations.lightning import Record, Valued


class Classifier(Valued):
    """A module that is trained by two batches a step."""

    accumulate = 2

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).double()

    def losses(self, batch: Any) -> Tensor:
        """Cross-entropies [b]."""
        return F.cross_entropy(self.net(batch["x"]), batch["y"], reduction="none")

    def configure_optimizers(self) -> Any:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main() -> list[tuple[float, float, float]]:
    """Trains for an epoch; for each step the sum of its values, the rest, and the change of the validation loss."""
    torch.manual_seed(0)
    rows: Any = [{"x": torch.randn(8).double(), "y": int(torch.randint(3, ())), "id": place} for place in range(60)]
    record = Record(tempfile.mkdtemp() + "/values", DataLoader(rows[40:], batch_size=20), rule="simpson")
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
    trainer = lightning.Trainer(max_epochs=1, callbacks=[record], accelerator="cpu", **quiet)
    trainer.fit(Classifier(), DataLoader(rows[:40], batch_size=5, shuffle=True))
    for account in record.accounts:
        print("values {:+.6f}  rest {:+.6f}  change {:+.6f}".format(*account))
    return record.accounts


if __name__ == "__main__":
    main()
