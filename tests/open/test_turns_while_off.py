"""A picture that goes into a steered conversation while steering is off is counted, so what comes after it is right or refused."""

from __future__ import annotations

import pytest
import torch
from kit.asking import answer_or_refusal, cache_for, generate, steered, with_cache
from kit.tiny import make_prompt

from hf_steer import Saliency, disable_steering
from hf_steer.errors import SaliencyError

FIRST, SECOND = 15, 27
"""Where the first and the second turn end: a picture of six tokens in each, one of four in the third."""


def conversation():
    return make_prompt("qwen2_vl", [[3, ("image", 2, 3), 4, ("image", 2, 3), 4, ("image", 2, 2), 3]])


def turn(inputs, first, last, picture):
    sizes = inputs["image_grid_thw"].prod(1).tolist()
    start = sum(sizes[:picture])
    return {
        "input_ids": inputs["input_ids"][:, first:last], "mm_token_type_ids": inputs["mm_token_type_ids"][:, first:last],
        "image_grid_thw": inputs["image_grid_thw"][picture : picture + 1],
        "pixel_values": inputs["pixel_values"][start : start + sizes[picture]],
    }  # fmt: skip


@torch.no_grad()
def two_turns(model, inputs):
    cache = cache_for(model)
    model(**turn(inputs, 0, FIRST, 0), **with_cache(model, cache))
    with disable_steering(model):
        model(**turn(inputs, FIRST, SECOND, 1), **with_cache(model, cache))
    return cache


@torch.no_grad()
def third(model, inputs, cache, **kwargs):
    return model(**turn(inputs, SECOND, None, 2), **with_cache(model, cache), **kwargs).logits


@pytest.mark.parametrize("image", [0, 1, 2])
def test_a_box_never_lands_in_another_picture(image):
    model, inputs = steered("qwen2_vl"), conversation()
    box = Saliency.from_boxes([(0, 0, 10, 10)], (30, 20), image=image)
    _, refusal = answer_or_refusal(lambda: third(model, inputs, two_turns(model, inputs), saliency=box))
    assert "has not seen" in refusal


@pytest.mark.parametrize("call", ["step", "turn", "generate"])
def test_the_models_own_eyes_say_what_they_missed(call):
    model, inputs = steered("qwen2_vl"), conversation()
    cache = two_turns(model, inputs)
    calls = {
        "step": lambda: model(input_ids=torch.tensor([[5]]), **with_cache(model, cache)),
        "turn": lambda: third(model, inputs, cache),
        "generate": lambda: generate(model, inputs, **with_cache(model, cache)),
    }
    with pytest.raises(SaliencyError, match="has not seen"):
        calls[call]()


def test_scores_of_the_whole_conversation_still_say_all():
    model, inputs = steered("qwen2_vl", source=None), conversation()
    said = Saliency.from_tokens(torch.randn(inputs["input_ids"].shape))
    unsaid = cache_for(model)
    with torch.no_grad():
        model(**turn(inputs, 0, FIRST, 0), **with_cache(model, unsaid))
        model(**turn(inputs, FIRST, SECOND, 1), **with_cache(model, unsaid))
    found = third(model, inputs, two_turns(model, inputs), saliency=said)
    torch.testing.assert_close(found, third(model, inputs, unsaid, saliency=said))


def test_a_turn_that_was_taken_back_is_forgotten():
    model, inputs = steered("qwen2_vl"), conversation()
    cache, other = two_turns(model, inputs), cache_for(model)
    cache.crop(FIRST - SECOND)
    with torch.no_grad():
        model(**turn(inputs, 0, FIRST, 0), **with_cache(model, other))
        for own in (cache, other):
            model(**turn(inputs, FIRST, SECOND, 1), **with_cache(model, own))
    torch.testing.assert_close(third(model, inputs, cache), third(model, inputs, other))


def test_text_that_went_by_while_steering_was_off_is_no_picture():
    model, inputs = steered("qwen2_vl"), conversation()
    cache = cache_for(model)
    with torch.no_grad():
        model(**turn(inputs, 0, FIRST, 0), **with_cache(model, cache))
        with disable_steering(model):
            model(input_ids=torch.tensor([[5, 6]]), **with_cache(model, cache))
        model(input_ids=torch.tensor([[7]]), **with_cache(model, cache))
