"""The memory that the cost model predicts, held to what torch allocates."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from funcghost.algebra.contractions import inner_products, squared_norms
from funcghost.algebra.cost import Means, choose, sketch
from funcghost.algebra.factors import Factor, Lookup, Outer, matrix_form
from funcghost.options import RouteName

MEGABYTE = 2**20


class Allocated(TorchDispatchMode):
    """The most memory that tensors made inside take at once, seen after every op."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, tuple[Any, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {value.untyped_storage()._cdata for value in args if isinstance(value, Tensor)}
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, list | tuple) else [out]:
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in given:
                storage = value.untyped_storage()
                self.known[storage._cdata] = (storage._weak_ref(), storage.nbytes())
        alive = {key: found for key, found in self.known.items() if not torch.UntypedStorage._expired(found[0])}
        self.known = alive
        self.most = max(self.most, sum(size for _, size in alive.values()))
        return out


def tokens(b: int, t: int, m: int, n: int) -> list[Factor]:
    return [Outer(torch.randn(b, t, 1, m), torch.randn(b, t, 1, n), matrix_form((m, n)))]


def tied(b: int, t: int, m: int, n: int) -> list[Factor]:
    return [*tokens(b, t, m, n), Lookup(torch.randint(m, (b, t)), torch.randn(b, t, n), (m, n))]


@pytest.mark.parametrize("budget", [8 * MEGABYTE, 256 * MEGABYTE])
@pytest.mark.parametrize("route", ["ghost", "materialise"])
@pytest.mark.parametrize("make", [tokens, tied])
@pytest.mark.parametrize("diagonal", [True, False])
def test_the_predicted_memory_of_tiles_is_what_is_allocated(
    budget: int, route: RouteName, make: Callable[..., list[Factor]], diagonal: bool
) -> None:
    b, t = 6, 256
    uses, means = make(b, t, 512, 384), Means(budget, route)
    sketches = [sketch(use) for use in uses]
    chosen, _ = choose(sketches, sketches, (b, b), means, diagonal=diagonal, same=True)
    with Allocated() as seen:
        squared_norms(uses, means) if diagonal else inner_products(uses, uses, means)
    predicted = min(chosen.full, budget)
    assert predicted > 2 * MEGABYTE
    assert 0.75 * predicted <= seen.most <= 1.25 * predicted


@pytest.mark.parametrize(("train", "validation"), [(8, 4), (3, 9), (6, 6)])
@pytest.mark.parametrize("make", [tokens, tied])
def test_the_predicted_memory_of_training_against_validation(
    make: Callable[..., list[Factor]], train: int, validation: int
) -> None:
    means = Means(1 << 40, "materialise")
    a, b = (make(size, 64, 512, 384) for size in (train, validation))
    chosen, _ = choose([sketch(use) for use in a], [sketch(use) for use in b], (train, validation), means)
    with Allocated() as seen:
        inner_products(a, b, means)
    assert 0.75 * chosen.full <= seen.most <= 1.25 * chosen.full
