"""Updates of sharded parameters: of shares where entries go by themselves, else of one parameter after another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import optree
import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from funcghost.distributed.collectives import Group, summed_over_ranks
from funcghost.distributed.tensor_parallel import share_of
from funcghost.errors import InputError
from funcghost.training.by_rules import ByRules
from funcghost.training.path_average import Leaves, inner
from funcghost.training.update_kinds import Clipped, Credit, Scheduled, Shared, Update
from funcghost.trees import Params, Tree, match_direction, split_params


class Shares:
    """A rank's shares of sharded parameters, and of trees like them."""

    def __init__(self, owned: Params, group: Group) -> None:
        """The parameters, DTensors all of them, and the ranks that have shares."""
        self.owned, self.group = owned, group
        self.ranks = distributed.get_world_size(group)
        self.copies = [self.ranks // _pieces(own) for own in owned.leaves]

    def joined(self, tree: Tree) -> Tree:
        """The tree that these are the shares of."""
        leaves = [joined(share, own) for share, own in zip(optree.tree_leaves(tree), self.owned.leaves, strict=True)]
        return self.owned.rebuild(leaves)

    def product(self, a: Leaves, b: Leaves) -> Tensor:
        """The inner product of what these are the shares of: what several ranks have as well counts once."""
        each = [inner([x], [y]) / copies for x, y, copies in zip(a, b, self.copies, strict=True)]
        return self.total(torch.stack(each).sum())

    def norm(self, leaves: Leaves) -> Tensor:
        """The norm of what these are the shares of."""
        return self.product(leaves, leaves).sqrt()

    def total(self, own: Tensor) -> Tensor:
        """The sum over ranks."""
        (total,) = summed_over_ranks([own], self.group)
        return total


def local(tree: Tree) -> Tree:
    """This rank's shares."""
    return optree.tree_map(lambda leaf: leaf.to_local().detach() if isinstance(leaf, DTensor) else leaf, tree)


def joined(share: Tensor, own: Tensor) -> DTensor:
    """What it is a share of, placed as a parameter is."""
    assert isinstance(own, DTensor)
    return DTensor.from_local(
        share, own.device_mesh, own.placements, run_check=False, shape=own.shape, stride=own.stride()
    )


def _pieces(own: Tensor) -> int:
    assert isinstance(own, DTensor)
    sizes = zip(own.device_mesh.shape, own.placements, strict=True)
    return prod(size for size, placement in sizes if not placement.is_replicate())


def over_ranks(update: Any, shares: Shares) -> Update:
    """The update of what these are the shares of, as one of the shares; see `check_rules`."""
    if isinstance(update, Scheduled):
        return replace(update, inner=over_ranks(update.inner, shares))
    if isinstance(update, Clipped):
        return replace(update, inner=over_ranks(update.inner, shares), product=shares.product, norm=shares.norm)
    return _Rules(update, shares)


def check_rules(update: Any) -> None:
    """Only what is known of an update tells what a share takes.

    Raises:
        InputError: it is a function.
    """
    while isinstance(update, Scheduled | Clipped):
        update = update.inner
    if not isinstance(update, ByRules):
        raise InputError(
            "sharded.along_path: takes an update of updates.of(optimizer, params), which may be clipped and scheduled, "
            f"found {type(update).__name__}: a function takes whole parameters, of which a rank has a share."
        )


@dataclass(frozen=True)
class _Part:
    """Some parameters: by their places, with the rules for them; `whole` if these do not take shares."""

    rules: ByRules
    places: list[int]
    whole: bool
    shares: Shares
    copies: int

    def given(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """What the rules take."""
        return [self._whole(place, leaves[place]) for place in self.places]

    def params(self, leaves: Sequence[Tensor]) -> Params:
        """The parameters that the rules take."""
        names = [self.shares.owned.names[place] for place in self.places]
        return split_params(dict(zip(names, self.given(leaves), strict=True)))

    def state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state that the rules take."""
        return {
            name: {
                slot: self._whole(place, value) if isinstance(value, Tensor) and value.dim() else value
                for slot, value in state[name].items()
            }
            for place, name in ((place, self.shares.owned.names[place]) for place in self.places)
        }

    def share(self, place: int, value: Any) -> Any:
        """This rank's share of what the rules gave."""
        own = self.shares.owned.leaves[place]
        assert isinstance(own, DTensor)
        return share_of(value, own) if self.whole and isinstance(value, Tensor) and value.dim() else value

    def _whole(self, place: int, share: Tensor) -> Tensor:
        return joined(share, self.shares.owned.leaves[place]).full_tensor() if self.whole else share


class _Rules:
    """Rules for parameters of which a rank has shares.

    Those that move every entry by itself take the shares; others (Muon) take one whole parameter after another, of
    which every rank computes the same, and keep the share of what came. Cost: for these, the bytes of the parameter,
    its gradient, its slots and cotangents; nothing for others.
    """

    def __init__(self, update: ByRules, shares: Shares) -> None:
        self.update, self.shares = update, shares
        kinds = dict[tuple[bool, int], list[int]]()
        names = shares.owned.names
        for place, name in enumerate(names):
            whole = name in update.rules and not update.rules[name].elementwise
            # A whole parameter goes by itself: no more than one is there at a time.
            kinds.setdefault((True, -1 - place) if whole else (False, shares.copies[place]), []).append(place)
        self.parts = [
            _Part(
                ByRules({names[place]: update.rules[names[place]] for place in places if names[place] in update.rules}),
                places,
                whole,
                shares,
                shares.ranks if whole else copies,
            )
            for (whole, copies), places in kinds.items()
        ]

    def __call__(self, params: Tree, grads: Tree, state: Tree) -> tuple[Tree, Tree]:
        """The parameters and the state after the step."""
        split = split_params(params)
        leaves, after = match_direction(grads, split, "grads"), list(split.leaves)
        slots = dict(self._checked(state))
        for part in self.parts:
            own = part.params(split.leaves)
            moved, new = part.rules(own.rebuild(own.leaves), own.rebuild(part.given(leaves)), part.state(slots))
            for place, name in zip(part.places, own.names, strict=True):
                after[place] = part.share(place, moved[name])
                slots[name] = {slot: part.share(place, value) for slot, value in new[name].items()}
        return split.rebuild(after), slots

    def share(
        self, params: Params, grads: Leaves, state: Tree, cotangents: Sequence[Leaves], credit: Credit, tolerance: float
    ) -> Shared:
        """See `Update.share`; the parts are those of all ranks."""
        along: list[Leaves] = [list(leaves) for leaves in cotangents]
        parts = torch.zeros(len(cotangents), dtype=torch.float64, device=grads[0].device)
        for part in self.parts:
            columns = [part.given(leaves) for leaves in cotangents]
            given = part.params(params.leaves), part.given(grads), part.state(self._checked(state))
            found = part.rules.share(*given, columns, credit, tolerance)
            parts += torch.stack(found.parts) / part.copies
            self._put(part, found.along, along)
        return Shared(along, list(self.shares.total(parts).unbind()))

    def pulled(self, params: Params, grads: Leaves, state: Tree, cotangents: Sequence[Leaves]) -> list[Leaves]:
        """`J^T V`."""
        along: list[Leaves] = [list(leaves) for leaves in cotangents]
        for part in self.parts:
            columns = [part.given(leaves) for leaves in cotangents]
            given = part.params(params.leaves), part.given(grads), part.state(self._checked(state))
            self._put(part, part.rules.pulled(*given, columns), along)
        return along

    def _put(self, part: _Part, found: Sequence[Leaves], along: Sequence[Leaves]) -> None:
        for own, leaves in zip(found, along, strict=True):
            for place, leaf in zip(part.places, own, strict=True):
                leaves[place] = part.share(place, leaf)

    def _checked(self, state: Any) -> Mapping[str, Any]:
        """The state, of these parameters.

        Raises:
            InputError: it is not.
        """
        names = set(self.shares.owned.names)
        if self.update.rules.keys() != names or not isinstance(state, Mapping) or state.keys() != names:
            raise InputError(
                "sharded.along_path: update and state must be those of updates.of(optimizer, params) for these params, "
                f"{sorted(names)[:5]}."
            )
        return state
