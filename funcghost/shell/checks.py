"""`check` and `plan`."""

import argparse
import sys
from pathlib import Path

from funcghost.checking.checker import check as check_losses
from funcghost.errors import GhostError, InputError
from funcghost.shell.targets import UsageError, load
from funcghost.transforms.halves import plan as make_plan

OK, FAILED = 0, 1


def check(chosen: argparse.Namespace) -> int:
    """Compares with a backward per sample."""
    report = check_losses(**load(chosen.target), samples=chosen.samples, seed=chosen.seed)
    print(report.to_json() if chosen.json else report)
    return OK if report.ok else FAILED


def plan(chosen: argparse.Namespace) -> int:
    """Prints what is done at each use of a parameter."""
    given = load(chosen.target)
    try:
        made = make_plan(**given)
    except InputError:
        raise
    except GhostError as error:
        print(f"funcghost plan: {type(error).__name__}: {error}", file=sys.stderr)
        return FAILED
    if chosen.json == "-":
        print(made.to_json())
        return OK
    print(made)
    if chosen.json is not None:
        try:
            Path(chosen.json).write_text(made.to_json() + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot write {chosen.json}: {error.strerror}.") from error
    return OK
