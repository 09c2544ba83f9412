"""Decoders that read an encoder by cross-attention: the gaze that is verified there, words for the decoder, and what is said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_steer.config import AttentionConfig, SaliencyConfig, SteerConfig
from hf_steer.ground.arguments import Given, named
from hf_steer.ground.attention_call import AttentionCall
from hf_steer.ground.decoders import reads_encoder
from hf_steer.ground.parts import Anatomy
from hf_steer.ground.settings import setting, text_settings
from hf_steer.patching import probe_attention
from hf_steer.saliency import Saliency
from hf_steer.testing.settled import strength_of

WORDS = 4
"""Of the decoder, for inputs that bring none."""


def gaze_across(anatomy: Anatomy) -> SteerConfig:
    """At what the encoder hands on, by all heads that read it, each with a strength of its own."""
    strength = {site.index: {head: strength_of(site.index, head) for head in range(site.heads)} for site in anatomy.crosses}
    saliency = SaliencyConfig(source=None, normalize="none")
    return SteerConfig(attention=AttentionConfig(attends="cross", heads="all", strength=strength, saliency=saliency))


def with_words(anatomy: Anatomy, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same inputs, with words of the decoder's own where they lack them and the model does not read its prompt itself."""
    given = Given(inputs)
    has_words = given.decoder_ids is not None or given.decoder_embeds is not None
    if anatomy.decoder is None or not reads_encoder(anatomy.root) or has_words:
        return dict(inputs)
    rows = next(value for value in inputs.values() if isinstance(value, Tensor)).shape[0]
    device = next(anatomy.root.parameters()).device
    words, generator = int(setting(text_settings(anatomy.root), "words")), torch.Generator().manual_seed(1)
    drawn = torch.randint(words // 4, 3 * words // 4, (rows, WORDS), generator=generator)
    return {**inputs, **named(decoder_ids=drawn.to(device))}


def said_across(model: Any, anatomy: Anatomy, inputs: Mapping[str, Any]) -> Saliency:
    """One random score for each real position that the encoder hands on; how many there are is seen in a plain pass."""
    keys: list[tuple[int, int]] = []

    def count(call: AttentionCall) -> None:
        keys.append((len(call.key), call.key.shape[2]))

    with torch.no_grad(), probe_attention(model, count, sites=anatomy.crosses):
        model(**inputs)
    scores = torch.randn(keys[0], generator=torch.Generator().manual_seed(0))
    mask = Given(inputs).mask
    if reads_encoder(anatomy.root) and isinstance(mask, Tensor) and mask.shape == scores.shape:
        scores = scores * mask.cpu().bool()
    return Saliency.from_tokens(scores)
