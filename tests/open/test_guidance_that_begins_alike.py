"""Guidance's own passes are unsteered by design, also where what they read begins as the prompt does."""

from __future__ import annotations

import pytest
import torch
from kit.asking import TOLERANCE, look, plain_logits, prompt, steered

SCALE = 1.5


def negatives(ids):
    return {"first": ids[:, :1], "beginning": ids[:, :4], "whole": ids, "longer": torch.cat([ids, ids], 1)}


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", ["first", "beginning", "whole", "longer"])
def test_the_negative_prompt_is_never_steered(name, use_cache):
    model, inputs = steered(), prompt()
    ids = inputs["input_ids"]
    said, negative = look(inputs), negatives(ids)[name]
    settings = {
        "max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_scores": True, "output_logits": True,
    }  # fmt: skip
    found = model.generate(
        **inputs, saliency=said, guidance_scale=SCALE, negative_prompt_ids=negative, use_cache=use_cache, **settings
    )
    for step in range(3):
        new = found.sequences[:, ids.shape[1] : ids.shape[1] + step]
        without = plain_logits(model, {"input_ids": torch.cat([negative, new], 1)})[:, -1].log_softmax(-1)
        expected = SCALE * (found.logits[step].log_softmax(-1) - without) + without
        allowed = torch.isfinite(found.scores[step])
        torch.testing.assert_close(found.scores[step][allowed], expected[allowed], **TOLERANCE)
