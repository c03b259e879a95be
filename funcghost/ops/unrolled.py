"""The factors of recurrent layers: products at every step of a sequence, instead of one derivative for each sample."""

from collections.abc import Sequence

import optree
import torch
from torch import Tensor

from funcghost.algebra.factors import Dense, Factor, Outer, matrix_form
from funcghost.dtypes import as_written
from funcghost.ops.apart import Passed, Use, by_autograd
from funcghost.ops.call import Call, is_operand, physical
from funcghost.ops.families.recurrent import KINDS, arguments_of
from funcghost.ops.layout import Layout, Placed, Rows, readable, samples_along
from funcghost.ops.products import bound
from funcghost.ops.recurrence import Deltas, Steps, Weights, unrolled
from funcghost.versions import is_autocast

HOST = torch.device("cpu")


def by_steps(call: Call, layouts: Sequence[Layout | Rows | None], chosen: Sequence[int], vmapped: int) -> Use | None:
    """The factors of the weights and the first states of a recurrent layer; None where the call is none that is known.

    Directions are scored by them, too: `J V` takes two backwards. They are had by a derivative for each sample where a
    sequence turns out not to be of one sample.
    """
    operands = [leaf for leaf in call.leaves if is_operand(leaf)]
    if call.op not in KINDS or vmapped or call.written or any(physical(leaf) is not leaf for leaf in operands):
        return None
    names, kind = arguments_of(call), KINDS[call.op]
    given, at = bound(call, names, call.leaves), bound(call, names, range(len(call.leaves)))
    states, params = optree.tree_leaves(at["hx"]), optree.tree_leaves(at["params"])
    slots = tuple(slot for slot in call.tracked if slot in (*states, *params))
    ways, each, packed = 1 + given["bidirectional"], 4 if given["has_biases"] else 2, "batch_sizes" in given
    dtypes = {leaf.dtype for leaf in operands if leaf.is_floating_point()}
    known = len(params) == given["num_layers"] * ways * each and dtypes in ({torch.float32}, {torch.float64})
    if not slots or not known or (given["dropout"] and given["train"]) or not (packed or given["input"].dim() == 3):
        return None
    axis = 0 if packed or given["batch_first"] else 1
    if not readable(given["input"]) or any(
        isinstance(where, Layout) and where.fold != "single" and where.axis != (1 if number else axis)
        for number, where in zip(chosen, layouts, strict=True)
    ):
        return None
    apart = by_autograd(call, slots, chosen)

    def factors(passed: Passed) -> list[Factor]:
        saved, _, gradients, layouts, batch = passed
        values = dict(zip(apart.needed, saved, strict=True))
        rows, first = values[at["input"]], [values[slot] for slot in states]
        if not readable(rows) or is_autocast(rows.device):
            return apart.factors(passed)
        # 1. The steps, and the sample of each sequence, on the host: a device that knows is waited for.
        counts = values[at["batch_sizes"]].tolist() if packed else [rows.shape[axis]] * rows.shape[1 - axis]
        steps = Steps(tuple(counts))
        ends: list[Tensor | None] = [None] * (1 + len(first))
        owners = list[Tensor | None]()
        for number, gradient, where in zip(chosen, gradients, layouts, strict=True):
            if gradient is not None:
                ends[number], place = gradient, 1 if number else axis
                own = None if isinstance(where, str) else samples_along(where, place, gradient.shape, batch, HOST)
                owners.append(_of_sequences(own, steps) if packed and not number else own)
        owner = owners[0]
        if owner is None or any(other is None or not torch.equal(owner, other) for other in owners[1:]):
            return apart.factors(passed)
        # 2. What the weights get at each step, by sample.
        out = ends[0]
        if not packed:
            rows, out = rows.movedim(axis, 1).flatten(0, 1), out if out is None else out.movedim(axis, 1).flatten(0, 1)
        weights = [Weights(*(values[slot] for slot in params[i : i + each])) for i in range(0, len(params), each)]
        with as_written(rows.device), torch.no_grad():
            found = unrolled(kind, steps, rows, first, weights, ways, out, ends[1:])
            placed = Placed(0, owner[steps.sequence])
            ours = [factor for delta in found for factor in _of_weights(delta, placed, batch)[:each]]
            by_state = zip(*(delta.first for delta in found), strict=True)
            ours += [_of_states(torch.stack(gradients), owner, batch) for gradients in by_state]
        known = dict(zip((*params, *states), ours, strict=True))
        return [known[slot] for slot in slots]

    return Use(slots, apart.needed, factors, smaller=True)


def _of_sequences(samples: Tensor | None, steps: Steps) -> Tensor | None:
    """The sample of each sequence from those of the rows, if it has one."""
    if samples is None:
        return None
    own = samples[: steps.counts[0]]
    return own if torch.equal(own[steps.sequence], samples) else None


def _of_weights(delta: Deltas, placed: Placed, batch: int) -> list[Factor]:
    """The factors of the weights of a layer in one direction, and of its biases."""
    inward, rows, before = (placed.by_sample(value, batch) for value in (delta.inward, delta.rows, delta.before))
    across = inward if delta.across is delta.inward else placed.by_sample(delta.across, batch)
    pairs = ((inward, rows), (across, before))
    outer = [Outer(d.unsqueeze(2), x.unsqueeze(2), matrix_form((d.shape[-1], x.shape[-1]))) for d, x in pairs]
    bias = Dense(inward.sum(1))
    return [*outer, bias, bias if across is inward else Dense(across.sum(1))]


def _of_states(gradients: Tensor, owner: Tensor, batch: int) -> Factor:
    """The factor of first states [l, s, h], of which a sample has those of its sequences."""
    own = torch.arange(batch, device=HOST).unsqueeze(1) == owner
    return Dense(gradients * own.view(batch, 1, -1, 1).to(gradients.device))
