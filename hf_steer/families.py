"""Where things are in each model family: one table, a row per `config.model_type`; `resolve(model)` reads it.

To add a family, add a row here and a tiny configuration of it to `tests/kit/tiny.py`; the contract test does the rest.
Whether a model of it keeps the contract is told by `hf_steer.testing.check_family`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from hf_steer.errors import PatchError
from hf_steer.ground.anatomy import model_type_of, resolve_row
from hf_steer.ground.parts import Anatomy
from hf_steer.values import MODALITIES

_NO_ENCODER: Mapping[str, EncoderRow] = MappingProxyType({})


@dataclass(frozen=True)
class EncoderRow:
    """An ear or an eye. Module paths are the ends of dotted names, since what comes before them changes between versions.

    Attributes:
        layers: of the encoder.
        outlet: what hands the features on, `"output"` of the encoder or `"projector"`, whose input they are.
        projector: what maps them into the language model's space; None where nothing does.
        tower: path of the encoder from `model.base_model`; None to ask `model.get_encoder(modality)`.
        mask: our word for the argument that says which mel frames or samples are real; None where there is none.
    """

    layers: str = "layers"
    outlet: Literal["output", "projector"] = "projector"
    projector: str | None = "multi_modal_projector"
    tower: str | None = None
    mask: str | None = None


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        layers: path of the decoder layers from `model.get_decoder()`; None where no language model reads a prompt.
        attention: path of the attention module from a decoder layer.
        blocks: path of the blocks from a vision tower whose attention can be read; None for other families.
        block_attention: path of the attention module from a block.
        placeholders: modalities that have placeholder tokens in the prompt.
        layout: row of `saliency.LAYOUTS` that says where in a picture or sound each placeholder token lies.
        windowed: the tower permutes patches into windows before its blocks (Qwen2.5-VL).
        arrangement: how the model lays out what the tower saw as tokens: `"whole"`, every picture its patches; `"anyres"`,
            base, crops and newlines, and pooled video; None where merge blocks are tokens already (Qwen-VL).
        encoders: modality -> where its aligners go.
        composes: the logits are what the head gives, so that a composed model's head can stand for the decoder's own.
        counts_items: the model's loss heeds Trainer's count of labels over all accumulation steps.
    """

    layers: str | None = "layers"
    attention: str = "self_attn"
    blocks: str | None = None
    block_attention: str = "attn"
    placeholders: tuple[str, ...] = ()
    layout: str | None = None
    windowed: bool = False
    arrangement: Literal["whole", "anyres"] | None = None
    encoders: Mapping[str, EncoderRow] = field(default_factory=lambda: _NO_ENCODER)
    composes: bool = True
    counts_items: bool = True


def _eye(**row: Any) -> Mapping[str, EncoderRow]:
    return MappingProxyType({"image": EncoderRow(**row)})


def _ear(**row: Any) -> Mapping[str, EncoderRow]:
    return MappingProxyType({"audio": EncoderRow(**row)})


_QWEN_EYE = _eye(layers="blocks", projector="visual.merger")
_LLAVA_EYE = _eye()
_CTC = Family(
    layers=None, counts_items=False, encoders=_ear(outlet="output", projector=None, tower="encoder", mask="mask")
)

FAMILIES: Mapping[str, Family] = MappingProxyType(
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
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    near = difflib.get_close_matches(model_type, FAMILIES, 1)
    raise PatchError(
        f"model type {model_type!r} is not known to hf_steer"
        + (f" (the nearest is {near[0]!r})" if near else "")
        + f"; it can patch {', '.join(FAMILIES)}. A new family is one row in hf_steer/families.py."
    )


def resolve(model: Any) -> Anatomy:
    """Find the decoder, its attention modules, the vision tower and the placeholder tokens of a live model.

    Args:
        model: a transformers model, on any device (meta included); nothing is changed or run.

    Raises:
        PatchError: not a transformers model, of an unknown family, or without something that its family has.
    """
    return resolve_row(model, family_of(model_type_of(model)))
