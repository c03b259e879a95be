"""Models of Hugging Face's transformers, as they are: batched, and held to per-sample gradients taken one by one."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import funcghost as fg
from tests.depth import thinned
from tests.models.architectures import (
    ARCHITECTURES,
    TRAINED_ALONE,
)
from tests.models.building import (
    EAGER_AND_SDPA,
    EITHER_SIDE,
    SINGLE,
    SPEECH,
    Architecture,
    B,
    Params,
    T,
    pretrained,
    sounds,
    squashed,
)
from tests.models.huggingface import (
    Case,
    CountedPlans,
    autograd,
    covering,
    draw_direction,
    find_truth,
    full_product,
    main,
    parameters,
)
from tests.models.mechanisms import MECHANISMS
from tests.models.text_models import (
    EXPERT_DECODERS,
)

CASES = full_product(ARCHITECTURES)
SLICE = [case for name, case in zip(ARCHITECTURES, covering(ARCHITECTURES), strict=True) if name in MECHANISMS]
REPLANNED = ("switch_transformers",)
"""Models that run an expert only where a token of the batch goes to it."""
TRAINED = {
    f"{name}-{attention}": Case(ARCHITECTURES[name], attention, training=True)
    for name in ("gpt2", "bert", "t5", "resnet", "modernbert", "whisper")
    for attention in ARCHITECTURES[name].attentions
} | {name: Case(architecture, training=True) for name, architecture in TRAINED_ALONE.items()}
OTHER_SIZES = ("gpt2", "llama", "gemma3", "mixtral", "gpt_oss", "mamba2", "bert", "deberta_v2", "xlnet", "t5", "clip")


def wav2vec2(**sizes: Any) -> Architecture:
    return Architecture(pretrained("Wav2Vec2ForCTC", "Wav2Vec2", **SPEECH, **sizes), sounds)


def assert_same_step(out: fg.Step, gradients: Params, losses: Tensor, dtype: torch.dtype) -> None:
    """To rounding: the order in which autograd adds up the uses of a parameter is its own."""
    tolerance = 64 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.losses, losses, rtol=tolerance, atol=0.0)
    size = max(float(gradient.abs().max()) for gradient in gradients.values())
    assert out.grads.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(out.grads[name], gradient, rtol=tolerance, atol=tolerance * size, msg=name)


def check_everything(case: Case, most_plans: int = 1) -> None:
    """Steps on two batches, then scores alone, along one plan and all from one state of the random numbers."""
    model = case.model()
    params, losses = parameters(model), case.losses(model)
    first, second = draw_direction(params), draw_direction(params)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = {name: parameter.requires_grad for name, parameter in params.items()}

    def again(function: Callable[..., Any], *arguments: Any) -> Any:
        torch.manual_seed(1)
        np.random.seed(1)
        model.load_state_dict(before)
        return function(*arguments)

    step: Any = fg.grad_and_reduce(losses)
    with CountedPlans() as counted:
        for batch in (case.batch(), case.batch()):
            truth = again(find_truth, losses, params, batch)
            gradients, values = again(autograd, losses, params, batch)
            drawn = torch.get_rng_state()
            buffers = {name: value.clone() for name, value in model.state_dict().items()}
            out = again(step, params, batch, fg.dot(first))
            truth.check(out.reduced, first, case.tolerance)
            assert_same_step(out, gradients, values, case.dtype)
            assert torch.equal(torch.get_rng_state(), drawn)
            assert all(torch.equal(value, buffers[name]) for name, value in model.state_dict().items())
    assert 1 <= counted.plans <= most_plans
    both = again(fg.reduce(losses, plan=step.__self__.plans[-1]), params, batch, fg.dot(fg.stack([first, second])))
    truth.check(both[:, 0], first, case.tolerance)
    truth.check(both[:, 1], second, case.tolerance)
    assert model.training is case.training
    for name, parameter in model.named_parameters():
        assert parameter is params[name]
        assert parameter.grad is None
        assert parameter.requires_grad == trained[name]


@pytest.mark.parametrize("name", thinned(CASES, SLICE))
def test_dot_is_exact(name: str) -> None:
    check_everything(CASES[name], most_plans=2 if name.startswith(REPLANNED) else 1)


def test_the_slice_meets_every_attention_and_padding() -> None:
    assert MECHANISMS.keys() <= ARCHITECTURES.keys()
    assert len(SLICE) == len(MECHANISMS)
    assert {(CASES[name].attention, CASES[name].padding) for name in SLICE} == {*product(EAGER_AND_SDPA, EITHER_SIDE)}


@pytest.mark.parametrize("name", TRAINED)
def test_training_mode(name: str) -> None:
    check_everything(TRAINED[name])


def test_training_mode_with_masked_spans() -> None:
    check_everything(Case(wav2vec2(layerdrop=0.0), training=True))


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "modernbert", "whisper"])
def test_training_mode_draws_random_numbers(name: str) -> None:
    for attention in ARCHITECTURES[name].attentions:
        # ModernBERT's default has no dropout but this one.
        dropout = {"attention_dropout": 0.1} if name in ("modernbert", "whisper") else {}
        case = Case(ARCHITECTURES[name], attention, training=True)
        build = case.architecture.build
        case = replace(case, architecture=replace(case.architecture, build=lambda b=build, d=dropout, **o: b(**d, **o)))
        model, batch = case.model(), case.batch()
        losses, params = case.losses(model), parameters(model)
        assert not torch.equal(losses(params, batch), losses(params, batch))


def test_layers_dropped_at_random_are_planned_anew() -> None:
    case = Case(wav2vec2(layerdrop=0.5, mask_time_prob=0.0), "sdpa", training=True)
    model, batch = case.model(), case.batch()
    params, losses = parameters(model), case.losses(model)
    direction = draw_direction(params)
    step = fg.grad_and_reduce(losses)
    with CountedPlans() as counted:
        for seed in range(12):
            torch.manual_seed(seed)
            truth = find_truth(losses, params, batch)
            out = step(params, batch, fg.dot(direction))
            truth.check(out.reduced, direction, case.tolerance)
    assert counted.plans == 4, "two layers, each of which runs or does not"


@pytest.mark.parametrize("name", OTHER_SIZES)
def test_other_sizes_along_the_same_plan(name: str) -> None:
    """More and fewer samples, longer and shorter rows, and as long as there are samples.

    The gradient is that of the sum: a mean over three would round where the models compute in float32.
    """
    architecture = ARCHITECTURES[name]
    case = Case(architecture, architecture.attentions[-1], architecture.paddings[-1])
    model = case.model()
    params, losses = parameters(model), case.losses(model)
    direction, step = draw_direction(params), fg.grad_and_reduce(losses, reduction="sum")
    with CountedPlans() as counted:
        for samples, length in ((B, T), (6, T), (3, 7), (6, 6), (B, T)):
            batch = case.batch(samples, length)
            out = step(params, batch, fg.dot(direction))
            find_truth(losses, params, batch).check(out.reduced, direction, case.tolerance)
    assert counted.plans == 1


@pytest.mark.parametrize("name", EXPERT_DECODERS)
def test_routing_differs_between_batches(name: str) -> None:
    """The batches of the exact tests send other numbers of tokens to the experts."""
    case = Case(EXPERT_DECODERS[name])
    model = case.model()
    counts = []

    def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        floats = [*args, *kwargs.values()]
        index = next(value for value in floats if isinstance(value, Tensor) and value.dtype == torch.int64)
        counts.append(index.flatten().bincount(minlength=4).tolist())

    experts = [module for name, module in model.named_modules() if name.endswith("experts")]
    handles = [module.register_forward_hook(note, with_kwargs=True) for module in experts[:1]]
    for _ in range(2):
        model(**case.batch())
    for handle in handles:
        handle.remove()
    assert counts[0] != counts[1]


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit", "convnext", "clip"])
def test_forward_route(name: str) -> None:
    """Every tangent passes the softmax of the attention, which the models take in float32."""
    case = Case(replace(ARCHITECTURES[name], rounding=4 * SINGLE))
    model, batch = case.model(), case.batch()
    params, losses = parameters(model), case.losses(model)
    direction = draw_direction(params)
    found = fg.reduce(losses, options=fg.Options(route="forward"))(params, batch, fg.dot(direction))
    find_truth(losses, params, batch).check(found, direction, case.tolerance)


def test_forward_route_through_a_custom_autograd_function() -> None:
    """BLOOM's activation is one: no mode sees it, and tangents are carried through by its backward."""
    case = Case(replace(ARCHITECTURES["bloom"], rounding=4 * SINGLE))
    model, batch = case.model(), case.batch()
    params, losses = parameters(model), case.losses(model)
    direction = draw_direction(params)
    found = fg.reduce(losses, options=fg.Options(route="forward"))(params, batch, fg.dot(direction))
    find_truth(losses, params, batch).check(found, direction, case.tolerance)


def test_xlnet_with_rows_as_long_as_the_batch() -> None:
    """Its layers have the samples second."""
    architecture = replace(ARCHITECTURES["xlnet"], criterion=squashed)
    xlnet = architecture.batch
    check_everything(Case(replace(architecture, batch=lambda samples, length: xlnet(samples, samples))))


def test_the_table_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    main(["gpt2"])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == ["gpt2-eager-none"]
    assert all("exact" in row for row in rows)
