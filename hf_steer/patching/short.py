"""Short ways to say what to steer: one gaze without four nested classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_steer.config import AttentionConfig, SaliencyConfig, SteerConfig
from hf_steer.errors import ConfigError
from hf_steer.families import resolve
from hf_steer.saliency import Saliency


def whole_config(model: Any, config: Any, said: Mapping[str, Any]) -> SteerConfig:
    """The `SteerConfig` that is meant.

    Args:
        model: that is to be steered; where nothing says what is salient, it decides whether its own eyes do.
        config: a `SteerConfig`, an `AttentionConfig` alone, or None.
        said: fields of `AttentionConfig` that were given by themselves, None for those that were not.

    Raises:
        ConfigError: both, or neither, or something else.
    """
    given = {name: value for name, value in said.items() if value is not None}
    if isinstance(given.get("saliency"), Saliency):
        raise ConfigError(
            "saliency= of patch_model names a source, such as 'vision_attention'; got a Saliency, which is said call by call: "
            "model.generate(..., saliency=...), model(..., saliency=...) or use_saliency(model, ...)."
        )
    if config is not None and given:
        raise ConfigError(
            f"patch_model takes a configuration or {', '.join(f'{name}=' for name in given)}, not both; put it into the "
            "configuration, with dataclasses.replace."
        )
    if config is None and not given:
        raise ConfigError(
            "patch_model was not told what to steer. Say it short, patch_model(model, heads='all', strength=2.0), or give a "
            "SteerConfig or an AttentionConfig."
        )
    if isinstance(config, AttentionConfig):
        return SteerConfig(attention=config)
    if config is not None:
        if not isinstance(config, SteerConfig):
            raise ConfigError(f"the configuration must be a SteerConfig or an AttentionConfig; got {type(config).__name__}.")
        return config
    if "saliency" not in given and resolve(model).tower is None:
        given["saliency"] = SaliencyConfig(source=None)  # a model without eyes looks where it is told
    return SteerConfig(attention=AttentionConfig(**given))
