"""Contexts around the step and inside the losses, frozen and parametrized modules."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, stateless

import funcghost as fg
from tests.models.small import like
from tests.models.wrapped import Mlp, Net, Params, assert_exact, made, normal, squares
from tests.naive import assert_scores, assert_trees_close, expected, gradient

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),  # transformers, of itself
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # Dynamo
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:quantized..linear_dynamic. an autograd kernel was not registered:UserWarning"),
]


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def anomaly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            yield


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "another default device": lambda: torch.device("meta"),
    "another default dtype": default_dtype,
    "deterministic algorithms": deterministic,
    "anomaly detection": anomaly,
    "no saved tensor hooks": lambda: torch.autograd.graph.disable_saved_tensors_hooks("not here"),
    "saved on the CPU": torch.autograd.graph.save_on_cpu,
    "saved as copies": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t),
    "saved tensors may be written to": torch.autograd.graph.allow_mutation_on_saved_tensors,
}


OUTSIDE_ONLY = {"no_grad", "inference mode", "another default device", "saved tensors may be written to"}


@pytest.mark.parametrize("name", CONTEXTS)
def test_context_around_the_step(name: str) -> None:
    _, losses, params = made(nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.3), nn.Tanh(), nn.Linear(4, 2)))
    x, direction, state = normal(5, 6), like(params), torch.get_rng_state()
    wanted, (grads, _) = expected(losses, params, x, direction), gradient(losses, params, x)
    for transform in (fg.grad_and_reduce, fg.reduce):
        torch.set_rng_state(state)
        with CONTEXTS[name]():
            out = transform(losses)(params, x, fg.dot(direction))
        assert_scores(out if isinstance(out, Tensor) else out.reduced, wanted)
    torch.set_rng_state(state)
    with CONTEXTS[name]():
        assert_trees_close(fg.grad_and_reduce(losses)(params, x, fg.dot(direction)).grads, grads)


@pytest.mark.parametrize("name", sorted(CONTEXTS.keys() - OUTSIDE_ONLY))
def test_context_inside_the_losses(name: str) -> None:
    _, losses, params = made(nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.3), nn.Tanh(), nn.Linear(4, 2)))

    def wrapped(p: Params, x: Tensor) -> Tensor:
        with CONTEXTS[name]():
            return losses(p, x)

    assert_exact(wrapped, params, normal(5, 6), truth=losses)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_frozen_encoder(mode: Callable[[], AbstractContextManager[Any]]) -> None:
    encoder, head = Mlp().double(), nn.Linear(6, 3).double()
    of_head: Params = dict(head.named_parameters())
    params: Params = {**of_head, **{f"encoder.{k}": p for k, p in encoder.named_parameters()}}

    def losses(p: Params, x: Tensor) -> Tensor:
        with mode():
            features = functional_call(encoder, {k[8:]: v for k, v in p.items() if k.startswith("encoder.")}, (x,))
        return squares(F.linear(features.clone(), p["weight"], p["bias"]))

    assert_exact(losses, params, normal(5, 6))
    with torch.inference_mode():
        features = encoder(normal(5, 6))
    assert_exact(lambda p, x: squares(F.linear(x.clone(), p["weight"], p["bias"])), of_head, features)


def test_parametrized_and_stateless_modules() -> None:
    x = normal(5, 6)
    for parametrize in (parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal):
        model, losses, params = made(nn.Sequential(parametrize(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 3)))
        model.eval()
        assert_exact(losses, params, x)
    outer, losses, params = made(Net(Mlp()))

    def nested(p: Params, x: Tensor) -> Tensor:
        scaled = {k: v * 2 for k, v in p.items() if k.startswith("block.")}
        return squares(functional_call(outer, p | scaled, (x,))) + losses(p, x)

    def swapped(p: Params, x: Tensor) -> Tensor:
        with stateless._reparametrize_module(outer, p):
            return squares(outer(x))

    assert_exact(nested, params, x)
    assert_exact(swapped, params, x, truth=losses)


def test_spectral_norm_in_training_moves_its_buffers_as_a_plain_step_does() -> None:
    x, direction = normal(5, 6), None
    ours, losses, params = made(nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 6)), nn.Tanh()))
    plain = copy.deepcopy(ours)
    plain_losses, step = fg.module_losses(plain, squares), fg.grad_and_reduce(losses)
    for _ in range(3):
        direction = like(params)
        wanted = expected(plain_losses, dict(plain.named_parameters()), x, direction)  # which puts buffers back
        assert_scores(step(params, x, fg.dot(direction)).reduced, wanted)
        plain_losses(dict(plain.named_parameters()), x)
        for name, buffer in plain.named_buffers():
            assert torch.equal(dict(ours.named_buffers())[name], buffer)
