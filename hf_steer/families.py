"""Where things are in each model family: one table, a row per `config.model_type`; `resolve(model)` reads it.

To add a family, add a row here and a tiny configuration of it to `tests/tiny.py`; the contract test does the rest.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from hf_steer.errors import PatchError
from hf_steer.values import Anatomy, Encoder, Site

_QWEN_PLACEHOLDERS = MappingProxyType({"image": "image_token_id", "video": "video_token_id"})
_NOTHING: Mapping[str, str] = MappingProxyType({})
_CLASS_TOKENS: Mapping[str, int] = MappingProxyType({"clip_vision_model": 1, "siglip_vision_model": 0})
"""Vision towers of LLaVAs whose attention can be read, and how many tokens they put before the patches."""
_NO_ENCODER: Mapping[str, EncoderRow] = MappingProxyType({})


@dataclass(frozen=True)
class EncoderRow:
    """An ear or an eye. Module paths are the ends of dotted names, since what comes before them changes between versions.

    Attributes:
        layers: of the encoder.
        outlet: what hands the features on, `"output"` of the encoder or `"projector"`, whose input they are.
        projector: what maps them into the language model's space; None where nothing does.
        size: the encoder's configuration value that holds the size of a feature.
        tower: path of the encoder from `model.base_model`; None to ask `model.get_encoder(modality)`.
        mask: the model's argument that says which mel frames or samples are real; None where there is none.
    """

    layers: str = "layers"
    outlet: Literal["output", "projector"] = "projector"
    projector: str | None = "multi_modal_projector"
    size: str = "hidden_size"
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
        placeholders: modality -> name of the config value that holds its placeholder token.
        layout: row of `saliency.LAYOUTS` that says where in a picture or sound each placeholder token lies.
        windowed: the tower permutes patches into windows before its blocks (Qwen2.5-VL).
        arrangement: how the model lays out what the tower saw as tokens: `"whole"`, every picture its patches; `"anyres"`,
            base, crops and newlines, and pooled video; None where merge blocks are tokens already (Qwen-VL).
        encoders: modality -> where its aligners go.
        composes: the logits are what the head gives, so that a composed model's head can stand for the decoder's own.
        counts_items: the model's loss heeds `num_items_in_batch`, Trainer's count over all accumulation steps.
    """

    layers: str | None = "layers"
    attention: str = "self_attn"
    blocks: str | None = None
    block_attention: str = "attn"
    placeholders: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
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
_AUDIO = MappingProxyType({"audio": "audio_token_id"})
_CTC = Family(
    layers=None, counts_items=False, encoders=_ear(outlet="output", projector=None, tower="encoder", mask="attention_mask")
)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "qwen2_vl": Family(
            blocks="blocks", placeholders=_QWEN_PLACEHOLDERS, layout="qwen", encoders=_eye(
                layers="blocks", projector="visual.merger", size="embed_dim"
            ),
        ),
        "qwen2_5_vl": Family(
            blocks="blocks", placeholders=_QWEN_PLACEHOLDERS, layout="qwen", windowed=True, encoders=_QWEN_EYE
        ),
        "qwen3_vl": Family(blocks="blocks", placeholders=_QWEN_PLACEHOLDERS, layout="qwen", encoders=_QWEN_EYE),
        "llava": Family(
            blocks="encoder.layers", block_attention="self_attn", placeholders=MappingProxyType({"image": "image_token_id"}),
            layout="llava", arrangement="whole", encoders=_LLAVA_EYE,
        ),
        "llava_onevision": Family(
            blocks="encoder.layers", block_attention="self_attn", placeholders=_QWEN_PLACEHOLDERS, layout="llava_onevision",
            arrangement="anyres", encoders=_LLAVA_EYE,
        ),
        "qwen2_audio": Family(
            placeholders=_AUDIO, layout="qwen2_audio", counts_items=False, encoders=_ear(mask="feature_attention_mask")
        ),
        "audioflamingo3": Family(placeholders=_AUDIO, layout="audioflamingo3", encoders=_ear(mask="input_features_mask")),
        "voxtral": Family(placeholders=_AUDIO, layout="voxtral", encoders=_ear(outlet="output")),
        "whisper": Family(layers=None, counts_items=False, encoders=_ear(outlet="output", projector=None, mask="attention_mask")),
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
        PatchError: not a transformers model, or of an unknown family.
    """
    if not isinstance(model, PreTrainedModel):
        inner = " Patch the model inside: peft_model.get_base_model()." if hasattr(model, "get_base_model") else ""
        raise PatchError(f"patch_model takes a transformers PreTrainedModel; got {type(model).__name__}.{inner}")
    family = family_of(model.config.model_type)
    names = {module: name for name, module in model.named_modules()}
    decoder = model.get_decoder() if family.layers is not None else None
    text = model.config.get_text_config(decoder=True)
    tower = _readable_tower(model, family)
    vision = None if tower is None or family.arrangement is not None else model.config.vision_config
    return Anatomy(
        family=model.config.model_type,
        root=model,
        base=model.base_model,
        decoder=decoder,
        layers=() if family.layers is None else _attention_sites(names, model.get_decoder(), family.layers, family.attention),
        num_heads=text.num_attention_heads,
        num_key_value_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_dim=_head_dim(text),
        tower=tower,
        blocks=() if tower is None else _blocks(names, model, tower, family),
        placeholder_ids={modality: getattr(model.config, name) for modality, name in family.placeholders.items()},
        layout=family.layout,
        merge_size=1 if vision is None else vision.spatial_merge_size,
        temporal_patch_size=1 if vision is None else vision.temporal_patch_size,
        windowed=family.windowed,
        arrangement=family.arrangement,
        class_tokens=0 if tower is None else _CLASS_TOKENS.get(tower.config.model_type, 0),
        hidden_size=text.hidden_size,
        encoders={
            modality: _encoder(names, model, family, modality, row) for modality, row in family.encoders.items()
        },
    )


def _head_dim(text: Any) -> int:
    """Features of a query; DeepSeek's `head_dim` counts the rotated ones alone."""
    named = getattr(text, "qk_head_dim", None) or getattr(text, "head_dim", None)
    return int(named or text.hidden_size // text.num_attention_heads)


def _readable_tower(model: Any, family: Family) -> Any | None:
    """The vision tower whose attention can be read, if this family, or this LLaVA, has one."""
    if family.blocks is None:
        return None
    tower = model.get_encoder(modality="image")
    return tower if family.arrangement is None or tower.config.model_type in _CLASS_TOKENS else None


def _blocks(names: Mapping[nn.Module, str], model: Any, tower: Any, family: Family) -> tuple[Site, ...]:
    """Attention modules of the tower's blocks whose output is read."""
    blocks = list(_ending(tower, str(family.blocks)).children())[: _layers_read(model)]
    modules = [block.get_submodule(family.block_attention) for block in blocks]
    return tuple(Site(names[module], module, index) for index, module in enumerate(modules))


def _attention_sites(names: Mapping[nn.Module, str], owner: nn.Module, layers: str, attention: str) -> tuple[Site, ...]:
    modules = [layer.get_submodule(attention) for layer in owner.get_submodule(layers).children()]
    return tuple(Site(names[module], module, index) for index, module in enumerate(modules))


def _encoder(names: Mapping[nn.Module, str], model: Any, family: Family, modality: str, row: EncoderRow) -> Encoder:
    tower = model.get_encoder(modality) if row.tower is None else model.base_model.get_submodule(row.tower)
    if modality == "audio" and tower is model:  # one that listens only: Whisper
        tower = model.get_encoder()
    layers = list(_ending(tower, row.layers).children())[: _layers_read(model)]
    projector = None if row.projector is None else _ending(model, row.projector)
    width = getattr(tower.config, row.size)
    chosen = getattr(model.config, "vision_feature_layer", None)  # LLaVA can join several hidden states
    count = len(chosen) if isinstance(chosen, (list, tuple)) else 1
    reads = row.outlet == "projector"
    placeholders = {name: value for name, value in family.placeholders.items() if (name == "audio") == (modality == "audio")}
    return Encoder(
        tower=tower,
        layers=tuple(Site(names[layer], layer, index) for index, layer in enumerate(layers)),
        outlet=projector if reads and projector is not None else tower,
        reads=reads,
        size=width * count,
        layer_size=width,
        projector=projector,
        placeholder_ids=tuple(getattr(model.config, name) for name in placeholders.values()),
        mask=row.mask,
    )


def _layers_read(model: Any) -> int | None:
    """How many layers of the encoder matter; LLaVA reads an inner hidden state, and what comes after it does nothing."""
    chosen = getattr(model.config, "vision_feature_layer", None)
    if chosen is None:
        return None
    depth = int(model.config.vision_config.num_hidden_layers)
    states = chosen if isinstance(chosen, (list, tuple)) else [chosen]
    return max(int(state) if state >= 0 else depth + 1 + int(state) for state in states)


def _ending(owner: nn.Module, path: str) -> nn.Module:
    """The submodule whose name ends in a path; the outermost where there are several."""
    found = [(name.count("."), name) for name, _ in owner.named_modules() if f".{name}".endswith(f".{path}")]
    if not found:
        raise PatchError(f"this {type(owner).__name__} has no {path}, where its family has one; please report the model.")
    return owner.get_submodule(min(found)[1])
