"""The command line: `python -m funcghost check package.module:factory` and `python -m funcghost plan ...`."""

import argparse
import importlib
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from funcghost._version import __version__
from funcghost.checking.checker import check
from funcghost.errors import GhostError, InputError
from funcghost.transforms.functions import plan

OK, FAILED, USAGE = 0, 1, 2
REQUIRED = ("losses", "params", "batch")
OPTIONAL = ("reducers", "has_aux", "options")

EPILOG = """\
The factory takes no arguments and returns (losses, params, batch), or a dict or NamedTuple of these with, if wanted,
reducers, has_aux and options: the arguments of fg.grad_and_reduce and of its step. For example, in mine.py:

    import torch, funcghost as fg

    def small():
        model = torch.nn.Linear(8, 4)
        losses = fg.module_losses(model, lambda output, batch: output.square().sum(1))
        return losses, dict(model.named_parameters()), torch.randn(6, 8)

    $ python -m funcghost check mine:small
    $ python -m funcghost plan mine:small --json plan.json

Exit status: 0 fine, 1 the check failed or there is no plan, 2 the target or an argument is not what it must be, or
the losses cannot be run.
"""


class UsageError(Exception):
    """The command cannot be run as it was given."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; gives its exit status."""
    chosen = _parser().parse_args(arguments)
    try:
        torch.manual_seed(chosen.seed)
        given = load(chosen.target)
        status: int = chosen.run(given, chosen)
        return status
    except (UsageError, InputError) as error:
        print(f"funcghost {chosen.command}: {error}", file=sys.stderr)
        return USAGE
    except Exception as error:  # the losses themselves fail: no verdict
        traceback.print_exc()
        print(f"funcghost {chosen.command}: the losses raise {type(error).__name__}: {error}", file=sys.stderr)
        return USAGE


def load(target: str) -> dict[str, Any]:
    """The arguments that the factory `package.module:factory` returns, by name.

    Raises:
        UsageError: there is no such module or function, it fails, or it returns something else.
    """
    module_name, colon, path = target.partition(":")
    if not (colon and module_name and path):
        raise UsageError(f"the target must be package.module:factory, found {target!r}.")
    factory = _imported(module_name)
    for name in path.split("."):
        if not hasattr(factory, name):
            raise UsageError(f"{module_name} has no {path!r}: give the name of a function that takes no arguments.")
        factory = getattr(factory, name)
    if not callable(factory):
        raise UsageError(f"{target} is no function but of type {type(factory).__name__}.")
    try:
        return named(factory(), target)
    except UsageError:
        raise
    except Exception as error:
        traceback.print_exc()
        raise UsageError(f"{target}() raises {type(error).__name__}: {error}") from error


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise UsageError(
                f"there is no module {error.name!r} in the current folder or where this Python looks."
            ) from error
        traceback.print_exc()
        raise UsageError(f"importing {name} raises {type(error).__name__}: {error}") from error
    except Exception as error:
        traceback.print_exc()
        raise UsageError(f"importing {name} raises {type(error).__name__}: {error}") from error


def named(returned: Any, target: str) -> dict[str, Any]:
    """What a factory returned, by name."""
    fields = returned._asdict() if isinstance(returned, tuple) and hasattr(returned, "_asdict") else returned
    if isinstance(fields, Mapping):
        missing = [name for name in REQUIRED if name not in fields]
        unknown = [name for name in fields if name not in REQUIRED + OPTIONAL]
        if missing or unknown:
            raise UsageError(
                f"{target}() must return losses, params and batch, and may return {', '.join(OPTIONAL)}; "
                f"missing {missing}, unknown {unknown}."
            )
        return dict(fields)
    if not isinstance(fields, tuple) or len(fields) != len(REQUIRED):
        size = f" of {len(fields)}" if isinstance(fields, tuple) else ""
        raise UsageError(
            f"{target}() must return (losses, params, batch) or a dict of these, found {type(fields).__name__}{size}."
        )
    return dict(zip(REQUIRED, fields, strict=True))


def _check(given: dict[str, Any], chosen: argparse.Namespace) -> int:
    report = check(**given, samples=chosen.samples, seed=chosen.seed)
    print(report.to_json() if chosen.json else report)
    return OK if report.ok else FAILED


def _plan(given: dict[str, Any], chosen: argparse.Namespace) -> int:
    try:
        made = plan(**given)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m funcghost",
        description="Per-sample gradient inner products: check them on your model, or see how they are had.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"funcghost {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, run, what in (
        ("check", _check, "compare with a backward per sample, parameter by parameter"),
        ("plan", _plan, "print what is done at each use of a parameter"),
    ):
        command = commands.add_parser(
            name, help=what, description=what, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.set_defaults(run=run)
        command.add_argument("target", metavar="package.module:factory", help="what makes losses, params and batch")
        command.add_argument(
            "--seed", type=_number(0), default=0, metavar="S", help="of torch, and of what is drawn (default: 0)"
        )
        if name == "check":
            command.add_argument(
                "--samples", type=_number(1), metavar="N", help="how many to compare (default: all, 16 at most)"
            )
            command.add_argument("--json", action="store_true", help="print the report as JSON")
        else:
            command.add_argument("--json", metavar="PATH", help="write the plan as JSON, too; - prints it alone")
    return parser


def _number(least: int) -> Any:
    """A reader of integers that are not below `least`."""

    def integer(text: str) -> int:
        value = int(text) if text.removeprefix("-").isdecimal() else least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be an integer, {least} or more, found {text!r}")
        return value

    return integer


if __name__ == "__main__":
    sys.exit(main())
