"""What one op does: its derivative, in which arguments it is linear, as which product, and where it puts the samples.

May import: the root and `algebra`. Read `tangent.py` first (a call and its `J V`), then `uses.py` (from an output
gradient to factors). What is known of single ops stands in `families`, which are imported here, so that it is known.
"""

from funcghost.ops.families import convolutions, heads, norms, products, recurrent, sums, tables

__all__ = ["convolutions", "heads", "norms", "products", "recurrent", "sums", "tables"]
