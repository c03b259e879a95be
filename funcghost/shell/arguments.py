"""The commands and what they take."""

import argparse
from pathlib import Path
from typing import Any

from funcghost._version import __version__

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

For score and verify it returns (losses, params, data, reducers), or a dict of these with any other argument of
corpus.score:

    $ python -m funcghost score mine:corpus --out runs/corpus
    $ python -m funcghost top runs/corpus --column score
    $ python -m funcghost nearest runs/corpus --query 17
    $ python -m funcghost report runs/corpus
    $ python -m funcghost verify runs/corpus mine:corpus

What is installed, and whether a small model is right on every device of this machine:

    $ python -m funcghost doctor

Exit status: 0 fine, 1 the check failed, there is no plan, or the store is damaged or another one, 2 the target or an
argument is not what it must be, or the losses cannot be run.
"""

COMMANDS = {
    "check": ("checks", "compare with a backward per sample, parameter by parameter"),
    "plan": ("checks", "print what is done at each use of a parameter"),
    "score": ("corpora", "score every sample of a data set into a store"),
    "top": ("corpora", "list the samples of a store with the largest values"),
    "nearest": ("corpora", "list the samples nearest to a query in gradient space"),
    "report": ("reports", "write the report of a store as one HTML file"),
    "verify": ("corpora", "read a store again, and compute some of it anew"),
    "doctor": ("doctors", "print what is installed, and check a small model on every device"),
}
"""For each command the module of this wing that has a function of its name, and what it does."""


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    made = argparse.ArgumentParser(
        prog="python -m funcghost",
        description="Per-sample gradient inner products: check them on your model, keep them for a corpus, ask these.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"funcghost {__version__}")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, what) in COMMANDS.items():
        command = commands.add_parser(
            name, help=what, description=what, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.set_defaults(module=module)
        ADD[name](command)
    return made


def _target(command: argparse.ArgumentParser, makes: str = "losses, params and batch", **more: Any) -> None:
    command.add_argument("target", metavar="package.module:factory", help=f"what makes {makes}", **more)
    command.add_argument(
        "--seed", type=number(0), default=0, metavar="S", help="of torch, and of what is drawn (default: 0)"
    )


def _json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print the result as JSON")


def _check(command: argparse.ArgumentParser) -> None:
    _target(command)
    command.add_argument(
        "--samples", type=number(1), metavar="N", help="how many to compare (default: all, 16 at most)"
    )
    command.add_argument("--json", action="store_true", help="print the report as JSON")


def _plan(command: argparse.ArgumentParser) -> None:
    _target(command)
    command.add_argument("--json", metavar="PATH", help="write the plan as JSON, too; - prints it alone")


def _score(command: argparse.ArgumentParser) -> None:
    _target(command, "losses, params, data and reducers")
    command.add_argument("--out", type=Path, required=True, metavar="RUN", help="the folder of the store")
    _json(command)


def _run(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", type=Path, metavar="RUN", help="the folder of a store")


def _ask(command: argparse.ArgumentParser) -> None:
    _run(command)
    command.add_argument("--k", type=number(1), default=10, metavar="K", help="how many (default: 10)")
    command.add_argument("--partial", action="store_true", help="ask a store that lacks samples, too")
    _json(command)


def _top(command: argparse.ArgumentParser) -> None:
    _ask(command)
    command.add_argument("--column", metavar="NAME", help="of the values (default: the only one)")
    command.add_argument("--smallest", action="store_true", help="the smallest values in place of the largest")


def _nearest(command: argparse.ArgumentParser) -> None:
    _ask(command)
    command.add_argument(
        "--query",
        required=True,
        metavar="ID",
        help="of a sample, or package.module:factory for (losses, params, batch)",
    )
    command.add_argument("--projection", metavar="NAME", help="of the vectors (default: the only one)")
    command.add_argument("--cosine", action="store_true", help="by the cosine in place of the inner product")


def _report(command: argparse.ArgumentParser) -> None:
    _run(command)
    command.add_argument("--out", type=Path, metavar="HTML", help="where to (default: RUN/report.html)")
    command.add_argument("--column", metavar="NAME", help="of the values (default: the last of them)")
    command.add_argument("--by", metavar="NAME", help="the column that says what a value is of (default: the sample)")
    command.add_argument("--group", metavar="NAME", help="a column of groups to tell apart")
    command.add_argument(
        "--groups", metavar="package.module:factory", help="in its place what makes a mapping from items to groups"
    )
    command.add_argument("--texts", metavar="package.module:factory", help="what makes a mapping from items to texts")
    _json(command)


def _verify(command: argparse.ArgumentParser) -> None:
    _run(command)
    _target(command, "losses, params, data and reducers, to compute some samples anew", nargs="?")
    command.add_argument("--count", type=number(1), default=4, metavar="N", help="how many of them (default: 4)")
    _json(command)


ADD = {
    "check": _check,
    "plan": _plan,
    "score": _score,
    "top": _top,
    "nearest": _nearest,
    "report": _report,
    "verify": _verify,
    "doctor": _json,
}


def number(least: int) -> Any:
    """A reader of integers that are not below `least`."""

    def integer(text: str) -> int:
        value = int(text) if text.removeprefix("-").isdecimal() else least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be an integer, {least} or more, found {text!r}")
        return value

    return integer
