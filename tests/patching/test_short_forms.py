"""One gaze, said short: the same plan as four nested classes make, and errors where two things are said or none."""

from __future__ import annotations

import peft
import pytest
import torch
from kit.gazing import gaze, logits, prompt_for
from kit.tiny import make_model

from hf_steer import (
    AttentionConfig,
    ConfigError,
    GateConfig,
    PatchError,
    Saliency,
    SaliencyConfig,
    SteerConfig,
    from_pretrained,
    get_steer_status,
    patch_model,
    unpatch_model,
)


def config_of(model):
    return get_steer_status(model).config


def test_the_short_form_is_the_long_one():
    model = make_model("qwen2_vl")
    patch_model(model, heads={1: (0, 3)}, strength=4.0, saliency="vision_rollout", queries="generated", gate="entropy")
    short, inputs = config_of(model), prompt_for("qwen2_vl")
    steered = logits(model, inputs)
    long = SteerConfig(
        attention=AttentionConfig(
            heads={1: (0, 3)}, strength=4.0, saliency=SaliencyConfig(source="vision_rollout"), queries="generated",
            gate=GateConfig(kind="entropy"),
        )
    )  # fmt: skip
    patch_model(unpatch_model(model), long)
    assert config_of(model) == short
    assert torch.equal(logits(model, inputs), steered)


def test_an_attention_config_alone_is_taken_by_patch_model_and_from_pretrained(tmp_path):
    model, attention = make_model("qwen2"), AttentionConfig(queries="all", strength=2.0, saliency=SaliencyConfig(source=None))
    model.save_pretrained(tmp_path)
    inputs = prompt_for("qwen2")
    patch_model(model, attention)
    assert config_of(model).attention == attention
    loaded = from_pretrained(tmp_path, attention).eval()
    said = gaze("qwen2", inputs)
    assert torch.equal(logits(loaded, inputs, said), logits(model, inputs, said))


def test_without_a_source_the_models_own_eyes_look_where_it_has_some_and_only_the_user_where_not():
    assert config_of(patch_model(make_model("qwen2_vl"), strength=2.0)).attention.saliency.source == "vision_attention"
    assert config_of(patch_model(make_model("llama"), heads="all")).attention.saliency.source is None


def test_names_stand_for_a_source_and_for_a_gate():
    assert AttentionConfig(saliency="feature_norm") == AttentionConfig(saliency=SaliencyConfig(source="feature_norm"))
    assert AttentionConfig(gate="margin") == AttentionConfig(gate=GateConfig(kind="margin"))
    with pytest.raises(ConfigError, match="vision_attention"):
        AttentionConfig(saliency="vision_atention")
    with pytest.raises(ConfigError, match="entropy"):
        AttentionConfig(gate="entropi")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((), {}), r"not told what to steer. Say it short, patch_model\(model, heads='all', strength=2.0\)"),
        (((SteerConfig(),), {"heads": "all"}), "a configuration or heads=, not both"),
        (((), {"saliency": Saliency.from_tokens([[1.0]])}), r"names a source.*got a Saliency, which is said call by call"),
        (((3,), {}), "must be a SteerConfig or an AttentionConfig; got int"),
    ],
    ids=["nothing", "both", "statement", "number"],
)
def test_what_cannot_be_meant_is_an_error_and_nothing_changes(arguments, message):
    model = make_model("qwen2")
    before, inputs = set(dict(model.named_modules())), prompt_for("qwen2")
    plain = logits(model, inputs)
    positional, named = arguments
    with pytest.raises(ConfigError, match=message):
        patch_model(model, *positional, **named)
    assert set(dict(model.named_modules())) == before
    assert torch.equal(logits(model, inputs), plain)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("short", [False, True])
def test_around_peft_it_says_what_to_call(short):
    adapted = peft.get_peft_model(make_model("qwen2"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    config = SteerConfig(attention=AttentionConfig(queries="all", saliency=SaliencyConfig(source=None)))
    with pytest.raises(PatchError, match=r"Patch the model inside: peft_model.get_base_model\(\)"):
        patch_model(adapted, strength=2.0) if short else patch_model(adapted, config)
    patch_model(adapted.get_base_model(), strength=2.0, queries="all")
    inputs = prompt_for("qwen2")
    assert not torch.equal(logits(adapted, inputs, gaze("qwen2", inputs)), logits(adapted, inputs))
