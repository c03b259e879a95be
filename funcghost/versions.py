"""Where the versions of torch differ that funcghost runs on: each difference with its version, and why it matters.

Nothing else asks for a version. What a version lacks is refused by name (`need`); what it does in another way, and what
is to be had in both, has one name here. `make test-range` runs the tests on the oldest and the newest.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from funcghost.errors import VersionError

Version = tuple[int, int]

_major, _minor, *_ = torch.__version__.split(".")
TORCH: Version = int(_major), int(_minor)
"""The version that runs."""

COMPILED_STEPS: Version = (2, 13)
"""Until 2.12 Dynamo cannot be asked what a variable stands for (`resolve_source_value`), so that a step could not be
planned for the values of its call; with its sources evaluated by hand, 2.11 baked in tensors that the losses read, and
gave wrong numbers in the next call."""


def need(version: Version, what: str, instead: str) -> None:
    """Refuses something on a torch older than this.

    Raises:
        VersionError: saying what, the version that it needs, and what to do instead.
    """
    if version > TORCH:
        raise VersionError(
            f"{what} needs torch {version[0]}.{version[1]} or newer, found {torch.__version__}. Install one, or "
            f"{instead}"
        )


LINEAR_CROSS_ENTROPY: Any = getattr(F, "linear_cross_entropy", None)
"""Torch's own head, new in 2.13; None before."""

NO_BACKWARD = (RuntimeError, AssertionError)
"""What a backward raises that is not to be run: until 2.12 a checkpoint saves its inputs in a Function whose backward
raises AssertionError, where later ones have no such Function, and every other raises RuntimeError."""


def is_autocast(device: torch.device) -> bool:
    """Whether autocast is on there.

    Until 2.12 Dynamo cannot read `torch.amp.is_autocast_available`, which is to be asked first.
    """
    try:
        return torch.is_autocast_enabled(device.type)
    except RuntimeError:  # a device that has none
        return False


def groups_of(state: Any) -> list[Any]:
    """The groups of parameters of a module's FSDP2 state: several since 2.13, one or none before."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def leaves_with_gradients(arguments: Any) -> tuple[Tensor, ...]:
    """The tensors that FSDP2 puts its identity behind until 2.12: the leaves of trees.

    Since 2.13 those in dataclasses too, as its own `collect_grad_tensors` tells.
    """
    return tuple(leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.requires_grad)
