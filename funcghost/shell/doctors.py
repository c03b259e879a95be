"""`doctor`: what is installed, on which devices, and whether scores are right there."""

import argparse
import json
import os
import platform
import re
import time
from collections import Counter
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funcghost._version import __version__
from funcghost.checking.checker import check
from funcghost.losses.modules import module_losses
from funcghost.reducers.quadratic import gram

OK, FAILED = 0, 1
REQUIREMENT = re.compile(
    r"(?P<name>[\w.-]+)(?P<itself>\[\w+\])?\s*(>=(?P<least>[\d.]+))?[^;]*(;.*extra == .(?P<extra>\w+))?"
)


@dataclass(frozen=True)
class Package:
    """A package, the oldest release of it that was tested, what is installed (None: nothing), and for which extras.

    Without extras, it is one that funcghost cannot do without. The first of them brings the fewest packages beside it.
    """

    name: str
    least: str
    found: str | None
    extras: tuple[str, ...]

    @property
    def old(self) -> bool:
        """Whether it is older than what funcghost was tested with."""
        return self.found is not None and _release(self.found) < _release(self.least)


@dataclass(frozen=True)
class Examined:
    """A device, and what `fg.check` says there: the first line of an error where it fails, else nothing."""

    device: str
    name: str
    gibibytes: float | None
    seconds: float
    error: str

    @property
    def ok(self) -> bool:
        """Whether all was right."""
        return not self.error


class Small(nn.Module):
    """A tied vocabulary, a norm, and a head: one parameter of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm, self.inner = nn.Embedding(7, 8), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [b, t, 7]."""
        hidden: Tensor = self.inner(self.norm(self.tokens(tokens))).tanh()
        return hidden @ self.tokens.weight.T


def doctor(chosen: argparse.Namespace) -> int:
    """Prints versions, devices and optional packages, and checks a small model on each device."""
    versions = {"funcghost": __version__, "python": platform.python_version(), "platform": platform.platform()}
    compiled = torch.version.cuda or torch.version.hip
    versions |= {"torch": torch.__version__} | ({"torch compiled for": compiled} if compiled else {})
    packages, devices = wanted(), [examine(device) for device in _devices()]
    ok = all(device.ok for device in devices)
    if chosen.json:
        found = {"ok": ok, "versions": versions, "packages": [asdict(package) for package in packages]}
        print(json.dumps(found | {"devices": [asdict(device) | {"ok": device.ok} for device in devices]}))
    else:
        print("\n".join([*_said(versions), "", *_listed(packages), "", *map(_verdict, devices)]))
    return OK if ok else FAILED


def wanted() -> list[Package]:
    """What the package that is installed says that it needs; nothing where it is only a folder on the path."""
    try:
        lines = metadata.requires("funcghost") or []
    except metadata.PackageNotFoundError:
        return []
    matches = [match for match in map(REQUIREMENT.match, lines) if match is not None and not match["itself"]]
    sizes, extras = Counter[str](), dict[tuple[str, str], list[str]]()
    for match in matches:
        own = extras.setdefault((match["name"], match["least"] or "0"), [])
        if match["extra"]:
            own.append(match["extra"])
            sizes[match["extra"]] += 1
    return [
        Package(name, least, _installed(name), tuple(sorted(own, key=lambda extra: (sizes[extra], extra))))
        for (name, least), own in extras.items()
    ]


def examine(device: torch.device) -> Examined:
    """Holds a small model on a device to a backward per sample, in about a second."""
    began, name, gibibytes, error = time.perf_counter(), device.type, None, ""
    try:
        name, gibibytes = _described(device)
        model, tokens = Small().to(device), torch.randint(7, (3, 5)).to(device)
        losses = module_losses(model, _next_token)
        report = check(losses, dict(model.named_parameters()), tokens, gram())
        error = "" if report.ok else f"the numbers are wrong:\n{report}"
    except Exception as raised:  # whatever a driver says: it is the finding
        error = f"{type(raised).__name__}: {raised}"
    return Examined(str(device), name, gibibytes, round(time.perf_counter() - began, 2), error)


def _next_token(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


def _devices() -> list[torch.device]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if accelerator else 0
    return [torch.device("cpu"), *(torch.device(accelerator.type, index) for index in range(count) if accelerator)]


def _described(device: torch.device) -> tuple[str, float | None]:
    """The name of a device, and its memory where the device says."""
    if device.type == "cpu":
        return f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch", None
    module: Any = torch.get_device_module(device)
    if not hasattr(module, "get_device_properties"):
        return device.type, None
    found = module.get_device_properties(device)
    return found.name, round(found.total_memory / 2**30, 1)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version, what is local or not final left out."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()


def _said(versions: dict[str, str]) -> list[str]:
    return [f"{name:18} {version}" for name, version in versions.items()]


def _listed(packages: list[Package]) -> list[str]:
    """A line for each package, by the extra that brings it."""
    if not packages:
        return ["funcghost is a folder on the path and not installed: which extras are there is not known"]
    lines = [f"{'package':16} {'wanted':10} {'found':16} for"]
    for package in packages:
        purpose = ", ".join(package.extras) or "all of it"
        missing = f": pip install 'funcghost[{package.extras[0]}]'" if package.extras and package.found is None else ""
        found = f"{package.found or 'none'}{' (old)' if package.old else ''}"
        lines.append(f"{package.name:16} >={package.least:8} {found:16} {purpose}{missing}")
    return lines


def _verdict(device: Examined) -> str:
    memory = f", {device.gibibytes} GiB" if device.gibibytes is not None else ""
    said = "exact" if device.ok else device.error
    return f"{device.device} ({device.name}{memory}), self-check in {device.seconds} s: {said}"
