"""Tiny configurations of the architectures in the sweep of merges."""

from typing import Any

_ENCODER = {
    "vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12,
}  # fmt: skip
_TEXT = {**_ENCODER, "max_position_embeddings": 16}
_DECODER = {**_TEXT, "num_key_value_heads": 1, "head_dim": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_MOE = {**_DECODER, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
_SEQ2SEQ = {
    "vocab_size": 40, "d_model": 8, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
_DEEPSEEK = {
    **{key: value for key, value in _MOE.items() if key != "head_dim"}, "num_key_value_heads": 2, "q_lora_rank": 6,
    "kv_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "n_routed_experts": 4,
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
_PICTURE = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
_SPEECH = {
    **_ENCODER, "conv_dim": (8, 8), "conv_kernel": (3, 3), "conv_stride": (2, 2), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
_EYE = {**_PICTURE, "model_type": "clip_vision_model", "projection_dim": 8}
_SIGHT = {**_PICTURE, "model_type": "siglip_vision_model"}
_LLAMA = {**_DECODER, "model_type": "llama"}
_GEMMA3 = {**_DECODER, "model_type": "gemma3_text"}
_MROPE = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 10000.0}
_QWEN_EYE = {"depth": 2, "num_heads": 2, "patch_size": 8, "in_channels": 3, "spatial_merge_size": 2}

# Class of the model -> arguments of its configuration.
TEXT: dict[str, dict[str, Any]] = {
    "BertForMaskedLM": _TEXT,
    "BertForSequenceClassification": _TEXT,
    "BertForTokenClassification": _TEXT,
    "RobertaForMaskedLM": _TEXT,
    "DistilBertForSequenceClassification": {
        "vocab_size": 40, "dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12, "max_position_embeddings": 16,
    },
    "AlbertForMaskedLM": {**_TEXT, "embedding_size": 6},
    "ElectraForSequenceClassification": {**_TEXT, "embedding_size": 6},
    "DebertaV2ForSequenceClassification": {**_TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "ModernBertForMaskedLM": {**_TEXT, "pad_token_id": 0},
    "GPT2LMHeadModel": {"vocab_size": 40, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16},
    "GPTNeoXForCausalLM": _TEXT,
    "OPTForCausalLM": {**_TEXT, "ffn_dim": 12, "word_embed_proj_dim": 8},
    "BloomForCausalLM": {"vocab_size": 40, "hidden_size": 8, "n_layer": 2, "n_head": 2},
    "FalconForCausalLM": {**_TEXT, "new_decoder_architecture": False},
    "LlamaForCausalLM": _DECODER,
    "MistralForCausalLM": _DECODER,
    "Qwen2ForCausalLM": {**_DECODER, "tie_word_embeddings": True},
    "Qwen3ForCausalLM": _DECODER,
    "Gemma2ForCausalLM": _DECODER,
    "Gemma3ForCausalLM": _DECODER,
    "Phi3ForCausalLM": _DECODER,
    "CohereForCausalLM": _DECODER,
    "T5ForConditionalGeneration": {
        "vocab_size": 40, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2,
    },
    "BartForConditionalGeneration": _SEQ2SEQ,
    "MarianMTModel": {**_SEQ2SEQ, "pad_token_id": 39},
    "MambaForCausalLM": {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 2, "state_size": 4},
}  # fmt: skip
EXPERTS: dict[str, dict[str, Any]] = {
    "MixtralForCausalLM": {**_MOE, "num_local_experts": 4},
    "Qwen2MoeForCausalLM": {**_MOE, "num_experts": 4, "shared_expert_intermediate_size": 12},
    "Qwen3MoeForCausalLM": {**_MOE, "num_experts": 4},
    "OlmoeForCausalLM": {**_MOE, "num_experts": 4},
    "DeepseekV3ForCausalLM": _DEEPSEEK,
    "Glm4MoeForCausalLM": {**_MOE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "GptOssForCausalLM": {**_MOE, "num_local_experts": 4},
    "GraniteMoeForCausalLM": {**_MOE, "num_local_experts": 4},
    "JambaForCausalLM": {
        **_MOE, "num_hidden_layers": 4, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
        "mamba_d_state": 4, "mamba_dt_rank": 3, "use_mamba_kernels": False,
    },
}  # fmt: skip
VISION: dict[str, dict[str, Any]] = {
    "ViTForImageClassification": _PICTURE,
    "BeitForImageClassification": {**_PICTURE, "use_relative_position_bias": True},
    "DeiTForImageClassification": _PICTURE,
    "Dinov2ForImageClassification": _PICTURE,
    "ViTMAEForPreTraining": {
        **_PICTURE, "decoder_hidden_size": 8, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 12,
    },
    "SwinForImageClassification": {
        "image_size": 16, "patch_size": 2, "embed_dim": 4, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2,
    },
    "ConvNextForImageClassification": {"hidden_sizes": [4, 6, 8, 10], "depths": [1, 1, 1, 1], "patch_size": 4},
    "ResNetForImageClassification": {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1]},
    "SegformerForSemanticSegmentation": {
        "depths": [1, 1, 1, 1], "hidden_sizes": [4, 4, 8, 8], "num_attention_heads": [1, 1, 2, 2],
        "decoder_hidden_size": 8,
    },
}  # fmt: skip
AUDIO: dict[str, dict[str, Any]] = {
    "WhisperForConditionalGeneration": {
        **{key: value for key, value in _SEQ2SEQ.items() if key != "max_position_embeddings"}, "num_mel_bins": 4,
        "max_source_positions": 8, "max_target_positions": 8,
    },
    "Wav2Vec2ForCTC": _SPEECH,
    "HubertForCTC": _SPEECH,
    "ASTForAudioClassification": {**_PICTURE, "num_mel_bins": 16, "max_length": 32},
}  # fmt: skip
MULTIMODAL: dict[str, dict[str, Any]] = {
    "CLIPModel": {"text_config": {**_TEXT, "eos_token_id": 2}, "vision_config": _PICTURE, "projection_dim": 6},
    "SiglipModel": {"text_config": {**_TEXT, "projection_size": 8}, "vision_config": _PICTURE},
    "BlipForConditionalGeneration": {
        "text_config": {**_TEXT, "encoder_hidden_size": 8}, "vision_config": _PICTURE, "projection_dim": 6,
    },
    "LlavaForConditionalGeneration": {"text_config": _LLAMA, "vision_config": _EYE, "image_token_index": 39},
    "PaliGemmaForConditionalGeneration": {
        "text_config": {**_DECODER, "model_type": "gemma"}, "vision_config": {**_SIGHT, "projection_dim": 8},
        "projection_dim": 8,
    },
    "Gemma3ForConditionalGeneration": {"text_config": _GEMMA3, "vision_config": _SIGHT, "mm_tokens_per_image": 4},
    "Idefics3ForConditionalGeneration": {
        "text_config": _LLAMA, "vision_config": {**_PICTURE, "model_type": "idefics3_vision"}, "scale_factor": 2,
    },
    "Qwen2VLForConditionalGeneration": {
        "text_config": {**_DECODER, "rope_parameters": _MROPE},
        "vision_config": {**_QWEN_EYE, "embed_dim": 8, "hidden_size": 8, "mlp_ratio": 2},
    },
    "Qwen2_5_VLForConditionalGeneration": {
        "text_config": {**_DECODER, "rope_parameters": _MROPE},
        "vision_config": {**_QWEN_EYE, "hidden_size": 8, "out_hidden_size": 8, "intermediate_size": 12},
    },
}  # fmt: skip
KINDS = {"text": TEXT, "experts": EXPERTS, "vision": VISION, "audio": AUDIO, "multimodal": MULTIMODAL}
