"""Directions of a sharded model: a rank keeps its shares, and has the whole of a group only while that is computed.

They are tensors of the whole shape, whose memory comes and goes with that of the parameters of their group.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from funcghost.algebra.directions import Direction, Leaf, LowRank
from funcghost.distributed.fsdp import Sharded
from funcghost.distributed.fsdp_groups import Group, Part


@contextmanager
def accompanied(model: Sharded, directions: Sequence[Direction], early: set[str]) -> Iterator[list[list[Leaf | None]]]:
    """The directions in the form of whole tensors, which are gathered with the parameters of their group.

    They are there in a backward from where FSDP2 gathers the group to where it frees it; those of groups with
    `early` parameters from the forward on, to the end.
    """
    whole: list[list[Leaf | None]] = [list(direction) for direction in directions]
    companies = dict[Group, Company]()
    try:
        for group in model.groups:
            company = Company(group, early=any(model.params.names[part.number] in early for part in group.parts))
            for direction in whole:
                for part in group.parts:
                    direction[part.number] = company.add(part, direction[part.number])
            companies[group] = company
        with model.followed(companies):
            yield whole
    finally:
        for company in companies.values():
            company.free()


class Company:
    """Directions that are whole on a rank only while the parameters of their group are."""

    def __init__(self, group: Group, *, early: bool) -> None:
        """Without directions."""
        self.group, self.early = group, early
        self.given: list[tuple[Part, Tensor, Tensor]] = []
        self.pending: tuple[Tensor, Any] | None = None
        self.there = False

    def add(self, part: Part, given: Leaf | None) -> Leaf | None:
        """The form in which a run takes a leaf of a direction; of one that is sharded, a tensor without memory yet."""
        like = part.leaf
        if isinstance(given, LowRank):
            rows, cols = (value.to(device=like.device, dtype=like.dtype) for value in (given.rows, given.cols))
            return replace(given, rows=rows, cols=cols)
        if not isinstance(given, DTensor):
            return given if given is None else given.to(device=like.device, dtype=like.dtype)
        whole = torch.empty(part.shape, dtype=like.dtype, device=like.device)
        whole.untyped_storage().resize_(0)
        self.given.append((part, given.to_local().detach(), whole))
        if not isinstance(like, DTensor):
            return whole
        return DTensor.from_local(
            whole, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )

    def start(self) -> None:
        """Sends for what is not there: one message for the group, in the dtype in which its layers compute."""
        if not self.given or self.there or self.pending is not None:
            return
        _, _, first = self.given[0]
        flat = torch.cat([self._padded(part, local).to(first).reshape(-1) for part, local, _ in self.given])
        gathered, work = flat, None
        if self.group.shards > 1:
            gathered = flat.new_empty(self.group.shards * len(flat))
            work = distributed.all_gather_single(gathered, flat, group=self.group.members, async_op=True)
        self.pending = gathered, work

    def finish(self) -> None:
        """Puts what has come where it belongs."""
        if self.pending is None:
            return
        (gathered, work), self.pending = self.pending, None
        if work is not None:
            work.wait()
        shares, start = gathered.view(self.group.shards, -1), 0
        for part, _, whole in self.given:
            pieces = self._pieces(part)
            size = prod(pieces)
            whole.untyped_storage().resize_(whole.numel() * whole.element_size())
            each = shares[:, start : start + size].reshape(-1, *pieces)
            joined = torch.cat(each.unbind(0), part.axis).narrow(part.axis, 0, whole.shape[part.axis])
            whole.data.copy_(joined)  # past the version counter: to autograd it is the same value all the time
            start += size
        self.there = True

    def free(self) -> None:
        """Lets the memory go."""
        for _, _, whole in self.given:
            whole.untyped_storage().resize_(0)
        self.there, self.pending = False, None

    def _pieces(self, part: Part) -> list[int]:
        """The shape of a rank's share, padded so that all ranks have as much."""
        shape = list(part.shape)
        shape[part.axis] = -(-shape[part.axis] // self.group.shards)
        return shape

    def _padded(self, part: Part, local: Tensor) -> Tensor:
        pieces = self._pieces(part)
        if local.shape[part.axis] == pieces[part.axis]:
            return local
        blank = local.new_zeros(pieces)
        blank.narrow(part.axis, 0, local.shape[part.axis]).copy_(local)
        return blank
