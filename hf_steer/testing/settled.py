"""What is checked, and what steers it, where the caller leaves that open."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hf_steer.config import TRAINABLE, AlignerConfig, AttentionConfig, SaliencyConfig, SteerConfig
from hf_steer.errors import ConfigError, SaliencyError
from hf_steer.ground.arguments import Given, name_of
from hf_steer.ground.decoders import reads_encoder
from hf_steer.ground.parts import Anatomy
from hf_steer.patching import read_saliency
from hf_steer.saliency import Saliency
from hf_steer.testing.subject import random_saliency


def settle(
    model: Any, inputs: Mapping[str, Any], anatomy: Anatomy, *, config: SteerConfig | None, saliency: Saliency | None
) -> tuple[SteerConfig, Saliency | None]:
    """What is checked, and what steers it; None for the model's own eyes.

    Scores of tokens come back as they are added, with a configuration that takes them so: over a longer prompt they would be scaled
    otherwise.

    Raises:
        ConfigError: saliency for a configuration without a gaze.
        SaliencyError: saliency that does not fit the inputs.
    """
    given = Given(inputs)
    if config is None:
        sees = anatomy.tower is not None and any(given.pixels(modality) is not None for modality in anatomy.placeholder_ids)
        config = whole_steering(anatomy, sees=sees and saliency is None)
    attention = config.attention
    if attention is None:
        if saliency is not None:
            raise ConfigError("saliency was given, and there is no gaze that it could steer: config.attention is None.")
        return config, None
    if attention.strength == TRAINABLE:
        attention = dataclasses.replace(attention, strength=1.0)
    told = saliency is None and attention.saliency.source is None
    attention = attention.spelled("tokens" if told else "source" if saliency is None else saliency.kind)
    if saliency is not None:
        reading = read_saliency(model, inputs, saliency=attention.saliency, given=saliency)
        if saliency.tokens is not None:
            saliency = reading.saliency()
            attention = dataclasses.replace(attention, saliency=dataclasses.replace(attention.saliency, normalize="none"))
    elif attention.saliency.source is None:
        if given.ids is None:
            raise SaliencyError(f"the inputs hold no {name_of('ids')}, so nothing says where to look. Give them, or saliency=.")
        saliency = random_saliency(given, seed=0)
        attention = dataclasses.replace(attention, saliency=dataclasses.replace(attention.saliency, normalize="none"))
    return dataclasses.replace(config, attention=attention), saliency


def whole_steering(anatomy: Anatomy, *, sees: bool) -> SteerConfig:
    """All that can be steered: every head, each with a strength of its own, and an aligner in each place.

    Args:
        anatomy: of the model.
        sees: whether its own eyes say where to look.
    """
    attention = None
    if anatomy.layers and not reads_encoder(anatomy.root):  # theirs reads words that are not among the inputs
        strength = {site.index: {head: strength_of(site.index, head) for head in range(site.heads)} for site in anatomy.layers}
        saliency = SaliencyConfig(preserve_mass=False) if sees else SaliencyConfig(source=None, normalize="none")
        attention = AttentionConfig(heads=dict.fromkeys(strength, "all"), strength=strength, saliency=saliency, queries="all")
    aligners: list[AlignerConfig] = []
    for modality, encoder in anatomy.encoders.items():
        own = {"modality": modality}
        aligners += [AlignerConfig(**own, placement="output"), AlignerConfig(**own, placement="layers", kind="layer_wise")]  # type: ignore[arg-type]
        if encoder.projector is not None:
            aligners.append(AlignerConfig(**own, placement="projector", kind="simple"))  # type: ignore[arg-type]
    return SteerConfig(attention=attention, aligners=tuple(aligners))


def strength_of(layer: int, head: int) -> float:
    """From 0.5 to 1.5, towards what is said or away from it; heads and layers side by side differ."""
    size = 0.5 + (3 * layer + 5 * head) % 7 / 6
    return -size if (layer + head) % 2 else size
