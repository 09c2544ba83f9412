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
from hf_steer.errors import FileError, PatchError
from hf_steer.families import family_of
from hf_steer.patching import make_plan, patch_model
from hf_steer.patching.context import steering_of

_ANYWHERE_KEYS = ("token", "cache_dir", "local_files_only")
_HUB_KEYS = (*_ANYWHERE_KEYS, "revision", "subfolder")


def save_steering(model: Any, directory: str | os.PathLike[str]) -> None:
    """Write only the steering of a patched model, `steer_config.json`; the base model is not written.

    Raises:
        PatchError: the model is not patched.
    """
    steering_of(model).save(directory)


def from_pretrained(
    id_or_dir: str | os.PathLike[str],
    steer_config: SteerConfig | str | os.PathLike[str] | None = None,
    **model_kwargs: Any,
) -> Any:
    """Load a model with its steering.

    Args:
        id_or_dir: folder or Hub repository of the base model. Its class is the first of `architectures` in `config.json`.
        steer_config: a SteerConfig, or the folder or Hub repository of one; when None, `steer_config.json` beside the model.
        **model_kwargs: handed on to the model's `from_pretrained`: `dtype`, `device_map`, `attn_implementation`, `revision`, ...

    Returns:
        The patched model.

    Raises:
        FileError: no model or no steering configuration there, or one that cannot be read.
        ConfigError: a configuration from a newer version, or for another model.
        PatchError: a model of an unknown family. Everything that can be checked is checked before weights are read.
    """
    hub = {key: model_kwargs[key] for key in _HUB_KEYS if key in model_kwargs}
    if steer_config is None:
        config = SteerConfig.from_pretrained(id_or_dir, **hub)
    elif isinstance(steer_config, SteerConfig):
        config = steer_config
    else:
        config = SteerConfig.from_pretrained(steer_config, **{key: hub[key] for key in _ANYWHERE_KEYS if key in hub})
    base_config = read_base_config(id_or_dir, **hub)
    model_class = model_class_of(base_config)
    make_plan(build_on_meta(base_config, model_kwargs.get("attn_implementation")), config)  # every check, before any weight
    return patch_model(read_base_model(model_class, id_or_dir, **model_kwargs), config)


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
