"""Products with curvature and conjugate gradients against dense matrices, in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import funcghost as fg
from funcghost.attribution import conjugate, curvature, labels, matrix_free
from funcghost.attribution.products import Product
from funcghost.testing.strategies import Model, models
from funcghost.trees import split_params
from tests.naive import assert_close
from tests.versions import differentiated_twice

D = torch.float64
SOURCE = torch.Generator().manual_seed(2)
PARAMS = {
    "a": torch.randn(4, 3, generator=SOURCE, dtype=D) * 0.6,
    "b": torch.randn(4, generator=SOURCE, dtype=D),
    "c": torch.randn(3, 4, generator=SOURCE, dtype=D),
}
BATCHES = [(torch.randn(n, 3, generator=SOURCE, dtype=D), torch.randint(0, 3, (n,), generator=SOURCE)) for n in (4, 3)]


def logits(params: Any, batch: Any) -> Tensor:
    return F.linear(torch.tanh(F.linear(batch[0], params["a"], params["b"])), params["c"])


def criterion(out: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(out, batch[1], reduction="none")


def losses(params: Any, batch: Any) -> Tensor:
    return criterion(logits(params, batch), batch)


def flat(tree: Any) -> Tensor:
    return torch.cat([tree[name].reshape(len(tree[name]), -1) for name in sorted(tree)], 1)


def unit(params: dict[str, Tensor]) -> dict[str, Tensor]:
    """All unit vectors as a stack."""
    names, sizes = sorted(params), [params[name].numel() for name in sorted(params)]
    eye = torch.eye(sum(sizes), dtype=D)
    return {n: part.reshape(len(eye), *params[n].shape) for n, part in zip(names, eye.split(sizes, 1), strict=True)}


@pytest.mark.parametrize("hold", [True, False])
def test_gauss_newton_is_that_of_all_labels(hold: bool) -> None:
    product = matrix_free.gauss_newton(logits, criterion, PARAMS, BATCHES, hold=hold)
    whole = curvature.exact(labels.all_labels(logits, 3), PARAMS, BATCHES, group=lambda name: "")
    matrix = flat(product(unit(PARAMS)))
    assert_close(matrix, whole.spectra[0].dense(), 1e-10)
    v = {name: torch.randn_like(leaf) for name, leaf in PARAMS.items()}
    for _ in range(2):  # what is held serves again
        assert_close(
            flat({k: u[None] for k, u in product(v).items()})[0],
            matrix @ flat({k: u[None] for k, u in v.items()})[0],
            1e-10,
        )


@given(models())
def test_hessians_of_drawn_models(model: Model) -> None:
    batches = [model.batch(2, 1), model.batch(1, 2)]
    found = flat(matrix_free.hessian(model.losses, model.params, batches)(unit(model.params)))
    names = sorted(model.params)
    shapes = [model.params[name].shape for name in names]

    def total(vector: Tensor) -> Tensor:
        parts = vector.split([shape.numel() for shape in shapes])
        params = {n: part.view(shape) for n, part, shape in zip(names, parts, shapes, strict=True)}
        return torch.stack([model.losses(params, batch).sum() for batch in batches]).sum() / 3

    flattened = torch.cat([model.params[n].detach().flatten() for n in names])
    with differentiated_twice():
        wanted = torch.autograd.functional.hessian(total, flattened)
    assert float((found - wanted).abs().max()) <= 1e-9 * (float(wanted.abs().max()) + 1e-6)


@pytest.mark.parametrize("preconditioned", [True, False])
def test_solutions_are_those_of_the_dense_matrix(preconditioned: bool) -> None:
    product = matrix_free.gauss_newton(logits, criterion, PARAMS, BATCHES, hold=True)
    matrix = flat(product(unit(PARAMS))) + 0.01 * torch.eye(28, dtype=D)
    inner = None
    if preconditioned:
        inner = curvature.ekfac(labels.all_labels(logits, 3), PARAMS, BATCHES).damped(0.01)
    solver = matrix_free.conjugate_gradients(product, 0.01, preconditioner=inner, tolerance=1e-10)
    v = {name: torch.randn(3, *leaf.shape, dtype=D) for name, leaf in PARAMS.items()}
    v["a"][2], v["b"][2], v["c"][2] = 0, 0, 0  # nothing to do
    found = solver.solve(v)
    assert_close(flat(found.direction), torch.linalg.solve(matrix, flat(v).T).T, 1e-7)
    assert float(found.residuals.max()) <= 1e-10
    one = solver({name: leaf[1] for name, leaf in v.items()})
    for name, leaf in one.items():
        assert_close(leaf, found.direction[name][1], 1e-7)


def test_right_sides_share_what_each_has_opened() -> None:
    product = matrix_free.gauss_newton(logits, criterion, PARAMS, BATCHES, hold=True)
    solver = matrix_free.conjugate_gradients(product, 0.01, tolerance=1e-9)
    together = solver.solve(unit(PARAMS))
    assert together.steps == 1  # the whole space
    assert_close(
        flat(together.direction) @ (flat(product(unit(PARAMS))) + 0.01 * torch.eye(28, dtype=D)),
        torch.eye(28, dtype=D),
        1e-7,
    )
    v = {name: torch.randn(4, *leaf.shape, generator=SOURCE, dtype=D) for name, leaf in PARAMS.items()}
    alone = [solver.solve({name: leaf[k] for name, leaf in v.items()}).steps for k in range(4)]
    assert solver.solve(v).steps <= min(alone) - 4


@given(st.integers(1, 5), st.integers(0, 2**16), st.sampled_from([torch.float32, D]), st.booleans())
def test_right_sides_of_any_size_that_repeat_and_depend(
    k: int, seed: int, dtype: torch.dtype, preconditioned: bool
) -> None:
    """Sums and copies of others, zeros, and sizes from 1e-6 to 1e6: to a residual of each its own."""
    source = torch.Generator().manual_seed(seed)
    size = 9
    root = torch.randn(size, size, generator=source, dtype=D)
    matrix = (root @ root.T / size).to(dtype)
    product = Product(
        split_params({"w": torch.zeros(size, dtype=dtype)}), lambda: iter([(lambda v: [v[0] @ matrix], 1)])
    )
    own = torch.randn(k, size, generator=source, dtype=D)
    mixed = torch.cat([own, own[:1], own.sum(0, keepdim=True), torch.zeros(1, size, dtype=D)])
    rows = (mixed * 10.0 ** torch.randint(-6, 7, (len(mixed), 1), generator=source)).to(dtype)
    inverse = 1 / (matrix.diagonal() + 0.3)
    inner = (lambda tree: {"w": tree["w"] * inverse}) if preconditioned else None
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    solver = matrix_free.conjugate_gradients(product, 0.3, preconditioner=inner, tolerance=tolerance, most=3 * size)
    found = solver({"w": rows})["w"]
    left = (rows - found @ matrix - 0.3 * found).double().norm(dim=1)
    assert bool((left <= 3 * tolerance * rows.double().norm(dim=1)).all())


def test_directions_of_several_precisions_that_nearly_depend(monkeypatch: pytest.MonkeyPatch) -> None:
    # What differs by float32's rounding alone is no direction of its own, though a leaf beside it is in float64.
    source = torch.Generator().manual_seed(0)
    x = torch.randn(32, 6, generator=source)
    params = {"w": torch.randn(3, 6, generator=source), "b": torch.randn(3, generator=source, dtype=D)}

    def outputs(params: Any, x: Tensor) -> Tensor:
        return F.linear(x, params["w"]) + params["b"]

    product = matrix_free.gauss_newton(outputs, lambda out, x: out.square().sum(1), params, [x])
    v = {name: torch.randn(leaf.shape, generator=source).to(leaf.dtype) for name, leaf in params.items()}
    many = {name: torch.stack([leaf, leaf * (1 + 1e-7), 3 * leaf]) for name, leaf in v.items()}
    basis, counts = conjugate._orthonormal, set[int]()

    def counted(rows: Tensor, eps: float) -> Tensor:
        found = basis(rows, eps)
        counts.add(len(found))
        return found

    monkeypatch.setattr(conjugate, "_orthonormal", counted)
    stack = fg.stack([{name: leaf[i] for name, leaf in many.items()} for i in range(3)])
    found = matrix_free.conjugate_gradients(product, 0.1, tolerance=1e-4)(stack)
    assert counts == {1}
    alone = matrix_free.conjugate_gradients(product, 0.1, tolerance=1e-4)(v)
    for name, leaf in found.items():
        assert leaf.dtype is params[name].dtype
        for row, times in zip(leaf, (1, 1, 3), strict=True):
            assert (row - times * alone[name]).abs().max() <= 1e-3 * alone[name].abs().max()


def test_ekfac_saves_steps() -> None:
    source = torch.Generator().manual_seed(1)
    x = torch.randn(64, 8, generator=source, dtype=D) * torch.logspace(0, 3, 8, dtype=D)
    params = {"w": torch.randn(5, 8, generator=source, dtype=D) * 0.01}

    def outputs(params: Any, x: Tensor) -> Tensor:
        return F.linear(x, params["w"])

    product = matrix_free.gauss_newton(outputs, lambda out, x: out.square().sum(1), params, [x], hold=True)
    of_outputs = [lambda p, x, c=c: outputs(p, x)[:, c] * 2**0.5 for c in range(5)]
    inner = curvature.ekfac(of_outputs, params, [x]).damped(1e-3)
    v = {"w": torch.randn(5, 8, generator=source, dtype=D)}
    plain, helped = (
        matrix_free.conjugate_gradients(product, 1e-3, preconditioner=own, tolerance=1e-8).solve(v).steps
        for own in (None, inner)
    )
    assert helped <= 3 < plain


def test_bad_arguments() -> None:
    product = matrix_free.hessian(losses, PARAMS, BATCHES)
    v = {name: torch.randn_like(leaf) for name, leaf in PARAMS.items()}
    for call, says in [
        (lambda: matrix_free.conjugate_gradients(product, 0.0), "above zero"),
        (lambda: matrix_free.conjugate_gradients(product, 1.0, tolerance=2.0), "tolerance"),
        (lambda: matrix_free.conjugate_gradients(lambda v: v, 1.0), "product"),  # type: ignore[arg-type]
        (lambda: matrix_free.conjugate_gradients(product, 1e-6)(v), "not positive definite"),
        (lambda: matrix_free.conjugate_gradients(product, 10.0, tolerance=1e-15, most=1)(v), "after 1 steps"),
        (lambda: matrix_free.hessian(losses, PARAMS, BATCHES[0][0]), "batches"),
        (lambda: matrix_free.gauss_newton(logits, lambda out, b: out, PARAMS, BATCHES)(v), "one number per sample"),
        (lambda: product({"a": v["a"]}), "missing leaves"),
    ]:
        with pytest.raises(fg.InputError, match=says):
            call()
