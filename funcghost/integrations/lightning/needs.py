"""Says which extra is missing, before a module of this folder imports what it holds."""

from importlib.util import find_spec

if find_spec("lightning") is None:
    raise ImportError("funcghost.integrations.lightning needs Lightning: pip install 'funcghost[lightning]'.")
