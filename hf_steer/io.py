"""Save and load: a base model that anything can read, with the steering beside it."""

from __future__ import annotations

import copy
import dataclasses
import os
import warnings
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from hf_steer.config import CONFIG_NAME, AttentionConfig, SaliencyConfig, SteerConfig
from hf_steer.config.record import Record
from hf_steer.config.steer import read_config
from hf_steer.errors import FileError, PatchError, SteerError
from hf_steer.families import family_of
from hf_steer.files import find_file
from hf_steer.ground.gguf import name_class, plain_weights, require_gguf
from hf_steer.patching import make_plan, patch_model
from hf_steer.patching.handle import Steering
from hf_steer.patching.planned import Plan
from hf_steer.patching.saves import WEIGHTS_NAME, is_stale, load_save, read_save
from hf_steer.patching.scopes import steering_of
from hf_steer.patching.weights import load_weights, own_weights
from hf_steer.saving import finish_save

_ANYWHERE_KEYS = ("token", "cache_dir", "local_files_only")
_HUB_KEYS = (*_ANYWHERE_KEYS, "revision", "subfolder")
Place: TypeAlias = str | os.PathLike[str]
_STALE = (
    "{place!r} holds a steering that was saved together with its model, and transformers has saved a model there since that is "
    "not patched: {name} is stale. Delete it (and the folder hf_steer), or load the model with transformers. To patch all the "
    "same: steer_config={place!r}, or hf_steer.save_steering of the patched model into that folder."
)


def save_steering(model: Any, directory: str | os.PathLike[str]) -> None:
    """Write only the steering of a patched model: `steer_config.json`, and `hf_steer/steer_model.safetensors` if it has weights.

    The base model is not written. Where weights are sharded, every process calls this.

    Raises:
        PatchError: the model is not patched.
    """
    steering_of(model).save(directory)


def load_steering(model: Any, id_or_dir: str | os.PathLike[str], **hub_kwargs: Any) -> None:
    """Load the weights of a saved steering into a patched model, all of them or none.

    Args:
        model: patched with the same aligners.
        id_or_dir: a folder that `save_steering`, `save_pretrained` or Trainer wrote, or a Hub repository.
        **hub_kwargs: `revision`, `token`, ..., as for `SteerConfig.from_pretrained`.

    Raises:
        PatchError: the model is not patched.
        FileError: nothing there, a file that cannot be read, or weights of another save, shape, family or kind.
        ConfigError: saved with another family of models.
    """
    load_save(steering_of(model), id_or_dir, **hub_kwargs)


def from_pretrained(
    id_or_dir: str | os.PathLike[str],
    steer_config: SteerConfig | AttentionConfig | str | os.PathLike[str] | None = None,
    *,
    tokenizer: Any = None,
    gguf_file: str | None = None,
    **model_kwargs: Any,
) -> Any:
    """Load a model with its steering.

    Args:
        id_or_dir: folder or Hub repository of the base model. Its class is the first of `architectures` in `config.json`.
        steer_config: a SteerConfig, or an AttentionConfig alone: aligners that it names just as the steering beside the model
            does keep their trained weights, others start fresh (a warning says which trained ones are left out); or the folder or
            Hub repository of a saved steering, whose weights are loaded; when None, the steering beside the model.
        tokenizer: reads think tags and phrases, as for `patch_model`; None loads the model's own where it is needed.
        gguf_file: in that folder or repository: configuration and weights come out of it, unpacked into plain ones, so that the
            model can be saved like any other. `quantization_config=` says otherwise. Needs the package gguf.
        **model_kwargs: handed on to the model's `from_pretrained`: `dtype`, `device_map`, `attn_implementation`, `revision`, ...

    Returns:
        The patched model.

    Raises:
        FileError: no model or no steering configuration there, one that cannot be read, weights of another save, or a steering
            that is left from before transformers saved another model into the folder.
        ConfigError: a configuration from a newer version, or for another model.
        PatchError: a model of an unknown family. Everything that can be checked is checked before weights are read.
    """
    hub = {key: model_kwargs[key] for key in _HUB_KEYS if key in model_kwargs}
    if gguf_file is not None:
        require_gguf()
        model_kwargs = plain_weights(gguf_file, model_kwargs)
    if isinstance(steer_config, AttentionConfig):
        steer_config = SteerConfig(attention=steer_config)
    config, record, place, keys = _wanted(id_or_dir, steer_config, hub)
    base_config = read_base_config(id_or_dir, gguf_file, **hub)
    model_class = model_class_of(base_config)
    if gguf_file is not None and tokenizer is None and config.attention is not None and config.attention.reads_tokens:
        tokenizer = AutoTokenizer.from_pretrained(id_or_dir, gguf_file=gguf_file, **hub)
    plan = make_plan(build_on_meta(base_config, model_kwargs.get("attn_implementation")), config, tokenizer)  # every check first
    if steer_config is None and is_stale(record, id_or_dir, **hub):
        raise FileError(_STALE.format(place=os.fspath(id_or_dir), name=CONFIG_NAME))
    with torch.device("meta"):
        needed = own_weights(Steering(plan))
    if isinstance(steer_config, SteerConfig):
        weights = _kept(plan, needed, id_or_dir, hub)
    else:
        again, record, weights = read_save(place, needed, **keys)
        if again != config:
            raise FileError(f"{os.fspath(place)!r} was saved to while it was read. Load it again.")
    model = patch_model(read_base_model(model_class, id_or_dir, **model_kwargs), config, tokenizer=tokenizer)
    if weights:
        load_weights(steering_of(model), {**own_weights(steering_of(model)), **weights}, place)
    return model


def _wanted(
    id_or_dir: Place, steer_config: SteerConfig | Place | None, hub: dict[str, Any]
) -> tuple[SteerConfig, Record | None, Place, dict[str, Any]]:
    """The configuration, what was noted about it, where its weights lie, and how that place is asked."""
    if steer_config is None or isinstance(steer_config, SteerConfig):
        place, keys = id_or_dir, hub
    else:
        place, keys = steer_config, {key: hub[key] for key in _ANYWHERE_KEYS if key in hub}
    for folder, inside in ((id_or_dir, hub), (place, keys)):
        if os.path.isdir(folder):
            finish_save(os.path.join(folder, inside.get("subfolder", "")))
    if isinstance(steer_config, SteerConfig):
        return steer_config, None, place, keys
    config, record, _ = read_config(place, **keys)
    return config, record, place, keys


def _kept(plan: Plan, needed: Mapping[str, Tensor], id_or_dir: str | os.PathLike[str], hub: dict[str, Any]) -> dict[str, Tensor]:
    """Trained weights beside the model for the parts that the plan has, too; a warning names those that it has not."""
    if not _is_there(id_or_dir, CONFIG_NAME, hub):
        return {}  # nothing to keep
    try:
        if not _is_there(id_or_dir, WEIGHTS_NAME, hub):
            noted = read_config(id_or_dir, **hub)[1]
            if noted is None or noted.weights is None:
                return {}  # a configuration by itself
        saved = read_config(id_or_dir, **hub)[0]
        if saved.base_model_type not in (None, plan.config.base_model_type):
            _warn_of_others(id_or_dir, ", ".join(part for part, _ in _parts(saved)))
            return {}
        saved, record, weights = read_save(id_or_dir, _weights_on_meta(plan, saved), **hub)
        if is_stale(record, id_or_dir, **hub):
            raise FileError(_STALE.format(place=os.fspath(id_or_dir), name=CONFIG_NAME))
    except SteerError as error:
        _warn_of_others(id_or_dir, f"weights ({error})")
        return {}
    kept, others = {}, []
    for (part, wanted), prefix in _parts(saved).items():
        target = _parts(plan.config).get((part, wanted))
        own = {f"{target}{name.removeprefix(prefix)}": value for name, value in weights.items() if name.startswith(prefix)}
        if target is None or any(name not in needed or needed[name].shape != value.shape for name, value in own.items()):
            others.append(part)
        else:
            kept.update(own)
    if others:
        _warn_of_others(id_or_dir, ", ".join(others))
    return kept


def _weights_on_meta(plan: Plan, saved: SteerConfig) -> dict[str, Tensor]:
    """What a saved configuration has weights for, without any: shapes are compared before a large foreign file is read."""
    learned = None
    if saved.attention is not None and saved.learns_strength:  # tags and phrases, which need a tokenizer, have no weights
        learned = AttentionConfig(heads=saved.attention.heads, strength="trainable", saliency=SaliencyConfig(source=None))
    with torch.device("meta"):
        return own_weights(Steering(make_plan(plan.anatomy.root, dataclasses.replace(saved, attention=learned))))


def _is_there(id_or_dir: Place, name: str, hub: Mapping[str, Any]) -> bool:
    try:
        find_file(id_or_dir, name, **hub)
    except FileError:
        return False
    return True


def _parts(config: SteerConfig) -> dict[tuple[str, Any], str]:
    """What has weights, with all that was asked of it -> how the names of its weights begin."""
    parts: dict[tuple[str, Any], str] = {
        (f"{aligner.kind} at {aligner.modality} {aligner.placement}", aligner): f"aligners.{index}."
        for index, aligner in enumerate(config.aligners)
    }
    if config.train_projector:
        parts["projector", True] = "projector."
    if config.attention is not None and config.learns_strength:
        parts["strengths", config.attention.heads] = "learned."
    return parts


def _warn_of_others(id_or_dir: str | os.PathLike[str], what: str) -> None:
    warnings.warn(
        f"{os.fspath(id_or_dir)!r} holds trained {what}, which the configuration that was given does not name, or names with other "
        "options: they are not loaded, and what it names there starts fresh. To load them, give no steer_config or one with the "
        "same aligners; to start afresh without this warning, patch_model(a model that transformers loaded, configuration).",
        stacklevel=4,
    )


def read_base_config(id_or_dir: str | os.PathLike[str], gguf_file: str | None = None, **hub_kwargs: Any) -> PreTrainedConfig:
    """`config.json` of a model, or what a GGUF file says; FileError when there is none that transformers can read."""
    try:
        if gguf_file is None:
            config: PreTrainedConfig = AutoConfig.from_pretrained(id_or_dir, **hub_kwargs)
            return config
        config = AutoConfig.from_pretrained(id_or_dir, gguf_file=gguf_file, **hub_kwargs)
        name_class(config)
        return config
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # of JSON that is something else
        raise FileError(
            f"{os.fspath(id_or_dir)!r} holds no model configuration that transformers can read ({error}). A folder with "
            f"{CONFIG_NAME} alone is a steering: give it as steer_config=, and the base model first."
        ) from error


def read_base_model(model_class: type[PreTrainedModel], id_or_dir: str | os.PathLike[str], **model_kwargs: Any) -> PreTrainedModel:
    """The model with all its weights; transformers alone would fill missing ones with random numbers and a warning.

    Raises:
        FileError: weight files that are missing, truncated, or of another model.
    """
    again = f"Save or download {os.fspath(id_or_dir)!r} again."
    loader: Any = model_class  # whose return type does not know of output_loading_info
    model: PreTrainedModel
    try:
        model, report = loader.from_pretrained(id_or_dir, **{**model_kwargs, "output_loading_info": True})
    except (SafetensorError, OSError) as error:
        raise FileError(f"the weights of {os.fspath(id_or_dir)!r} cannot be read ({error}). {again}") from error
    except RuntimeError as error:
        if "size mismatch" not in str(error) and "mismatched" not in str(error):
            raise
        raise FileError(f"the weights of {os.fspath(id_or_dir)!r} belong to another model ({error}). {again}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise FileError(
            f"the weights of {os.fspath(id_or_dir)!r} lack {len(missing)} of the model's parameters, {missing[0]!r} among them: "
            f"they are incomplete or belong to another model. {again}"
        )
    return model


def build_on_meta(config: PreTrainedConfig, attn_implementation: str | None = None) -> PreTrainedModel:
    """The model without its weights: every module is there, no memory is taken.

    Raises:
        FileError: a configuration of sizes that no tensor can have.
    """
    model: PreTrainedModel
    try:
        with torch.device("meta"):
            model = model_class_of(config)._from_config(copy.deepcopy(config), attn_implementation=attn_implementation)
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise FileError(f"config.json asks for a model that cannot be made ({error}). Save or download it again.") from error
    return model


def model_class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that `architectures` names, in a family that can be patched."""
    family_of(config.model_type)
    names = config.architectures or []
    found = getattr(transformers, names[0], None) if names else None
    if found is None:
        raise PatchError(
            f"config.json names architectures {names}; the first must be a class of transformers {transformers.__version__}. "
            "Load the model yourself and call patch_model(model, config)."
        )
    return found  # type: ignore[no-any-return]
