"""Small steered models, what is asked of them, and the law for every answer: what was asked, or an error with a remedy."""

from __future__ import annotations

import inspect
import re
from contextlib import nullcontext
from typing import Any

import torch
from kit.tiny import SEEING, make_model, make_prompt
from transformers import DynamicCache

from hf_steer import AttentionConfig, Saliency, SaliencyConfig, SteerConfig, disable_steering, patch_model, use_saliency
from hf_steer.errors import SteerError

TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
"""Two kernels with other orders of summation, three layers of fp32."""
PICTURES = [[3, ("image", 2, 3), 4]]


def steer(family="qwen2", **attention):
    """Every head of every layer, hard; by the model's own eyes where it has some, else by what is said."""
    source = attention.pop("source", "vision_attention" if family in SEEING else None)
    saliency = SaliencyConfig(source=source, normalize=attention.pop("normalize", "zscore"))
    return SteerConfig(attention=AttentionConfig(**{"strength": 3.0, "saliency": saliency, "queries": "all", **attention}))


def steered(family="qwen2", *, implementation="sdpa", seed=0, **attention):
    return patch_model(make_model(family, implementation, seed=seed), steer(family, **attention))


def prompt(family="qwen2", tokens=9, rows=1, seed=0) -> dict[str, torch.Tensor]:
    """One picture in some text where the family sees, else text."""
    return make_prompt(family, PICTURES * rows if family in SEEING else [[tokens]] * rows, seed=seed)


def look(inputs, seed=0) -> Saliency:
    generator = torch.Generator().manual_seed(seed)
    return Saliency.from_tokens(torch.randn(inputs["input_ids"].shape, generator=generator))


def saying(family, inputs, seed=0):
    """What steers this family: None for its own eyes."""
    return None if family in SEEING else look(inputs, seed)


def looking(model, statement):
    return nullcontext() if statement is None else use_saliency(model, statement)


def cache_name(model) -> str:
    """`past_key_values`, or `cache` since transformers 5.24."""
    names = inspect.signature(inspect.unwrap(model.forward)).parameters
    return "cache" if "cache" in names else "past_key_values"


def with_cache(model, cache) -> dict[str, Any]:
    return {cache_name(model): cache}


def cache_for(model):
    return DynamicCache(config=model.config.get_text_config())


@torch.no_grad()
def logits(model, inputs, statement=None, **kwargs):
    with looking(model, statement):
        return model(**inputs, **kwargs).logits


def plain_logits(model, inputs, **kwargs):
    with disable_steering(model):
        return logits(model, inputs, **kwargs)


def generate(model, inputs, statement=None, **kwargs):
    """Greedy, six new tokens."""
    with looking(model, statement):
        return model.generate(**inputs, **{"max_new_tokens": 6, "do_sample": False, **kwargs})


def plain_generate(model, inputs, **kwargs):
    with disable_steering(model):
        return generate(model, inputs, **kwargs)


def answer_or_refusal(call) -> tuple[Any, str | None]:
    """What a call gives, or the message of the `SteerError` that it raises."""
    try:
        return call(), None
    except SteerError as error:
        return None, str(error)


def right_or_refused(call, expected, telling, *, unlike=None) -> bool:
    """What was asked is what comes, or a `SteerError` that says how to get it. Whether it came.

    Args:
        call: makes the tensor.
        expected: what the plain, supported way gives.
        telling: pattern that the error's message must hold.
        unlike: what would come without steering, which must differ, or the test shows nothing.
    """
    if unlike is not None:
        assert unlike.shape != expected.shape or not torch.allclose(unlike, expected, rtol=1e-3, atol=1e-3)
    found, refusal = answer_or_refusal(call)
    if refusal is not None:
        assert re.search(telling, refusal), f"the message does not say {telling!r}: {refusal}"
        return False
    torch.testing.assert_close(found, expected, **({} if expected.dtype == torch.long else TOLERANCE))
    return True
