"""What the user asks for: frozen, validated at birth, JSON on disk."""

from hf_steer.config.aligner import AlignerConfig
from hf_steer.config.attention import TRAINABLE, AttentionConfig, SaliencyConfig
from hf_steer.config.gate import GateConfig
from hf_steer.config.steer import CONFIG_NAME, SteerConfig

__all__ = [
    "CONFIG_NAME",
    "TRAINABLE",
    "AlignerConfig",
    "AttentionConfig",
    "GateConfig",
    "SaliencyConfig",
    "SteerConfig",
]
