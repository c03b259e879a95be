"""What is known of an op's derivative beyond linearity, and what an op that writes to its input is evaluated as."""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from funcghost.ops.call import ACTIVATIONS, Call
from funcghost.ops.tangent import pushforward
from tests.models.checked import normal

NAMES = [names for n in (1, 2, 3) for names in combinations(("input", "weight", "bias"), n)]


def call_of(
    op: Callable[..., Any], args: Sequence[Any], tracked: Sequence[int], written: Sequence[int] = (), **kwargs: Any
) -> Call:
    nest: Any = (tuple(args), kwargs)
    leaves, spec = optree.tree_flatten(nest)
    return Call(op, tuple(leaves), spec, tuple(tracked), tuple(written))


def derivative(function: Callable[..., Tensor], at: Sequence[Tensor], along: Sequence[Tensor]) -> Tensor:
    """By torch's own forward derivatives."""
    found: Any = torch.func.jvp(function, tuple(at), tuple(along))
    slope: Tensor = found[1]
    return slope


def slope_of(call: Call, tangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
    push = pushforward(call, "forward")
    return push.evaluate([call.leaves[slot] for slot in push.needed], tangents)


@pytest.mark.parametrize("axes", range(4))
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("names", NAMES, ids="-".join)
def test_batch_norm(names: tuple[str, ...], training: bool, axes: int) -> None:
    tensors = {"input": 3 * normal(5, 4, *[2] * axes) + 1, "weight": normal(4), "bias": normal(4)}
    mean, var = normal(4), normal(4).square() + 0.1
    kept, moved = (mean.clone(), var.clone()), {name: torch.randn_like(tensors[name]) for name in names}

    def op(**given: Tensor) -> Tensor:
        own = tensors | given
        found: Tensor = F.batch_norm(
            own["input"], mean.clone(), var.clone(), own["weight"], own["bias"], training, 0.3, 0.01
        )
        return found

    wanted = derivative(
        lambda *values: op(**dict(zip(names, values, strict=True))),
        [tensors[name] for name in names],
        [*moved.values()],
    )
    x, weight, bias = tensors.values()
    forms: dict[Any, Any] = {
        F.batch_norm: ((x, mean, var, weight, bias, training, 0.3, 0.01), (0, 3, 4), (1, 2)),
        torch.batch_norm: ((x, weight, bias, mean, var, training, 0.3, 0.01, True), (0, 1, 2), (3, 4)),
    }
    for function, (args, slots, statistics) in forms.items():
        tracked = [slot for slot, name in zip(slots, tensors, strict=True) if name in names]
        found, *others = slope_of(call_of(function, args, tracked, statistics if training else ()), [*moved.values()])
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11)
        assert [other.any().item() for other in others] == [False, False][: 2 * training]
        assert mean.equal(kept[0])
        assert var.equal(kept[1])


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_without_scale_or_statistics(training: bool) -> None:
    x, along = normal(6, 3, 2), normal(6, 3, 2)
    mean, var = (None, None) if training else (normal(3), normal(3).square())
    wanted = derivative(lambda x: F.batch_norm(x, mean, var, None, None, training), [x], [along])
    call = call_of(F.batch_norm, (x, mean, var, None, None, training), (0,))
    torch.testing.assert_close(slope_of(call, [along])[0], wanted, rtol=1e-10, atol=1e-11)


def test_batch_norm_far_from_zero_keeps_its_digits() -> None:
    values = [normal(64, 3, 8) + 1000, normal(3), normal(3)]
    tangents = [normal(64, 3, 8) + 10, normal(3), normal(3)]
    own, exact = [
        slope_of(
            call_of(F.batch_norm, (x, None, None, weight, bias, True), (0, 1, 2)), [t.to(x.dtype) for t in tangents]
        )[0]
        for x, weight, bias in ([value.float() for value in values], [value.float().double() for value in values])
    ]
    assert (own - exact).abs().max() <= 1e-3 * exact.abs().max()  # x has 1e-4 of its spread left in float32


@pytest.mark.parametrize("op", ACTIVATIONS, ids=lambda op: op.__name__)
def test_activations_that_write_to_their_input(op: Callable[..., Tensor]) -> None:
    flags = {F.threshold: (0.1, 0.2), F.hardtanh: (-0.5, 0.5)}.get(op, (0.3,) * (ACTIVATIONS[op] - 1))
    x, along = normal(5, 3), normal(5, 3)
    kept = x.clone()
    wanted = derivative(lambda x: op(x, *flags), [x], [along])
    for call in (
        call_of(op, (x, *flags, True), (0,), (0,)),
        call_of(op, (x, *flags), (0,), (0,), inplace=True),
    ):
        (found,) = slope_of(call, [along])
        assert found.equal(wanted)
        (value,) = call.evaluate(call.leaves)
        assert value.equal(op(x, *flags))
        assert x.equal(kept)
