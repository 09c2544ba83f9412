"""Tiny random models of one kind of eye or ear each, none of which has a row in the table of families."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from kit.tiny import spread
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

_TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "vocab_size": 96, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_EYE = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
}  # fmt: skip
_EAR = {
    "d_model": 16, "hidden_size": 16, "encoder_layers": 2, "num_hidden_layers": 2, "encoder_attention_heads": 2,
    "num_attention_heads": 2, "encoder_ffn_dim": 64, "intermediate_size": 64, "num_mel_bins": 8, "max_source_positions": 20,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
_LLAMA, _QWEN = {**_TEXT, "model_type": "llama"}, {**_TEXT, "model_type": "qwen2"}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    # pixels are shuffled before the projector, which reads four times the tower's width
    "internvl": ("image", {
        "text_config": _QWEN, "vision_config": {**_EYE, "image_size": [32, 32], "patch_size": [8, 8]}, "image_token_id": 90,
    }),
    # ... or in it
    "idefics3": ("image", {"text_config": _LLAMA, "vision_config": _EYE, "image_token_id": 90, "scale_factor": 2}),
    # queries read the tower by cross-attention
    "blip-2": ("image", {
        "text_config": {**_TEXT, "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32}, "vision_config": _EYE,
        "qformer_config": {**_TEXT, "encoder_hidden_size": 16, "num_hidden_layers": 2}, "num_query_tokens": 4,
        "image_token_index": 90,
    }),
    # a convolution reads it, channels first
    "got_ocr2": ("image", {
        "text_config": _QWEN, "image_token_index": 90,
        "vision_config": {**_EYE, "output_channels": 12, "mlp_dim": 24, "global_attn_indexes": [1], "window_size": 2},
    }),
    # pooled, normalised, and mapped by a bare parameter
    "gemma3": ("image", {
        "text_config": {**_TEXT, "model_type": "gemma3_text"}, "vision_config": _EYE, "mm_tokens_per_image": 4,
        "image_token_index": 90,
    }),
    # the tower maps its own features
    "glm4v": ("image", {
        "text_config": {**_TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
        "vision_config": {
            **_EYE, "depth": 2, "num_heads": 2, "out_hidden_size": 32, "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        "image_token_id": 90, "video_token_id": 91,
    }),
    # mel frames are joined after the tower
    "glmasr": ("audio", {"text_config": _LLAMA, "audio_config": _EAR, "audio_token_id": 90}),
}  # fmt: skip


def make_tower_model(kind: str, *, seed: int = 0) -> Any:
    """A model whose features are far from equal."""
    _, sections = CONFIGS[kind]
    model_class = getattr(transformers, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[kind])
    torch.manual_seed(seed)
    model = model_class._from_config(model_class.config_class(**sections), attn_implementation="eager")
    spread(model, seed)
    return model.eval().requires_grad_(False)
