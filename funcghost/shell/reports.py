"""`report`."""

import argparse
import json

from funcghost.plots.report import report as write_report
from funcghost.shell.targets import called

OK = 0


def report(chosen: argparse.Namespace) -> int:
    """Writes the report of a store as one HTML file."""
    groups, texts = (None if name is None else called(name) for name in (chosen.groups, chosen.texts))
    out = chosen.out if chosen.out is not None else chosen.run / "report.html"
    found = write_report(
        chosen.run, out, column=chosen.column, by=chosen.by, group=chosen.group, groups=groups, texts=texts
    )
    summary = {"out": str(out), "rows": found.rows, "items": found.items, "column": found.column}
    print(json.dumps(summary) if chosen.json else f"{out}: {found.column} of {found.items} in {found.rows} rows")
    return OK
