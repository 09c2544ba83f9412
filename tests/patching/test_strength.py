"""Other strengths for a stretch of code equal a model that is patched with them."""

from __future__ import annotations

import pytest
import torch
from kit.gazing import every, gaze, generate, logits, prompt_for, steer
from kit.tiny import make_model

from hf_steer import ConfigError, PatchError, patch_model, unpatch_model, use_strength


@every
@pytest.mark.parametrize("strength", [5.0, {1: 2.0}, {1: {0: 2.0, 2: -1.0}, -1: {3: 4.0}}])
def test_a_strength_in_force_equals_one_that_is_patched_in(family, implementation, strength):
    inputs, model = prompt_for(family), make_model(family, implementation)
    statement = gaze(family, inputs)
    heads = "all"
    if isinstance(strength, dict):
        heads = {layer: tuple(value) if isinstance(value, dict) else "all" for layer, value in strength.items()}
    patch_model(model, steer(family, heads=heads, strength=strength, preserve_mass=True))
    wanted, said = logits(model, inputs, statement), generate(model, inputs, statement)
    patch_model(unpatch_model(model), steer(family, heads="all", strength=1.0, preserve_mass=True))
    usual = logits(model, inputs, statement)
    with use_strength(model, strength):
        assert torch.equal(logits(model, inputs, statement), wanted)
        assert torch.equal(generate(model, inputs, statement)[1], said[1])
    assert torch.equal(logits(model, inputs, statement), usual)
    assert not torch.equal(usual, wanted)


@every
def test_strength_zero_in_force_is_bit_equal_to_no_steering(family, implementation):
    inputs, model = prompt_for(family), make_model(family, implementation)
    plain = logits(model, inputs)
    patch_model(model, steer(family))
    with use_strength(model, 0):
        assert torch.equal(logits(model, inputs, gaze(family, inputs)), plain)


def test_strengths_that_cannot_be_in_force_are_refused():
    model = make_model("qwen2")
    with pytest.raises(PatchError, match="is not patched"), use_strength(model, 1.0):
        pass
    patch_model(model, steer("qwen2", heads={1: (0,)}))
    with pytest.raises(ConfigError, match=r"layers \[2\]; the configuration steers layers \[1\]"), use_strength(model, {2: 1.0}):
        pass
    with pytest.raises(ConfigError, match="layer 9 is not there"), use_strength(model, {9: 1.0}):
        pass
    with pytest.raises(ConfigError, match="finite number"), use_strength(model, float("nan")):
        pass
    patch_model(unpatch_model(model), steer("qwen2", strength=0.0))
    with pytest.raises(PatchError, match="steers no head"), use_strength(model, 1.0):
        pass
