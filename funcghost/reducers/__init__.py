"""Reducers: values that say what is wanted of the per-sample gradients.

May import: the root, `algebra` and `ops`. Read `bases.py` first: the two kinds that there are, and what each
must give; then `requests.py`, where a tree of them is asked and answered.
"""
