"""How a small model of Hugging Face's transformers is built, with random weights, and the batches it is run on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

hf: Any = transformers  # typed for literal arguments, not for sizes handed on from one place
hf.logging.set_verbosity_error()

Params = dict[str, Tensor]
Batch = dict[str, Tensor]
Build = Callable[..., nn.Module]
Padding = Literal["none", "right", "left", "either"]

B, T, VOCABULARY = 4, 10, 61
SINGLE = torch.finfo(torch.float32).eps
EAGER = ("eager",)
EAGER_AND_SDPA = ("eager", "sdpa")
EITHER_SIDE: tuple[Padding, ...] = ("none", "right", "either", "left")
RIGHT_SIDE: tuple[Padding, ...] = ("none", "right")
WITH_LEFT: tuple[Padding, ...] = ("either", "left")
PADDED: tuple[Padding, ...] = ("right", "either", "left")

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SMALL: dict[str, Any] = VISION | {"vocab_size": VOCABULARY}
SPECIAL_SMALL = SMALL | SPECIAL
GROUPED = SMALL | {"num_key_value_heads": 2}
WIDE = GROUPED | SPECIAL | {"head_dim": 8}
IMAGE: dict[str, Any] = {"image_size": 32, "patch_size": 8}
SPEECH: dict[str, Any] = SMALL | {
    "conv_dim": (8, 8),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
BOTH_SIDES: dict[str, Any] = {
    f"{side}_{key}": size
    for side in ("encoder", "decoder")
    for key, size in {"layers": 1, "attention_heads": 4, "ffn_dim": 48}.items()
} | {"d_model": 32, "vocab_size": VOCABULARY, "decoder_start_token_id": 1, **SPECIAL}
STAGES: dict[str, Any] = {"hidden_sizes": [8, 16], "depths": [1, 1]}
T5_SIZE = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}


def tokens(samples: int = B, length: int = T) -> Batch:
    return {"input_ids": torch.randint(3, VOCABULARY, (samples, length))}


def source_and_target(samples: int = B, length: int = T) -> Batch:
    return tokens(samples, length) | {"decoder_input_ids": torch.randint(3, VOCABULARY, (samples, 7))}


def images(samples: int = B, length: int = T) -> Batch:
    return {"pixel_values": torch.randn(samples, 3, 32, 32)}


def captioned_images(samples: int = B, length: int = T) -> Batch:
    return tokens(samples, length) | images(samples)


def pages(samples: int = B, length: int = T) -> Batch:
    corner = torch.randint(0, 30, (samples, length, 2))
    return tokens(samples, length) | {"bbox": torch.cat([corner, corner + torch.randint(1, 30, corner.shape)], -1)}


def spectrograms(samples: int = B, length: int = T) -> Batch:
    target = torch.randint(3, VOCABULARY, (samples, 7))
    return {"input_features": torch.randn(samples, 8, 20), "decoder_input_ids": target}


def frames(samples: int = B, length: int = T) -> Batch:
    target = torch.randint(3, VOCABULARY, (samples, 7))
    return {"input_features": torch.randn(samples, 24, 8), "decoder_input_ids": target}


def sounds(samples: int = B, length: int = T) -> Batch:
    return {"input_values": torch.randn(samples, 20 * length)}


def audio_patches(samples: int = B, length: int = T) -> Batch:
    return {"input_values": torch.randn(samples, 24, 16)}


def histories(samples: int = B, length: int = T) -> Batch:
    return {"past_values": torch.randn(samples, 16, 3)}


def histories_and_futures(samples: int = B, length: int = T) -> Batch:
    past, future = 10, 4
    return {
        "past_values": torch.randn(samples, past),
        "past_time_features": torch.randn(samples, past, 2),
        "past_observed_mask": torch.ones(samples, past),
        "future_values": torch.randn(samples, future),
        "future_time_features": torch.randn(samples, future, 2),
    }


def padded(batch: Batch, padding: Padding) -> Batch:
    """The batch with rows that are full, and padded more and more, with the token 0."""
    if padding == "none":
        return batch
    samples, length = batch["input_ids"].shape
    lengths = torch.tensor([length, 6, 3, 2, 5, 4])[:samples].clamp_max(length)
    right = torch.arange(length) < lengths[:, None]
    turned = {"right": 0, "left": samples, "either": samples // 2}[padding]
    mask = torch.cat([right[: samples - turned], right[samples - turned :].flip(1)])
    return batch | {"input_ids": batch["input_ids"] * mask, "attention_mask": mask.long()}


def squashed(output: Any, batch: Batch) -> Tensor:
    """A smooth function of everything that the model puts out first."""
    return output[0].flatten(1).sub(0.1).tanh().square().sum(1)


def labelled(output: Any, batch: Batch) -> Tensor:
    """Padded rows: the mean cross-entropy of each row's next tokens, padding left out by labels of -100."""
    if "attention_mask" not in batch:
        return squashed(output, batch)
    known = batch.get("decoder_input_ids", batch["input_ids"])
    mask = torch.ones_like(known) if "decoder_input_ids" in batch else batch["attention_mask"]
    labels = known.masked_fill(mask == 0, -100)[:, 1:]
    terms = F.cross_entropy(output.logits[:, :-1].transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return terms.sum(1) / (labels != -100).sum(1).clamp_min(1)


def unpadded(output: Any, batch: Batch) -> Tensor:
    """A smooth function of the states of the tokens that are no padding."""
    if "attention_mask" not in batch:
        return squashed(output, batch)
    return (output[0].sub(0.1).tanh().square() * batch["attention_mask"][..., None]).flatten(1).sum(1)


def contrastive(output: Any, batch: Batch) -> Tensor:
    """Every loss depends on every sample."""
    return output.logits_per_image.log_softmax(1).diagonal().neg()


def sigmoidal(output: Any, batch: Batch) -> Tensor:
    """Every loss depends on every sample: a pair is right or wrong."""
    signs = 2 * torch.eye(len(output.logits_per_image), dtype=output.logits_per_image.dtype) - 1
    return F.logsigmoid(signs * output.logits_per_image).sum(1).neg()


@dataclass(frozen=True)
class Architecture:
    """A model to be built for an attention implementation, and what it is run on.

    `paddings`: where its rows may be padded. `rounding`: what a tangent loses on its way where the model itself casts
    to a lower precision there. `single`: the paddings with which its eager attention is NaN in float64, since it takes
    the softmax in float32, where the mask of a position that sees nothing becomes minus infinity.
    """

    build: Build
    batch: Callable[[int, int], Batch] = tokens
    attentions: tuple[str, ...] = EAGER
    paddings: tuple[Padding, ...] = ("none",)
    criterion: Callable[[Any, Batch], Tensor] = squashed
    dtype: torch.dtype = torch.float64
    rounding: float = 0.0
    single: tuple[Padding, ...] = ()

    def precision(self, attention: str, padding: Padding) -> torch.dtype:
        return torch.float32 if attention == "eager" and padding in self.single else self.dtype

    def tolerance(self, dtype: torch.dtype) -> float:
        return max(1e-8 if dtype == torch.float64 else 1e-4, self.rounding)


def pretrained(model: str, config: str, **sizes: Any) -> Build:
    return lambda **options: getattr(hf, model)(getattr(hf, f"{config}Config")(**sizes, **options))


def causal(name: str, sizes: dict[str, Any], config: str = "", **options: Any) -> Architecture:
    chosen: dict[str, Any] = {"attentions": EAGER_AND_SDPA, "paddings": EITHER_SIDE, "criterion": labelled}
    chosen |= {"single": WITH_LEFT} | options
    return Architecture(pretrained(f"{name}ForCausalLM", config or name, **sizes), **chosen)


def masked(name: str, sizes: dict[str, Any], **options: Any) -> Architecture:
    chosen: dict[str, Any] = {"attentions": EAGER_AND_SDPA, "paddings": EITHER_SIDE, "criterion": labelled} | options
    return Architecture(pretrained(f"{name}ForMaskedLM", name, **sizes), **chosen)


def translating(model: str, config: str, sizes: dict[str, Any], **options: Any) -> Architecture:
    chosen: dict[str, Any] = {"attentions": EAGER_AND_SDPA, "paddings": RIGHT_SIDE, "criterion": labelled} | options
    return Architecture(pretrained(model, config, **sizes), source_and_target, **chosen)


def seeing(name: str, sizes: dict[str, Any], head: str = "ForImageClassification", **options: Any) -> Architecture:
    return Architecture(pretrained(f"{name}{head}", name, **sizes), images, **options)


SINGLE_PRECISION: dict[str, Any] = {"dtype": torch.float32}  # grouped_mm has no float64
