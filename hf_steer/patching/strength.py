"""How hard the steered heads are steered now: as configured, or as a stretch of the caller's code says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from hf_steer.config.checks import Heads, Strength, check_strength
from hf_steer.errors import ConfigError, PatchError
from hf_steer.patching.blocks import Block
from hf_steer.patching.plan import resolve_strengths
from hf_steer.patching.planned import Plan, Strengths
from hf_steer.patching.scopes import STRENGTHS, steering_of


def use_strength(model: Any, strength: Strength) -> AbstractContextManager[Any]:
    """Steer this model's calls inside the block, in this thread, with other strengths than configured.

    To compare many heads and strengths, patch once with `heads="all"` and name them here: nothing is patched again.

    Args:
        model: a patched model.
        strength: λ, one number for the heads that the configuration steers; or `{layer: number}` or
            `{layer: {head: number}}`, in layers that it steers. Heads that are not named are left alone; 0 everywhere is
            bit-equal to no steering.

    Raises:
        PatchError: the model is not patched, or its configuration steers no head.
        ConfigError: not a number, or a layer or head that is not steered.
    """
    steering = steering_of(model)
    return Block(steering, STRENGTHS, _resolve(steering.plan, check_strength(strength)))


def _resolve(plan: Plan, strength: Strength) -> Strengths:
    if plan.config.attention is None or not plan.strengths:
        raise PatchError("this model's SteerConfig steers no head; patch it with an AttentionConfig whose strength is not 0.")
    heads: Heads
    if isinstance(strength, Mapping):
        heads = {layer: tuple(value) if isinstance(value, Mapping) else "all" for layer, value in strength.items()}
    else:
        heads = {layer: tuple(h for h, value in enumerate(values) if value) for layer, values in plan.strengths.items()}
    if plan.config.attention.share is not None:
        raise PatchError("this model keeps a share of attention, so no strength says how hard; patch it without share= to use one.")
    attention = dataclasses.replace(plan.config.attention, heads=heads, strength=strength)
    strengths = resolve_strengths(attention, plan.anatomy)
    missing = sorted(set(strengths) - set(plan.strengths))
    if missing:
        raise ConfigError(
            f"use_strength names layers {missing}; the configuration steers layers {sorted(plan.strengths)}. Patch with "
            'heads="all" to reach every layer.'
        )
    return strengths
