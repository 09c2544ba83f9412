"""What transformers calls the values of a configuration: our word for each, and every spelling of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from transformers import __version__

from hf_steer.errors import PatchError
from hf_steer.ground.arguments import Given

SETTINGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        # of a language model
        "heads": (
            "decoder_attention_heads", "num_decoder_attention_heads", "num_attention_heads", "num_heads", "n_head", "n_heads",
        ),
        "key_value_heads": ("num_key_value_heads",),
        "head_size": ("qk_head_dim", "head_dim"),  # DeepSeek's head_dim counts the rotated features of a query alone
        "features": ("hidden_size", "d_model", "n_embd"),
        "words": ("vocab_size",),
        # of an encoder
        "vision": ("vision_config",),
        "audio": ("audio_config",),
        "depth": ("num_hidden_layers",),
        "encoder_features": ("embed_dim", "hidden_size"),  # the hidden_size of Qwen2-VL's eye is the language model's
        "inner_features": ("intermediate_size",),
        "states_read": ("vision_feature_layer", "vision_feature_layers"),
        "image_token": ("image_token_id", "image_token_index"),
        "video_token": ("video_token_id", "video_token_index"),
        "audio_token": ("audio_token_id", "audio_token_index"),
        # of pictures
        "side_px": ("image_size",),
        "patch_px": ("patch_size",),
        "merge": ("spatial_merge_size", "merge_kernel_size"),
        "frames_per_step": ("temporal_patch_size",),
        "tokens_in_square": ("mm_tokens_per_image", "vision_soft_tokens_per_image"),
        "patches_joined": ("scale_factor", "downsample_factor", "pooling_kernel_size", "hidden_stride"),
        "patches_shrunk": ("downsample_ratio", "pixel_shuffle_ratio"),
        "resolutions_px": ("image_grid_pinpoints",),
        "aspect_ratio": ("vision_aspect_ratio",),
        "tilings": ("supported_aspect_ratios",),
        "most_tiles": ("max_num_tiles",),
        "feature_strategy": ("vision_feature_select_strategy",),
        # of sounds
        "window_steps": ("max_source_positions",),
        "half_window": ("n_window",),
        "joined_steps": ("audio_merge_size",),
        "tokens_a_sound": ("audio_soft_tokens_per_image",),
        "stretch_steps": ("window_size",),
        "steps_a_query": ("downsample_rate",),
        "codec": ("acoustic_tokenizer_encoder_config",),
        "hop": ("hop_length",),
        "samples_a_token": ("samples_per_token",),
        # of generate
        "end_tokens": ("eos_token_id",),
        "start_token": ("decoder_start_token_id",),
    }
)
"""Our word -> their spellings; the first that is there counts."""


def name_of_setting(word: str) -> str:
    """What transformers calls a value of a configuration, for messages."""
    return SETTINGS[word][0]


def has_setting(config: Any, word: str) -> bool:
    """Whether a configuration says this at all."""
    return any(getattr(config, name, None) is not None for name in SETTINGS[word])


def setting(config: Any, word: str) -> Any:
    """A value of a configuration.

    Args:
        config: of a model or of a part of one.
        word: of `SETTINGS`.

    Raises:
        PatchError: it has none under any spelling that is known.
    """
    for name in SETTINGS[word]:
        if (value := getattr(config, name, None)) is not None:
            return value
    raise PatchError(
        f"{type(config).__name__} has no {' and no '.join(SETTINGS[word])}, where hf_steer looks for {word.replace('_', ' ')!r}, "
        f"without which nothing can be placed. transformers {__version__} may call it otherwise, or the configuration lacks it; "
        "set it there, or report the model."
    )


def side_of(config: Any, word: str) -> int:
    """A side of something square, which some configurations give as height and width."""
    value = setting(config, word)
    return int(value[0] if isinstance(value, (tuple, list)) else value)


def placeholder_of(config: Any, modality: str) -> int:
    """The token that stands for a picture, video or sound in a prompt; Phi-4 says it where it describes the ear."""
    ear = getattr(config, name_of_setting("audio"), None)
    if modality == "audio" and not has_setting(config, "audio_token") and has_setting(ear, "audio_token"):
        config = ear
    return setting(config, f"{modality}_token")  # type: ignore[no-any-return]


def text_settings(model: Any) -> Any:
    """The configuration of the language model that reads the prompt; the whole one where it does not say which that is."""
    try:
        return model.config.get_text_config(decoder=True)
    except ValueError:  # several could be meant
        return model.config


def end_tokens(model: Any, given: Given) -> Any:
    """The tokens that end a row of `generate`: those that it is called with, or else the model's own; None without."""
    if given.end_tokens is not None:
        return given.end_tokens
    speaking = (settings for settings in (given.settings, model.generation_config) if has_setting(settings, "end_tokens"))
    chosen = next(speaking, None)
    return None if chosen is None else setting(chosen, "end_tokens")


def generate_like(model: Any, other: Any, *, never: int) -> None:
    """Let a model generate with a copy of another's settings, but never say one token."""
    settings = copy.deepcopy(other.generation_config)
    settings.suppress_tokens = [*(settings.suppress_tokens or []), never]
    model.generation_config = settings


def generation_settings(model: Any) -> Any:
    """How a model generates when nobody says otherwise."""
    return model.generation_config
