"""Where things are in one live model: what structure finds, and what its family's row adds, as modules, sizes and tokens."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from hf_steer.errors import PatchError
from hf_steer.ground.arguments import ARGUMENTS, spelling_in
from hf_steer.ground.parts import Anatomy, Encoder, Site
from hf_steer.ground.pictures import CLASS_TOKENS, kind_of
from hf_steer.ground.settings import has_setting, placeholder_of, setting, side_of, text_settings
from hf_steer.ground.structure import Attention, Names, find_attention
from hf_steer.ground.towers import find_encoders
from hf_steer.ground.ways import PERCEIVED
from hf_steer.registry import EncoderRow, Family


def model_type_of(model: Any) -> str:
    """The architecture of a live model.

    Raises:
        PatchError: not a transformers model.
    """
    if not isinstance(model, PreTrainedModel):
        inner = " Patch the model inside: peft_model.get_base_model()." if hasattr(model, "get_base_model") else ""
        raise PatchError(f"patch_model takes a transformers PreTrainedModel; got {type(model).__name__}.{inner}")
    return kind_of(model.config)


def resolve_row(model: Any, family: Family) -> Anatomy:
    """Find the decoder, its attention modules, the vision tower and the placeholder tokens of a live model.

    Args:
        model: a transformers model, on any device (meta included); nothing is changed or run.
        family: its row.

    Raises:
        PatchError: a module, or a value of the configuration, is not where transformers is known to have it.
    """
    names = {module: name for name, module in model.named_modules()}
    attention = find_attention(model, names, None if family.decoder is None else _inside(model, family.decoder))
    text = text_settings(model)
    found = find_encoders(model, [modality for modality in PERCEIVED if modality not in family.encoders], names)
    tower = _readable_tower(model, family)
    eye = setting(model.config, "vision") if has_setting(model.config, "vision") else None
    heads, key_value_heads, head_dim = _sizes(text, attention)
    return Anatomy(
        family=kind_of(model.config),
        root=model,
        base=model.base_model,
        decoder=attention.decoder,
        layers=attention.layers,
        crosses=attention.crosses,
        carried=attention.carried,
        carried_across=attention.carried_across,
        left_out=attention.left_out,
        reason=attention.reason,
        num_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        tower=tower,
        blocks=() if tower is None else _blocks(names, model, tower, family),
        placeholder_ids={modality: placeholder_of(model.config, modality) for modality in family.placeholders},
        layout=family.layout,
        merge_size=side_of(eye, "merge") if eye is not None and has_setting(eye, "merge") else 1,
        patch_px=_side(setting(eye, "patch_px")) if eye is not None and has_setting(eye, "patch_px") else 0,
        temporal_patch_size=side_of(eye, "frames_per_step") if eye is not None and has_setting(eye, "frames_per_step") else 1,
        windowed=family.windowed,
        arrangement=family.arrangement,
        class_tokens=0 if tower is None else CLASS_TOKENS.get(kind_of(tower.config), 0),
        hidden_size=int(setting(text, "features")) if has_setting(text, "features") else 0,
        encoders={**found.encoders, **{eye: _encoder(names, model, family, eye, row) for eye, row in family.encoders.items()}},
        no_encoder=found.reasons,
        frame_seconds=family.frame_seconds,
    )


def _sizes(text: Any, attention: Attention) -> tuple[int, int, int]:
    """Query heads, key heads and features of each: of the layer with most, or as the configuration says."""
    sites = attention.layers or attention.crosses
    heads = max((site.heads for site in sites), default=0) or (int(setting(text, "heads")) if has_setting(text, "heads") else 0)
    shared = max((site.key_value_heads for site in sites), default=0)
    shared = shared or (int(setting(text, "key_value_heads")) if has_setting(text, "key_value_heads") else heads)
    if has_setting(text, "head_size"):
        return heads, shared, int(setting(text, "head_size"))
    return heads, shared, int(setting(text, "features")) // heads if heads and has_setting(text, "features") else 0


def _side(px: Any) -> int:
    """Of a patch, which configurations write as a number or as one per side; 0 for patches that are not square."""
    sides = set(px) if isinstance(px, (list, tuple)) else {px}
    return int(sides.pop()) if len(sides) == 1 else 0


def _readable_tower(model: Any, family: Family) -> Any | None:
    """The vision tower whose attention can be read, if this family, or this LLaVA, has one."""
    if family.blocks is None:
        return None
    tower = model.get_encoder(modality="image")
    return tower if family.arrangement is None or kind_of(tower.config) in CLASS_TOKENS else None


def _blocks(names: Names, model: Any, tower: Any, family: Family) -> tuple[Site, ...]:
    """Attention modules of the tower's blocks whose output is read."""
    blocks = list(_ending(tower, str(family.blocks)).children())[: _layers_read(model)]
    modules = [_inside(block, family.block_attention) for block in blocks]
    return tuple(Site(names[module], module, index) for index, module in enumerate(modules))


def _encoder(names: Names, model: Any, family: Family, modality: str, row: EncoderRow) -> Encoder:
    tower = model.get_encoder(modality) if row.tower is None else _inside(model.base_model, row.tower)
    if modality == "audio" and tower is model:  # one that listens only: Whisper
        tower = model.get_encoder()
    layers = list(_ending(tower, row.layers).children())[: _layers_read(model)]
    projector = None if row.projector is None else _ending(model, row.projector)
    width = setting(tower.config, "encoder_features")
    reads = row.outlet == "projector"
    placeholders = [name for name in family.placeholders if (name == "audio") == (modality == "audio")]
    return Encoder(
        tower=tower,
        layers=tuple(Site(names[layer], layer, index) for index, layer in enumerate(layers)),
        outlet=projector if reads and projector is not None else tower,
        reads=reads,
        size=width * max(1, len(_states_read(model))),
        layer_size=width,
        projector=projector,
        projectors=() if projector is None else (projector,),
        placeholder_ids=tuple(placeholder_of(model.config, name) for name in placeholders),
        mask=None if row.mask is None else _mask_argument(model, family, row.mask),
    )


def _mask_argument(model: Any, family: Family, word: str) -> str | None:
    """Under which name a model is told which frames are real; some heads of models that only listen are not."""
    name = spelling_in(model, word)
    if name is None and family.placeholders:
        raise PatchError(
            f"{type(model).__name__}.forward takes no {' and no '.join(ARGUMENTS[word])}, without which padding would be taken for "
            "sound. This version of transformers may call it otherwise; please report the model."
        )
    return name


def _states_read(model: Any) -> list[int]:
    """Hidden states of the encoder that the projector reads, which LLaVA chooses and can join; empty for the last."""
    if not has_setting(model.config, "states_read"):
        return []
    chosen = setting(model.config, "states_read")
    return [int(state) for state in chosen] if isinstance(chosen, (list, tuple)) else [int(chosen)]


def _layers_read(model: Any) -> int | None:
    """How many layers of the encoder matter; LLaVA reads an inner hidden state, and what comes after it does nothing."""
    states = _states_read(model)
    if not states:
        return None
    depth = int(setting(setting(model.config, "vision"), "depth"))
    return max(state if state >= 0 else depth + 1 + state for state in states)


def _inside(owner: Any, path: str) -> Any:
    """The submodule at a path."""
    try:
        return owner.get_submodule(path)
    except AttributeError as error:
        raise _missing(owner, path) from error


def _ending(owner: Any, path: str) -> Any:
    """The submodule whose name ends in a path; the outermost where there are several."""
    found = [(name.count("."), name) for name, _ in owner.named_modules() if f".{name}".endswith(f".{path}")]
    if not found:
        raise _missing(owner, path)
    return owner.get_submodule(min(found)[1])


def _missing(owner: Any, path: str) -> PatchError:
    return PatchError(f"this {type(owner).__name__} has no {path}, where its family has one; please report the model.")
