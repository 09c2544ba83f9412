"""What the general rules cannot know: values of single model types, by dotted paths from the section of that type."""

from __future__ import annotations

from typing import Any

from hf_steer.testing.zoo.sizes import FEATURES, HEAD_SIZE, HEADS, INNER, WORDS

IMAGE = 300
"""The placeholder of a picture, where a configuration has none."""
SOUND = 301
"""The same for sounds."""
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
TWO_KINDS = {"full_attention": ROPE, "sliding_attention": ROPE}
BOTH = ["sliding_attention", "full_attention"]
QUANTIZER = {
    "vq_config.base_channels": 32, "vq_config.channel_multiplier": [1, 1], "vq_config.num_res_blocks": 1,
    "vq_config.resolution": 32, "vq_config.latent_channels": 32, "vq_config.num_embeddings": 64,
}
VIBRATIONS = {"num_filters": 4, "downsampling_ratios": [2, 4], "depths": [1, 1, 1]}
SAM = {"output_channels": 16, "global_attn_indexes": [1], "image_size": 64}
THREE_AXES = {"rope_parameters.mrope_section": [4, 2, 2]}
SHARED_KEYS = {"num_hidden_layers": 4, "layer_types": BOTH * 2, "num_kv_shared_layers": 2}
READER = {"model_type": "bert", "is_decoder": True, "add_cross_attention": True}

BUILT_WITH: dict[str, dict[str, Any]] = {
    "encoder-decoder": {"encoder": {"model_type": "bert"}, "decoder": READER},
    "gemma4_assistant": {
        "text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "gemma4_unified_assistant": {"text_config": {"model_type": "gemma4_unified_text"}},
    "granite4_vision": {"text_config": {"model_type": "granite4_vision_text"}},
    "reformer": {"is_decoder": True},
    "speech-encoder-decoder": {"encoder": {"model_type": "wav2vec2"}, "decoder": READER},
    "vision-encoder-decoder": {"encoder": {"model_type": "vit"}, "decoder": READER},
    "wav2vec2-bert": {"vocab_size": WORDS},
    "wav2vec2-conformer": {"vocab_size": WORDS},
}
"""Arguments without which the default configuration is none."""

EXCEPTIONS: dict[str, dict[str, Any]] = {
    # text
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "vocab_size": 260, "encoder_hash_byte_group_vocab": 50, "encoder_hash_byte_group_size": [3],
        "encoder_config.hidden_size_global": FEATURES, "decoder_config.hidden_size_global": FEATURES,
    },
    "cohere_compass_text": {"rope_parameters": TWO_KINDS},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}, "num_key_value_heads": 2,
        "ffn_config.hidden_size": FEATURES, "ffn_config.ffn_hidden_size": FEATURES,
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": INNER},
    "dory": {
        "num_hidden_layers": 6, "layer_types": ["sliding_attention", "mlp"] + ["full_attention", "mlp"] * 2,
        "n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_head": 16},
    "gemma3n_text": {
        **SHARED_KEYS, "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [INNER] * 4,
        "hidden_size_per_layer_input": 8, "laurel_rank": 8,
    },
    "gemma4_assistant": {"text_config.num_kv_shared_layers": 2},
    "gemma4_unified_assistant": {"text_config.num_kv_shared_layers": 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_hidden_layers": 16, "num_layers_per_stack": 2},
    "jamba": {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "led": {"attention_window": [8, 8]},
    "lfm2": {"layer_types": ["conv", "full_attention"], "full_attn_idxs": [1]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": HEAD_SIZE, "indexer_budget": 64,
        "indexer_compress_ratio": 4, "ngram_vocab_size_base": 100, "ple_embed_dim": FEATURES, "heads_per_ngram": 2,
        "split_ngram_parts": 1, "make_ngram_vocab_size_divisible_by": 8, "hc_lowrank": 16,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [32, 32], "attn_layers": ["local", "local"], "is_decoder": True,
    },
    "roc_bert": {"shape_embed_dim": 16, "pronunciation_embed_dim": 16},
    "rwkv": {"attention_hidden_size": FEATURES},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 5, "layers_block_type": ["linear_attention", *["linear_attention", "hybrid"] * 2],
        "attention_head_dim": 32, "num_key_value_heads": HEADS, "use_mamba_kernels": False,
    },
    "zamba2": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "hybrid_layer_ids": [1, 3],
        "attention_head_dim": 32, "num_key_value_heads": HEADS, "num_query_groups": HEADS,
    },
    "zaya": {"num_experts_per_tok": 1},
    # pictures
    "apertus1p5": {"image_token_offset": 200, "audio_token_offset": 232},
    "apertus1p5_vision_tokenizer": {
        "codebook_size": 32, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "latent_channels": FEATURES,
        "resolution": 32, "spatial_scale_factor": 2,
    },
    "blip-2": {"image_token_id": IMAGE, "image_token_index": IMAGE},
    "chameleon": {"vocabulary_map": {"<image>": IMAGE}, **QUANTIZER},
    "deepseek_ocr2_sam_vision_model": {**SAM, "downsample_channels": [16, FEATURES]},
    "deepseek_ocr2_text": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "mlp_layer_types": ["dense", "sparse"]},
    "dots3_note_vision_encoder": {"adapter_in_dim": FEATURES, "adapter_out_dim": FEATURES},
    "emu3": {"vocabulary_map": {"<image>": IMAGE}},
    "emu3_vqgan": {
        "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "codebook_size": 64, "attn_resolutions": [8]
    },
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {**ROPE, "mrope_section": [3, 3, 2]}, "moe_intermediate_size": [INNER, INNER]
    },
    "fast_vlm": {"vision_config.architecture": "fastvit_t8", "vision_config.model_args": {}},
    "florence_vision": {
        "depths": [1] * 4, "embed_dim": [16] * 4, "num_heads": [2] * 4, "num_groups": [2] * 4, "projection_dim": FEATURES
    },
    "gemma3n_vision": {"architecture": "mobilenetv3_small_050", "vocab_size": 8, "vocab_offset": 296},
    "glm46v_text": THREE_AXES,
    "glm4v_text": THREE_AXES,
    "glm4v_moe_text": {"rope_parameters.mrope_section": [2, 1, 1]},
    "glm_ocr_text": THREE_AXES,
    "glm5_next_text": {"head_dim": 0, "qk_nope_head_dim": 16, "qk_head_dim": 16, "index_kpool": 4, "index_topk": 64, "hc_mult": 2},
    "granite4_vision": {"downsample_rate": "4/8", "deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [1]},
    "hunyuan_vl_text": {"rope_parameters": {**ROPE, "mrope_section": [2, 2, 2, 2]}},
    "instructblip": {"image_token_id": IMAGE, "image_token_index": IMAGE},
    "instructblipvideo": {"video_token_id": IMAGE, "video_token_index": IMAGE},
    "janus": {**QUANTIZER, "vq_config.projection_dim": FEATURES, "vq_config.image_token_embed_dim": FEATURES},
    "llama4_vision_model": {"projector_input_dim": FEATURES, "projector_output_dim": FEATURES, "intermediate_size": 256},
    "molmo2_adapter": {"vision_feature_layer": [-1, -2]},
    "muse_spark_audio": {"hidden_sizes": [16, FEATURES], "depths": [1, 1]},
    "paddleocr_vl_text": {"rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]}},
    "qwen2_vl_text": THREE_AXES,
    "qwen2_5_vl_text": THREE_AXES,
    "qwen2_5_omni_text": THREE_AXES,
    "qwen2_5_omni_thinker": {"vision_start_token_id": 250, "vision_end_token_id": 251},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 250, "vision_end_token_id": 251},
    "step3p5": {"sliding_window": 64},
    "unlimited_ocr_sam_vision_model": {**SAM, "downsample_channels": [16, FEATURES]},
    "perception_lm": {
        "vision_config.architecture": "vit_tiny_patch16_224", "vision_use_cls_token": True,
        "vision_config.model_args": {"depth": 2, "embed_dim": FEATURES, "num_heads": HEADS, "img_size": [32, 32], "patch_size": 8},
    },
    "unlimited_ocr_text": {"num_experts_per_tok": 2, "num_key_value_heads": HEADS},
    # sounds
    "dia_decoder": {"num_channels": 9},
    "dots3_note_audio_encoder": {"adapter_input_size": FEATURES, "adapter_out_dim": FEATURES},
    "gemma3n_audio": {
        "vocab_size": 8, "vocab_offset": 304, "input_feat_size": 16, "conf_num_hidden_layers": 1,
        "sscp_conv_channel_size": [8, 8],
    },
    "fun_asr_nano": {"adaptor_config.intermediate_size": 16},
    "kyutai_speech_to_text": {
        "num_codebooks": 4, "codebook_vocab_size": 65, "codec_config.upsample_groups": FEATURES, "codec_config.num_filters": 4,
        "codec_config.vector_quantization_hidden_dimension": 16, "codec_config.codebook_dim": 16,
        "codec_config.codebook_size": 64, "codec_config.num_quantizers": 4,
    },
    "moonshine": {"encoder_num_key_value_heads": HEADS, "decoder_num_key_value_heads": HEADS},
    "moonshine_streaming": {"num_key_value_heads": HEADS},
    "nemo_speechlm": {"audio_config.diarization_config.head_config.audio_hidden_size": FEATURES},
    "nemotron3_5_asr": {"default_prompt_id": 5},
    "qwen2_5_omni": {"enable_audio_output": False},
    "qwen3_omni_moe": {"enable_audio_output": False},
    "vibevoice_acoustic_tokenizer": VIBRATIONS,
    "vibevoice_acoustic_tokenizer_encoder": VIBRATIONS,
    "voxtral": {"audio_token_id": SOUND},
    "wavtokenizer_encoder": {"codebook_dim": FEATURES, "num_filters": 4, "codebook_size": 64},
}  # fmt: skip
"""Model type of a section, or `type-Class` for the whole of one architecture -> path -> value."""
