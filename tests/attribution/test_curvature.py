"""Every curvature held to a dense matrix of per-sample gradients, in float64."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor, nn

import funcghost as fg
from funcghost.attribution import curvature, labels
from funcghost.attribution import kept as store
from funcghost.attribution.inverses import Curvature
from funcghost.attribution.spectra import Whole
from funcghost.laws.oracle import per_sample_gradients
from funcghost.testing.strategies import Model, models
from tests.depth import fewer
from tests.naive import assert_close

Make = Callable[..., Curvature]
MAKES: list[Make] = [curvature.diagonal, curvature.kfac, curvature.ekfac, curvature.exact]


def rows_of(losses: Any, params: Any, batches: list[Any]) -> dict[str, Tensor]:
    found = [per_sample_gradients(losses, params, batch) for batch in batches]
    return {
        name: torch.cat([part[name].flatten(1) if part[name].dim() > 1 else part[name][:, None] for part in found])
        for name in params
    }


def second_moment(rows: dict[str, Tensor], names: tuple[str, ...]) -> Tensor:
    flat = torch.cat([rows[name] for name in names], 1)
    return flat.T @ flat / len(flat)


def small(size: float) -> float:
    return 1e-9 * (size + 1e-6)


@fewer(3)
@given(models())
def test_every_curvature_of_drawn_models(model: Model) -> None:
    """Tied, reused, convolved, looked-up, merged weights, norms and shifts, with all that is between their uses."""
    batches = [model.batch(3, seed=1), model.batch(2, seed=2)]
    rows = rows_of(model.losses, model.params, batches)
    made = {make.__name__: make(model.losses, model.params, batches) for make in MAKES}
    for name in model.params:
        truth = second_moment(rows, (name,))
        size = float(truth.norm())
        (diagonal,), (kfac,), (ekfac,) = (
            [s.dense() for s in made[kind].spectra if s.names == (name,)] for kind in ("diagonal", "kfac", "ekfac")
        )
        assert float((diagonal - truth.diagonal().diag()).norm()) <= small(size)
        assert float((kfac - kfac.T).norm()) <= small(size)
        assert float((kfac.trace() - truth.trace()).abs()) <= small(float(truth.trace()))
        assert float((ekfac.trace() - truth.trace()).abs()) <= small(float(truth.trace()))
        # The nearest in its basis: what is left is orthogonal to it, and no farther than K-FAC leaves.
        assert abs(float((ekfac * (truth - ekfac)).sum())) <= small(size**2)
        assert float((truth - ekfac).norm()) <= float((truth - kfac).norm()) + small(size)
    for spectrum in made["exact"].spectra:
        assert isinstance(spectrum, Whole)
        truth = second_moment(rows, spectrum.names)
        assert float((spectrum.dense() - truth).norm()) <= small(float(truth.norm()))
    v = {name: torch.randn(2, *leaf.shape, dtype=torch.float64) for name, leaf in model.params.items()}
    for found in made.values():
        _holds_the_laws(found, v)


def _holds_the_laws(found: Curvature, v: dict[str, Tensor]) -> None:
    """The product with the matrix and the damped inverse, of a stack, against dense matrices."""
    product, inverse, root = found(v), found.damped(0.3)(v), found.damped(0.3, power=-0.5)(v)
    for spectrum in found.spectra:
        matrix = spectrum.dense()
        damped = matrix + 0.3 * torch.eye(len(matrix), dtype=torch.float64)

        def flat(tree: dict[str, Tensor], names: tuple[str, ...] = spectrum.names) -> Tensor:
            return torch.cat([tree[name].reshape(2, -1) for name in names], 1)

        torch.testing.assert_close(flat(product), flat(v) @ matrix)
        torch.testing.assert_close(flat(inverse), torch.linalg.solve(damped, flat(v).T).T)
        values, basis = torch.linalg.eigh(damped)
        torch.testing.assert_close(flat(root), flat(v) @ (basis * values.rsqrt()) @ basis.T)
    one = {name: leaf[1] for name, leaf in v.items()}
    for name, leaf in found.damped(0.3)(one).items():
        torch.testing.assert_close(leaf, inverse[name][1])


class Net(nn.Module):
    def __init__(self, *widths: int, act: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.act = act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.act(layer(x))
        return self.layers[-1](x)


NET = Net(4, 5, 3, act=nn.Tanh()).double()
PARAMS: dict[str, Tensor] = {name: value.detach() for name, value in NET.named_parameters()}


def logits(params: Any, batch: Any) -> Tensor:
    return torch.func.functional_call(NET, params, (batch[0],))


def losses(params: Any, batch: Any) -> Tensor:
    return F.cross_entropy(logits(params, batch), batch[1], reduction="none")


def batch(n: int, seed: int) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=source, dtype=torch.float64), torch.randint(0, 3, (n,), generator=source)


BATCHES = [batch(4, 1), batch(3, 2)]


def test_kfac_is_exact_on_deep_linear_nets_with_one_input() -> None:
    net = Net(3, 4, 2, 3).double()
    params = {name: value.detach() for name, value in net.named_parameters()}
    x = torch.randn(1, 3, dtype=torch.float64)

    def of(c: int) -> Any:
        return lambda params, x: torch.func.functional_call(net, params, (x,))[:, c] * (c + 1)

    parts = [of(c) for c in range(3)]
    found = curvature.kfac(parts, params, [x])
    rows = [rows_of(part, params, [x]) for part in parts]
    for spectrum in found.spectra:
        truth = torch.stack([second_moment(row, spectrum.names) for row in rows]).sum(0)
        assert_close(spectrum.dense(), truth, 1e-10)


def test_all_labels_give_the_gauss_newton_matrix_and_sampled_ones_in_expectation() -> None:
    names = tuple(sorted(PARAMS))  # as in the tree

    def flat_logits(flat: Tensor, x: Tensor) -> Tensor:
        split = dict(zip(names, flat.split([PARAMS[name].numel() for name in names]), strict=True))
        return logits({k: split[k].view_as(PARAMS[k]) for k in names}, (x[None],))[0]

    flat = torch.cat([PARAMS[name].flatten() for name in names])
    truth = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for x in torch.cat([own[0] for own in BATCHES]):
        jacobian: Any = torch.func.jacrev(flat_logits)(flat, x)
        p = flat_logits(flat, x).softmax(-1)
        truth += jacobian.T @ (p.diag() - torch.outer(p, p)) @ jacobian / 7
    found = curvature.exact(labels.all_labels(logits, 3), PARAMS, BATCHES, group=lambda name: "")
    assert found.made_of["samples"] == 7
    (spectrum,) = found.spectra
    assert_close(spectrum.dense(), truth, 1e-12)
    drawn = curvature.exact(labels.sampled_labels(logits, 100), PARAMS, BATCHES, group=lambda name: "")
    off = float((drawn.spectra[0].dense() - truth).norm() / truth.norm())
    assert off < 0.2
    own = curvature.exact(losses, PARAMS, BATCHES, group=lambda name: "").spectra[0].dense()
    assert float((own - truth).norm() / truth.norm()) > 0.4


def test_labels_of_sequences_are_weighted() -> None:
    def of(params: Any, batch: Any) -> Tensor:
        return torch.zeros(2, 3, 4, dtype=torch.float64)

    weights = torch.tensor([[1.0, 1.0, 0.0], [0.5, 0.0, 0.0]], dtype=torch.float64)
    (found,) = labels.sampled_labels(of, 1, weights=lambda batch: weights)
    assert_close(found({}, None), torch.tensor([2.0, 0.5]).double() * torch.tensor(4.0).double().log(), 1e-12)


@pytest.mark.parametrize("make", MAKES)
def test_batches_may_be_split_and_shared_out(make: Make) -> None:
    v = {name: torch.randn_like(leaf) for name, leaf in PARAMS.items()}
    whole = tuple(torch.cat(parts) for parts in zip(*BATCHES, strict=True))
    together = make(losses, PARAMS, [whole]).damped(fraction=0.1)(v)
    apart = make(losses, PARAMS, BATCHES).damped(fraction=0.1)(v)
    for name in PARAMS:
        assert_close(apart[name], together[name], 1e-8)
    if make is curvature.ekfac:
        return  # its second pass asks for the bases of all: see the tests of distributed
    others: list[Tensor] = []
    make(losses, PARAMS, BATCHES[1:], across=lambda value: others.append(value) or value)  # type: ignore[func-returns-value]
    shared = make(losses, PARAMS, BATCHES[:1], across=lambda value: value + others.pop(0))
    assert shared.made_of["samples"] == 7
    assert not others
    for name, leaf in shared.damped(fraction=0.1)(v).items():
        assert_close(leaf, together[name], 1e-8)


def test_processes_that_see_parameters_in_other_ways_are_refused() -> None:
    def across(value: Tensor) -> Tensor:
        return value + torch.tensor([1.0, 3.0, 9.0], dtype=torch.float64)  # what another one says of its uses

    with pytest.raises(fg.InputError, match="other processes"):
        curvature.ekfac(losses, PARAMS, BATCHES, across=across)


def test_long_sides_and_large_groups_keep_less(tmp_path: Path) -> None:
    rows = rows_of(losses, PARAMS, BATCHES)
    found = curvature.ekfac(losses, PARAMS, BATCHES, largest=4)
    shapes = {s.names[0]: (s.left is None, s.right is None) for s in found.spectra}  # type: ignore[union-attr]
    assert shapes["layers.0.weight"] == (True, False)
    assert shapes["layers.1.weight"] == (False, True)
    mixed = curvature.exact(losses, PARAMS, BATCHES, largest=20)
    assert {spectrum.names for spectrum in mixed.spectra} == {
        ("layers.1.bias", "layers.1.weight"),
        ("layers.0.weight",),
        ("layers.0.bias",),
    }
    for spectrum in (*found.spectra, *mixed.spectra):
        truth = second_moment(rows, spectrum.names)
        assert float(spectrum.dense().trace()) == pytest.approx(float(truth.trace()), rel=1e-9)
    v = {name: torch.randn_like(leaf) for name, leaf in PARAMS.items()}
    for number, kept in enumerate((found, mixed)):
        store.save(kept, tmp_path / f"{number}")
        store.save(kept, tmp_path / f"{number}")  # what is there stays
        again = store.load(tmp_path / f"{number}", PARAMS)
        assert again.made_of == kept.made_of
        for ours, theirs in zip(again.spectra, kept.spectra, strict=True):
            assert ours.names == theirs.names
            for tensor in ("left", "right", "basis", "values"):
                one, other = getattr(ours, tensor, None), getattr(theirs, tensor, None)
                assert one is other is None or torch.equal(one, other)  # type: ignore[arg-type]
        for name, leaf in again.damped(fraction=0.2)(v).items():
            assert_close(leaf, kept.damped(fraction=0.2)(v)[name], 1e-10)  # in memory they lie in another order
    with pytest.raises(fg.InputError, match="other parameters"):
        store.load(tmp_path / "0", {**PARAMS, "more": torch.ones(2)})
    with pytest.raises(fg.InputError, match="other values"):
        store.load(tmp_path / "0", {name: leaf + 1 for name, leaf in PARAMS.items()})
    with pytest.raises(fg.StoreError, match="something else"):
        store.save(mixed, tmp_path / "0")
    damaged = next((tmp_path / "0" / "vectors").rglob("*.arrow"))
    damaged.write_bytes(damaged.read_bytes()[:-9] + bytes(9))
    with pytest.raises(fg.StoreError, match="damaged"):
        store.load(tmp_path / "0", PARAMS)


def test_a_parameter_that_no_loss_depends_on_has_no_curvature() -> None:
    params = {**PARAMS, "idle": torch.ones(2, 2, dtype=torch.float64)}
    for make in MAKES:
        found = make(lambda p, b: losses({k: p[k] for k in PARAMS}, b), params, BATCHES)
        (idle,) = (s for s in found.spectra if "idle" in s.names)
        assert float(idle.values.abs().max()) <= 1e-300
        with pytest.raises(fg.InputError, match="'idle'"):
            found.damped(fraction=0.1)


def test_float32_and_to() -> None:
    small = {name: leaf.float() for name, leaf in PARAMS.items()}
    single = [(x.float(), y) for x, y in BATCHES]
    found, truth = curvature.ekfac(losses, small, single), curvature.ekfac(losses, PARAMS, BATCHES)
    v = {name: torch.randn_like(leaf) for name, leaf in PARAMS.items()}
    wanted, cast = truth.damped(fraction=0.1)(v), truth.to(torch.float32).damped(fraction=0.1)
    for form in (found.damped(fraction=0.1), cast):
        for name, leaf in form({name: leaf.float() for name, leaf in v.items()}).items():
            assert leaf.dtype is torch.float32
            assert_close(leaf.double(), wanted[name], 2e-3)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: curvature.ekfac(losses, PARAMS, BATCHES[0][0]), "batches"),
        (lambda: curvature.ekfac(losses, PARAMS, []), "found none"),
        (lambda: curvature.ekfac([], PARAMS, BATCHES), "one function"),
        (lambda: curvature.ekfac(losses, PARAMS, BATCHES, largest=-1), "largest"),
        (lambda: curvature.diagonal(losses, PARAMS, BATCHES).damped(0.0), "above zero"),
        (lambda: curvature.diagonal(losses, PARAMS, BATCHES).damped(fraction=-0.1), "above zero"),
        (lambda: curvature.diagonal(losses, PARAMS, BATCHES).damped(), "either"),
        (lambda: curvature.diagonal(losses, PARAMS, BATCHES).damped(0.1, fraction=0.1), "either"),
        (lambda: curvature.diagonal(losses, PARAMS, BATCHES).damped(0.1)({"w": torch.ones(1)}), "missing leaves"),
        (lambda: labels.sampled_labels(logits, 0), "draws"),
        (lambda: labels.all_labels(logits, 1), "classes"),
        (lambda: labels.all_labels(logits, 4)[0](PARAMS, BATCHES[0]), r"must be \[b, 4\]"),
        (lambda: labels.sampled_labels(lambda p, b: b)[0](PARAMS, torch.ones(2)), "logits"),
        (lambda: labels.sampled_labels(logits, 1, lambda b: torch.ones(1))[0](PARAMS, BATCHES[0]), "weights"),
    ],
)
def test_bad_arguments(call: Any, says: str) -> None:
    with pytest.raises(fg.InputError, match=says):
        call()
