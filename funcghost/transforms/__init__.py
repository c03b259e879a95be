"""The public functions, with the plans that they keep.

May import: all wings up to `planning`. Read `functions.py` first, then `steps.py`, which every transform is.
"""
