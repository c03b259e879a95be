"""Runs a command."""

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

import torch

from funcghost.errors import InputError, StoreError
from funcghost.shell.arguments import parser
from funcghost.shell.targets import UsageError

FAILED, USAGE = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; gives its exit status."""
    chosen = parser().parse_args(arguments)
    try:
        run = getattr(_module(chosen.module), chosen.command)
        if hasattr(chosen, "seed"):
            torch.manual_seed(chosen.seed)
        status: int = run(chosen)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever reads has had enough, as `head` has; nothing more is to be written at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (UsageError, InputError) as error:
        print(f"funcghost {chosen.command}: {error}", file=sys.stderr)
        return USAGE
    except StoreError as error:
        print(f"funcghost {chosen.command}: {error}", file=sys.stderr)
        return FAILED
    except Exception as error:  # the losses themselves fail: no verdict
        traceback.print_exc()
        print(f"funcghost {chosen.command}: the losses raise {type(error).__name__}: {error}", file=sys.stderr)
        return USAGE


def _module(name: str) -> object:
    """The module of a command; what needs an extra is imported only where it is called for."""
    try:
        return importlib.import_module(f"funcghost.shell.{name}")
    except ImportError as error:
        raise UsageError(str(error)) from error
