"""Whether a text is a thought is remembered, also where the model's own hooks do not run: PEFT calls its forward by hand."""

from __future__ import annotations

import pytest
import torch
from kit.asking import look, plain_logits, prompt, with_cache
from kit.gates import OPEN, Words, gated
from kit.tiny import make_model
from peft import LoraConfig, get_peft_model

from hf_steer import patch_model, use_saliency

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it


def loop(call, model, inputs):
    """Logits of three steps after a prompt that opens a thought."""
    with torch.no_grad():
        output = call(**inputs, use_cache=True)
        (cache,) = (value for name, value in output.items() if name in ("cache", "past_key_values"))
        step = torch.tensor([[5]])
        return torch.cat([call(input_ids=step, **with_cache(model, cache)).logits for _ in range(3)], 1)


@pytest.mark.parametrize("how", ["forward", "lora"])
def test_steps_inside_a_thought_are_steered(how):
    model = patch_model(make_model("llama"), gated("llama", queries="thinking", normalize="none"), tokenizer=Words())
    inputs = prompt("llama")
    inputs["input_ids"][0, -2] = OPEN
    with use_saliency(model, look(inputs)):
        expected = loop(model, model, inputs)
    steps = {**inputs, "input_ids": torch.cat([inputs["input_ids"], torch.full((1, 3), 5)], 1)}
    steps.pop("attention_mask")
    assert not torch.allclose(expected, plain_logits(model, steps)[:, -3:], atol=1e-2)
    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")  # which begins as nothing
    call = model.forward if how == "forward" else get_peft_model(model, lora).eval()
    with use_saliency(model, look(inputs)):
        torch.testing.assert_close(loop(call, model, inputs), expected)
