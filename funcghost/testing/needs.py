"""Says which extra is missing, before a module of this wing imports what it holds."""

from importlib.util import find_spec

if find_spec("hypothesis") is None:
    raise ImportError("funcghost.testing draws models and pairs: pip install 'funcghost[testing]' (hypothesis).")
