"""transformers' `Trainer` with values of its samples: `trainer.py` says how. Needs the extra `transformers`."""

from funcghost.integrations.transformers import needs
from funcghost.integrations.transformers.trainer import Trainer, Valued
from funcghost.integrations.transformers.valuation import Valuation

__all__ = ["Trainer", "Valuation", "Valued", "needs"]
