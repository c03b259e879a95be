"""The peak memory of one step, measured in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def can_measure(device: torch.device) -> bool:
    """On the CPU this takes Linux, where a process may reset its high-water mark."""
    return device.type == "cuda" or (STATUS.exists() and os.access(CLEAR, os.W_OK))


def resident(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def step_peak(route: Callable[[], Any], device: torch.device) -> int:
    """Bytes that a call takes at its peak, beyond what is there before; the second call, so that nothing is lazy."""
    route()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        route()
        return torch.cuda.max_memory_allocated(device) - before
    CLEAR.write_text("5")
    before = resident("VmRSS")
    route()
    return resident("VmHWM") - before


def size(tensors: Sequence[Tensor]) -> int:
    """Bytes, each tensor counted once."""
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


def in_child(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """What a child prints. There, large tensors are mapped one by one and given back when they die."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, script, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
