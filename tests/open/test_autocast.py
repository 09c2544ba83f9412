"""Autocast leaves queries, keys and values in different precisions; every way to carry the bias copes or is passed over."""

from __future__ import annotations

import pytest
import torch
from kit.asking import logits, look, plain_logits, prompt, steered


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
def test_a_prompt_under_autocast_is_steered(family, implementation):
    model, inputs = steered(family, implementation=implementation), prompt(family)
    said = look(inputs)
    expected = logits(model, inputs, said)
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(model, inputs, said).float()
    assert (found - expected).abs().mean() < 0.1 * (plain_logits(model, inputs) - expected).abs().mean()
