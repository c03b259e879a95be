"""`fg.check`: funcghost against a backward per sample, on the caller's own losses.

May import: all wings up to `transforms`. Read `checker.py` first.
"""
