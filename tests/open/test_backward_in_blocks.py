"""What is recomputed in backward is what ran forward, whatever is said around backward."""

from __future__ import annotations

import pytest
import torch
from kit.asking import look, prompt, steered

from hf_steer import disable_steering, use_saliency


def gradient(model, inputs, block):
    model.zero_grad()
    with disable_steering(model):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
    if block is None:
        loss.backward()
    else:
        with block:
            loss.backward()
    return model.model.layers[0].self_attn.q_proj.weight.grad.clone()


@pytest.mark.parametrize("reentrant", [True, False])
def test_an_unsteered_pass_may_be_recomputed_inside_a_block(reentrant):
    model, inputs = steered(), prompt()
    model.config.use_cache = False
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    expected = gradient(model, inputs, None)
    assert torch.equal(gradient(model, inputs, use_saliency(model, look(inputs))), expected)
