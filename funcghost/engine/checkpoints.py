"""Regions that `torch.utils.checkpoint` runs again in the backward, outside of the losses."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from funcghost.errors import MismatchError, UnsupportedOpError


class Resumable(Protocol):
    """A mode that can be active again where a part of what it saw is run again."""

    def renamed(self, old: Tensor, new: Tensor) -> None:
        """Another tensor is the same value."""

    def resumed(self) -> AbstractContextManager[Any]:
        """The mode as it is now, for a part that is run again."""


active: ContextVar[Resumable | None] = ContextVar("funcghost_capture", default=None)
"""The mode of the run that is going on."""


def checkpoint_context() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The `context_fn` that lets `torch.utils.checkpoint` recompute under funcghost.

    Example:
        >>> import torch, funcghost as fg
        >>> from torch.utils.checkpoint import checkpoint
        >>> layer, x = torch.nn.Linear(3, 3), torch.ones(2, 3)
        >>> y = checkpoint(layer, x, use_reentrant=False, context_fn=fg.checkpoint_context)

    Checkpointing recomputes a region in the backward, outside of the losses. There a module has its own parameters
    again, not those handed to `functional_call`; so this works when the `params` of the step are the module's own
    tensors, and raises `UnsupportedOpError` otherwise. Outside of funcghost it does nothing.
    """
    mode = active.get()
    again = nullcontext() if mode is None else mode.resumed()
    return nullcontext(), again


@contextmanager
def through_no_checkpoint() -> Iterator[None]:
    """Where a backward runs while the losses do.

    Raises:
        UnsupportedOpError: it comes to a region of `torch.utils.checkpoint`.
    """
    try:
        yield
    except (CheckpointError, MismatchError) as error:
        raise UnsupportedOpError(
            "the losses take a derivative through a region of torch.utils.checkpoint, which is not run again there as "
            "it ran. Leave the checkpoint out where the losses call torch.autograd.grad; without create_graph=True it "
            "is enough to pass it context_fn=fg.checkpoint_context."
        ) from error
