"""Pure functions with transformers' attention signature; one file per way to carry the bias."""

from hf_steer.attention.backends import BACKENDS, choose_backend
from hf_steer.attention.bias import head_bias, mass_shift
from hf_steer.attention.call import AttentionCall, Reader, call_of
from hf_steer.attention.chunks import READABLE, logits_in_chunks
from hf_steer.attention.steered import (
    STEERABLE,
    SteeredCall,
    recording_attention,
    registered_name,
    steered_attention,
)

__all__ = [
    "BACKENDS",
    "READABLE",
    "STEERABLE",
    "AttentionCall",
    "Reader",
    "SteeredCall",
    "call_of",
    "choose_backend",
    "head_bias",
    "logits_in_chunks",
    "mass_shift",
    "recording_attention",
    "registered_name",
    "steered_attention",
]
