"""Continuous batching packs prompts of many requests into one row, where no bias is carried yet: refused in the caller's thread."""

from __future__ import annotations

import pytest
from kit.asking import prompt, steered
from kit.tiny import make_model

from hf_steer import PatchError, patch_model, unpatch_model
from hf_steer.config import AttentionConfig, SaliencyConfig, SteerConfig

NAMES = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
REMEDY = r"unpatch_model|generate\("


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
def test_it_is_refused_at_once(name, family, monkeypatch):
    model, inputs, ran = steered(family), prompt(family), []
    monkeypatch.setattr(type(model), name, lambda *args, **kwargs: ran.append(name))  # its worker thread would hide the error
    arguments = (inputs["input_ids"].tolist(),) if name == "generate_batch" else ()
    with pytest.raises(PatchError, match=rf"(?s)continuous batching.*({REMEDY})"):
        entered = getattr(model, name)(*arguments)
        if hasattr(entered, "__enter__"):
            entered.__enter__()
    assert not ran


def test_the_base_is_as_it_was_afterwards():
    bare = make_model("qwen2")
    before = set(vars(bare))
    model = unpatch_model(patch_model(bare, steered("qwen2").hf_steer.plan.config))
    assert set(vars(model)) == before
    for name in NAMES:
        assert getattr(model, name).__func__ is getattr(type(model), name)


def test_a_steering_without_strength_refuses_nothing():
    """λ = 0 asks for nothing: the class's own methods are there."""
    config = SteerConfig(attention=AttentionConfig(strength=0.0, saliency=SaliencyConfig(source=None)))
    model = patch_model(make_model("qwen2"), config)
    assert getattr(model.init_continuous_batching, "__func__", None) is type(model).init_continuous_batching
