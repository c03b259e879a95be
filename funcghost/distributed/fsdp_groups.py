"""What FSDP2 knows of a parameter and of a group of them, and functions that stand for its methods for a while.

With `fsdp.py`, the only place where names of `torch.distributed.fsdp._fully_shard` stand.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, distributed, nn


@dataclass(frozen=True, eq=False)
class Part:
    """A parameter of the params of a step: its number there, and what FSDP2 knows of it."""

    number: int
    own: Any

    @property
    def leaf(self) -> Tensor:
        """What layers read."""
        leaf: Tensor = self.own.unsharded_param
        return leaf

    @property
    def shape(self) -> torch.Size:
        """The shape of what layers read."""
        return torch.Size(self.own._orig_size)

    @property
    def axis(self) -> int:
        """The axis that it is sharded along."""
        return int(self.own.fsdp_placement.dim)


@dataclass(frozen=True, eq=False)
class Group:
    """Parameters that are gathered in one message, and freed together."""

    own: Any
    parts: list[Part] = field(default_factory=list)

    @property
    def ranks(self) -> int:
        """How many ranks the average of a gradient is taken over."""
        info = self.own.mesh_info
        return int(info.shard_mesh_size * getattr(info, "replicate_mesh_size", 1))

    @property
    def shards(self) -> int:
        """How many ranks have a share each."""
        return int(self.own.mesh_info.shard_mesh_size)

    @property
    def members(self) -> distributed.ProcessGroup:
        """These ranks."""
        members: distributed.ProcessGroup = self.own.mesh_info.shard_process_group
        return members

    @property
    def divisor(self) -> float:
        """What a sum of gradients over ranks is divided by in a backward."""
        factor: float | None = self.own.gradient_divide_factor
        return self.ranks if factor is None else factor


class Companion(Protocol):
    """What is gathered along with the parameters of a group; `early` if it is wanted from the forward on."""

    early: bool

    def start(self) -> None:
        """The parameters are sent for."""

    def finish(self) -> None:
        """They have come."""

    def free(self) -> None:
        """They are freed."""


def sharded_as(own: Any) -> list[nn.Parameter | None]:
    """The parameter, and what a loading of weights has put in its place, which FSDP2 sees when it is first used."""
    place = own._module_info
    return [own.sharded_param, place.module._parameters.get(place.param_name)]


def last(*args: Any) -> Any:
    """The last argument: stands for a method that is to do nothing."""
    return args[-1]


def unseen(method: Callable[..., Any]) -> Callable[..., Any]:
    """The same, whose ops no function mode sees: they are none of the losses."""

    def called(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return method(*args, **kwargs)

    return called


@contextmanager
def standing(methods: Sequence[tuple[Any, Mapping[str, Callable[..., Any]]]]) -> Iterator[None]:
    """Lets functions stand for methods of single objects, for as long as the body runs."""
    try:
        for own, parts in methods:
            for name, part in parts.items():
                setattr(own, name, part)
        yield
    finally:
        for own, parts in methods:
            for name in parts:
                own.__dict__.pop(name, None)
