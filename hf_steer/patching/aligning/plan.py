"""Every check on aligners, before the first change: from their configurations to places in the model."""

from __future__ import annotations

from torch import nn

from hf_steer.aligners import mixes_tokens
from hf_steer.config import AlignerConfig, SteerConfig
from hf_steer.errors import ConfigError
from hf_steer.ground.parts import Anatomy, Encoder, Site
from hf_steer.patching.planned import PlannedAligner
from hf_steer.registry import FAMILIES


def plan_aligners(config: SteerConfig, anatomy: Anatomy) -> tuple[PlannedAligner, ...]:
    """Where each aligner goes, and how large its features are there.

    Raises:
        ConfigError: a modality, projector or layer that the model lacks; sizes that its own size does not allow.
    """
    return tuple(_placed(aligner, anatomy) for aligner in config.aligners)


def plan_projectors(config: SteerConfig, anatomy: Anatomy) -> tuple[nn.Module, ...]:
    """The projectors to be trained; ConfigError where there is none."""
    if not config.train_projector:
        return ()
    projectors = tuple(own for encoder in anatomy.encoders.values() for own in encoder.projectors)
    if not projectors:
        raise ConfigError(f"train_projector=True, but {anatomy.family!r} has no projector between encoder and language model.")
    return projectors


def _placed(config: AlignerConfig, anatomy: Anatomy) -> PlannedAligner:
    encoder = anatomy.encoders.get(config.modality)
    if encoder is None:
        able = ", ".join(name for name, row in FAMILIES.items() if config.modality in row.placeholders)
        raise ConfigError(
            f"an aligner for modality {config.modality!r} was asked for, but {anatomy.family!r} has encoders for "
            f"{', '.join(map(repr, anatomy.encoders)) or 'none'}: {anatomy.no_encoder.get(config.modality, 'it has no more')}. "
            f"Among others, these families have one: {able}. To give a text-only model an ear or an eye, see hf_steer.compose."
        )
    if config.placement == "projector" and encoder.projector is None and not encoder.placeholder_ids:
        raise ConfigError(
            f"placement='projector' needs a projector between encoder and language model, which {anatomy.family!r} lacks; "
            "use placement='output' or 'layers'."
        )
    if config.placement in encoder.lacks:
        others = [repr(own) for own in config.row.placements if own not in encoder.lacks]
        raise ConfigError(
            f"placement={config.placement!r} does not go with the {config.modality} encoder of {anatomy.family!r}: "
            f"{encoder.lacks[config.placement]}. An aligner of kind {config.kind!r} can be placed at "
            f"{' or '.join(others) or 'none'} there."
        )
    sizes = {"layers": encoder.layer_size, "output": encoder.size, "projector": anatomy.hidden_size}
    layers = _layers(config, encoder) if config.placement == "layers" else ()
    row, size = config.row, sizes[config.placement]
    reason = row.refuse(config, size)
    if reason is not None:
        raise ConfigError(reason)
    if not row.reads_text and mixes_tokens(config, size):
        raise ConfigError(
            f"an aligner of kind {config.kind!r} at placement={config.placement!r} would let padding, and the sounds and pictures "
            "of other rows, into each token: it makes one token's features out of others', and is not told there which of them "
            "belong together. Allowed are kinds that steer each token by itself, or that are handed masks: a row with "
            "reads_text=True and placements=('projector',) gets forward(features, text, *, mask, text_mask)."
        )
    return PlannedAligner(config, encoder, layers, size, row.reads_text, row.own_layers, row.routes)


def _layers(config: AlignerConfig, encoder: Encoder) -> tuple[Site, ...]:
    depth = len(encoder.layers)
    chosen = tuple(range(depth)) if config.layers is None else config.layers
    outside = [layer for layer in chosen if not -depth <= layer < depth]
    if outside:
        raise ConfigError(
            f"aligner.layers {outside} are not there; the {config.modality} encoder has {depth} layers that are read, "
            f"0 to {depth - 1}."
        )
    resolved = sorted(layer % depth for layer in chosen)
    if len(set(resolved)) != len(resolved):
        raise ConfigError(f"aligner.layers names a layer twice: {list(chosen)} of {depth}.")
    return tuple(encoder.layers[layer] for layer in resolved)
