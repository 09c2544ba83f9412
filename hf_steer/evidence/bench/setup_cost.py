"""What patching costs: a 7B-shaped Qwen2-VL without weights."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from hf_steer.config import AttentionConfig, SteerConfig
from hf_steer.evidence.bench.scores import STRENGTH
from hf_steer.evidence.bench.shapes import SHAPES, Shape
from hf_steer.evidence.bench.timing import Call, peak_bytes
from hf_steer.patching import patch_model, unpatch_model

_VISION = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14, "spatial_merge_size": 2}


def patching_costs(*, rounds: int = 15) -> tuple[Shape, list[float], int]:
    """Patch and unpatch, all heads of all layers, scores from the model's own eyes.

    Args:
        rounds: how often it is timed.

    Returns:
        The shape; milliseconds of each patching; highest bytes that Python's objects and tensors of the CPU took, above what
        was there before. (Tensors of the meta device take nothing; of the weights' size there can be none on another.)
    """
    shape = SHAPES["qwen2-vl-7b"]
    model = _model_without_weights(shape)
    config = SteerConfig(attention=AttentionConfig(strength=STRENGTH))
    taken = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        patch_model(model, config)
        taken.append(1e3 * (time.perf_counter() - started))
        unpatch_model(model)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    patch_model(model, config)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    unpatch_model(model)
    tensors = peak_bytes(Call(lambda: (patch_model(model, config),)), "cpu")
    unpatch_model(model)
    return shape, taken[1:], peak - before + tensors  # the first imports what it needs


def _model_without_weights(shape: Shape) -> Any:
    angles, side = shape.head_dim // 2, shape.head_dim // 6
    text = {
        "vocab_size": 152064,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [angles - 2 * side, side, side]},
    }
    config = Qwen2VLConfig(text_config=text, vision_config={**_VISION, "hidden_size": shape.hidden})
    with torch.device("meta"):
        return Qwen2VLForConditionalGeneration._from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)
