"""Tiny random models of every family, and prompts for them: grouped heads, odd lengths, no zero weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

IMAGE, VIDEO, START, END, PAD = 90, 91, 92, 93, 0
PATCH, TEMPORAL, CHANNELS = 4, 2, 3

SEEING = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
BRIDGED = ("llava", "qwen2_audio", "voxtral")
"""Their decoders read plain prompts like those of text-only models; `tiny_encoders` builds them and shows them something."""
READING = ("qwen2", "qwen3", "llama", *BRIDGED)
FAMILIES = SEEING + READING
UNCOMMON = {"mistral": ("eager", "sdpa"), "deepseek_v3": ("eager", "sdpa"), "gemma2": ("eager",), "gpt_oss": ("eager",)}
"""Sliding windows, values smaller than keys, softcapped logits, sinks; and the implementations that they have."""
IMPLEMENTATIONS = ("eager", "sdpa")
HEADS, LAYERS = 4, 3

_TEXT: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "pad_token_id": PAD, "bos_token_id": 1,
    "eos_token_id": None,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_SPECIAL = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
_VISION: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"depth": 2, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
    "qwen2_5_vl": {
        "depth": 2, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "window_size": 16,
        "fullatt_block_indexes": [0],
    },
    "qwen3_vl": {
        "depth": 2, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    },
}
_CLASSES = {
    "qwen2_vl": ("Qwen2VLConfig", "Qwen2VLForConditionalGeneration"),
    "qwen2_5_vl": ("Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration"),
    "qwen3_vl": ("Qwen3VLConfig", "Qwen3VLForConditionalGeneration"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM"),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM"),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM"),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM"),  # no row of ours: one for others to add
}
_OWN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 7},
    "deepseek_v3": {
        "num_key_value_heads": HEADS, "q_lora_rank": 12, "kv_lora_rank": 10, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
        "v_head_dim": 6, "first_k_dense_replace": LAYERS,
    },
    "gemma2": {"sliding_window": 7, "attn_logit_softcapping": 1.5, "query_pre_attn_scalar": 8},
    "gpt_oss": {"sliding_window": 7, "num_local_experts": 2, "num_experts_per_tok": 1},
}


def make_config(family: str, **text: Any) -> Any:
    config_class = getattr(transformers, _CLASSES[family][0])
    if family not in SEEING:
        own = {**_TEXT, **_OWN.get(family, {}), **text}
        if family == "deepseek_v3":
            del own["head_dim"]
        return config_class(**own)
    vision = {
        "num_heads": 2, "patch_size": PATCH, "temporal_patch_size": TEMPORAL, "spatial_merge_size": 2,
        "in_channels": CHANNELS, **_VISION[family],
    }
    return config_class(text_config={**_TEXT, "rope_parameters": _ROPE, **text}, vision_config=vision, **_SPECIAL)


def make_model(family: str, implementation: str = "sdpa", *, seed: int = 0, **text: Any) -> Any:
    """A model whose attention is far from uniform, so that steering has something to change."""
    if family in BRIDGED:
        from kit.tiny_encoders import make_encoder_model

        return make_encoder_model(family, seed=seed, implementation=implementation)
    torch.manual_seed(seed)
    config = make_config(family, **text)
    model = getattr(transformers, _CLASSES[family][1])._from_config(config, attn_implementation=implementation)
    spread(model, seed)
    settle_generation(model)
    return model.eval()


def spread(model: Any, seed: int) -> None:
    """Weights large enough that attention is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5 * 1.5)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def settle_generation(model: Any) -> None:
    """Generate to the length asked for, and no placeholders: a trained model does not say them either."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    model.generation_config.suppress_tokens = [IMAGE, VIDEO]


def make_prompt(
    family: str, rows: list[list[Any]], *, padding: str = "left", seed: int = 0
) -> dict[str, Tensor]:
    """Inputs as a processor makes them.

    Args:
        family: of the model.
        rows: per row, integers (that many text tokens), `("image", height, width)` or `("video", frames, height, width)`
            with sizes in tokens.
        padding: side.
        seed: of the text and the pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    ids: list[list[int]] = []
    grids: dict[str, list[list[int]]] = {"image": [], "video": []}
    for row in rows:
        tokens: list[int] = []
        for item in row:
            if isinstance(item, int):
                tokens += torch.randint(2, 80, (item,), generator=generator).tolist()
                continue
            modality, *size = item
            frames, height, width = size if modality == "video" else (1, *size)
            grids[modality].append([frames, 2 * height, 2 * width])
            placeholder = IMAGE if modality == "image" else VIDEO
            runs = [height * width] * frames if family == "qwen3_vl" else [frames * height * width]
            for number, run in enumerate(runs):
                stamp = [80 + number] if family == "qwen3_vl" and modality == "video" else []
                tokens += [*stamp, START, *[placeholder] * run, END]
        ids.append(tokens)
    inputs = pad_rows(ids, padding=padding)
    input_ids = inputs["input_ids"]
    if family not in SEEING:
        return inputs
    inputs["mm_token_type_ids"] = (input_ids == IMAGE).int() + 2 * (input_ids == VIDEO).int()
    for modality, pixels, grid in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        if grids[modality]:
            inputs[grid] = torch.tensor(grids[modality])
            patches = int(inputs[grid].prod(1).sum())
            inputs[pixels] = torch.randn(patches, CHANNELS * TEMPORAL * PATCH**2, generator=generator)
    return inputs


def pad_rows(ids: list[list[int]], *, padding: str) -> dict[str, Tensor]:
    """Rows of unequal length as one batch, with its mask."""
    longest = max(map(len, ids))
    blank = [[PAD] * (longest - len(row)) for row in ids]
    left = padding == "left"
    input_ids = torch.tensor([gap + row if left else row + gap for gap, row in zip(blank, ids, strict=True)])
    mask = torch.tensor(
        [[0] * len(gap) + [1] * len(row) if left else [1] * len(row) + [0] * len(gap) for gap, row in zip(blank, ids, strict=True)]
    )
    return {"input_ids": input_ids, "attention_mask": mask}
