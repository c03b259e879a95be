"""What a per-sample gradient is in factored form, every product of two of them, and directions of low rank.

May import: the root alone. Read `factors.py` first (the three forms), then `contractions.py` (each formula once),
`cost.py` (which route is taken) and `pairs.py`.
"""
