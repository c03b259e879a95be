"""Says which extra is missing, before a module of this folder imports what it holds."""

from importlib.util import find_spec

if find_spec("trl") is None:
    raise ImportError("funcghost.integrations.trl needs TRL: pip install 'funcghost[trl]'.")
