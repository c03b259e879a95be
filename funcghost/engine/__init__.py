"""One forward and one backward along a plan.

May import: all wings up to `reducers`. Read `run.py` first, then `capture.py` (the mode that sees the ops), `tap.py`,
`recipes.py` (which terms a call takes), `contributions.py` (what they contribute) and `ledger.py` (where contributions
add up); `regions.py` is a part of the losses that runs as one compiled op.
"""
