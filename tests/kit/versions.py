"""How this transformers spells what the tests say to it, and what it gets wrong by itself.

The suite runs on every version of `.ci/matrix.py`. Where a version's own, unpatched models are wrong, a patched one cannot be
right; `ground/test_versions` holds each of these facts against the plain models.
"""

from __future__ import annotations

import inspect
from typing import Any

import transformers
from transformers import GenerationMixin, Qwen2ForCausalLM

RELEASE = tuple(map(int, transformers.__version__.split(".")[:2]))

CACHE = "cache" if "cache" in inspect.signature(inspect.unwrap(Qwen2ForCausalLM.forward)).parameters else "past_key_values"
"""The argument and the output field that hold the cache. Since 5.24 the old name warns, and tests turn warnings into errors."""

ENCODES_FIRST = hasattr(GenerationMixin, "_prepare_multimodal_encoder_kwargs_for_generation")
"""Since 5.18; before, pictures could not be encoded by the caller."""

CHUNKS_PICTURES = RELEASE >= (5, 23)
"""Before, a prompt with pictures that was cut into chunks (`prefill_chunk_size`) raised or got other logits."""


LLAMA4_RUNS = RELEASE != (5, 24)
"""5.24's `Llama4ForConditionalGeneration.forward` ends in an AttributeError, with a picture or without one: it asks what its
language model returns, a `MoeCausalLMOutputWithPast`, for `image_outputs`, which that has not."""


def generates_from_embeds(model: Any) -> bool:
    """Whether `generate` takes `inputs_embeds`; the models with an ear refuse them in old versions."""
    return "inputs_embeds" in inspect.signature(model.prepare_inputs_for_generation).parameters


def repeats_pictures(family: str) -> bool:
    """Whether `num_return_sequences` deals several pictures of a row to the copies of that row.

    Args:
        family: `model_type`. Those of Qwen-VL went wrong in 5.18 alone, the others up to 5.18.
    """
    return RELEASE >= (5, 19) or (family.startswith("qwen") and RELEASE < (5, 18))


def cached(cache: Any) -> dict[str, Any]:
    """The keyword that hands a cache to a model or to `generate`."""
    return {CACHE: cache}


def cache_of(output: Any) -> Any:
    """The cache in the output of a model or of `generate`."""
    return getattr(output, CACHE)
