"""What structure cannot say of a model family: one table, a row per `config.model_type`; `resolve(model)` reads it.

Decoders and their attention are found by structure (`ground/structure.py`), and a family without a row is steered, too. To add
one, add a row here and a tiny configuration of it to `tests/kit/tiny.py`; the contract test does the rest. For one of your own
outside of hf_steer see `docs/extending/family.md`; `hf_steer.testing.check_family` tells whether it keeps the contract.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from hf_steer.ground.anatomy import model_type_of, resolve_row
from hf_steer.ground.parts import Anatomy
from hf_steer.registry import FAMILIES, Family
from hf_steer.values import MODALITIES

_CTC = Family(counts_items=False)

OURS: Mapping[str, Family] = MappingProxyType(
    {
        "qwen2_vl": Family(blocks="blocks", placeholders=MODALITIES, layout="qwen"),
        "qwen2_5_vl": Family(blocks="blocks", placeholders=MODALITIES, layout="qwen", windowed=True),
        "qwen3_vl": Family(blocks="blocks", placeholders=MODALITIES, layout="qwen"),
        "llava": Family(
            blocks="encoder.layers", block_attention="self_attn", placeholders=("image",),
            layout="llava", arrangement="whole",
        ),
        "llava_onevision": Family(
            blocks="encoder.layers", block_attention="self_attn", placeholders=MODALITIES, layout="llava_onevision",
            arrangement="anyres",
        ),
        **dict.fromkeys(
            ("qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
            Family(placeholders=MODALITIES, layout="qwen"),
        ),
        **dict.fromkeys(("glm4v", "glm4v_moe", "glm46v"), Family(placeholders=("image",), layout="glm4v")),
        "kimi_k25": Family(placeholders=("image",), layout="kimi_k25"),
        **dict.fromkeys(("vipllava", "mistral3"), Family(placeholders=("image",), layout="llava")),
        **dict.fromkeys(("llava_next", "llava_next_video"), Family(placeholders=("image",), layout="llava_next")),
        **dict.fromkeys(("gemma3", "paligemma"), Family(placeholders=("image",), layout="square")),
        **dict.fromkeys(("deepseek_vl", "janus"), Family(placeholders=("image",), layout="padded_square")),
        "internvl": Family(placeholders=("image",), layout="internvl"),
        "aya_vision": Family(placeholders=("image",), layout="aya_vision"),
        "cohere2_vision": Family(placeholders=("image",), layout="cohere2_vision"),
        "llama4": Family(placeholders=("image",), layout="llama4"),
        **dict.fromkeys(("idefics3", "smolvlm"), Family(placeholders=("image",), layout="idefics3")),
        "mllama": Family(layout="mllama"),
        "qwen2_audio": Family(placeholders=("audio",), layout="qwen2_audio", counts_items=False),
        "audioflamingo3": Family(placeholders=("audio",), layout="audioflamingo3"),
        "voxtral": Family(placeholders=("audio",), layout="voxtral"),
        "qwen3_asr": Family(placeholders=("audio",), layout="qwen3_omni"),
        **dict.fromkeys(("granite_speech", "granite_speech_plus"), Family(placeholders=("audio",), layout="granite_speech")),
        "qwen2_5_omni_thinker": Family(placeholders=(*MODALITIES, "audio"), layout=("qwen", "qwen2_5_omni")),
        "qwen3_omni_moe_thinker": Family(placeholders=(*MODALITIES, "audio"), layout=("qwen", "qwen3_omni")),
        "gemma3n": Family(placeholders=("image", "audio"), layout=("square", "gemma3n_audio")),
        "gemma4": Family(placeholders=("image", "audio"), layout=("gemma4", "gemma4_audio")),
        "gemma4_unified": Family(placeholders=("audio",), layout="gemma4_unified_audio"),
        "dots3_note": Family(placeholders=("audio",), layout="dots3_note_audio"),
        "inkling": Family(placeholders=("audio",), layout="inkling_audio"),
        "muse_spark": Family(placeholders=("audio",), layout="muse_spark_audio"),
        "nemotron_h_omni": Family(placeholders=("audio",), layout="nemotron_h_omni"),
        **{
            name: Family(placeholders=("audio",), layout=name)
            for name in ("glmasr", "musicflamingo", "moss_transcribe_diarize", "fun_asr_nano", "phi4_multimodal", "vibevoice_asr")
        },
        "whisper": Family(frame_seconds=0.02, counts_items=False),
        "wav2vec2": _CTC,
        "hubert": _CTC,
        **dict.fromkeys(("qwen2", "qwen3", "llama", "mistral", "deepseek_v3", "gpt_oss"), Family(composes=True)),
    }
)  # fmt: skip


NONE = Family()
"""Of a model type that no row is needed for."""


def family_of(model_type: str) -> Family:
    """The row of a `config.model_type`; an empty one where there is none, since structure says the rest."""
    row, failures = FAMILIES.look(model_type)
    if row is None:
        for failure in failures:
            warnings.warn(f"{failure}; if it has a family {model_type!r}, that is left out.", stacklevel=3)
    return NONE if row is None else row


def resolve(model: Any) -> Anatomy:
    """Find the decoder, its attention modules, the vision tower and the placeholder tokens of a live model.

    Args:
        model: a transformers model, on any device (meta included); nothing of it is changed or run.

    Raises:
        PatchError: not a transformers model, or without something that its family has.
    """
    return resolve_row(model, family_of(model_type_of(model)))
