"""Tiny random models with an ear or an eye, of every family that an aligner can go into, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from kit import tiny
from kit.tiny import PAD

PLACEHOLDER, VIDEO = tiny.IMAGE, tiny.VIDEO
FRAMES, MELS = 20, 8
"""Frames after the convolutions of a Whisper-type encoder, which reads twice as many mel frames."""

_TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": tiny.LAYERS, "num_attention_heads": tiny.HEADS,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 96, "max_position_embeddings": 256, "pad_token_id": PAD,
    "bos_token_id": 1, "eos_token_id": None,
}
_WHISPER = {
    "d_model": 16, "encoder_layers": 3, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "num_mel_bins": MELS,
    "max_source_positions": FRAMES,
}
_WAVE = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "conv_dim": (8, 8),
    "conv_stride": (4, 2), "conv_kernel": (8, 4), "num_feat_extract_layers": 2, "vocab_size": 20, "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0, "feat_extract_norm": "layer", "do_stable_layer_norm": True,
    "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "feat_proj_dropout": 0.0, "final_dropout": 0.0,
    "mask_time_prob": 0.0, "ctc_loss_reduction": "mean", "pad_token_id": 0,
}
_PATCHES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 12, "patch_size": 4,
}
_CLASSES = {
    "whisper": ("WhisperConfig", "WhisperForConditionalGeneration"),
    "qwen2_audio": ("Qwen2AudioConfig", "Qwen2AudioForConditionalGeneration"),
    "voxtral": ("VoxtralConfig", "VoxtralForConditionalGeneration"),
    "audioflamingo3": ("AudioFlamingo3Config", "AudioFlamingo3ForConditionalGeneration"),
    "wav2vec2": ("Wav2Vec2Config", "Wav2Vec2ForCTC"),
    "hubert": ("HubertConfig", "HubertForCTC"),
    "llava": ("LlavaConfig", "LlavaForConditionalGeneration"),
    "llava_onevision": ("LlavaOnevisionConfig", "LlavaOnevisionForConditionalGeneration"),
}
LISTENING = ("whisper", "qwen2_audio", "voxtral", "wav2vec2", "hubert")
LOOKING = ("llava", "llava_onevision", *tiny.SEEING)
PROJECTING = ("qwen2_audio", "voxtral", *LOOKING)
ENCODING = LISTENING + LOOKING


def modality_of(family: str) -> str:
    return "audio" if family in LISTENING else "image"


def make_encoder_config(family: str) -> Any:
    whisper = {
        "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "num_mel_bins": MELS,
        "max_source_positions": FRAMES,
    }
    sections: dict[str, Any] = {
        "whisper": {
            **_WHISPER, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "vocab_size": 96,
            "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "max_target_positions": 40,
            "suppress_tokens": None, "begin_suppress_tokens": None,
        },
        "qwen2_audio": {
            "audio_config": {**_WHISPER, "model_type": "qwen2_audio_encoder"}, "text_config": {**_TEXT, "model_type": "qwen2"},
            "audio_token_index": PLACEHOLDER,
        },
        "voxtral": {
            "audio_config": {**whisper, "model_type": "voxtral_encoder"}, "text_config": {**_TEXT, "model_type": "llama"},
            "audio_token_id": PLACEHOLDER,
        },
        "audioflamingo3": {
            "audio_config": {**whisper, "model_type": "audioflamingo3_encoder"}, "text_config": {**_TEXT, "model_type": "qwen2"},
            "audio_token_id": PLACEHOLDER,
        },
        "wav2vec2": _WAVE,
        "hubert": _WAVE,
        "llava": {
            "vision_config": {**_PATCHES, "model_type": "clip_vision_model"}, "text_config": {**_TEXT, "model_type": "llama"},
            "image_token_index": PLACEHOLDER,
        },
        "llava_onevision": {
            "vision_config": {**_PATCHES, "model_type": "siglip_vision_model"}, "text_config": {**_TEXT, "model_type": "qwen2"},
            "image_token_index": PLACEHOLDER, "video_token_index": VIDEO, "image_grid_pinpoints": [[12, 24]],
        },
    }  # fmt: skip
    return getattr(transformers, _CLASSES[family][0])(**sections[family])


def make_encoder_model(family: str, *, seed: int = 0, implementation: str = "sdpa") -> Any:
    if family in tiny.SEEING:
        return tiny.make_model(family, implementation, seed=seed)
    torch.manual_seed(seed)
    config = make_encoder_config(family)
    model = getattr(transformers, _CLASSES[family][1])._from_config(config, attn_implementation=implementation)
    tiny.spread(model, seed)
    if family not in ("wav2vec2", "hubert"):
        tiny.settle_generation(model)
    return model.eval()


def make_encoder_inputs(family: str, *, padding: str = "left", seed: int = 1) -> dict[str, Any]:
    """Three rows of unequal length: one or two pictures or sounds each, but for the last of the prompts, which has none."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    if family in tiny.SEEING:
        rows = [[3, ("image", 2, 3), 4, ("image", 3, 2), 5], [2, ("image", 2, 2), 3], [6]]
        return tiny.make_prompt(family, rows, padding=padding)
    if family == "whisper":
        mask = torch.ones(3, 2 * FRAMES, dtype=torch.long)
        mask[1, 23:] = 0
        return {
            "input_features": noise(3, MELS, 2 * FRAMES), "attention_mask": mask,
            "decoder_input_ids": torch.randint(3, 90, (3, 5), generator=generator),
        }
    if family in ("wav2vec2", "hubert"):
        mask = torch.ones(3, 400, dtype=torch.long)
        mask[1, 251:] = 0
        return {"input_values": noise(3, 400) * mask, "attention_mask": mask}
    per_item = {
        "qwen2_audio": (10, 6, 4), "audioflamingo3": (10, 6, 4), "voxtral": (5, 5, 5), "llava": (9, 9, 9),
        "llava_onevision": (30, 30, 30),
    }[family]  # fmt: skip
    rows = [[3, per_item[0], 4, per_item[1], 2], [2, per_item[2], 5], [6]]
    ids: list[list[int]] = [[] for _ in rows]
    for tokens, row in zip(ids, rows, strict=True):
        for index, count in enumerate(row):
            words = torch.randint(2, 80, (count,), generator=generator).tolist()
            tokens.extend([PLACEHOLDER] * count if index % 2 else words)
    inputs: dict[str, Any] = tiny.pad_rows(ids, padding=padding)
    if family in ("qwen2_audio", "voxtral", "audioflamingo3"):
        inputs["input_features"] = noise(3, MELS, 2 * FRAMES)
    if family in ("qwen2_audio", "audioflamingo3"):
        mask = torch.ones(3, 2 * FRAMES, dtype=torch.long)
        mask[1, 24:], mask[2, 17:] = 0, 0  # 6 and 4 tokens
        inputs["feature_attention_mask" if family == "qwen2_audio" else "input_features_mask"] = mask
    if family == "llava":
        inputs["pixel_values"] = noise(3, 3, 12, 12)
    if family == "llava_onevision":
        inputs["pixel_values"] = noise(3, 3, 3, 12, 12)
        inputs["image_sizes"] = torch.tensor([[12, 24]] * 3)
    return inputs


def labels_for(family: str, inputs: dict[str, Any]) -> torch.Tensor:
    """Something to learn: the last tokens of each prompt, a transcript, or a CTC target."""
    if family == "whisper":
        return inputs["decoder_input_ids"].roll(-1, 1)
    if family in ("wav2vec2", "hubert"):
        return torch.tensor([[3, 4, 5], [6, 7, -100], [8, 9, 3]])
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    return labels
