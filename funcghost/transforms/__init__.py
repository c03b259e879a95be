"""The public functions, with the plans that they keep.

May import: all wings up to `planning`. Read `functions.py` first, then `steps.py`, which every transform is;
`one_op.py` is the step without a plan, for losses that are many small ops.
"""
