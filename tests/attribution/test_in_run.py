"""In-Run Data Shapley against its definition."""

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import funcghost as fg
from funcghost.attribution import in_run
from funcghost.laws.oracle import per_sample_gradients
from tests.depth import fewer
from tests.models.programs import Program, programs
from tests.models.small import like, rows, small_gpt
from tests.naive import assert_close, assert_trees_close, dots, gradient
from tests.versions import differentiated_twice

Params = dict[str, Tensor]


def flat(tree: Params) -> Tensor:
    return torch.cat([leaf.flatten() for leaf in tree.values()])


def rowwise(tree: Params) -> Tensor:
    return torch.cat([leaf.reshape(len(leaf), -1) for leaf in tree.values()], 1)


def hessian(losses: Any, params: Params, batch: Any) -> Tensor:
    """The whole Hessian of the mean loss, by torch.autograd.functional."""
    sizes = [p.numel() for p in params.values()]

    def mean(vector: Tensor) -> Tensor:
        parts = (part.view(p.shape) for part, p in zip(vector.split(sizes), params.values(), strict=True))
        value: Tensor = losses(dict(zip(params, parts, strict=True)), batch).mean()
        return value

    with differentiated_twice():
        return torch.autograd.functional.hessian(mean, flat(params))


@fewer(3)
@given(programs(empty=False), st.sampled_from(["mean", "sum"]), st.booleans())
def test_values_are_those_of_the_paper(program: Program, reduction: Any, scaled: bool) -> None:
    assume("no grad" not in program.features)  # a Hessian through torch.no_grad() is not a matter of definition
    batch, validation = program.batch(), program.batch(3, seed=9)
    params, lr = program.params, 0.3
    scale = {k: v.abs() + 0.1 for k, v in program.direction(3).items()} if scaled else None
    diagonal = flat(scale) if scale else torch.ones(sum(p.numel() for p in params.values()), dtype=torch.float64)
    gradients = rowwise(per_sample_gradients(program.losses, params, batch))
    eta = lr / len(gradients) if reduction == "mean" else lr
    v = flat(gradient(program.losses, params, validation)[0])
    h = hessian(program.losses, params, validation)
    first = -eta * gradients @ (diagonal * v)
    second = first + eta**2 / 2 * gradients @ (diagonal * (h @ (diagonal * gradients.sum(0))))
    step: Any = in_run.second_order(program.losses, reduction=reduction)
    out = step(params, batch, lr=lr, validation=[validation], preconditioner=scale)
    size = (gradients.abs() @ (diagonal * (v.abs() + h.abs() @ (diagonal * gradients.abs().sum(0))))).max()
    assert float((out.first - first).abs().max()) <= 1e-10 * float(size)
    assert float((out.values - second).abs().max()) <= 1e-10 * float(size)
    assert_trees_close(out.grads, gradient(program.losses, params, batch, reduction)[0])


def test_first_and_second_order_are_shapley_values_of_their_utility() -> None:
    # By the definition: averages over all orders of the samples' marginal contributions to the Taylor expansion of U.
    _, losses, params = small_gpt(layers=1, width=4, vocabulary=8, length=5)
    params = {k: p.detach().double() for k, p in params.items()}
    batch, validation, lr = rows(4, 5, 8), rows(3, 5, 8), 0.1
    gradients = rowwise(per_sample_gradients(losses, params, batch))
    v = flat(gradient(losses, params, validation)[0])
    products = (in_run.hessian_vector_product(losses, params, [validation], unflat(row, params)) for row in gradients)
    h = torch.stack([flat(product) for product in products])
    curvature = gradients @ h.T  # <g_i, H g_j>

    def utility(subset: tuple[int, ...], order: int) -> float:
        chosen = list(subset)
        linear = -lr * float((gradients[chosen] @ v).sum())
        return linear + (lr**2 / 2 * float(curvature[chosen][:, chosen].sum()) if order == 2 else 0.0)

    for order in (1, 2):
        shapley = torch.zeros(4, dtype=torch.float64)
        for permutation in itertools.permutations(range(4)):
            for place, sample in enumerate(permutation):
                shapley[sample] += utility(permutation[: place + 1], order) - utility(permutation[:place], order)
        step: Any = in_run.second_order(losses, reduction="sum")
        out = step(params, batch, lr=lr, validation=[validation])
        assert_close(out.values if order == 2 else out.first, shapley / math.factorial(4), 1e-9)


def unflat(vector: Tensor, params: Params) -> Params:
    parts = vector.split([p.numel() for p in params.values()])
    return {k: part.view(p.shape) for (k, p), part in zip(params.items(), parts, strict=True)}


def test_sum_follows_the_true_change_of_the_validation_loss() -> None:
    model, losses, params = small_gpt(width=16)
    model.double()
    batch, lr = rows(8), 0.2
    validation = [rows(3, 7), (torch.cat([batch[0][:3], rows(2)[0]]),)]
    out = in_run.second_order(losses)(params, batch, lr=lr, validation=validation)
    moved = {k: p - lr * out.grads[k] for k, p in params.items()}

    def mean(p: Params) -> Tensor:
        return torch.cat([losses(p, part) for part in validation]).mean().detach()

    change = float(mean(moved) - mean(params))
    first, second = (abs(float(values.sum()) - change) / abs(change) for values in (out.first, out.values))
    assert second < 0.05
    assert second < first / 3


def test_validation_gradient_is_that_of_the_mean_over_all_batches() -> None:
    model, losses, params = small_gpt()
    model.double()
    batches = [rows(2), rows(5, 7)]
    leaves = {k: p.detach().requires_grad_() for k, p in params.items()}
    torch.cat([losses(leaves, batch) for batch in batches]).mean().backward()
    found = in_run.validation_gradient(losses, params, batches)
    assert_trees_close(found, {k: leaf.grad for k, leaf in leaves.items() if leaf.grad is not None})
    kept = in_run.first_order(losses)(params, rows(), lr=0.1, direction=found)
    assert kept.values.shape == (4,)


def test_compression_is_of_the_scaled_direction_and_leaves_the_curvature() -> None:
    _, losses, params = small_gpt(layers=1, width=8)
    batch, validation, lr = rows(), [rows(3)], 0.2
    scale, direction = {k: v.abs() + 0.1 for k, v in like(params).items()}, like(params)
    compress = partial(fg.compress, rank=1)
    keywords: dict[str, Any] = {"lr": lr, "direction": direction, "preconditioner": scale}
    small = compress({k: scale[k] * v for k, v in direction.items()})
    wanted = -lr / 4 * fg.reduce(losses)(params, batch, fg.dot(small))
    out = in_run.first_order(losses, compress=compress)(params, batch, **keywords)
    dense = in_run.second_order(losses)(params, batch, validation=validation, **keywords)
    low = in_run.second_order(losses, compress=compress)(params, batch, validation=validation, **keywords)
    size = float(dense.first.abs().max())
    assert float((out.values - wanted).abs().max()) <= 1e-5 * size
    assert float((low.first - wanted).abs().max()) <= 1e-5 * size
    assert float((dense.first - wanted).abs().max()) > 1e-3 * size
    assert float(((low.values - low.first) - (dense.values - dense.first)).abs().max()) <= 1e-5 * size


def test_directions_in_other_forms() -> None:
    _, losses, params = small_gpt(layers=1, width=16)
    batch, validation = rows(), [rows(3)]
    gradient = in_run.validation_gradient(losses, params, validation)
    pairs = fg.pairs(losses)(params, validation[0])
    mean = pairs.weighted(torch.full((3,), 1 / 3))
    low = fg.track(mean, fg.compress(gradient, rank=2))
    for step in (in_run.first_order(losses), partial(in_run.second_order(losses), validation=validation)):
        dense = step(params, batch, lr=0.1, direction=gradient)
        size = float(dense.values.abs().max())
        assert float((step(params, batch, lr=0.1, direction=mean).values - dense.values).abs().max()) < 1e-5 * size
        first = -0.1 / 4 * fg.reduce(losses)(params, batch, fg.dot(low))
        assert float((step(params, batch, lr=0.1, direction=low).first - first).abs().max()) < 1e-5 * size
        with pytest.raises(fg.InputError, match="direction: must be a tree like params"):
            step(params, batch, lr=0.1, direction=fg.stack([gradient] * 4))
        with pytest.raises(fg.InputError, match="must be a tensor, found LowRank"):
            step(params, batch, lr=0.1, direction=low, preconditioner=gradient)


def test_hessian_vector_product_without_forward_derivative() -> None:
    # The custom Function has no jvp: reverse over reverse takes over.
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            product: Tensor = 3 * x**2 * gradient
            return product

    params, x = {"w": torch.randn(3, dtype=torch.float64)}, torch.randn(4, 3, dtype=torch.float64)
    vector = like(params)
    found = in_run.hessian_vector_product(lambda p, x: Cube.apply(x @ p["w"]), params, [x], vector)
    wanted = hessian(lambda p, x: (x @ p["w"]) ** 3, params, x) @ vector["w"]
    assert_close(found["w"], wanted, 1e-12)


def test_arguments() -> None:
    losses, params, x = lambda p, x: x @ p["w"], {"w": torch.ones(2)}, torch.eye(2)
    step = in_run.first_order(losses)
    with pytest.raises(fg.InputError, match="either validation"):
        step(params, x, lr=0.1)
    with pytest.raises(fg.InputError, match="either validation"):
        step(params, x, lr=0.1, validation=[x], direction=params)
    with pytest.raises(fg.InputError, match=r"Pass \[batch\]"):
        step(params, x, lr=0.1, validation=x)
    with pytest.raises(fg.InputError, match="no samples"):
        step(params, x, lr=0.1, validation=[x[:0]])
    with pytest.raises(fg.InputError, match="preconditioner"):
        step(params, x, lr=0.1, validation=[x], preconditioner={"w": torch.ones(3)})
    with pytest.raises(fg.InputError, match="vector"):
        in_run.hessian_vector_product(losses, params, [x], {"v": torch.ones(2)})
    assert dots(per_sample_gradients(losses, params, x), params).tolist() == [1.0, 1.0]
