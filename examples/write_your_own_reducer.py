"""Three reducers of your own, each held to per-sample gradients by one backward each.

A reducer is a value that says what to make of the per-sample gradients of a batch. There are two kinds.
`fg.Directional` makes something of scores along directions: these cost what `fg.dot` costs. `fg.Additive` makes
something of whole gradients, parameter by parameter, in factored form. Anything else is made of parts of these kinds.
None of them has to know how the gradients come about, and all go wherever `fg.dot` goes: into a step, over kept pairs,
into a tree.

    python examples/write_your_own_reducer.py
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import funcghost as fg
from funcghost.algebra.contractions import inner_products
from funcghost.algebra.directions import Direction
from funcghost.algebra.factors import Factor
from funcghost.testing import assert_matches_naive
from funcghost.trees import Params, Tree


@dataclass(frozen=True, eq=False)
class Contrast(fg.Directional):
    """Which of two validation sets a sample serves more: `out[i] = <grad_i, one> - <grad_i, other>`, [b]."""

    one: Tree
    other: Tree

    def directions(self, params: Params) -> list[Direction]:
        """Both, matched to the parameters and checked by `fg.dot`."""
        return fg.dot(fg.stack([self.one, self.other])).directions(params)

    def result(self, scores: Tensor, params: Params) -> Tensor:
        """The difference of scores [b, 2]."""
        return scores[..., 0] - scores[..., 1]


@dataclass(frozen=True, eq=False)
class SquaredDistances(fg.Additive):
    """How far gradients are from each other: `out[i, j] = |grad_i - grad_j|^2`, [b, b].

    Squared distances add up over parameters: the sum of what `of_parameter` gives is the result. Were it something else
    that is made of the contributions, `result(parts)` would say so. Twice the gradients give four times the distances,
    hence the degree.
    """

    degree: ClassVar[int] = 2

    def of_parameter(self, name: str, uses: Sequence[Factor]) -> Tensor:
        """From inner products of the factors; a parameter used twice has two of them, whose gradients add up."""
        products = inner_products(uses, uses)
        norms = products.diagonal()
        return norms.unsqueeze(1) + norms - 2 * products

    def zero(self, batch: int, like: Tensor) -> Tensor:
        """A parameter without a gradient keeps no samples apart."""
        return like.new_zeros((batch, batch))


@dataclass(frozen=True, eq=False)
class CosineTo(fg.Reducer):
    """The cosine of the angle between each gradient and a direction: `<grad_i, v> / (|grad_i| |v|)`, [b].

    A score and a norm: of each kind one part, from the same forward and backward.
    """

    direction: Tree

    def parts(self) -> tuple[fg.Reducer, ...]:
        """What is asked for."""
        return fg.dot(self.direction), fg.squared_norm()

    def joined(self, results: Sequence[Any]) -> Tensor:
        """What is made of the answers, in the same order."""
        scores, norms = results
        size = torch.stack([leaf.square().sum() for leaf in self.direction.values()]).sum()
        cosines: Tensor = scores / (norms * size).sqrt()
        return cosines


def main() -> int:
    """Asks for all three in one step, and holds them to what they say of naive gradients."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    params = {name: weight.detach() for name, weight in model.named_parameters()}
    x, y = torch.randn(5, 6, dtype=torch.float64), torch.randint(3, (5,))

    def losses(params: Tree, batch: Tree) -> Tensor:
        logits = torch.func.functional_call(model, params, (batch[0],))
        return torch.nn.functional.cross_entropy(logits, batch[1], reduction="none")

    one, other = ({name: torch.randn_like(value) for name, value in params.items()} for _ in range(2))
    mine = {"contrast": Contrast(one, other), "distances": SquaredDistances(), "cosine": CosineTo(one)}

    found = fg.reduce(losses)(params, (x, y), mine)

    rows = torch.cat([leaf.flatten(1) for leaf in fg.materialize(fg.pairs(losses)(params, (x, y))).values()], 1)
    v, w = (torch.cat([leaf.flatten() for leaf in direction.values()]) for direction in (one, other))
    torch.testing.assert_close(found["contrast"], rows @ (v - w))
    torch.testing.assert_close(found["distances"], torch.cdist(rows, rows).square())
    torch.testing.assert_close(found["cosine"], torch.cosine_similarity(rows, v.unsqueeze(0)))
    # The same on gradients by one backward per sample. `assert_reducer_laws` draws models, too, and checks every law.
    assert_matches_naive(losses, params, (x, y), mine)
    for name, value in found.items():
        print(f"{name:9} {[round(number, 3) for number in value.flatten().tolist()][:5]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
