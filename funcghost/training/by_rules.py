"""Updates that have a rule for every parameter: what torch's optimizers are."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funcghost.errors import InputError
from funcghost.training.path_average import Leaves, adaptive_average, elementwise_average, inner, pulled_back
from funcghost.training.update_kinds import Credit, Shared
from funcghost.training.update_rules import Rule, Slots
from funcghost.trees import Params, Tree, match_direction, split_params


@dataclass(frozen=True)
class ByRules:
    """An update that has a rule for every parameter."""

    rules: Mapping[str, Rule]

    def __call__(self, params: Tree, grads: Tree, state: Tree) -> tuple[Tree, Tree]:
        """The parameters and the state after the step."""
        split = split_params(params)
        after, slots = [], {}
        for name, param, grad, rule, own in self._rows(split, match_direction(grads, split, "grads"), state):
            moved = rule.moved(param, grad, own)
            after.append(moved.kept + moved.move)
            slots[name] = moved.slots
        return split.rebuild(after), slots

    def share(
        self, params: Params, grads: Leaves, state: Tree, cotangents: Sequence[Leaves], credit: Credit, tolerance: float
    ) -> Shared:
        """See `Update.share`; parameter by parameter."""
        rows = self._rows(params, grads, state)
        along: list[Leaves] = [list(leaves) for leaves in cotangents]
        parts: list[list[Tensor]] = [[] for _ in cotangents]
        for places in _together(rows):
            row = _joined([rows[place] for place in places])
            columns = [_flat([leaves[place] for place in places]) for leaves in cotangents]
            found, own = _in_pieces(*row, columns, credit, tolerance)
            for k, value in enumerate(found):
                parts[k].append(own[k])
                for place, leaf in zip(places, _apart(value, [params.leaves[p] for p in places]), strict=True):
                    along[k][place] = leaf
        return Shared(along, [torch.stack(numbers).sum() for numbers in parts])

    def pulled(self, params: Params, grads: Leaves, state: Tree, cotangents: Sequence[Leaves]) -> list[Leaves]:
        """`J^T V`."""
        rows = self._rows(params, grads, state)

        def step(leaves: Leaves) -> Leaves:
            return [
                rule.moved(param, leaf, slots, rounded=False).move
                for leaf, (_, param, _, rule, slots) in zip(leaves, rows, strict=True)
            ]

        return pulled_back(step, grads, cotangents)

    def _rows(self, params: Params, grads: Leaves, state: Tree) -> "list[Row]":
        """Name, parameter, gradient, rule and slots of every parameter."""
        if self.rules.keys() != set(params.names):
            raise InputError(
                f"params: the update was made for {sorted(self.rules)[:5]}, found {sorted(params.names)[:5]}. "
                "Make it with updates.of(optimizer, params) for these parameters."
            )
        if not isinstance(state, Mapping) or state.keys() != self.rules.keys():
            found = sorted(map(str, state))[:5] if isinstance(state, Mapping) else type(state).__name__
            raise InputError(f"state: must be that of this update, slots for {sorted(self.rules)[:5]}, found {found}.")
        rows = []
        for name, param, grad in zip(params.names, params.leaves, grads, strict=True):
            rule, slots = self.rules[name], state[name]
            _check_slots(name, param, slots, rule.begin(torch.empty_like(param, device="meta")))
            rows.append((name, param, grad, rule, slots))
        return rows


def _check_slots(name: str, param: Tensor, slots: Any, wanted: Slots) -> None:
    if not isinstance(slots, Mapping) or slots.keys() != {*wanted, "lr"}:
        found = sorted(slots) if isinstance(slots, Mapping) else type(slots).__name__
        raise InputError(
            f"state[{name!r}]: this optimizer has {sorted([*wanted, 'lr'])}, found {found}: the state of another one? "
            "Pass the state that updates.of gave with this update, or that its last step gave."
        )
    for slot, value in slots.items():
        shape = list(wanted[slot].shape) if slot in wanted else []
        if not isinstance(value, Tensor) or list(value.shape) != shape:
            found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"state[{name!r}][{slot!r}]: must be a tensor {shape}, found {found}.")


SMALL = 1 << 16
"""Entries of a parameter up to which the time of an op is that of calling it."""
PIECE = 1 << 17
"""Entries of which all that an update makes stays in a CPU's cache."""

Row = tuple[str, Tensor, Tensor, Rule, Slots]


def _together(rows: Sequence[Row]) -> list[list[int]]:
    """Places of small parameters whose entries go by themselves in the same way, as one; every other by itself."""
    groups: dict[Any, list[int]] = {}
    for place, (_, param, _, rule, slots) in enumerate(rows):
        numbers = tuple((name, float(value)) for name, value in slots.items() if not value.dim())
        small = rule.elementwise and param.dim() > 0 and param.numel() <= SMALL
        groups.setdefault((rule, param.dtype, param.device, numbers) if small else place, []).append(place)
    return list(groups.values())


def _joined(rows: Sequence[Row]) -> Row:
    """Several parameters as one, flat and end to end; one as it is."""
    if len(rows) == 1:
        return rows[0]
    names, params, grads, rules, slots = zip(*rows, strict=True)
    merged = {name: _flat([own[name] for own in slots]) if value.dim() else value for name, value in slots[0].items()}
    return ", ".join(names), _flat(params), _flat(grads), rules[0], merged


def _flat(leaves: Sequence[Tensor]) -> Tensor:
    return leaves[0] if len(leaves) == 1 else torch.cat([leaf.flatten() for leaf in leaves])


def _apart(value: Tensor, like: Sequence[Tensor]) -> Sequence[Tensor]:
    if len(like) == 1:
        return [value]
    parts = value.split([leaf.numel() for leaf in like])
    return [part.view(leaf.shape) for part, leaf in zip(parts, like, strict=True)]


def _in_pieces(
    name: str,
    param: Tensor,
    grad: Tensor,
    rule: Rule,
    slots: Slots,
    cotangents: Sequence[Tensor],
    credit: Credit,
    tolerance: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """As `_shared`; of a large parameter whose entries go by themselves, in pieces that stay in a cache."""
    if not rule.elementwise or param.numel() <= PIECE or param.device.type != "cpu":
        return _shared(name, param, grad, rule, slots, cotangents, credit, tolerance)
    found = [torch.empty_like(v, memory_format=torch.contiguous_format) for v in cotangents]
    parts = [list[Tensor]() for _ in cotangents]
    whole = [param, grad, *(value for value in slots.values() if value.dim()), *cotangents, *found]
    for piece in zip(*(tensor.reshape(-1).split(PIECE) for tensor in whole), strict=True):
        own_param, own_grad, *rest = piece
        own_slots = {slot: rest.pop(0) if value.dim() else value for slot, value in slots.items()}
        columns, places = rest[: len(cotangents)], rest[len(cotangents) :]
        values, sums = _shared(name, own_param, own_grad, rule, own_slots, columns, credit, tolerance)
        for place, value, part, total in zip(places, values, parts, sums, strict=True):
            place.copy_(value)
            part.append(total)
    return found, [torch.stack(part).sum() for part in parts]


def _shared(
    name: str,
    param: Tensor,
    grad: Tensor,
    rule: Rule,
    slots: Slots,
    cotangents: Sequence[Tensor],
    credit: Credit,
    tolerance: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """D of one parameter for each cotangent, and what the parts of its gradient add up to."""
    at: Tensor = grad
    times: float | Tensor = 1.0
    if credit == "impulse":
        with torch.no_grad():
            at, times = rule.remembered(param, grad, slots)
    step = _step(rule, credit, param, grad, slots)
    if rule.elementwise:

        def step_at(places: Tensor) -> Callable[[Tensor], Tensor]:
            own = {slot: value.take(places) if value.dim() else value for slot, value in slots.items()}
            return _step(rule, credit, param.take(places), grad.take(places), own)

        factor, moved = elementwise_average(step, at, step_at)
        found, parts = [factor * v for v in cotangents], [inner([v], [moved]) for v in cotangents]
    else:
        columns = [[v] for v in cotangents]
        what = f"the update of {name!r}"
        averaged, parts = adaptive_average(lambda leaves: [step(leaves[0])], [at], columns, tolerance, what)
        found = [value for [value] in averaged]
    if credit == "impulse":
        found = [value * times for value in found]
        parts = [inner([value], [grad]) for value in found]
    return found, parts


def _step(rule: Rule, credit: Credit, param: Tensor, grad: Tensor, slots: Slots) -> Callable[[Tensor], Tensor]:
    """The step that a gradient makes, or for its impulse that the memory makes, everything else being as it is."""
    if credit == "impulse":
        return lambda memory: rule.from_memory(param, grad, slots, memory)
    return lambda leaf: rule.moved(param, leaf, slots, rounded=False).move
