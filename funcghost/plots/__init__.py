"""Figures of values, and the report of a store: one HTML file with everything in it.

May import: all wings up to `integrations`; needs the extras `plots` (matplotlib) and `store`. Read `report.py` first.
"""

from funcghost.plots import needs
from funcghost.plots.report import Reported, report

__all__ = ["Reported", "needs", "report"]
