"""Pure functions that attend with a bias; one file per way to carry it."""

from hf_steer.attention.backends import choose_backend
from hf_steer.attention.bias import head_bias, mass_shift
from hf_steer.attention.chunks import READABLE, logits_in_chunks
from hf_steer.attention.steered import (
    CURRENT_PASS,
    STEERABLE,
    Reader,
    SteeredCall,
    attend_steered,
    recording_attention,
    registered_name,
)
from hf_steer.ground.attention_call import AttentionCall
from hf_steer.registry import BACKENDS

__all__ = [
    "BACKENDS",
    "CURRENT_PASS",
    "READABLE",
    "STEERABLE",
    "AttentionCall",
    "Reader",
    "SteeredCall",
    "attend_steered",
    "choose_backend",
    "head_bias",
    "logits_in_chunks",
    "mass_shift",
    "recording_attention",
    "registered_name",
]
