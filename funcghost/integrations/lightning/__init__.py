"""Lightning modules that value their samples, and a callback that writes the record: `module.py`. Needs `lightning`."""

from funcghost.integrations.lightning import needs
from funcghost.integrations.lightning.module import Record, Valued

__all__ = ["Record", "Valued", "needs"]
