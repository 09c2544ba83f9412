"""Save and load: a base model that anything can read, with the steering beside it."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from hf_steer.config import CONFIG_NAME, SteerConfig
from hf_steer.errors import ConfigError, FileError, PatchError
from hf_steer.families import family_of
from hf_steer.files import find_file
from hf_steer.patching import make_plan, patch_model
from hf_steer.patching.context import steering_of
from hf_steer.patching.weights import WEIGHTS_NAME, load_weights, own_weights, read_weights

_ANYWHERE_KEYS = ("token", "cache_dir", "local_files_only")
_HUB_KEYS = (*_ANYWHERE_KEYS, "revision", "subfolder")


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
        FileError: nothing there, a file that cannot be read, or weights of another shape, family or kind.
        ConfigError: saved with another family of models.
    """
    steering = steering_of(model)
    saved = SteerConfig.from_pretrained(id_or_dir, **hub_kwargs)
    family = steering.plan.anatomy.family
    if saved.base_model_type not in (None, family):
        raise ConfigError(f"the steering in {os.fspath(id_or_dir)!r} is for {saved.base_model_type!r}; this model is {family!r}.")
    kinds = [[(a.modality, a.placement, a.kind) for a in config.aligners] for config in (saved, steering.plan.config)]
    if kinds[0] != kinds[1]:
        raise FileError(
            f"the steering in {os.fspath(id_or_dir)!r} has aligners {kinds[0]}; this model was patched with {kinds[1]}. Patch "
            "with SteerConfig.from_pretrained of that folder."
        )
    if own_weights(steering):
        load_weights(steering, read_weights(find_file(id_or_dir, WEIGHTS_NAME, **hub_kwargs)), id_or_dir)


def from_pretrained(
    id_or_dir: str | os.PathLike[str],
    steer_config: SteerConfig | str | os.PathLike[str] | None = None,
    *,
    tokenizer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Load a model with its steering.

    Args:
        id_or_dir: folder or Hub repository of the base model. Its class is the first of `architectures` in `config.json`.
        steer_config: a SteerConfig, whose aligners start fresh, or the folder or Hub repository of a saved steering, whose
            weights are loaded; when None, the steering beside the model.
        tokenizer: reads think tags and phrases, as for `patch_model`; None loads the model's own where it is needed.
        **model_kwargs: handed on to the model's `from_pretrained`: `dtype`, `device_map`, `attn_implementation`, `revision`, ...

    Returns:
        The patched model.

    Raises:
        FileError: no model or no steering configuration there, or one that cannot be read.
        ConfigError: a configuration from a newer version, or for another model.
        PatchError: a model of an unknown family. Everything that can be checked is checked before weights are read.
    """
    hub = {key: model_kwargs[key] for key in _HUB_KEYS if key in model_kwargs}
    elsewhere = {key: hub[key] for key in _ANYWHERE_KEYS if key in hub}
    if steer_config is None:
        config = SteerConfig.from_pretrained(id_or_dir, **hub)
    elif isinstance(steer_config, SteerConfig):
        config = steer_config
    else:
        config = SteerConfig.from_pretrained(steer_config, **elsewhere)
    base_config = read_base_config(id_or_dir, **hub)
    model_class = model_class_of(base_config)
    make_plan(build_on_meta(base_config, model_kwargs.get("attn_implementation")), config, tokenizer)  # every check first
    if isinstance(steer_config, SteerConfig) or not config.has_weights:
        return patch_model(read_base_model(model_class, id_or_dir, **model_kwargs), config, tokenizer=tokenizer)
    place = id_or_dir if steer_config is None else steer_config
    weights = read_weights(_weights_file(place, **(hub if steer_config is None else elsewhere)))
    model = patch_model(read_base_model(model_class, id_or_dir, **model_kwargs), config, tokenizer=tokenizer)
    load_weights(steering_of(model), weights, place)
    return model


def _weights_file(id_or_dir: str | os.PathLike[str], **hub_kwargs: Any) -> str:
    try:
        return find_file(id_or_dir, WEIGHTS_NAME, **hub_kwargs)
    except FileError as error:
        raise FileError(
            f"{error} Its {CONFIG_NAME} describes trained parts, whose weights are in {WEIGHTS_NAME}. To start with fresh ones, "
            "give the configuration itself: steer_config=SteerConfig.from_pretrained(...)."
        ) from error


def read_base_config(id_or_dir: str | os.PathLike[str], **hub_kwargs: Any) -> PreTrainedConfig:
    """`config.json` of a model; FileError when there is none that transformers can read."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(id_or_dir, **hub_kwargs)
        return config
    except (OSError, ValueError, KeyError) as error:
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
    """The model without its weights: every module is there, no memory is taken."""
    with torch.device("meta"):
        model: PreTrainedModel = model_class_of(config)._from_config(
            copy.deepcopy(config), attn_implementation=attn_implementation
        )
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
