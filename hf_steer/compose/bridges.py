"""Which architecture of transformers joins which encoder to a decoder: one row per modality, pooling and projector."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from hf_steer.errors import ConfigError


@dataclass(frozen=True)
class Bridge:
    """One architecture of transformers that joins an encoder and a decoder.

    Attributes:
        config: name of its configuration class.
        model: name of its model class.
        processor: name of its processor class; `"StackingProcessor"` is our own.
        section: name of the encoder's section in the configuration.
        tower: name of the encoder's module.
        token: name of the configuration value, and the text, of the placeholder token.
        settings: further values of the configuration, from the encoder's configuration and the projector's kind.
        tower_settings: values of the encoder's section, from the encoder's configuration; None to take it as it is.
        processing: arguments of the processor, from the encoder's configuration and the placeholder.
    """

    config: str
    model: str
    processor: str
    section: str
    tower: str
    token: tuple[str, str]
    settings: Callable[[Any, str], dict[str, Any]]
    tower_settings: Callable[[Any], dict[str, Any]] | None
    processing: Callable[[Any, str], dict[str, Any]]


ACTIVATIONS = {"linear": "linear", "mlp": "gelu"}
_CONVOLUTIONS = ("num_mel_bins", "max_source_positions", "scale_embedding", "activation_function", "dropout", "attention_dropout")


def _whisper(config: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """The encoder's half of a Whisper configuration, under another configuration's names."""
    own = ("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", *_CONVOLUTIONS)
    return {names.get(name, name): getattr(config, name) for name in own}


def stacked(config: Any) -> int:
    """Frames that Voxtral puts side by side: as many as make its projector's input, the width of the encoder's inner layers."""
    frames, rest = divmod(config.encoder_ffn_dim, config.d_model)
    if rest or config.max_source_positions % frames:
        raise ConfigError(
            f"pooling='stack' needs encoder_ffn_dim ({config.encoder_ffn_dim}) to be a multiple of d_model ({config.d_model}), and "
            f"max_source_positions ({config.max_source_positions}) one of their ratio; use pooling='mean'."
        )
    return int(frames)


_FLAMINGO_NAMES = {
    "d_model": "hidden_size", "encoder_layers": "num_hidden_layers", "encoder_attention_heads": "num_attention_heads",
    "encoder_ffn_dim": "intermediate_size",
}  # fmt: skip

def has_class_token(config: Any) -> bool:
    """CLIP puts a class token before its patches."""
    return bool(config.model_type.startswith("clip"))


BRIDGES: Mapping[tuple[str, str, str], Bridge] = MappingProxyType(
    {
        ("audio", "mean", "linear"): Bridge(
            "Qwen2AudioConfig", "Qwen2AudioForConditionalGeneration", "Qwen2AudioProcessor", "audio_config", "audio_tower",
            ("audio_token_index", "<|AUDIO|>"),
            settings=lambda config, projector: {},
            tower_settings=lambda config: {"model_type": "qwen2_audio_encoder", **_whisper(config, {})},
            processing=lambda config, token: {"audio_token": token},
        ),
        ("audio", "mean", "mlp"): Bridge(
            "AudioFlamingo3Config", "AudioFlamingo3ForConditionalGeneration", "AudioFlamingo3Processor", "audio_config",
            "audio_tower", ("audio_token_id", "<sound>"),
            settings=lambda config, projector: {"projector_hidden_act": "gelu"},
            tower_settings=lambda config: {"model_type": "audioflamingo3_encoder", **_whisper(config, _FLAMINGO_NAMES)},
            processing=lambda config, token: {"audio_token": token},
        ),
        **{
            ("audio", "stack", projector): Bridge(
                "VoxtralConfig", "VoxtralForConditionalGeneration", "StackingProcessor", "audio_config", "audio_tower",
                ("audio_token_id", "[AUDIO]"),
                settings=lambda config, projector: {"projector_hidden_act": ACTIVATIONS[projector]},
                tower_settings=lambda config: {"model_type": "voxtral_encoder", **_whisper(config, _FLAMINGO_NAMES)},
                processing=lambda config, token: {"audio_token": token, "frames": stacked(config)},
            )
            for projector in ACTIVATIONS
        },
        **{
            ("image", "mean", projector): Bridge(
                "LlavaConfig", "LlavaForConditionalGeneration", "LlavaProcessor", "vision_config", "vision_tower",
                ("image_token_index", "<image>"),
                settings=lambda config, projector: {
                    "projector_hidden_act": ACTIVATIONS[projector],
                    "vision_feature_select_strategy": "default" if has_class_token(config) else "full",
                },
                tower_settings=None,
                processing=lambda config, token: {
                    "image_token": token, "patch_size": config.patch_size,
                    "vision_feature_select_strategy": "default" if has_class_token(config) else "full",
                    "num_additional_image_tokens": int(has_class_token(config)),
                },
            )
            for projector in ACTIVATIONS
        },
    }
)  # fmt: skip
"""One row per modality, kind of pooling (none for pictures) and kind of projector."""

ENCODERS: Mapping[str, str] = MappingProxyType(
    {
        "whisper": "audio", "clip": "image", "clip_vision_model": "image", "siglip": "image", "siglip_vision_model": "image",
    }
)  # fmt: skip
"""`config.model_type` of an encoder -> its modality."""
