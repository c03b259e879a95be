"""Sums over ranks, in a few large messages that are under way at once."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from funcghost.errors import InputError
from funcghost.trees import Params

BUCKET = 25 * 2**20
"""Bytes of one message, as in `DistributedDataParallel`."""

Group = distributed.ProcessGroup | None
"""The ranks that take part; None for all."""


def several(group: Group) -> bool:
    """Whether there is anyone to talk to."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size(group) > 1


def told_by_all(own: Any, group: Group) -> list[Any]:
    """What every rank says, by rank: a small value, for which host and device wait."""
    if not several(group):
        return [own]
    told = [own] * distributed.get_world_size(group)
    distributed.all_gather_object(told, own, group=group)
    return told


def summed_over_ranks(values: Sequence[Tensor], group: Group = None, bucket: int = BUCKET) -> list[Tensor]:
    """The sums over the ranks of tensors that every rank has, in the same order and of the same shapes and dtypes.

    In the dtype of the tensors, as `DistributedDataParallel` does. Cost: the bytes of the tensors, once by all-reduce,
    and a copy of them. The tensors given are left as they are.
    """
    if not several(group):
        return list(values)
    found: dict[int, Tensor] = {}
    pending = []
    for members in _buckets(values, bucket):
        flat = torch.cat([values[index].reshape(-1) for index in members])
        pending.append((members, flat, distributed.all_reduce(flat, group=group, async_op=True)))
    for members, flat, work in pending:
        work.wait()
        parts = flat.split([values[index].numel() for index in members])
        found.update({index: part.view(values[index].shape) for index, part in zip(members, parts, strict=True)})
    return [found[index] for index in range(len(values))]


def _buckets(values: Sequence[Tensor], size: int) -> list[list[int]]:
    """The numbers of tensors that travel together: of one dtype, in order, up to `size` bytes or a single one."""
    done: list[list[int]] = []
    filling: dict[torch.dtype, list[int]] = defaultdict(list)
    held: dict[torch.dtype, int] = defaultdict(int)
    for index, value in enumerate(values):
        members = filling[value.dtype]
        if members and held[value.dtype] + value.nbytes > size:
            done.append(members)
            members = filling[value.dtype] = []
            held[value.dtype] = 0
        members.append(index)
        held[value.dtype] += value.nbytes
    return done + [members for members in filling.values() if members]


def check_replicated(params: Params, group: Group = None) -> None:
    """The parameters must be the same on every rank: names, shapes, dtypes, and the values by a checksum.

    Every rank must call it, and every rank raises if one differs. Host and device wait for each other.

    Raises:
        InputError: naming the ranks that differ from the first.
    """
    if not several(group):
        return
    own = [_summary(params)]
    everyone = [own[0]] * distributed.get_world_size(group)
    distributed.all_gather_object(everyone, own[0], group=group)
    for what, place in (("names, shapes or dtypes", 0), ("values", 1)):
        other = [rank for rank, found in enumerate(everyone) if found[place] != everyone[0][place]]
        if other:
            raise InputError(
                f"params: the {what} of the parameters on ranks {other} are not those of rank 0, but a data parallel "
                "step needs the same model on every rank. Seed alike, load one checkpoint, or broadcast from rank 0."
            )


def _summary(params: Params) -> tuple[list[tuple[str, tuple[int, ...], str]], list[str]]:
    """What is compared: the structure, and each leaf's sum and sum of squares to the last digit."""
    structure = [
        (name, tuple(leaf.shape), str(leaf.dtype)) for name, leaf in zip(params.names, params.leaves, strict=True)
    ]
    wide = [leaf.detach().double() for leaf in params.leaves if not leaf.is_meta]
    sums = [torch.stack([leaf.sum(), leaf.square().sum()]) for leaf in wide]
    return structure, [value.hex() for pair in sums for value in pair.tolist()]
