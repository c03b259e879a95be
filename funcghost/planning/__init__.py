"""Making a plan: one forward that follows the parameters, backwards that measure layouts, and the ways to `J V`.

May import: all wings up to `laws`. Read `planner.py` first, then `trace.py` (what is measured), `sites.py` (what
follows from it) and `ways.py` (how `J V` is had).
"""
