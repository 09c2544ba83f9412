"""What a decoder of transformers does with its layers."""

from __future__ import annotations

from typing import Any

LAYERDROP = ("layerdrop", "decoder_layerdrop", "layer_drop")
"""Configuration values for the share of layers that a training pass leaves out."""


def skips_layers(decoder: Any) -> bool:
    """Whether a decoder leaves layers out at random in training (LayerDrop, https://arxiv.org/abs/1909.11556)."""
    return any(bool(getattr(decoder.config, name, 0)) for name in LAYERDROP)
