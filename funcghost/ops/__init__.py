"""What one op does: its derivative, in which arguments it is linear, as which product, and where it puts the samples.

May import: the root and `algebra`. Read `tangent.py` first (a call and its `J V`), then `rules.py`, `products.py` and
`uses.py` (from an output gradient to factors).
"""
