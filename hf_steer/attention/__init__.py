"""Pure functions that attend with a bias; one file per way to carry it."""

from hf_steer.attention.backends import attend_for, choose_backend, say_once
from hf_steer.attention.bias import head_bias, mass_shift, on_device
from hf_steer.attention.chunks import READABLE, chunks_of, logits_in_chunks
from hf_steer.attention.masked import add_to_mask
from hf_steer.attention.share import bias_for_share
from hf_steer.attention.steered import (
    CURRENT_PASS,
    STEERABLE,
    Reader,
    SteeredCall,
    bias_over,
    fit_bias,
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
    "add_to_mask",
    "attend_for",
    "bias_for_share",
    "bias_over",
    "choose_backend",
    "chunks_of",
    "fit_bias",
    "head_bias",
    "logits_in_chunks",
    "mass_shift",
    "on_device",
    "recording_attention",
    "registered_name",
    "say_once",
]
