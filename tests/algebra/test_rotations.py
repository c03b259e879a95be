"""Factored gradients in a basis against the gradients themselves."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from funcghost.algebra.contractions import inner_products, squared_norms
from funcghost.algebra.cost import Means
from funcghost.algebra.factors import Dense, Factor, Form, Outer, dense, samples
from funcghost.algebra.pairs import Pairs
from funcghost.algebra.rotations import form_of, in_form, rotated, squares, weighted_norms, weighted_products
from funcghost.algebra.sums import total
from funcghost.testing.strategies import pairs as drawn_pairs

BUDGETS = st.sampled_from([1, 100, 1 << 20])


def whole(pairs: Pairs, name: str, form: Form) -> Tensor:
    """[b, q, m, n]."""
    return form.fold(total([dense(use) for use in pairs.uses[name]]))


def test_a_dense_use_beside_blocks() -> None:
    """A dense gradient has no blocks of its own: it is seen as those of the product beside it."""
    form = Form((4, 2), (2, 2, 2), ((0,), (1,), (2,)))
    dense_use, outer = Dense(torch.randn(3, 4, 2)), Outer(torch.randn(3, 5, 2, 2), torch.randn(3, 5, 2, 2), form)
    orders: list[list[Factor]] = [[dense_use, outer], [outer, dense_use]]
    for uses in orders:
        seen = [in_form(use, form_of(uses)) for use in uses]
        truth = form.fold(dense(outer) + dense_use.value)
        torch.testing.assert_close(squares(seen, 1), truth.square().sum(0))
        turned = [rotated(use, torch.ones(2, 2, 1), None) for use in seen]
        torch.testing.assert_close(squares(turned, 1 << 20), truth.sum(2, keepdim=True).square().sum(0))


@given(drawn_pairs(integers=True), BUDGETS, st.booleans(), st.booleans())
def test_rotated_gradients_are_the_gradients_rotated(
    kept: Pairs, budget: int, with_left: bool, with_right: bool
) -> None:
    """On small whole numbers, to the last bit: squares, weighted norms and products, over all uses."""
    for name, uses in kept.uses.items():
        form = form_of(uses)
        q, m, n = form.blocks
        left = torch.randint(-2, 3, (q, m, 2)).double() if with_left else None
        right = torch.randint(-2, 3, (q, n, 3)).double() if with_right else None
        seen = [rotated(in_form(use, form), left, right) for use in uses]
        truth = whole(kept, name, form)
        truth = truth if left is None else left.mT @ truth
        truth = truth if right is None else truth @ right
        b = samples(seen[0])
        weights = torch.randint(0, 4, truth.shape[1:]).double()
        assert torch.equal(squares(seen, budget), truth.square().sum(0))
        assert torch.equal(
            weighted_norms(seen, weights, budget),
            (truth.square() * weights).flatten(1).sum(1) if b else truth.new_zeros(0),
        )
        flat = truth.reshape(b, truth[0].numel() if b else 0)
        if b:
            assert torch.equal(weighted_products(seen, seen, weights, budget), (flat * weights.flatten()) @ flat.T)
            other = [use.map(lambda value: value[:1]) for use in seen]
            assert torch.equal(weighted_products(seen, other, weights, budget), (flat * weights.flatten()) @ flat[:1].T)
            # What is rotated is a factored gradient like any other.
            assert torch.equal(squared_norms(seen, Means()), flat.square().sum(1))
            assert torch.equal(inner_products(seen, seen, Means()), flat @ flat.T)
