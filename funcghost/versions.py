"""Where the versions of torch differ that funcghost runs on: each difference with its version, and why it matters.

Nothing else asks for a version. What a version lacks is refused by name (`need`); what it does in another way, and what
is to be had in both, has one name here. `make test-range` runs the tests on the oldest and the newest.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funcghost.errors import VersionError

Version = tuple[int, int]

_major, _minor, *_ = torch.__version__.split(".")
TORCH: Version = int(_major), int(_minor)
"""The version that runs."""

COMPILED_STEPS: Version = (2, 13)
"""Until 2.12 Dynamo cannot be asked what a variable stands for (`resolve_source_value`), so that a step could not be
planned for the values of its call; with its sources evaluated by hand, 2.11 baked in tensors that the losses read, and
gave wrong numbers in the next call."""

SHARDED_MODELS: Version = (2, 13)
"""Until 2.12 FSDP2 cannot be brought back to where it is between two steps (`_reset_iter_state`) from a forward without
its backward, as planning has them, or a step that raised; it names its groups and what it hooks in other ways, too."""


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


GRAD_FN: Any = vars(torch._C.TensorBase)["grad_fn"].__get__
"""To ask for it is no use of a tensor: until 2.12 checkpoints ask what saves their inputs."""

LINEAR_CROSS_ENTROPY: Any = getattr(F, "linear_cross_entropy", None)
"""Torch's own head, new in 2.13; None before."""


def is_autocast(device: torch.device) -> bool:
    """Whether autocast is on there.

    Until 2.12 Dynamo cannot read `torch.amp.is_autocast_available`, which is to be asked first.
    """
    try:
        return torch.is_autocast_enabled(device.type)
    except RuntimeError:  # a device that has none
        return False


def detach_as_placed(value: Tensor) -> Tensor:
    """The same memory apart from autograd, for whom it is no view; a DTensor stays placed as it is.

    From 2.14 on `detach` gathers what a table whose rows lie on several ranks gives, and uses up the mask that its sum
    over ranks needs.
    """
    if type(value) is Tensor:  # in half the time
        return value.detach()
    placed: Tensor = torch.ops.aten._unsafe_view(value, value.shape)
    return placed
