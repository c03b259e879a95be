"""Says which extra is missing, before a module of this wing imports what it holds."""

from importlib.util import find_spec

if find_spec("pyarrow") is None:
    raise ImportError("funcghost.store writes Parquet and Arrow files: pip install 'funcghost[store]' (pyarrow).")
