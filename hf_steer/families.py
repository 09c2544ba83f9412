"""Where things are in each model family: one table, a row per `config.model_type`; `resolve(model)` reads it.

To add a family, add a row here and a tiny configuration of it to `tests/tiny.py`; the contract test does the rest.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_steer.errors import PatchError
from hf_steer.values import Anatomy, Site

_QWEN_PLACEHOLDERS = MappingProxyType({"image": "image_token_id", "video": "video_token_id"})
_NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        layers: path of the decoder layers from `model.get_decoder()`.
        attention: path of the attention module from a decoder layer.
        blocks: path of the blocks from the vision tower; None for a family without eyes.
        block_attention: path of the attention module from a block.
        placeholders: modality -> name of the config value that holds its placeholder token.
        windowed: the tower permutes patches into windows before its blocks (Qwen2.5-VL).
    """

    layers: str = "layers"
    attention: str = "self_attn"
    blocks: str | None = None
    block_attention: str = "attn"
    placeholders: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    windowed: bool = False


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "qwen2_vl": Family(blocks="blocks", placeholders=_QWEN_PLACEHOLDERS),
        "qwen2_5_vl": Family(blocks="blocks", placeholders=_QWEN_PLACEHOLDERS, windowed=True),
        "qwen3_vl": Family(blocks="blocks", placeholders=_QWEN_PLACEHOLDERS),
        "qwen2": Family(),
        "qwen3": Family(),
        "llama": Family(),
    }
)


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
    decoder = model.get_decoder()
    text = model.config.get_text_config(decoder=True)
    tower: Any = model.get_encoder(modality="image") if family.blocks is not None else None
    vision = model.config.vision_config if tower is not None else None
    return Anatomy(
        family=model.config.model_type,
        root=model,
        base=model.base_model,
        decoder=decoder,
        layers=_sites(names, decoder.get_submodule(family.layers), family.attention),
        num_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        tower=tower,
        blocks=() if family.blocks is None else _sites(names, tower.get_submodule(family.blocks), family.block_attention),
        placeholder_ids={modality: getattr(model.config, name) for modality, name in family.placeholders.items()},
        merge_size=1 if vision is None else vision.spatial_merge_size,
        temporal_patch_size=1 if vision is None else vision.temporal_patch_size,
        windowed=family.windowed,
    )


def _sites(names: Mapping[nn.Module, str], layers: nn.Module, attention: str) -> tuple[Site, ...]:
    modules = [layer.get_submodule(attention) for layer in layers.children()]
    return tuple(Site(names[module], module, index) for index, module in enumerate(modules))
