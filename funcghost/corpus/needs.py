"""Says which extra is missing, before a module of this wing imports what it holds."""

from funcghost.store import needs as needs
