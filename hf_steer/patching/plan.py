"""Every check, before the first change: from a model and a configuration to a `Plan`. Nothing is touched here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from hf_steer.attention import READABLE, STEERABLE
from hf_steer.config import TRAINABLE, AttentionConfig, SteerConfig
from hf_steer.config.manners import AUTO
from hf_steer.errors import ConfigError, PatchError
from hf_steer.families import resolve
from hf_steer.ground.implementations import SWITCH, implementation_of
from hf_steer.ground.parts import Anatomy, Site
from hf_steer.ground.settings import name_of_setting
from hf_steer.patching.aligning.plan import plan_aligners, plan_projectors
from hf_steer.patching.by_mask import check_by_mask, refuse_unread
from hf_steer.patching.gaze.phrases import read_patterns
from hf_steer.patching.planned import Plan
from hf_steer.registry import FAMILIES


def make_plan(model: Any, config: SteerConfig, tokenizer: Any = None) -> Plan:
    """What `patch_model` would do, with every index resolved and every strength a number.

    Args:
        model: a live transformers model; may lie on the meta device.
        config: what the user asked for.
        tokenizer: reads think tags and phrases, where the configuration has any; None to load the model's own.

    Raises:
        PatchError: unknown family, or an attention implementation that cannot be steered.
        ConfigError: a layer, head or block that is not there; a source, modality or projector that the family lacks;
            another base model.
    """
    if not isinstance(config, SteerConfig):
        raise ConfigError(f"the configuration must be a SteerConfig; got {type(config).__name__}.")
    anatomy = resolve(model)
    if config.base_model_type not in (None, anatomy.family):
        raise ConfigError(
            f"this configuration was saved with a {config.base_model_type!r} model; this one is {anatomy.family!r}. "
            "Layers and heads mean something else there. To use it all the same: "
            "dataclasses.replace(config, base_model_type=None)."
        )
    config = dataclasses.replace(config, base_model_type=anatomy.family)
    aligners, projectors = plan_aligners(config, anatomy), plan_projectors(config, anatomy)
    if config.attention is None:
        return Plan(config, anatomy, {}, (), aligners, projectors)
    attention = config.attention
    if anatomy.decoder is None:
        raise ConfigError(f"a gaze cannot be put into this {anatomy.family!r} model: {anatomy.reason}. {_instead(anatomy)}")
    if attention.attends == "cross":
        anatomy = _across(anatomy)
    strengths = resolve_strengths(attention, anatomy) if anatomy.layers else {}  # `survey` says why there are none
    refuse_implementation(anatomy.decoder.config, "decoder")
    check_by_mask(attention, anatomy)
    if attention.share is not None:
        _refuse_share(anatomy)
    eyes = _eyes(attention, anatomy) if strengths or not anatomy.layers else ()
    patterns = read_patterns(attention, model, tokenizer) if strengths and attention.reads_tokens else None
    readers = _readers(attention, anatomy, strengths)
    return Plan(config, anatomy, strengths, eyes, aligners, projectors, patterns, readers)


def _across(anatomy: Anatomy) -> Anatomy:
    """With cross-attention as what is steered; ConfigError where the decoder reads no encoder by it."""
    if not anatomy.crosses and anatomy.left_out:
        odd = "; ".join(f"{name}: {why}" for name, why in anatomy.left_out.items())
        raise ConfigError(f"attention.attends='cross' cannot be had of this {anatomy.family!r} ({odd}). Leave attends at 'self'.")
    if not anatomy.crosses:
        raise ConfigError(
            "attention.attends='cross' needs a decoder that reads an encoder by cross-attention, and "
            f"{type(anatomy.decoder).__name__} does not: what its encoder hands on, if it has one, stands among its prompt's "
            "tokens. Leave attends at 'self'."
        )
    return anatomy.across()


def _instead(anatomy: Anatomy) -> str:
    """What works where a gaze does not."""
    able = " and ".join(sorted(anatomy.encoders))
    return f"Leave attention=None; aligners for {able} can be had." if able else "Nothing was changed."


def refuse_implementation(config: Any, part: str) -> None:
    """PatchError for an attention implementation that cannot be wrapped."""
    implementation = implementation_of(config)
    if implementation not in STEERABLE:
        raise PatchError(
            f"the {part} runs attention implementation {implementation!r}; hf_steer can steer {', '.join(STEERABLE)}. "
            f"Load the model with attn_implementation='sdpa', or call {SWITCH}('sdpa') first."
        )


def _refuse_share(anatomy: Anatomy) -> None:
    """PatchError where the attention that a span has by itself cannot be known."""
    refuse_unread(anatomy)
    implementation = implementation_of(anatomy.decoder.config)
    if implementation not in READABLE:
        raise PatchError(
            f"attention.share needs to know how much attention the span has, which implementation {implementation!r} does not let "
            f"out. Load the model with one of {', '.join(READABLE)}, or give a strength instead."
        )


def resolve_strengths(attention: AttentionConfig, anatomy: Anatomy) -> dict[int, tuple[float, ...]]:
    """Layer -> λ of all query heads, for layers with one that is not 0; 1 where λ is learned or open. Faults are raised at once."""
    faults: list[str] = []
    heads_of = {site.index: site.heads for site in anatomy.layers}
    heads = dict.fromkeys(heads_of, "all") if isinstance(attention.heads, str) else attention.heads
    chosen = _by_layer(heads, tuple(heads_of), "heads", faults)
    given: Any = 1.0 if attention.strength in (AUTO, TRAINABLE) else attention.strength
    mapped = isinstance(given, Mapping)
    strength = _by_layer(given, tuple(heads_of), "strength", faults) if mapped else dict.fromkeys(chosen, given)
    if set(strength) != set(chosen):
        faults.append(f"strength names layers {sorted(strength)}, heads {sorted(chosen)}; name the same")
    table = {}
    for layer in sorted(set(chosen) & set(strength)):
        there = range(heads_of[layer])
        names = there if chosen[layer] == "all" else chosen[layer]
        values = strength[layer]
        outside = sorted({*names, *(values if isinstance(values, Mapping) else ())} - set(there))
        if outside:
            faults.append(f"heads {tuple(outside)} asked for layer {layer}")
            continue
        if isinstance(values, Mapping) and set(values) != set(names):
            faults.append(f"layer {layer}: strength names heads {sorted(values)}, steered are {sorted(names)}")
            continue
        table[layer] = tuple((values[head] if isinstance(values, Mapping) else values) if head in names else 0.0 for head in there)
    if faults:
        raise ConfigError(f"{'; '.join(faults)}. {_what_is_there(anatomy)}; see `hf-steer inspect`.")
    return {layer: values for layer, values in table.items() if any(values)}


def _what_is_there(anatomy: Anatomy) -> str:
    """Layers and heads of a model in words."""
    numbers = [site.index for site in anatomy.layers]
    whole = numbers == list(range(len(numbers)))
    layers = f"{len(numbers)} layers, 0 to {len(numbers) - 1}," if whole else f"attention in {len(numbers)} layers, {numbers},"
    counts = sorted({site.heads for site in anatomy.layers})
    if len(counts) == 1:
        return f"This model has {layers} with {counts[0]} query heads each, 0 to {counts[0] - 1}"
    return f"This model has {layers} with {', '.join(map(str, counts[:-1]))} or {counts[-1]} query heads"


def _by_layer(values: Mapping[int, Any], layers: Sequence[int], name: str, faults: list[str]) -> dict[int, Any]:
    """Negative layers count from the last that attends; one that is not there, or is named twice, is a fault."""
    resolved: dict[int, Any] = {}
    for layer, value in values.items():
        if not (layer in layers or -len(layers) <= layer < 0):
            faults.append(f"{name}: layer {layer} is not there")
            continue
        number = layer if layer >= 0 else layers[layer]
        if number in resolved:
            other = number - len(layers) if layer >= 0 or number in values else layer
            faults.append(f"{name}: layer {number} is named twice, as {number} and {other}")
        else:
            resolved[number] = value
    return resolved


def _eyes(attention: AttentionConfig, anatomy: Anatomy) -> tuple[Site, ...]:
    """The vision blocks to read; none when only the user supplies saliency."""
    saliency, depth, row = attention.saliency, len(anatomy.blocks), attention.saliency.row
    if row is None:
        return ()
    if row.prompt is not None:
        if not anatomy.placeholder_ids:
            raise ConfigError(
                f"saliency source {attention.saliency.source!r} scores picture and sound tokens, which {anatomy.family!r} has "
                "none of. Use SaliencyConfig(source=None) and give the saliency with use_saliency."
            )
        return ()
    if anatomy.tower is None:
        seeing = ", ".join(name for name, row in FAMILIES.items() if row.blocks is not None)
        raise ConfigError(
            f"saliency source {saliency.source!r} needs a vision tower, which {anatomy.family!r} lacks (these have one: "
            f"{seeing}; the LLaVAs if it is CLIP or SigLIP). Use SaliencyConfig(source=None) and give the saliency with "
            "use_saliency."
        )
    refuse_implementation(anatomy.tower.config, "vision tower")
    wanted = row.blocks if saliency.blocks is None else saliency.blocks
    chosen = tuple(range(depth)) if isinstance(wanted, str) else wanted
    outside = [block for block in chosen if not -depth <= block < depth]
    if outside or not depth:
        which = f"0 to {depth - 1}" if depth else f"since {name_of_setting('states_read')} is its input"
        raise ConfigError(
            f"vision blocks {outside or wanted} are not there; the tower has {depth} whose output the model reads, {which}."
        )
    return tuple(anatomy.blocks[index] for index in sorted({block % depth for block in chosen}))


def _readers(
    attention: AttentionConfig, anatomy: Anatomy, strengths: Mapping[int, tuple[float, ...]]
) -> dict[int, tuple[int, ...]]:
    """Layer -> heads whose attention is the saliency: those that were named, or the steered ones."""
    row = attention.saliency.row
    if row is None or not row.reads_heads or not strengths:
        return {}
    implementation = implementation_of(anatomy.decoder.config)
    if implementation not in READABLE:
        raise PatchError(
            f"saliency source {attention.saliency.source!r} reads attention weights, which attention implementation "
            f"{implementation!r} does not let out. Load the model with one of {', '.join(READABLE)}, or take another source."
        )
    if attention.saliency.source_heads is not None:
        named = AttentionConfig(heads=attention.saliency.source_heads)
        try:
            strengths = resolve_strengths(named, anatomy)
        except ConfigError as error:
            raise ConfigError(f"saliency.source_heads: {error}") from error
    return {layer: tuple(head for head, value in enumerate(values) if value) for layer, values in strengths.items()}
