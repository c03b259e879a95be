"""Models that break engines of this kind, each with what must come of it: what a case is, and what several share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

Params = dict[str, Tensor]


class Case(NamedTuple):
    """`outcome` is the error to come, `says` a phrase of it; `remedy` names the case that does what it advises.

    The remedied case has the same losses. `forward_route`: whether scores can be carried to the losses as well.
    """

    losses: Callable[[Params, Any], Tensor]
    params: Params
    batch: Any
    outcome: type[Exception] | None = None
    forward_route: bool = True
    says: str = ""
    remedy: str = ""
    tolerance: float = 1e-10


CASES: dict[str, Callable[[], Case]] = {}


def case(make: Callable[[], Case]) -> Callable[[], Case]:
    CASES[make.__name__] = make
    return make


Size = tuple[int, ...] | Callable[[], Tensor]


def row(
    batch: Callable[[], Any] | None = None, says: str = "", remedy: str = "", **given: Any
) -> Callable[[Callable[[Params, Any], Tensor]], Callable[[Params, Any], Tensor]]:
    """A case from its losses: `given` are the fields of `Case` and the parameters, by shape or by what makes them."""
    fields = {k: given.pop(k) for k in ("outcome", "forward_route", "tolerance") if k in given}
    sizes: dict[str, Size] = given

    def add(losses: Callable[[Params, Any], Tensor]) -> Callable[[Params, Any], Tensor]:
        def make() -> Case:
            params = {k: size() if callable(size) else normal(*size) for k, size in sizes.items()}
            return Case(losses, params, (batch or inputs)(), says=says, remedy=remedy, **fields)

        CASES[losses.__name__] = make
        return losses

    return add


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64) * 0.7


def inputs() -> Tensor:
    return normal(4, 5, 6)


def rows() -> Tensor:
    return normal(4, 6)


def tokens() -> Tensor:
    return torch.randint(0, 10, (4, 5))


def squares(values: Tensor) -> Tensor:
    return values.square().flatten(1).sum(1)


# -- other layouts ------------------------------------------------------------------------------------


@row(w=(6, 3), v=(3, 3), batch=lambda: (normal(4, 5, 6), torch.tensor([5, 2, 4, 2])))
def packed_by_lengths(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, lengths = batch
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    h = torch.tanh(packed.data @ p["w"])
    back, _ = pad_packed_sequence(packed._replace(data=h), batch_first=True)
    return squares(back @ p["v"])


def segments() -> tuple[Tensor, Tensor]:
    return normal(7, 6), torch.tensor([2, 1, 3, 1])


# -- kinds of models ----------------------------------------------------------------------------------


def graph() -> tuple[Tensor, Tensor, Tensor]:
    edges = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0], [1, 2, 0, 4, 3, 6, 5, 2]])
    return normal(7, 6), edges, torch.tensor([0, 0, 0, 1, 1, 2, 2])
