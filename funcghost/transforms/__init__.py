"""The public functions, with the plans that they keep.

May import: all wings up to `planning`. Read `steps.py` first; `one_op.py` is the step without a plan, for losses
that are many small ops, `compiling.py` the step as a compiler traces it.
"""
