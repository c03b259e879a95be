"""The laws that funcghost holds itself to, for your own models, reducers and rules. Needs hypothesis.

    assert_matches_naive(losses, params, batch)   your model against one backward per sample
    assert_reducer_laws(reducer)                  your reducer, on drawn models and pairs
    assert_rule_laws(op, args)                    your `fg.register_rule`

`models()`, `batches(model)` and `pairs()` are hypothesis strategies, for laws of your own.
"""

from funcghost.testing import needs
from funcghost.testing.naive import assert_matches_naive, naive_pairs
from funcghost.testing.reducer_laws import assert_reducer_laws
from funcghost.testing.rule_laws import assert_rule_laws
from funcghost.testing.strategies import Model, batches, models, pairs

__all__ = [
    "Model",
    "assert_matches_naive",
    "assert_reducer_laws",
    "assert_rule_laws",
    "batches",
    "models",
    "naive_pairs",
    "needs",
    "pairs",
]
