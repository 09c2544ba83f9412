"""A tiny random model, whose attention is far from uniform."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_steer.errors import ConfigError
from hf_steer.testing.zoo.catalogue import Architecture, find
from hf_steer.testing.zoo.exceptions import BUILT_WITH, EXCEPTIONS
from hf_steer.testing.zoo.shrinking import TokenNumbers, shrink, with_paths
from hf_steer.testing.zoo.sizes import HEAD_SIZE, WORDS

MOST_PARAMETERS = 20_000_000
GAIN = 1.3
"""Of the weights of a matrix, over what keeps the size of a signal."""
START, END = 2, WORDS - 1
"""Tokens with which what an encoder-decoder writes begins, and what Whisper writes ends."""
ORDERED = ("A_log", "dt_bias", "log_lambda", "recurrent_param")
"""Parts of names of vectors in which a state space keeps its times: they stay as they were initialised."""


def config_class(architecture: Architecture) -> Any:
    """The configuration class that goes with a model class: the model type's, unless the class wants another."""
    own = getattr(transformers, architecture.class_name).config_class
    named = CONFIG_MAPPING[architecture.model_type] if architecture.model_type in CONFIG_MAPPING else own  # noqa: SIM401
    return named if own is None or issubclass(named, own) or issubclass(own, named) else own


def tiny_config(model_type: str, class_name: str | None = None) -> Any:
    """The configuration of a tiny model.

    Args:
        model_type: as in `config.model_type`.
        class_name: of the model; None for the first that the auto mappings have.

    Raises:
        ConfigError: the installed transformers has no such model.
    """
    architecture = find(model_type, class_name)
    kind = config_class(architecture)
    default = kind(**copy.deepcopy(BUILT_WITH.get(model_type, {})))  # some take what they are given apart
    section = shrink(default.to_dict(), TokenNumbers())
    with_paths(section, EXCEPTIONS.get(str(architecture), {}))
    section.pop("model_type", None)
    config = kind(**section)
    if architecture.kind == "causal" and hasattr(config, "is_decoder") and not config.is_encoder_decoder:
        config.is_decoder = True
    for part in sections(config):
        pad = getattr(part, "pad_token_id", None)
        if pad is None or pad >= WORDS:
            part.pad_token_id = 0
    return config


def sections(config: Any) -> list[Any]:
    """A configuration and those inside it."""
    inner = [value for value in vars(config).values() if isinstance(value, transformers.PreTrainedConfig)]
    return [config, *(part for one in inner for part in sections(one))]


def tiny_model(
    model_type: str, class_name: str | None = None, *, implementation: str = "eager", seed: int = 0
) -> Any:
    """A model of two or a few layers with random weights, in float32, ready to run.

    Args:
        model_type: as in `config.model_type`.
        class_name: of the model; None for the first that the auto mappings have.
        implementation: of attention.
        seed: of the weights.

    Raises:
        ConfigError: the installed transformers has no such model, or it does not get tiny by the rules that are known.
    """
    architecture = find(model_type, class_name)
    kind = getattr(transformers, architecture.class_name)
    config = tiny_config(*architecture[:2])
    with torch.device("meta"):
        shape = kind(copy.deepcopy(config))
    parameters = sum(parameter.numel() for parameter in shape.parameters())
    if parameters > MOST_PARAMETERS:
        names = sorted(((own.numel(), name, tuple(own.shape)) for name, own in shape.named_parameters()), reverse=True)
        raise ConfigError(
            f"{architecture} has {parameters:,} parameters when shrunk, more than {MOST_PARAMETERS:,}; the greatest are "
            f"{', '.join(f'{name} {shape}' for _, name, shape in names[:3])}: add a row to hf_steer/testing/zoo/exceptions.py"
        )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = kind._from_config(config, attn_implementation=implementation).float()
    spread(model, seed)
    settle_generation(model)
    return model.eval()


@torch.no_grad()
def spread(model: Any, seed: int) -> None:
    """Weights large enough that attention is far from uniform, and no zeros."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if not weight.is_floating_point() or not weight.numel():
            continue
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1:
            turned = weight.ndim == 2 and weight.shape[0] >= HEAD_SIZE  # GPT-2 keeps its matrices the other way round
            read = min(weight.shape) if turned else weight[0].numel()
            weight.copy_(noise * read**-0.5 * GAIN)
        elif not any(part in name for part in ORDERED):
            weight.add_(noise * 0.05)


def settle_generation(model: Any) -> None:
    """Generate to the length that is asked for, from a start that is known."""
    settings = getattr(model, "generation_config", None)
    if settings is not None:
        settings.eos_token_id = END if model.config.model_type == "whisper" else None  # its `generate` wants one
        settings.forced_eos_token_id = settings.forced_bos_token_id = None
        settings.pad_token_id = 0
        settings.decoder_start_token_id = START if model.config.is_encoder_decoder else None
