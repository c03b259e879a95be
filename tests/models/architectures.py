"""Architectures of Hugging Face's transformers, small and with random weights."""

import torch

from tests.models.building import (
    BOTH_SIDES,
    EAGER,
    EAGER_AND_SDPA,
    EITHER_SIDE,
    IMAGE,
    RIGHT_SIDE,
    SINGLE,
    SINGLE_PRECISION,
    SPECIAL,
    SPECIAL_SMALL,
    SPEECH,
    STAGES,
    VISION,
    VOCABULARY,
    Architecture,
    audio_patches,
    captioned_images,
    contrastive,
    frames,
    histories,
    histories_and_futures,
    labelled,
    pages,
    pretrained,
    seeing,
    sigmoidal,
    sounds,
    spectrograms,
    tokens,
)
from tests.models.text_models import (
    DECODERS,
    ENCODERS,
    EXPERT_DECODERS,
    RECURRENT_DECODERS,
    TRANSLATORS,
)

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
