"""What `fg.check` found, as a value: a table for people, plain dicts for programs, an error for scripts."""

import json
from dataclasses import dataclass
from typing import Any

from funcghost.errors import CheckError

Row = dict[str, Any]


@dataclass(frozen=True)
class Report:
    """What a check found; `print` it.

    Attributes:
        rows: a dict for each parameter, for all of them together, and for each column of the caller's reducers, with
            the keys `kind` ("parameter", "all", "reducer"), `name`, `shape`, `uses` (ops it goes into), `layout` and
            `way` (how `J V` is had) as in the plan, `grads`, `dots` and `norms` (the largest errors found, relative to
            the size of the terms; None: not compared, or not a number), `ok` and `note`, which names the columns that
            are off, or "factors" for products of factored gradients with the direction of `dots`. `norms` are squared;
            for reducers such as `fg.gram()`, which have no direction, it is the error of their numbers.
        facts: `batch`, `samples` (those compared), `precision`, `tolerance`, `deterministic`, `mixing` ("yes", "no",
            "unknown") with `mixing_note`, `norms` ("yes": compared, "no") with `norms_note`, `unused` and
            `zero_gradient` (names of parameters), `not_finite` (samples).
        failures: what is wrong and what to do, one sentence or more each.

    All of it is made of dicts, lists, strings and numbers that JSON knows.
    """

    rows: list[Row]
    facts: dict[str, Any]
    failures: list[str]

    @property
    def ok(self) -> bool:
        """Whether everything was compared and agrees."""
        return not self.failures

    def raise_if_failed(self) -> None:
        """Does nothing if the check is ok.

        Raises:
            CheckError: naming what failed and what to do.
        """
        if self.failures:
            raise CheckError("the check failed. " + " ".join(self.failures))

    def to_json(self) -> str:
        """The report as a JSON object with `ok`, `facts`, `rows` and `failures`."""
        whole = {"ok": self.ok, "facts": self.facts, "rows": self.rows, "failures": self.failures}
        return json.dumps(whole, indent=1, allow_nan=False)

    def __str__(self) -> str:
        """The table, the facts, and what failed."""
        lines = [*table([_HEAD, *map(_cells, self.rows)]), *_sentences(self.facts)]
        lines += [f"FAILED: {failure}" for failure in self.failures]
        return "\n".join([*lines, "" if self.failures else "ok: everything agrees"]).rstrip()


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """Lines with the cells of each column aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


_HEAD = ("parameter", "shape", "uses", "layout", "J V by", "grads", "dots", "norms", "")


def _cells(row: Row) -> tuple[str, ...]:
    shape = "" if row["shape"] is None else "x".join(map(str, row["shape"])) or "scalar"
    uses = "" if row["uses"] is None else str(row["uses"])
    verdict = "; ".join(part for part in ("ok" if row["ok"] else "FAILED", row["note"]) if part)
    errors = (_error(row[column]) for column in ("grads", "dots", "norms"))
    return (row["name"], shape, uses, row["layout"], row["way"], *errors, verdict)


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _sentences(facts: dict[str, Any]) -> list[str]:
    lines = [
        f"{facts['samples']} of {facts['batch']} samples against a backward each; errors relative to the size of the "
        f"terms, up to {facts['tolerance']:.1e} allowed ({facts['precision']})",
        f"losses: {'the same' if facts['deterministic'] else 'NOT the same'} for the same random state; samples mix: "
        f"{facts['mixing']} ({facts['mixing_note']})",
    ]
    if facts["norms"] == "no":
        lines.append(f"norms were not compared: {facts['norms_note']}")
    for key, what in (
        ("unused", "never used by the losses"),
        ("zero_gradient", "used, with zero gradient in these samples"),
        ("not_finite", "samples whose loss is not finite"),
    ):
        if facts[key]:
            shown = ", ".join(map(str, facts[key][:8])) + (", ..." if len(facts[key]) > 8 else "")
            lines.append(f"{what}: {shown}")
    return lines
