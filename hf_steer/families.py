"""Where things are in each model family: one table, a row per `config.model_type`; `resolve(model)` reads it.

To add a family, add a row here and a tiny configuration of it to `tests/kit/tiny.py`; the contract test does the rest. For one
of your own outside of hf_steer see `docs/extending/family.md`; `hf_steer.testing.check_family` tells whether it keeps the contract.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from hf_steer.ground.anatomy import model_type_of, resolve_row
from hf_steer.ground.parts import Anatomy
from hf_steer.registry import FAMILIES, EncoderRow, Family
from hf_steer.values import MODALITIES


def _eye(**row: Any) -> Mapping[str, EncoderRow]:
    return MappingProxyType({"image": EncoderRow(**row)})


def _ear(**row: Any) -> Mapping[str, EncoderRow]:
    return MappingProxyType({"audio": EncoderRow(**row)})


_QWEN_EYE = _eye(layers="blocks", projector="visual.merger")
_LLAVA_EYE = _eye()
_CTC = Family(
    layers=None, counts_items=False, encoders=_ear(outlet="output", projector=None, tower="encoder", mask="mask")
)

OURS: Mapping[str, Family] = MappingProxyType(
    {
        "qwen2_vl": Family(blocks="blocks", placeholders=MODALITIES, layout="qwen", encoders=_QWEN_EYE),
        "qwen2_5_vl": Family(
            blocks="blocks", placeholders=MODALITIES, layout="qwen", windowed=True, encoders=_QWEN_EYE
        ),
        "qwen3_vl": Family(blocks="blocks", placeholders=MODALITIES, layout="qwen", encoders=_QWEN_EYE),
        "llava": Family(
            blocks="encoder.layers", block_attention="self_attn", placeholders=("image",),
            layout="llava", arrangement="whole", encoders=_LLAVA_EYE,
        ),
        "llava_onevision": Family(
            blocks="encoder.layers", block_attention="self_attn", placeholders=MODALITIES, layout="llava_onevision",
            arrangement="anyres", encoders=_LLAVA_EYE,
        ),
        "qwen2_audio": Family(
            placeholders=("audio",), layout="qwen2_audio", counts_items=False, encoders=_ear(mask="mel_mask")
        ),
        "audioflamingo3": Family(placeholders=("audio",), layout="audioflamingo3", encoders=_ear(mask="mel_mask")),
        "voxtral": Family(placeholders=("audio",), layout="voxtral", encoders=_ear(outlet="output")),
        "whisper": Family(layers=None, counts_items=False, encoders=_ear(outlet="output", projector=None, mask="mask")),
        "wav2vec2": _CTC,
        "hubert": _CTC,
        "qwen2": Family(),
        "qwen3": Family(),
        "llama": Family(),
        "mistral": Family(),
        "deepseek_v3": Family(),
        "gemma2": Family(composes=False),
        "gpt_oss": Family(),
    }
)  # fmt: skip


def family_of(model_type: str) -> Family:
    """The row of a `config.model_type`.

    Raises:
        PatchError: no such row; the nearest and all known types are named.
    """
    return FAMILIES.find(
        model_type,
        "model type {got} is not known to hf_steer{near}; it can patch {known}. A new family is one row in hf_steer/families.py; "
        "see docs/extending/family.md.",
    )


def resolve(model: Any) -> Anatomy:
    """Find the decoder, its attention modules, the vision tower and the placeholder tokens of a live model.

    Args:
        model: a transformers model, on any device (meta included); nothing is changed or run.

    Raises:
        PatchError: not a transformers model, of an unknown family, or without something that its family has.
    """
    return resolve_row(model, family_of(model_type_of(model)))
