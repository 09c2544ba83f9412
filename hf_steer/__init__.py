"""Patch live Hugging Face models: turn the gaze of a reasoning decoder, align frozen encoders with it."""

from hf_steer.compose import compose
from hf_steer.config import AlignerConfig, AttentionConfig, GateConfig, SaliencyConfig, SteerConfig
from hf_steer.errors import (
    AlignerError,
    ConfigError,
    ContractError,
    FileError,
    GroundError,
    PatchError,
    SaliencyError,
    SteerError,
)
from hf_steer.io import from_pretrained, load_steering, save_steering
from hf_steer.patching import (
    SteerStatus,
    disable_steering,
    get_steer_status,
    patch_model,
    print_trainable_parameters,
    read_saliency,
    trace_steering,
    unpatch_model,
    use_saliency,
    use_strength,
)
from hf_steer.provider import SaliencyProvider
from hf_steer.saliency import Saliency

__version__ = "0.1.0"

__all__ = [
    "AlignerConfig",
    "AlignerError",
    "AttentionConfig",
    "ConfigError",
    "ContractError",
    "FileError",
    "GateConfig",
    "GroundError",
    "PatchError",
    "Saliency",
    "SaliencyConfig",
    "SaliencyError",
    "SaliencyProvider",
    "SteerConfig",
    "SteerError",
    "SteerStatus",
    "compose",
    "disable_steering",
    "from_pretrained",
    "get_steer_status",
    "load_steering",
    "patch_model",
    "print_trainable_parameters",
    "read_saliency",
    "save_steering",
    "trace_steering",
    "unpatch_model",
    "use_saliency",
    "use_strength",
]
