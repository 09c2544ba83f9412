"""Which part of a model is its decoder, and what a decoder of transformers does with its layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

LAYERDROP = ("layerdrop", "decoder_layerdrop", "layer_drop")
"""Configuration values for the share of layers that a training pass leaves out."""


def skips_layers(decoder: Any) -> bool:
    """Whether a decoder leaves layers out at random in training (LayerDrop, https://arxiv.org/abs/1909.11556)."""
    return any(bool(getattr(decoder.config, name, 0)) for name in LAYERDROP)


def checkpoints(decoder: Any) -> bool:
    """Whether a decoder runs its layers again in backward (`gradient_checkpointing_enable`)."""
    return any(getattr(module, "gradient_checkpointing", False) for module in decoder.modules())


def reads_encoder(model: Any) -> bool:
    """Whether a model's token numbers are those of an encoder, and its decoder has some of its own."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def decoder_of(model: Any) -> Any:
    """The module whose call is one pass of the language model: as the model says, or else all of it.

    Some models name their head (ModernBERT) or a whole encoder-decoder (Florence-2), of which the decoder is a part.
    """
    try:
        found = model.get_decoder()
    except (AttributeError, NotImplementedError):
        found = None
    if not isinstance(found, nn.Module) or not hasattr(found, "config"):
        found = model.base_model
    while reads_encoder(found) and hasattr(found, "encoder") and hasattr(getattr(found, "decoder", None), "config"):
        found = found.decoder
    return found


def encoders_inside(model: Any, decoder: Any) -> Iterator[Any]:
    """Parts of a decoder that read something other than its prompt: its own encoder, and eyes and ears that lie in it."""
    encoder = getattr(decoder, "encoder", None)
    if isinstance(encoder, nn.Module) and reads_encoder(decoder):
        yield encoder
    inside = set(decoder.modules())
    for modality in ("image", "audio"):
        try:
            tower = model.get_encoder(modality=modality)
        except (AttributeError, NotImplementedError, ValueError, TypeError):
            continue
        if isinstance(tower, nn.Module) and tower in inside and tower is not decoder and decoder not in set(tower.modules()):
            yield tower
