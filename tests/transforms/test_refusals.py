"""What is refused names its remedy, and the remedy works."""

import re
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import funcghost as fg
from tests.models.awkward import Hidden
from tests.models.world import Losses, Params, exact, hidden_losses, hidden_params, normal, says
from tests.naive import assert_scores, assert_trees_close, expected


@pytest.mark.parametrize("scoring_only", [False, True])
def test_parameter_hidden_in_a_custom_function_is_named(scoring_only: bool) -> None:
    params, x = hidden_params(), normal(5, 3)
    message = says("do not add up for parameters ['hidden']: .*custom autograd Function.*leave them out of params")
    transform: Any = fg.reduce if scoring_only else fg.grad_and_reduce
    with pytest.raises(fg.ConservationError, match=message):
        transform(hidden_losses)(params, x, fg.dot(params))
    # Either remedy: an ordinary op, or leaving the parameter out of params.
    exact(lambda p, x: hidden_losses(p, x, torch.matmul), params, x)
    hidden = params.pop("hidden")
    exact(lambda p, x: hidden_losses({**p, "hidden": hidden}, x), params, x)


@pytest.mark.parametrize("names", [["a"], ["c"], ["a", "b"], ["a", "c", "d"], ["a", "b", "c", "d", "e"]])
def test_all_hidden_parameters_are_named_and_no_other(names: list[str]) -> None:
    params, x = {name: normal(3, 3, seed=i) for i, name in enumerate("abcde")}, normal(4, 3)

    def losses(params: Params, x: Tensor) -> Tensor:
        for name, w in params.items():
            x = (Hidden.apply(x, w) if name in names else x @ w).sin()
        return x.sum(1)

    with pytest.raises(fg.ConservationError, match=re.escape(f"for parameters {names}:")):
        fg.reduce(losses)(params, x, fg.dot(params))


def through_a_view(params: Params, x: Tensor) -> Tensor:
    y = x @ params["w"]
    y[:, 0].add_(params["b"])
    return y.sin().sum(1)


def behind_a_copy(params: Params, x: Tensor) -> Tensor:
    w = params["w"].clone()
    w[0].mul_(params["b"])
    return (x @ w).sin().sum(1)


@pytest.mark.parametrize("losses", [through_a_view, behind_a_copy])
def test_changes_in_place_through_a_view_are_seen_in_the_graph(losses: Losses) -> None:
    params, x = {"w": normal(3, 2), "b": normal(1, seed=1)[0]}, normal(4, 3)
    before = {name: value.clone() for name, value in params.items()}
    exact(losses, params, x)
    assert_trees_close(params, before, 0.0)


def test_changes_beside_views_are_exact() -> None:
    params, x = {"w": normal(3, 2), "b": normal(1, seed=1)[0]}, normal(4, 3)

    def out_of_place(params: Params, x: Tensor) -> Tensor:
        y = x @ params["w"]
        return torch.cat([y[:, :1] + params["b"], y[:, 1:]], 1).sin().sum(1)

    exact(out_of_place, params, x)
    # In place on the value itself, not on a view of it, is followed.
    exact(lambda p, x: (x @ p["w"]).add_(p["b"]).sin().sum(1), params, x)


def test_max_norm_is_refused_and_renormalising_before_the_step_works() -> None:
    params, index = {"rows": normal(5, 2)}, torch.tensor([[0, 1], [3, 1]])
    before = params["rows"].clone()

    def losses(params: Params, index: Tensor, max_norm: float | None = None) -> Tensor:
        return F.embedding(index, params["rows"], max_norm=max_norm).sin().sum((1, 2))

    with pytest.raises(
        fg.UnsupportedOpError,
        match=says("parameter 'rows' is written to by torch.nn.functional.embedding.*max_norm.*before the step"),
    ):
        fg.reduce(lambda p, x: losses(p, x, max_norm=1.0))(params, index, fg.dot(params))
    assert torch.equal(params["rows"], before)
    params["rows"] = torch.renorm(params["rows"], 2, 0, 1.0)
    exact(losses, params, index)


@pytest.mark.parametrize("options", [{"mode": "max"}, {"mode": "sum", "scale_grad_by_freq": True}])
def test_an_op_without_any_derivative_is_differentiated_for_each_sample(options: dict[str, Any]) -> None:
    params, index = {"other": normal(2), "rows": normal(5, 2)}, torch.tensor([[0, 1], [3, 2]])

    def losses(params: Params, index: Tensor, bag: Any = None) -> Tensor:
        h = F.embedding_bag(index, params["rows"], **options) if bag is None else bag(params["rows"])
        return (h * params["other"]).sin().sum(1)

    exact(losses, params, index)

    def bag(rows: Tensor) -> Tensor:
        found = F.embedding(index, rows)
        return found.amax(1) if options["mode"] == "max" else found.sum(1)

    exact(lambda p, x: losses(p, x, bag), params, index)
    if options["mode"] == "sum":  # every index comes once: the frequencies are 1
        fg.register_rule(F.embedding_bag, linear=[["weight"]])
        exact(losses, params, index)


class Checkpointed(nn.Module):
    """Two layers, the second recomputed in the backward."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first: nn.Module = nn.Linear(3, 3).double()
        self.second = nn.Linear(3, 2).double()
        self.options: dict[str, Any] = {"use_reentrant": False, **options}

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.second, self.first(x).sin(), **self.options)


def checkpointed_losses(model: nn.Module) -> Losses:
    return fg.module_losses(model, lambda output, x: output.sin().sum(1))


def test_checkpoint_needs_its_context() -> None:
    plain, x = Checkpointed(), normal(4, 3)
    params = dict(plain.named_parameters())
    with pytest.raises(fg.UnsupportedOpError, match=says("torch.utils.checkpoint.*context_fn=fg.checkpoint_context")):
        fg.grad_and_reduce(checkpointed_losses(plain))(params, x, fg.dot(params))
    remedied = Checkpointed(context_fn=fg.checkpoint_context)
    exact(checkpointed_losses(remedied), dict(remedied.named_parameters()), x)


def test_checkpoint_needs_the_own_parameters_of_the_module() -> None:
    model, x = Checkpointed(context_fn=fg.checkpoint_context), normal(4, 3)
    params = {name: value.detach() * 2 for name, value in model.named_parameters()}
    with pytest.raises(fg.UnsupportedOpError, match=says("checkpoint.*let params be the module's own tensors")):
        fg.reduce(checkpointed_losses(model))(params, x, fg.dot(params))
    model.load_state_dict(params)
    exact(checkpointed_losses(model), dict(model.named_parameters()), x)


def test_reentrant_checkpoint_does_not_pass_for_zero() -> None:
    # Its gradients flow in .backward() alone: torch.autograd.grad sees no path to the parameters inside.
    model, x = Checkpointed(use_reentrant=True), normal(4, 3).requires_grad_()
    model.first = nn.Identity()  # so that nothing but the batch leads there
    params = dict(model.named_parameters())
    with pytest.raises(fg.GhostError, match=says("use_reentrant=False")):
        fg.grad_and_reduce(checkpointed_losses(model))(params, x, fg.dot(params))


@pytest.mark.parametrize("context", [{}, {"context_fn": fg.checkpoint_context}], ids=["plain", "ours"])
def test_a_derivative_through_a_checkpoint_is_refused(context: dict[str, Any]) -> None:
    params, x = {"w": normal(3, 2)}, normal(4, 3)

    def losses(params: Params, x: Tensor, region: bool = True, twice: bool = True) -> Tensor:
        def layer(x: Tensor) -> Tensor:
            return (x @ params["w"]).sin()

        x = x.detach().requires_grad_()
        value = checkpoint(layer, x, use_reentrant=False, **context) if region else layer(x)
        (slope,) = torch.autograd.grad(value.sum(), x, create_graph=twice)
        return slope.square().sum(1) if twice else layer(x + slope).sum(1)

    with pytest.raises(fg.UnsupportedOpError, match=says("Leave the checkpoint out")):
        fg.reduce(losses)(params, x, fg.dot(params))
    remedied = partial(losses, region=False)
    assert_scores(fg.reduce(remedied)(params, x, fg.dot(params)), expected(remedied, params, x, params))
    once = partial(losses, twice=False)
    if context:
        assert_scores(fg.reduce(once)(params, x, fg.dot(params)), expected(once, params, x, params))
    else:
        with pytest.raises(fg.UnsupportedOpError, match=says("checkpoint_context")):
            fg.reduce(once)(params, x, fg.dot(params))
