"""Says which extra is missing, before a module of this folder imports what it holds."""

from importlib.util import find_spec

if find_spec("transformers") is None or find_spec("accelerate") is None:
    raise ImportError(
        "funcghost.integrations.transformers needs transformers and accelerate: pip install 'funcghost[transformers]'."
    )
