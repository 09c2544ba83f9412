"""What a model would look at, without running its decoder to the end."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import Any

import torch

from hf_steer.config import AttentionConfig, SaliencyConfig, SteerConfig
from hf_steer.errors import PatchError, SaliencyError
from hf_steer.patching.patch import patch_model, unpatch_model
from hf_steer.patching.scopes import Enough, find_steering, listen, use_saliency
from hf_steer.patching.watching.reading import Preview, SaliencyReading
from hf_steer.saliency import Saliency


def read_saliency(
    model: Any, inputs: Mapping[str, Any], *, saliency: SaliencyConfig | None = None, given: Saliency | None = None
) -> SaliencyReading:
    """The saliency that steers, or would steer, this prompt. The model is afterwards as it was before.

    Args:
        model: patched, or not: then it is patched for the call.
        inputs: of its forward pass, as the processor makes them.
        saliency: which source, for a model that is not patched; its own eyes when None.
        given: what the user says, instead of a source.

    Raises:
        SaliencyError: no picture or sound in the prompt, or nothing says where to look.
        PatchError: the model is patched, and another source was asked for.
        ConfigError: the model has no such source.
    """
    steering = find_steering(model)
    if steering is not None and saliency is not None and saliency != _configured(steering):
        raise PatchError("this model is patched with another source of saliency; unpatch it, or leave saliency= out.")
    with ExitStack() as during:
        if steering is None:
            config = saliency or (SaliencyConfig() if given is None else SaliencyConfig(source=None))
            patch_model(model, SteerConfig(attention=AttentionConfig(saliency=config)), freeze_base=None)
            during.callback(unpatch_model, model)
        if given is not None:
            during.enter_context(use_saliency(model, given))
        with listen(model, Preview()) as listener, torch.no_grad(), suppress(Enough):
            model(**inputs)
    found: SaliencyReading | None = listener.found
    if found is None or not bool((found.raw.group >= 0).any()):
        raise SaliencyError(
            "there is no picture, video or sound in this prompt, so there is nothing to look at. Build text and pixels with one "
            "call of the model's processor, and check that the text holds its placeholder tokens."
        )
    return found


def _configured(steering: Any) -> SaliencyConfig | None:
    attention = steering.plan.config.attention
    return None if attention is None else attention.saliency
