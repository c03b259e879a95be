"""Models of Hugging Face's transformers, as they are: batched, and held to per-sample gradients taken one by one."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import funcghost as fg
from funcghost.oracle import per_sample_gradients

hf: Any = transformers  # typed for literal arguments, not for sizes handed on from one place
hf.logging.set_verbosity_error()

Params = dict[str, Tensor]
Batch = dict[str, Tensor]

B, T, VOCABULARY = 4, 10, 61
SINGLE = torch.finfo(torch.float32).eps
EAGER_AND_SDPA = ("eager", "sdpa")
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
VISION: dict[str, Any] = {key: size for key, size in SMALL.items() if key != "vocab_size"}
IMAGE: dict[str, Any] = {"image_size": 32, "patch_size": 8}
SPEECH: dict[str, Any] = SMALL | {
    "conv_dim": (8, 8),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}


def tokens(length: int = T) -> Batch:
    return {"input_ids": torch.randint(3, VOCABULARY, (B, length))}


def short_tokens() -> Batch:
    return tokens(B)


def padded_tokens() -> Batch:
    """Rows that are full, and padded more and more."""
    lengths = torch.tensor([T, 6, 3, 2])
    return tokens() | {"attention_mask": (torch.arange(T) < lengths[:, None]).long()}


def padded_tokens_on_either_side() -> Batch:
    batch = padded_tokens()
    return batch | {"attention_mask": torch.cat([batch["attention_mask"][:2], batch["attention_mask"][2:].flip(1)])}


def source_and_target() -> Batch:
    return tokens() | {"decoder_input_ids": torch.randint(3, VOCABULARY, (B, 7))}


def images() -> Batch:
    return {"pixel_values": torch.randn(B, 3, 32, 32)}


def captioned_images() -> Batch:
    return tokens() | images()


def spectrograms() -> Batch:
    return {"input_features": torch.randn(B, 8, 20), "decoder_input_ids": torch.randint(3, VOCABULARY, (B, 7))}


def sounds() -> Batch:
    return {"input_values": torch.randn(B, 200)}


def squashed(output: Any, batch: Batch) -> Tensor:
    """A smooth function of everything that the model puts out first."""
    return output[0].flatten(1).sub(0.1).tanh().square().sum(1)


def next_token(output: Any, batch: Batch) -> Tensor:
    """The mean cross-entropy of each row's next tokens, padding left out."""
    targets = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
    terms = F.cross_entropy(output.logits[:, :-1].transpose(1, 2), targets, reduction="none")
    return terms.sum(1) / (targets != -100).sum(1).clamp_min(1)


def contrastive(output: Any, batch: Batch) -> Tensor:
    """Every loss depends on every sample."""
    return output.logits_per_image.log_softmax(1).diagonal().neg()


@dataclass(frozen=True)
class Case:
    """A model to be built for an attention implementation, and what it is run on.

    `rounding`: what a tangent loses on its way where the model itself casts to a lower precision there.
    """

    build: Callable[..., nn.Module]
    batch: Callable[[], Batch] = tokens
    attentions: tuple[str, ...] = ("eager",)
    criterion: Callable[[Any, Batch], Tensor] = squashed
    dtype: torch.dtype = torch.float64
    rounding: float = 0.0

    @property
    def tolerance(self) -> float:
        return max(1e-8 if self.dtype == torch.float64 else 1e-4, self.rounding)


def gpt2(**options: Any) -> nn.Module:
    size = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**size, **options))


def bert(**options: Any) -> nn.Module:
    return hf.BertForMaskedLM(hf.BertConfig(**SMALL, **options))


def llama(**options: Any) -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, **options))


def t5(**options: Any) -> nn.Module:
    size = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
    return hf.T5ForConditionalGeneration(hf.T5Config(**size, **options))


def bloom(**options: Any) -> nn.Module:
    return hf.BloomForCausalLM(
        hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2)
    )


def opt(**options: Any) -> nn.Module:
    size = {"max_position_embeddings": 16, "word_embed_proj_dim": 16, "ffn_dim": 48}
    return hf.OPTForCausalLM(hf.OPTConfig(**SMALL, **size, **options))


def distilbert(**options: Any) -> nn.Module:
    size = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": VOCABULARY}
    return hf.DistilBertForMaskedLM(hf.DistilBertConfig(**size, **options))


def xlnet(**options: Any) -> nn.Module:
    size = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "vocab_size": VOCABULARY}
    return hf.XLNetLMHeadModel(hf.XLNetConfig(**size))


def deberta(**options: Any) -> nn.Module:
    relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8}
    return hf.DebertaV2ForMaskedLM(hf.DebertaV2Config(**SMALL, **relative))


def fnet(**options: Any) -> nn.Module:
    return hf.FNetForMaskedLM(
        hf.FNetConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=VOCABULARY)
    )


def mamba(**options: Any) -> nn.Module:
    return hf.MambaForCausalLM(hf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=VOCABULARY, state_size=4))


def mixtral(**options: Any) -> nn.Module:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**GROUPED, num_local_experts=4, **options))


def qwen3_moe(**options: Any) -> nn.Module:
    experts = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**GROUPED, **experts, head_dim=8, **options))


def convnext(**options: Any) -> nn.Module:
    return hf.ConvNextForImageClassification(
        hf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32)
    )


def resnet(**options: Any) -> nn.Module:
    return hf.ResNetForImageClassification(
        hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    )


def swin(**options: Any) -> nn.Module:
    size = {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
    return hf.SwinForImageClassification(hf.SwinConfig(image_size=32, patch_size=4, **size, **options))


def clip(**options: Any) -> nn.Module:
    text = SMALL | {"max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=VISION | IMAGE, projection_dim=16, **options))


def whisper(**options: Any) -> nn.Module:
    both = {"layers": 1, "attention_heads": 4, "ffn_dim": 48}
    sides = {f"{side}_{key}": size for side in ("encoder", "decoder") for key, size in both.items()}
    sizes = {"d_model": 32, "vocab_size": VOCABULARY, "num_mel_bins": 8}
    lengths = {"max_source_positions": 10, "max_target_positions": 16}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**sides, **sizes, **lengths, **special, **options))


def wav2vec2(**options: Any) -> nn.Module:
    return hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**SPEECH, **options))


CASES = {
    "gpt2": Case(gpt2, attentions=EAGER_AND_SDPA),
    "gpt_neox": Case(lambda **o: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SMALL, **o)), attentions=EAGER_AND_SDPA),
    "llama": Case(llama, attentions=EAGER_AND_SDPA),
    "gemma3": Case(
        lambda **o: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=4, **o)),
        attentions=EAGER_AND_SDPA,
        rounding=SINGLE,
    ),
    "opt": Case(opt, attentions=EAGER_AND_SDPA),
    "bloom": Case(bloom),
    "mamba": Case(mamba, rounding=SINGLE),
    "mixtral": Case(mixtral, attentions=EAGER_AND_SDPA, dtype=torch.float32),
    "qwen3_moe": Case(qwen3_moe, attentions=EAGER_AND_SDPA, dtype=torch.float32),
    "bert": Case(bert, attentions=EAGER_AND_SDPA),
    "albert": Case(
        lambda **o: hf.AlbertForMaskedLM(hf.AlbertConfig(**SMALL, embedding_size=16, **o)), attentions=EAGER_AND_SDPA
    ),
    "distilbert": Case(distilbert, attentions=EAGER_AND_SDPA),
    "deberta": Case(deberta),
    "fnet": Case(fnet),
    "xlnet": Case(xlnet),
    "xlnet_as_long_as_the_batch": Case(xlnet, short_tokens),
    "t5": Case(t5, source_and_target, attentions=EAGER_AND_SDPA),
    "vit": Case(lambda **o: hf.ViTForImageClassification(hf.ViTConfig(**VISION, **IMAGE, **o)), images, EAGER_AND_SDPA),
    "swin": Case(swin, images),
    "convnext": Case(convnext, images),
    "resnet": Case(resnet, images),
    "clip": Case(clip, captioned_images, EAGER_AND_SDPA, contrastive, rounding=SINGLE),
    "whisper": Case(whisper, spectrograms, EAGER_AND_SDPA),
    "wav2vec2": Case(wav2vec2, sounds, EAGER_AND_SDPA),
}
PADDED = {
    "gpt2": Case(gpt2, padded_tokens_on_either_side, EAGER_AND_SDPA, next_token),
    # Left padding in float64 gives Llama's own gradients NaN: its softmax is in float32, where the mask is -inf.
    "llama": Case(llama, padded_tokens, EAGER_AND_SDPA, next_token),
    "bert": Case(bert, padded_tokens_on_either_side, EAGER_AND_SDPA, next_token),
}
TRAINED = {
    "gpt2": CASES["gpt2"],
    "bert": CASES["bert"],
    "t5": CASES["t5"],
    "resnet": CASES["resnet"],
    "wav2vec2": Case(lambda **o: wav2vec2(layerdrop=0.0, **o), sounds, EAGER_AND_SDPA),
}


def attended(cases: dict[str, Case]) -> list[Any]:
    """Every case with each of its attention implementations."""
    return [
        pytest.param(case, attention, id=f"{name}-{attention}")
        for name, case in cases.items()
        for attention in case.attentions
    ]


def build(case: Case, attention: str, training: bool = False) -> tuple[nn.Module, Batch]:
    """The model with no parameter left at zero or one, where a missing use of it would not show; and a batch."""
    model = case.build(attn_implementation=attention).to(case.dtype).train(training)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    batch = {name: value.to(case.dtype) if value.is_floating_point() else value for name, value in case.batch().items()}
    return model, batch


def parameters(model: nn.Module) -> Params:
    return dict(model.named_parameters())


def draw_direction(params: Params) -> Params:
    return {name: torch.randn_like(parameter) for name, parameter in params.items()}


@dataclass(frozen=True)
class Truth:
    """Per-sample gradients one by one: their norms are the size of scores in directions of independent entries."""

    gradients: Params

    def scores(self, direction: Params) -> Tensor:
        terms = [(g.flatten(1) * direction[k].flatten()).sum(1) for k, g in self.gradients.items()]
        return torch.stack(terms).sum(0)

    def norms(self) -> Tensor:
        return torch.stack([g.flatten(1).square().sum(1) for g in self.gradients.values()]).sum(0).sqrt()

    def check(self, found: Tensor, direction: Params, case: Case) -> None:
        wanted, norms = self.scores(direction), self.norms()
        assert found.shape == wanted.shape
        assert bool((norms > 0).all())
        assert bool(((found - wanted).abs() <= case.tolerance * norms).all()), ((found - wanted).abs() / norms).tolist()


def find_truth(losses: Any, params: Params, batch: Batch) -> Truth:
    named = {k: g[:, None] if g.dim() == 1 else g for k, g in per_sample_gradients(losses, params, batch).items()}
    return Truth(named)


def autograd(losses: Any, params: Params, batch: Batch) -> tuple[Params, Tensor]:
    """The gradient of the mean loss without funcghost, and the losses."""
    leaves = {name: parameter.detach().requires_grad_() for name, parameter in params.items()}
    values = losses(leaves, batch)
    gradients = torch.autograd.grad(values.mean(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, gradients, strict=True)), values.detach()


def assert_same_step(out: fg.Step, gradients: Params, losses: Tensor, dtype: torch.dtype) -> None:
    """To rounding: the order in which autograd adds up the uses of a parameter is its own."""
    tolerance = 64 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.losses, losses, rtol=tolerance, atol=0.0)
    size = max(float(gradient.abs().max()) for gradient in gradients.values())
    assert out.grads.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(out.grads[name], gradient, rtol=tolerance, atol=tolerance * size, msg=name)


def check_everything(case: Case, attention: str, caplog: pytest.LogCaptureFixture, training: bool = False) -> None:
    """Steps, a second step along the same plan, and scores alone, all from one state of the random numbers."""
    caplog.set_level(logging.INFO, logger="funcghost")
    model, batch = build(case, attention, training)
    params = parameters(model)
    losses = fg.module_losses(model, case.criterion)
    first, second = draw_direction(params), draw_direction(params)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = {name: parameter.requires_grad for name, parameter in params.items()}

    def again(function: Callable[..., Any], *arguments: Any) -> Any:
        torch.manual_seed(1)
        np.random.seed(1)
        model.load_state_dict(before)
        return function(*arguments)

    truth = again(find_truth, losses, params, batch)
    gradients, values = again(autograd, losses, params, batch)
    drawn, buffers = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    step = fg.grad_and_reduce(losses)
    for _ in range(2):
        out = again(step, params, batch, fg.dot(first))
        truth.check(out.reduced, first, case)
        assert_same_step(out, gradients, values, case.dtype)
        assert torch.equal(torch.get_rng_state(), drawn)
        assert all(torch.equal(value, buffers[name]) for name, value in model.state_dict().items())
    assert sum(record.message.startswith("planned") for record in caplog.records) == 1
    both = again(fg.reduce(losses), params, batch, fg.dot(fg.stack([first, second])))
    truth.check(both[:, 0], first, case)
    truth.check(both[:, 1], second, case)
    assert model.training is training
    for name, parameter in model.named_parameters():
        assert parameter is params[name]
        assert parameter.grad is None
        assert parameter.requires_grad == trained[name]


@pytest.mark.parametrize(("case", "attention"), attended(CASES))
def test_dot_is_exact(case: Case, attention: str, caplog: pytest.LogCaptureFixture) -> None:
    check_everything(case, attention, caplog)


@pytest.mark.parametrize(("case", "attention"), attended(PADDED))
def test_padded_rows(case: Case, attention: str, caplog: pytest.LogCaptureFixture) -> None:
    check_everything(case, attention, caplog)


@pytest.mark.parametrize(("case", "attention"), attended(TRAINED))
def test_training_mode(case: Case, attention: str, caplog: pytest.LogCaptureFixture) -> None:
    check_everything(case, attention, caplog, training=True)


def test_training_mode_draws_random_numbers() -> None:
    for name in ("gpt2", "bert", "t5"):
        for attention in EAGER_AND_SDPA:
            model, batch = build(CASES[name], attention, training=True)
            losses, params = fg.module_losses(model, squashed), parameters(model)
            assert not torch.equal(losses(params, batch), losses(params, batch))


def test_layers_dropped_at_random_are_planned_anew(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="funcghost")
    case = Case(lambda **options: wav2vec2(layerdrop=0.5, mask_time_prob=0.0, **options), sounds)
    model, batch = build(case, "sdpa", training=True)
    params, losses = parameters(model), fg.module_losses(model, squashed)
    direction = draw_direction(params)
    step = fg.grad_and_reduce(losses)
    for seed in range(12):
        torch.manual_seed(seed)
        truth = find_truth(losses, params, batch)
        out = step(params, batch, fg.dot(direction))
        truth.check(out.reduced, direction, case)
    planned = sum(record.message.startswith("planned") for record in caplog.records)
    assert planned == 4, "two layers, each of which runs or does not"


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit", "convnext", "clip"])
def test_forward_route(name: str) -> None:
    """Every tangent passes the softmax of the attention, which the models take in float32."""
    case = replace(CASES[name], rounding=SINGLE)
    model, batch = build(case, "eager")
    params, losses = parameters(model), fg.module_losses(model, case.criterion)
    direction = draw_direction(params)
    found = fg.reduce(losses, options=fg.Options(route="forward"))(params, batch, fg.dot(direction))
    find_truth(losses, params, batch).check(found, direction, case)


def test_forward_route_through_a_custom_autograd_function_is_caught() -> None:
    """BLOOM's activation is one: it loses a tangent that is carried through, while the backward passes it by."""
    model, batch = build(CASES["bloom"], "eager")
    params = parameters(model)
    score = fg.reduce(fg.module_losses(model, squashed), options=fg.Options(route="forward"))
    with pytest.raises(fg.ConservationError, match=r"dense_h_to_4h"):
        score(params, batch, fg.dot(draw_direction(params)))
