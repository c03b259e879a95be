"""Lightning's trainer, held to its automatic optimisation; where Lightning is installed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import funcghost as fg
from funcghost import store

lightning = pytest.importorskip("lightning")
ours = pytest.importorskip("funcghost.integrations.lightning")

pytestmark = pytest.mark.filterwarnings("ignore")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Tanh(), nn.Linear(4, 2)).double()


def optimizers(module: nn.Module) -> Any:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: 0.9**count)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Mine(ours.Valued):  # type: ignore[name-defined]
    accumulate = 2
    max_norm = 0.1

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def losses(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch["x"]), batch["y"], reduction="none")

    def configure_optimizers(self) -> Any:
        return optimizers(self)


class Plain(lightning.LightningModule):  # type: ignore[name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch["x"]), batch["y"])

    def configure_optimizers(self) -> Any:
        return optimizers(self)


def data(count: int) -> Any:
    return [{"x": torch.randn(3).double(), "y": int(torch.randint(2, ())), "id": place} for place in range(count)]


def rows_of_ranks() -> tuple[Any, Any]:
    """Rows to train on in one process or two, and validation batches, an odd number of them."""
    torch.manual_seed(2)
    return data(14), list(DataLoader(data(5), batch_size=2))


def fit(module: Any, rows: Any, *callbacks: Any, **settings: Any) -> None:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    torch.manual_seed(1)
    how: Any = {"batch_size": settings.pop("batch_size", 2), "sampler": settings.pop("sampler", None)}
    loader: Any = DataLoader(rows, shuffle=how["sampler"] is None, **how)
    trainer = lightning.Trainer(
        max_epochs=2, callbacks=list(callbacks), enable_model_summary=False, **quiet, **settings
    )
    trainer.fit(module, loader)


def test_a_step_is_lightnings_and_its_account_adds_up(tmp_path: Path) -> None:
    """Seven batches an epoch, two to a step, the last alone."""
    rows = data(14)
    validation: Any = DataLoader(data(5), batch_size=3)
    kept, valued, without, plain = ours.Record(tmp_path, validation, rule="simpson"), Mine(), Mine(), Plain()
    fit(valued, rows, kept)
    fit(without, rows)
    fit(plain, rows, accumulate_grad_batches=2, gradient_clip_val=0.1)
    # Lightning divides by the number of batches of a whole step also in the last: that step clips to the same norm.
    for mine, other, theirs in zip(valued.parameters(), without.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
    assert len(kept.accounts) == 8
    for values, rest, change in kept.accounts:
        assert abs(values + rest - change) < 1e-3 * (abs(values) + abs(rest))
    table = store.open_record(tmp_path).table()
    assert sorted(table["sample_id"].to_pylist()) == sorted([*range(14)] * 2)
    assert table["step"].to_pylist()[:5] == [0, 0, 0, 0, 1]


def test_what_cannot_be_valued_is_told(tmp_path: Path) -> None:
    with pytest.raises(fg.InputError, match="Valued, found Plain"):
        fit(Plain(), data(4), ours.Record(tmp_path / "a", [data(1)]))
    with pytest.raises(fg.InputError, match="which samples"):
        Mine().sample_ids({"x": torch.ones(2, 3)})
    with pytest.raises(fg.InputError, match="no validation batch"):
        fit(Mine(), data(4), ours.Record(tmp_path / "b", []))
    strategy = lightning.pytorch.strategies.DDPStrategy(ddp_comm_hook=print)
    with pytest.raises(fg.InputError, match="without a hook on its communication; found DDPStrategy"):
        ours.Record(tmp_path / "c", []).on_train_start(SimpleNamespace(strategy=strategy), Mine())
