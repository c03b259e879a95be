"""TRL's `SFTTrainer` and `DPOTrainer` with values of their samples: `trainers.py`. Needs the extra `trl`."""

from funcghost.integrations.transformers.valuation import Valuation
from funcghost.integrations.trl import needs
from funcghost.integrations.trl.trainers import DPOTrainer, SFTTrainer

__all__ = ["DPOTrainer", "SFTTrainer", "Valuation", "needs"]
