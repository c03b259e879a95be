"""Architectures of Hugging Face's transformers, small and with random weights, and the batches they are run on."""

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
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FINE_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
LATENT = {
    **{"q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"moe_intermediate_size": 16, "first_k_dense_replace": 1},
}
STATE_SPACE = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "state_size": 4}
HYBRID = {"mamba_d_state": 4, "mamba_d_conv": 3, "mamba_expand": 2}

DECODERS: dict[str, Architecture] = {
    "gpt2": Architecture(
        pretrained("GPT2LMHeadModel", "GPT2", n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, **SPECIAL),
        tokens,
        EAGER_AND_SDPA,
        EITHER_SIDE,
        labelled,
    ),
    "gpt_neo": causal(
        "GPTNeo",
        {
            **{"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY},
            **{"attention_types": [[["global", "local"], 1]], "window_size": 4, "max_position_embeddings": 16},
            **SPECIAL,
        },
        attentions=EAGER,
        single=(),
    ),
    "gpt_neox": causal("GPTNeoX", SPECIAL_SMALL),
    "gptj": causal(
        "GPTJ",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "vocab_size": VOCABULARY, **SPECIAL},
        attentions=EAGER,
        single=(),
    ),
    "gpt_bigcode": causal(
        "GPTBigCode", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "vocab_size": VOCABULARY, **SPECIAL}
    ),
    "opt": causal("OPT", SPECIAL_SMALL | {"max_position_embeddings": 16, "word_embed_proj_dim": 16, "ffn_dim": 48}),
    "bloom": causal(
        "Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, **SPECIAL}, attentions=EAGER
    ),
    "llama": causal("Llama", GROUPED | SPECIAL),
    "mistral": causal("Mistral", GROUPED | SPECIAL | {"sliding_window": 4}, single=PADDED),
    "qwen2": causal("Qwen2", GROUPED | SPECIAL),
    "qwen3": causal("Qwen3", WIDE),
    "gemma": causal("Gemma", WIDE, rounding=SINGLE),
    "gemma2": causal(
        "Gemma2",
        WIDE | {"sliding_window": 4, "query_pre_attn_scalar": 8},
        attentions=EAGER,
        rounding=SINGLE,
        single=PADDED,
    ),
    "gemma3": causal("Gemma3", WIDE | {"sliding_window": 4}, "Gemma3Text", rounding=SINGLE, single=PADDED),
    "phi": causal("Phi", SPECIAL_SMALL),
    "phi3": causal("Phi3", GROUPED | SPECIAL),
    "stablelm": causal("StableLm", GROUPED | SPECIAL),
    "starcoder2": causal("Starcoder2", GROUPED | SPECIAL),
    "falcon": causal("Falcon", SPECIAL_SMALL | {"alibi": False}, single=()),
    "falcon_alibi": causal("Falcon", SPECIAL_SMALL | {"alibi": True}, single=()),
    "mpt": causal(
        "Mpt",
        {"d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "vocab_size": VOCABULARY},
        attentions=EAGER,
    ),
    "codegen": causal(
        "CodeGen",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "vocab_size": VOCABULARY, **SPECIAL},
        attentions=EAGER,
        single=(),
    ),
    "cohere": causal("Cohere", GROUPED | SPECIAL, rounding=SINGLE),
    "cohere2": causal("Cohere2", GROUPED | SPECIAL | {"sliding_window": 4}, rounding=SINGLE, single=PADDED),
    "olmo": causal("Olmo", GROUPED | SPECIAL),
    "olmo2": causal("Olmo2", GROUPED | SPECIAL),
    "granite": causal("Granite", GROUPED | SPECIAL),
    "glm4": causal("Glm4", WIDE),
    "smollm3": causal("SmolLM3", GROUPED | SPECIAL),
    "nemotron": causal("Nemotron", WIDE),
    "xglm": causal(
        "XGLM",
        {
            **{"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "vocab_size": VOCABULARY},
            **{"max_position_embeddings": 16, **SPECIAL},
        },
        attentions=EAGER,
        **SINGLE_PRECISION,  # its mask has no float64
    ),
    "openai_gpt": Architecture(
        pretrained("OpenAIGPTLMHeadModel", "OpenAIGPT", n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY),
        tokens,
        EAGER,
        EITHER_SIDE,
        labelled,
    ),
}
EXPERT_DECODERS: dict[str, Architecture] = {
    "mixtral": causal("Mixtral", GROUPED | SPECIAL | LOCAL_EXPERTS, **SINGLE_PRECISION),
    "qwen2_moe": causal(
        "Qwen2Moe",
        GROUPED | SPECIAL | EXPERTS | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
        **SINGLE_PRECISION,
    ),
    "qwen3_moe": causal("Qwen3Moe", WIDE | EXPERTS | {"moe_intermediate_size": 16}, **SINGLE_PRECISION),
    "olmoe": causal("Olmoe", GROUPED | SPECIAL | EXPERTS, **SINGLE_PRECISION),
    "phimoe": causal("Phimoe", GROUPED | SPECIAL | LOCAL_EXPERTS, **SINGLE_PRECISION),
    "granite_moe": causal("GraniteMoe", GROUPED | SPECIAL | LOCAL_EXPERTS, **SINGLE_PRECISION),
    "gpt_oss": causal("GptOss", WIDE | LOCAL_EXPERTS | {"sliding_window": 4}, attentions=EAGER, **SINGLE_PRECISION),
    "deepseek_v2": causal("DeepseekV2", SPECIAL_SMALL | LATENT | FINE_EXPERTS, **SINGLE_PRECISION),
    "deepseek_v3": causal(
        "DeepseekV3", SPECIAL_SMALL | {"num_key_value_heads": 4} | LATENT | FINE_EXPERTS, **SINGLE_PRECISION
    ),
    "glm4_moe": causal(
        "Glm4Moe",
        WIDE | FINE_EXPERTS | {"moe_intermediate_size": 16, "first_k_dense_replace": 1},
        **SINGLE_PRECISION,
    ),
    "jamba": causal(
        "Jamba",
        GROUPED
        | SPECIAL
        | EXPERTS
        | HYBRID
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
        | {"mamba_dt_rank": 4, "use_mamba_kernels": False},
        **SINGLE_PRECISION,
    ),
}
RECURRENT_DECODERS: dict[str, Architecture] = {
    "mamba": causal("Mamba", STATE_SPACE | SPECIAL, attentions=EAGER, rounding=SINGLE),
    "mamba2": causal(
        "Mamba2",
        STATE_SPACE | SPECIAL | {"num_heads": 4, "head_dim": 16, "n_groups": 2, "chunk_size": 4},
        attentions=EAGER,
        rounding=SINGLE,
    ),
    "falcon_mamba": causal("FalconMamba", STATE_SPACE | SPECIAL, attentions=EAGER, rounding=SINGLE),
    "recurrent_gemma": causal(
        "RecurrentGemma",
        GROUPED | SPECIAL | {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8, "head_dim": 8},
        attentions=EAGER,
        rounding=SINGLE,
        single=PADDED,
    ),
    "rwkv": causal(
        "Rwkv",
        {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "intermediate_size": 48}
        | {"vocab_size": VOCABULARY, "context_length": 16, "use_cache": False, "rescale_every": 0},
        attentions=EAGER,
    ),
    "bamba": causal(
        "Bamba",
        GROUPED
        | SPECIAL
        | HYBRID
        | {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}
        | {"attn_layer_indices": [1], "mamba_chunk_size": 4},
        rounding=SINGLE,
    ),
    "zamba2": causal(
        "Zamba2",
        GROUPED
        | SPECIAL
        | HYBRID
        | {"n_mamba_heads": 4, "mamba_headdim": 16, "mamba_ngroups": 1, "chunk_size": 4}
        | {"layers_block_type": ["mamba", "hybrid", "mamba"], "num_hidden_layers": 3, "num_mem_blocks": 1}
        | {"adapter_rank": 4},
        rounding=SINGLE,
    ),
    "xlstm": causal(
        "xLSTM",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_heads": 4,
            "vocab_size": VOCABULARY,
            "chunk_size": 5,
            **SPECIAL,
        }
        | {"use_cache": False, "ffn_round_up_to_multiple_of": 8, "mlstm_round_up_to_multiple_of": 8},
        attentions=EAGER,
        rounding=SINGLE,
    ),
    "lfm2": causal("Lfm2", GROUPED | SPECIAL | {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),
    "qwen3_next": causal(
        "Qwen3Next",
        WIDE
        | EXPERTS
        | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
        | {"layer_types": ["linear_attention", "full_attention"]}
        | {
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        **SINGLE_PRECISION,
    ),
}
DISTILLED = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": VOCABULARY}
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8}
ENCODERS: dict[str, Architecture] = {
    "bert": masked("Bert", SPECIAL_SMALL),
    "roberta": masked("Roberta", SPECIAL_SMALL | {"max_position_embeddings": 16}),
    "xlm_roberta": masked("XLMRoberta", SPECIAL_SMALL | {"max_position_embeddings": 16}),
    "albert": masked("Albert", SPECIAL_SMALL | {"embedding_size": 16}),
    "distilbert": masked("DistilBert", DISTILLED | SPECIAL),
    "electra": masked("Electra", SPECIAL_SMALL | {"embedding_size": 16}),
    "deberta": masked("Deberta", SPECIAL_SMALL | RELATIVE, attentions=EAGER),
    "deberta_v2": masked("DebertaV2", SPECIAL_SMALL | RELATIVE, attentions=EAGER),
    "modernbert": masked(
        "ModernBert", SPECIAL_SMALL | {"local_attention": 4, "cls_token_id": 1, "sep_token_id": 2}, single=PADDED
    ),
    "longformer": masked("Longformer", SPECIAL_SMALL | {"attention_window": 4}, attentions=EAGER, single=PADDED),
    "big_bird": masked("BigBird", SPECIAL_SMALL | {"attention_type": "original_full"}, attentions=EAGER),
    "big_bird_sparse": masked(
        "BigBird",
        SPECIAL_SMALL | {"attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 1},
        attentions=EAGER,
    ),
    "fnet": masked("FNet", SPECIAL_SMALL, attentions=EAGER, paddings=("none",)),
    "mpnet": masked("MPNet", SPECIAL_SMALL | {"max_position_embeddings": 16}, attentions=EAGER),
    "xlnet": Architecture(
        pretrained("XLNetLMHeadModel", "XLNet", d_model=32, n_layer=2, n_head=4, d_inner=48, vocab_size=VOCABULARY),
        tokens,
        EAGER,
        EITHER_SIDE,
        labelled,
    ),
    "funnel": masked(
        "Funnel",
        {
            **{"block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48},
            **{"vocab_size": VOCABULARY},
        },
        attentions=EAGER,
    ),
    "convbert": masked("ConvBert", SPECIAL_SMALL | {"embedding_size": 16}, attentions=EAGER),
    "squeezebert": masked("SqueezeBert", SPECIAL_SMALL | {"embedding_size": 32}, attentions=EAGER),
    "mobilebert": masked(
        "MobileBert",
        SPECIAL_SMALL | {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
        attentions=EAGER,
    ),
    "roformer": masked("RoFormer", SPECIAL_SMALL | {"embedding_size": 32}, attentions=EAGER),
    "nystromformer": masked(
        "Nystromformer",
        SPECIAL_SMALL | {"num_landmarks": 5, "segment_means_seq_len": 10},
        attentions=EAGER,
        paddings=("none",),
    ),
    "yoso": masked("Yoso", SPECIAL_SMALL | {"use_expectation": True}, attentions=EAGER),
    "ibert": masked("IBert", SPECIAL_SMALL, attentions=EAGER),
    "rembert": masked(
        "RemBert", SPECIAL_SMALL | {"input_embedding_size": 16, "output_embedding_size": 16}, attentions=EAGER
    ),
    "esm": masked("Esm", SPECIAL_SMALL | {"position_embedding_type": "rotary", "mask_token_id": 3}),
    "flaubert": Architecture(
        pretrained("FlaubertWithLMHeadModel", "Flaubert", emb_dim=32, n_layers=2, n_heads=4, n_words=VOCABULARY),
        tokens,
        EAGER,
        EITHER_SIDE,
        labelled,
    ),
    "canine": Architecture(
        pretrained(
            "CanineModel",
            "Canine",
            **VISION,
            downsampling_rate=2,
            upsampling_kernel_size=2,
            num_hash_functions=2,
            num_hash_buckets=16,
            local_transformer_stride=4,
        ),
        tokens,
        EAGER,
        EITHER_SIDE,
        unpadded,
        **SINGLE_PRECISION,
    ),
}
TRANSLATORS: dict[str, Architecture] = {
    "t5": translating("T5ForConditionalGeneration", "T5", T5_SIZE),
    "mt5": translating("MT5ForConditionalGeneration", "MT5", T5_SIZE),
    "umt5": translating("UMT5ForConditionalGeneration", "UMT5", T5_SIZE),
    "longt5": translating("LongT5ForConditionalGeneration", "LongT5", T5_SIZE | {"local_radius": 3}, attentions=EAGER),
    "longt5_global": translating(
        "LongT5ForConditionalGeneration",
        "LongT5",
        T5_SIZE | {"local_radius": 3, "global_block_size": 4, "encoder_attention_type": "transient-global"},
        attentions=EAGER,
    ),
    "switch_transformers": translating(
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformers",
        T5_SIZE
        | {"num_decoder_layers": 2, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
        attentions=EAGER,
        **SINGLE_PRECISION,
    ),
    "bart": translating("BartForConditionalGeneration", "Bart", BOTH_SIDES | {"max_position_embeddings": 16}),
    "mbart": translating("MBartForConditionalGeneration", "MBart", BOTH_SIDES | {"max_position_embeddings": 16}),
    "pegasus": translating("PegasusForConditionalGeneration", "Pegasus", BOTH_SIDES | {"max_position_embeddings": 16}),
    "pegasus_x": translating(
        "PegasusXForConditionalGeneration",
        "PegasusX",
        BOTH_SIDES | {"num_global_tokens": 2, "block_size": 4},
        attentions=EAGER,
    ),
    "m2m100": translating("M2M100ForConditionalGeneration", "M2M100", BOTH_SIDES | {"max_position_embeddings": 16}),
    "nllb_moe": translating(
        "NllbMoeForConditionalGeneration",
        "NllbMoe",
        BOTH_SIDES
        | {"max_position_embeddings": 16, "num_experts": 4, "encoder_sparse_step": 1, "decoder_sparse_step": 1},
        attentions=EAGER,
        **SINGLE_PRECISION,
    ),
    "marian": translating("MarianMTModel", "Marian", BOTH_SIDES | {"max_position_embeddings": 16}),
    "blenderbot": translating(
        "BlenderbotForConditionalGeneration", "Blenderbot", BOTH_SIDES | {"max_position_embeddings": 16}
    ),
    "led": translating(
        "LEDForConditionalGeneration",
        "LED",
        BOTH_SIDES
        | {"attention_window": 4, "max_encoder_position_embeddings": 16, "max_decoder_position_embeddings": 16},
        attentions=EAGER,
        single=PADDED,
    ),
    "prophetnet": translating(
        "ProphetNetForConditionalGeneration",
        "ProphetNet",
        {
            **{"hidden_size": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_encoder_layers": 1},
            **{"num_decoder_layers": 1, "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4},
            **{"vocab_size": VOCABULARY, "max_position_embeddings": 16, "ngram": 2, **SPECIAL},
        },
        attentions=EAGER,
        single=PADDED,
    ),
    "fsmt": translating(
        "FSMTForConditionalGeneration",
        "FSMT",
        {key: size for key, size in BOTH_SIDES.items() if key != "vocab_size"}
        | {
            "src_vocab_size": VOCABULARY,
            "tgt_vocab_size": VOCABULARY,
            "langs": ["en", "de"],
            "max_position_embeddings": 16,
        },
        attentions=EAGER,
    ),
}
WINDOWED = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
PYRAMID = {"depths": [1, 1], "hidden_sizes": [8, 16], "num_attention_heads": [1, 2], "sr_ratios": [2, 1]}
VISUAL: dict[str, Architecture] = {
    "vit": seeing("ViT", VISION | IMAGE, attentions=EAGER_AND_SDPA),
    "deit": seeing("DeiT", VISION | IMAGE, attentions=EAGER_AND_SDPA),
    "dinov2": seeing(
        "Dinov2",
        {**IMAGE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2},
        attentions=EAGER_AND_SDPA,
    ),
    "dinov3": seeing("DINOv3ViT", VISION | IMAGE | {"num_register_tokens": 2}, head="Model", attentions=EAGER_AND_SDPA),
    "beit": seeing("Beit", VISION | IMAGE | {"use_relative_position_bias": True}, attentions=EAGER_AND_SDPA),
    "data2vec_vision": seeing(
        "Data2VecVision", VISION | IMAGE | {"use_shared_relative_position_bias": True}, attentions=EAGER_AND_SDPA
    ),
    "swin": seeing("Swin", WINDOWED),
    "swinv2": seeing("Swinv2", WINDOWED),
    "convnext": seeing("ConvNext", STAGES | {"num_stages": 2, "image_size": 32}),
    "convnextv2": seeing("ConvNextV2", STAGES | {"num_stages": 2, "image_size": 32}),
    "resnet": seeing("ResNet", STAGES | {"embedding_size": 8, "layer_type": "basic"}),
    "bit": seeing("Bit", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_groups": 4}),
    "regnet": seeing("RegNet", STAGES | {"embedding_size": 8, "groups_width": 4, "layer_type": "y"}),
    "mobilenet_v1": seeing("MobileNetV1", {"depth_multiplier": 0.25, "min_depth": 4, "image_size": 32}),
    "mobilenet_v2": seeing(
        "MobileNetV2", {"depth_multiplier": 0.1, "min_depth": 4, "depth_divisible_by": 4, "image_size": 32}
    ),
    "efficientnet": seeing(
        "EfficientNet",
        {
            **{"image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.25, "kernel_sizes": [3, 3]},
            **{"in_channels": [32, 16], "out_channels": [16, 24], "strides": [1, 2], "num_block_repeats": [1, 1]},
            **{"expand_ratios": [1, 2], "hidden_dim": 320, "depthwise_padding": []},
        },
    ),
    "segformer": seeing(
        "Segformer",
        PYRAMID
        | {"num_encoder_blocks": 2, "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}
        | {"decoder_hidden_size": 16},
    ),
    "mobilevit": seeing(
        "MobileViT",
        {
            **{"image_size": 32, "patch_size": 2, "hidden_sizes": [16, 24, 32], "num_attention_heads": 2},
            "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32],
        },
    ),
    "pvt": seeing(
        "Pvt",
        {
            **{"image_size": 32, "num_encoder_blocks": 2, "depths": [1, 1], "sequence_reduction_ratios": [2, 1]},
            **{"hidden_sizes": [8, 16], "patch_sizes": [4, 2], "strides": [4, 2], "num_attention_heads": [1, 2]},
            "mlp_ratios": [2, 2],
        },
    ),
    "pvt_v2": seeing(
        "PvtV2",
        {
            **{"image_size": 32, "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1]},
            **{"hidden_sizes": [8, 16], "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2]},
            "mlp_ratios": [2, 2],
        },
    ),
    "poolformer": seeing(
        "PoolFormer",
        {
            **{"num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [8, 16], "patch_sizes": [7, 3]},
            **{"strides": [4, 2], "padding": [2, 1], "mlp_ratio": 2.0},
        },
    ),
    "focalnet": seeing(
        "FocalNet",
        {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "focal_levels": [1, 1], "focal_windows": [3, 3]}
        | {"hidden_sizes": [8, 16]},
    ),
    "cvt": seeing(
        "Cvt",
        {
            **{"patch_sizes": [7, 3], "patch_stride": [4, 2], "patch_padding": [2, 1], "embed_dim": [8, 16]},
            **{"num_heads": [1, 2], "depth": [1, 2], "mlp_ratio": [2.0, 2.0], "attention_drop_rate": [0.0, 0.0]},
            **{"drop_rate": [0.0, 0.0], "drop_path_rate": [0.0, 0.0], "qkv_bias": [True, True]},
            **{"cls_token": [False, True], "qkv_projection_method": ["dw_bn", "dw_bn"], "kernel_qkv": [3, 3]},
            **{"padding_kv": [1, 1], "stride_kv": [2, 2], "padding_q": [1, 1], "stride_q": [1, 1]},
        },
    ),
    "hiera": seeing(
        "Hiera",
        {
            **{"embed_dim": 8, "image_size": [32, 32], "patch_kernel": [7, 7], "patch_stride": [4, 4]},
            **{"patch_padding": [3, 3], "depths": [1, 1, 1], "num_heads": [1, 2, 4], "query_stride": [2, 2]},
            **{"num_query_pool": 2, "masked_unit_size": [4, 4], "masked_unit_attention": [True, True, False]},
        },
    ),
    "vit_mae_encoder": seeing("ViTMAE", VISION | IMAGE | {"mask_ratio": 0.0}, head="Model", attentions=EAGER_AND_SDPA),
    "yolos": seeing(
        "Yolos", VISION | IMAGE | {"image_size": [32, 32], "num_detection_tokens": 3}, head="ForObjectDetection"
    ),
}
# In eval mode LeViT keeps a tensor made from its parameters for later calls: those have no gradient of it.
TRAINED_ALONE: dict[str, Architecture] = {
    "levit": seeing(
        "Levit",
        {
            **{"image_size": 32, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1]},
            **{"key_dim": [4, 4, 4], "drop_path_rate": 0, "mlp_ratio": [2, 2, 2], "attention_ratio": [2, 2, 2]},
        },
    ),
}
TEXT_TOWER = SPECIAL_SMALL | {"max_position_embeddings": 16}
HEARD: dict[str, Architecture] = {
    "wav2vec2": Architecture(pretrained("Wav2Vec2ForCTC", "Wav2Vec2", **SPEECH), sounds, EAGER_AND_SDPA),
    "wav2vec2_layer_norm": Architecture(
        pretrained("Wav2Vec2ForCTC", "Wav2Vec2", **SPEECH, feat_extract_norm="layer", do_stable_layer_norm=True),
        sounds,
        EAGER_AND_SDPA,
    ),
    "hubert": Architecture(pretrained("HubertForCTC", "Hubert", **SPEECH), sounds, EAGER_AND_SDPA),
    "wavlm": Architecture(pretrained("WavLMForCTC", "WavLM", **SPEECH, num_buckets=8, max_bucket_distance=16), sounds),
    "unispeech_sat": Architecture(pretrained("UniSpeechSatForCTC", "UniSpeechSat", **SPEECH), sounds, EAGER_AND_SDPA),
    "sew": Architecture(pretrained("SEWForCTC", "SEW", **SPEECH, squeeze_factor=2), sounds, EAGER_AND_SDPA),
    "data2vec_audio": Architecture(
        pretrained(
            "Data2VecAudioForCTC",
            "Data2VecAudio",
            **(SPEECH | {"num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 5}),
        ),
        sounds,
        EAGER_AND_SDPA,
    ),
    "whisper": Architecture(
        pretrained(
            "WhisperForConditionalGeneration",
            "Whisper",
            **BOTH_SIDES,
            num_mel_bins=8,
            max_source_positions=10,
            max_target_positions=16,
        ),
        spectrograms,
        EAGER_AND_SDPA,
    ),
    "speech_to_text": Architecture(
        pretrained(
            "Speech2TextForConditionalGeneration",
            "Speech2Text",
            **BOTH_SIDES,
            input_feat_per_channel=8,
            max_source_positions=24,
            max_target_positions=16,
            conv_channels=16,
            conv_kernel_sizes=[3, 3],
        ),
        frames,
        EAGER,
    ),
    "audio_spectrogram": Architecture(
        pretrained(
            "ASTForAudioClassification",
            "AST",
            **VISION,
            patch_size=8,
            frequency_stride=4,
            time_stride=4,
            max_length=24,
            num_mel_bins=16,
        ),
        audio_patches,
        EAGER_AND_SDPA,
    ),
    "moonshine": Architecture(
        pretrained(
            "MoonshineForConditionalGeneration",
            "Moonshine",
            hidden_size=32,
            intermediate_size=48,
            vocab_size=VOCABULARY,
            encoder_num_hidden_layers=1,
            decoder_num_hidden_layers=1,
            encoder_num_attention_heads=4,
            decoder_num_attention_heads=4,
            **SPECIAL,
        ),
        lambda b, t: {"input_values": torch.randn(b, 1600), "decoder_input_ids": torch.randint(3, VOCABULARY, (b, 7))},
        EAGER_AND_SDPA,
    ),
}
MULTIMODAL: dict[str, Architecture] = {
    "clip": Architecture(
        pretrained("CLIPModel", "CLIP", text_config=TEXT_TOWER, vision_config=VISION | IMAGE, projection_dim=16),
        captioned_images,
        EAGER_AND_SDPA,
        RIGHT_SIDE,
        contrastive,
        rounding=4 * SINGLE,
    ),
    "siglip": Architecture(
        pretrained("SiglipModel", "Siglip", text_config=TEXT_TOWER, vision_config=VISION | IMAGE),
        captioned_images,
        EAGER_AND_SDPA,
        RIGHT_SIDE,
        sigmoidal,
        rounding=4 * SINGLE,
    ),
    "blip": Architecture(
        pretrained("BlipModel", "Blip", text_config=TEXT_TOWER, vision_config=VISION | IMAGE, projection_dim=16),
        captioned_images,
        EAGER,
        RIGHT_SIDE,
        contrastive,
    ),
    "vilt": Architecture(pretrained("ViltModel", "Vilt", **TEXT_TOWER, **IMAGE, max_image_length=-1), captioned_images),
    "layoutlm": Architecture(
        pretrained("LayoutLMForMaskedLM", "LayoutLM", **TEXT_TOWER, max_2d_position_embeddings=64),
        pages,
        EAGER_AND_SDPA,
        EITHER_SIDE,
        labelled,
    ),
    "flava": Architecture(
        pretrained(
            "FlavaModel",
            "Flava",
            text_config=TEXT_TOWER,
            image_config=VISION | IMAGE,
            multimodal_config=VISION,
            hidden_size=32,
            projection_dim=16,
        ),
        captioned_images,
        EAGER,
        ("none",),
        lambda output, batch: output.multimodal_embeddings.flatten(1).sub(0.1).tanh().square().sum(1),
    ),
    "git": Architecture(
        pretrained("GitForCausalLM", "Git", **TEXT_TOWER, vision_config=VISION | IMAGE), captioned_images
    ),
    "visual_bert": Architecture(
        pretrained("VisualBertModel", "VisualBert", **TEXT_TOWER, visual_embedding_dim=12),
        lambda b, t: tokens(b, t) | {"visual_embeds": torch.randn(b, 5, 12)},
    ),
    "lxmert": Architecture(
        pretrained(
            "LxmertModel",
            "Lxmert",
            hidden_size=32,
            intermediate_size=48,
            num_attention_heads=4,
            vocab_size=VOCABULARY,
            l_layers=1,
            r_layers=1,
            x_layers=1,
            visual_feat_dim=12,
        ),
        lambda b, t: tokens(b, t) | {"visual_feats": torch.randn(b, 5, 12), "visual_pos": torch.rand(b, 5, 4)},
    ),
    "perceiver": Architecture(
        pretrained(
            "PerceiverModel",
            "Perceiver",
            num_latents=6,
            d_latents=16,
            d_model=12,
            num_blocks=1,
            num_self_attends_per_block=2,
            num_self_attention_heads=2,
            num_cross_attention_heads=2,
        ),
        lambda b, t: {"inputs": torch.randn(b, t, 12)},
    ),
    "decision_transformer": Architecture(
        pretrained(
            "DecisionTransformerModel",
            "DecisionTransformer",
            state_dim=5,
            act_dim=3,
            hidden_size=32,
            n_layer=2,
            n_head=4,
            max_ep_len=32,
        ),
        lambda b, t: {
            "states": torch.randn(b, t, 5),
            "actions": torch.randn(b, t, 3),
            "rewards": torch.randn(b, t, 1),
            "returns_to_go": torch.randn(b, t, 1),
            "timesteps": torch.arange(t).expand(b, t),
            "attention_mask": torch.ones(b, t),
        },
    ),
}
SEASONAL = {
    **{"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 2, "d_model": 16},
    **{"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
    **{"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "scaling": "mean", "input_size": 1},
}
SERIES: dict[str, Architecture] = {
    "patchtst": Architecture(
        pretrained(
            "PatchTSTForPrediction",
            "PatchTST",
            num_input_channels=3,
            context_length=16,
            prediction_length=4,
            patch_length=4,
            patch_stride=4,
            d_model=16,
            num_attention_heads=2,
            ffn_dim=24,
            num_hidden_layers=2,
            loss="mse",
        ),
        histories,
        EAGER_AND_SDPA,
        criterion=lambda output, batch: output.prediction_outputs.flatten(1).sub(0.1).square().mean(1),
    ),
    "patchtsmixer": Architecture(
        pretrained(
            "PatchTSMixerForPrediction",
            "PatchTSMixer",
            num_input_channels=3,
            context_length=16,
            prediction_length=4,
            patch_length=4,
            patch_stride=4,
            d_model=16,
            num_layers=2,
            loss="mse",
        ),
        histories,
        criterion=lambda output, batch: output.prediction_outputs.flatten(1).sub(0.1).square().mean(1),
    ),
    "autoformer": Architecture(
        pretrained("AutoformerModel", "Autoformer", **SEASONAL, moving_average=3, label_length=2),
        histories_and_futures,
        **SINGLE_PRECISION,
    ),
    "informer": Architecture(pretrained("InformerModel", "Informer", **SEASONAL), histories_and_futures),
    "time_series_transformer": Architecture(
        pretrained("TimeSeriesTransformerModel", "TimeSeriesTransformer", **SEASONAL), histories_and_futures
    ),
}
ARCHITECTURES: dict[str, Architecture] = {
    **DECODERS,
    **EXPERT_DECODERS,
    **RECURRENT_DECODERS,
    **ENCODERS,
    **TRANSLATORS,
    **VISUAL,
    **HEARD,
    **MULTIMODAL,
    **SERIES,
}
