"""Says which extra is missing, before a module of this wing imports what it holds."""

from importlib.util import find_spec

if find_spec("matplotlib") is None:
    raise ImportError("funcghost.plots draws with matplotlib: pip install 'funcghost[plots]'.")
