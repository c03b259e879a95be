"""Arguments, tables and numbers that every benchmark needs."""

import argparse
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch

import funcghost as fg


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper one."""
    if len(values) < 2:
        return (values[0],) * 3
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return low, middle, high


def table(rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def describe(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Where and in what something is measured."""
    cpu = device.type == "cpu"
    return {
        "device": str(device),
        "device_name": platform.machine() if cpu else torch.get_device_module(device).get_device_name(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "funcghost": fg.__version__,
    }


def parser_of(description: str | None, quick: str) -> argparse.ArgumentParser:
    """A parser of what `make bench` passes to every script: `quick` says what that leaves out."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--out", type=writable_file, metavar="JSON", help="write everything to this JSON file")
    return parser


def writable_file(text: str) -> Path:
    """A path in a folder that exists."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {str(path.parent)!r} does not exist")
    return path


def positive(kind: type) -> Callable[[str], Any]:
    """A reader of positive numbers."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be positive, found {text}")
        return value

    return parse
