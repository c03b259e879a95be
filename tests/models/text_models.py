"""Architectures of Hugging Face's transformers for text alone, small and with random weights."""

from tests.models.building import (
    BOTH_SIDES,
    EAGER,
    EAGER_AND_SDPA,
    EITHER_SIDE,
    GROUPED,
    PADDED,
    SINGLE,
    SINGLE_PRECISION,
    SPECIAL,
    SPECIAL_SMALL,
    T5_SIZE,
    VISION,
    VOCABULARY,
    WIDE,
    Architecture,
    causal,
    labelled,
    masked,
    pretrained,
    tokens,
    translating,
    unpadded,
)

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
