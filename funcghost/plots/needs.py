"""Says which extra is missing, before a module of this wing imports what it holds."""

from importlib.util import find_spec

for _name in ("matplotlib", "pyarrow"):
    if find_spec(_name) is None:
        raise ImportError(f"funcghost.plots draws values of stores: pip install 'funcghost[plots]' ({_name}).")
