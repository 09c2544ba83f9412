"""Every architecture of the installed transformers that takes pictures or sounds, without weights."""

from __future__ import annotations

import inspect
import warnings
from functools import cache
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

MAPPINGS = (
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "MODEL_FOR_CTC_MAPPING_NAMES", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
)  # fmt: skip
PERCEIVED = {
    "image": ("pixel_values", "pixel_values_videos", "image_pixel_values", "flattened_patches"),
    "audio": ("input_features", "input_values", "audio_input_features", "audio_input_ids"),
}


_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_CODES = {"vocabulary_map": {"<image>": 300}}
MORE: dict[str, dict[str, Any]] = {
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152, "num_attention_heads": 16}},
    "chameleon": _CODES,
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}}},
    "deepseek_ocr2": {"text_config": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}},
    "emu3": _CODES,
    "gemma4": {"vision_config": {}, "audio_config": {}},
    "gemma4_unified": {"vision_config": {}, "audio_config": {}},
    "granite4_vision": {"downsample_rate": "4/8", "deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [1]},
    "hunyuan_vl": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [16, 16, 16, 16]}}},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "nemotron_h_omni": {"audio_config": {}},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
}
"""What a configuration has to be told before a model, or its eye and ear, can be made of it."""


@cache
def classes() -> dict[str, str]:
    """Model type -> class, of all that take pictures or sounds by name."""
    named = {
        kind: own if isinstance(own, str) else own[0]
        for mapping in MAPPINGS
        for kind, own in getattr(modeling_auto, mapping, {}).items()
    }
    return {kind: own for kind, own in sorted(named.items()) if modalities(own)}


def modalities(class_name: str) -> list[str]:
    with warnings.catch_warnings(action="ignore"):  # modules of older releases warn of their own making
        model_class = getattr(transformers, class_name)
    taken = inspect.signature(inspect.unwrap(model_class.forward)).parameters
    return [modality for modality, names in PERCEIVED.items() if any(name in taken for name in names)]


def without_weights(kind: str) -> Any:
    """A model of the size that its configuration has when nothing is said, on the meta device."""
    model_class = getattr(transformers, classes()[kind])
    config_class = CONFIG_MAPPING.get(kind, model_class.config_class)
    if not issubclass(config_class, model_class.config_class):
        config_class = model_class.config_class
    with torch.device("meta"):
        return model_class(config_class(**MORE.get(kind, {})))
